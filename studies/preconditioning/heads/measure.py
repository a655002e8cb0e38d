"""Part A measured: singular values of the Jacobian of pooling heads on real features, and the spectrum of these.

Rows of the part "heads". For each head, with its option as `setting`, over images: `condition_median`, `_q25`, `_q75`, `_max`,
and the extreme singular values in units of 1 / sqrt(M), `smallest` and `largest`. For Newton-Schulz `trace_gap`, how far the
formula without the trace is, in the same units. Of one image and at most `PROBED` of its channels the Jacobian itself:
`jacobian_condition`, beside `closed_condition`, and `jacobian_error`, the largest difference of singular values relative to the
largest of them. With "features" as head: `share_*`, eigenvalue / trace at the rank in `setting`, and `kappa_*`.
"""

from typing import Any

import torch
from torch import Tensor

from secondorder.preconditioning import HeadSpectrum, head_spectrum
from studies.preconditioning.heads.features import head_features, varying
from studies.preconditioning.settings import Settings
from studies.preconditioning.situation import Row, Situation, row

PART = "heads"
PROBED = 16
"""Channels, evenly spaced, of the image whose Jacobian is computed: it has PROBED (PROBED + 1) / 2 rows."""
FEWER = 4
"""Every so many images are compared with the formula without the trace."""
POWERS = (0.25, 0.75)
Head = tuple[str, dict[str, Any]]


def heads(settings: Settings) -> list[Head]:
    """Every head with its option: (a key of HEAD_FUNCTIONS, options)."""
    powers: list[Head] = [("gcp_power", {"exponent": exponent}) for exponent in POWERS]
    steps: list[Head] = [("gcp", {"num_iter": steps}) for steps in settings.newton_schulz_steps]
    return [("covariance", {}), ("gcp_exact", {}), ("gcp_log", {}), *powers, *steps]


def measure(situation: Situation) -> list[Row]:
    """The rows of one backbone; none when the features of all images are constant."""
    features = head_features(situation)
    features = features[varying(features)]
    if not len(features):
        return []
    spectrum = head_spectrum(features, "covariance")
    probed = probe(features, spectrum.feature_condition)
    rows = spectrum_rows(spectrum)
    for head, options in heads(situation.settings):
        setting = next(iter(options.values()), "")
        rows += [row(PART, "", head, setting, name, value) for name, value in values(features, head, options).items()]
        if probed is not None:
            found = agreement(probed, head, options)
            rows += [row(PART, "", head, setting, name, value) for name, value in found.items()]
    return rows


def values(features: Tensor, head: str, options: dict[str, Any]) -> dict[str, float]:
    """What is measured of a head over all images."""
    root = (features.shape[2] * features.shape[3]) ** 0.5
    found = head_spectrum(features, head, **options)
    result = quantiles("condition", found.condition)
    result |= {"smallest": root * float(found.smallest.min()), "largest": root * float(found.largest.max())}
    if head == "gcp":
        plain = head_spectrum(features[::FEWER], head, trace_term=False, **options)
        result["trace_gap"] = root * float((found.singular_values[::FEWER] - plain.singular_values).abs().max())
    return result


def probe(features: Tensor, kappa: Tensor) -> Tensor | None:
    """Some channels of the image of median kappa, `[1, c, H, W]`; None when these channels are constant."""
    image = int(kappa.argsort()[len(kappa) // 2])
    channels = torch.linspace(0, features.shape[1] - 1, min(PROBED, features.shape[1])).round().long()
    chosen = features[image : image + 1, channels]
    return chosen if varying(chosen).all() else None


def agreement(probed: Tensor, head: str, options: dict[str, Any]) -> dict[str, float]:
    """The closed form beside the Jacobian itself."""
    closed, exact = (head_spectrum(probed, head, exact=exact, **options) for exact in (False, True))
    difference = (closed.singular_values - exact.singular_values).abs().max() / exact.largest.max()
    return {
        "closed_condition": float(closed.condition),
        "jacobian_condition": float(exact.condition),
        "jacobian_error": float(difference),
    }


def spectrum_rows(found: HeadSpectrum) -> list[Row]:
    """Eigenvalue / trace at a few ranks, and kappa, over images."""
    shares = found.eigenvalues / found.eigenvalues.sum(1, keepdim=True)
    C = shares.shape[1]
    ranks = sorted({*(2**n for n in range(C.bit_length())), *range(C // 4, C, max(1, C // 4)), C} - {0})
    rows = []
    for rank in ranks:
        named = quantiles("share", shares[:, rank - 1])
        rows += [row(PART, "", "features", rank, name, value) for name, value in named.items()]
    named = quantiles("kappa", found.feature_condition) | {"rank_median": float(found.rank.double().median())}
    return rows + [row(PART, "", "features", "", name, value) for name, value in named.items()]


def quantiles(name: str, values: Tensor) -> dict[str, float]:
    """Median, quartiles and maximum."""
    at = torch.tensor([0.5, 0.25, 0.75, 1.0], dtype=values.dtype)
    found = values.quantile(at).tolist()
    return dict(zip((f"{name}_median", f"{name}_q25", f"{name}_q75", f"{name}_max"), found, strict=True))

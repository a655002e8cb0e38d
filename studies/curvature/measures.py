"""What the curvature study measures of one network: spectra of blocks, Hessian against GGN, K-FAC against GGN.

Blocks are the weights of the first, the middle and the last convolution and of the classifier, and all parameters together
where there are few enough. The last convolution is the one before the pooling: the 1x1 reduction where there is one.

The GGN of N samples and K classes has rank at most r = min(P, N (K - 1)) for P parameters, the same under every head. Two
measures of conditioning compare heads at this rank and have no threshold:

    half_rank_condition    lambda_1 / lambda_k at k = r / 2 (rounded up)
    largest_to_mean        lambda_1 r / tr
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.curvature import (
    CurvatureBlocks,
    curvature_blocks,
    fidelity,
    relative_difference,
    spectral_summary,
    top_eigenvalues,
)
from secondorder.curvature.operators import DenseOperator, FactoredOperator, SymmetricOperator
from secondorder.curvature.spectrum import trace_estimate
from secondorder.errors import InputError
from studies.checks import check_count
from studies.frozen_statistics import frozen_at

Row = dict[str, Any]
WHOLE = "whole"
SUMMARISED = ("last", WHOLE)
"""Blocks with a list of eigenvalues, and with ends of the Hessian's spectrum even where they can only be estimated."""
SPECTRAL = (
    "largest",
    "smallest",
    "trace",
    "frobenius_norm",
    "rank",
    "condition",
    "median_condition",
    "effective_rank",
    "stable_rank",
    "negative_share",
)
APPROXIMATIONS = {
    "kfac_expand": "K-FAC (expand)",
    "kfac_reduce": "K-FAC (reduce)",
    "ekfac": "EKFAC",
    "diagonal": "diagonal",
}
RANKS = 80
"""Eigenvalues kept of a spectrum in descending order: of a GGN at geometrically, of a Hessian at evenly spaced ranks."""


@dataclass(frozen=True)
class Limits:
    """Up to which size the study is exact, and how far it estimates beyond."""

    threshold: float = 1e-5
    """Eigenvalues below this share of the largest magnitude are outside the range, for rank and condition number."""
    dense: int = 2000
    """Parameters of a network up to which its Hessian is a dense matrix with all eigenvalues."""
    block: int = 300_000
    """Parameters up to which a convolution is measured; larger ones are passed over for the next smaller."""
    whole: int = 100_000
    """Parameters of a network up to which all together are measured too."""
    probes: int = 4
    """Random vectors for the Hessian of larger blocks."""
    steps: int = 30
    """Lanczos steps at most for each end of the Hessian's spectrum of larger blocks."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < 1.0:
            raise InputError(f"threshold {self.threshold}: a share of the largest eigenvalue, in [0, 1)")
        for name, least in (("dense", 0), ("block", 1), ("whole", 0), ("probes", 2), ("steps", 2)):
            check_count(name, getattr(self, name), least)


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    limits: Limits,
    *,
    precision: str = "float64",
    seed: int = 0,
    hessian: bool = True,
) -> list[Row]:
    """Rows (block, matrix, measure, value, error, rank) of the mean cross-entropy over the images; the model is copied.

    Batch-norm statistics are those of the images, as constants (`frozen_at`). Matrices: "GGN", "Hessian", "GGN to Hessian"
    (measure "relative_difference": |H - G| / |H|), and the APPROXIMATIONS (measures "cosine", "relative_error" to the GGN).
    `rank` is 0 but for the measure "eigenvalue". The Hessian costs most of the time and may be left out.
    """
    dtype = getattr(torch, precision)
    frozen = frozen_at(model, images, dtype)
    problem = _Problem(frozen, (images.to(dtype), labels), block_names(frozen, limits.block), limits)
    ggn = problem.ggn()
    rows: list[Row] = []
    samples_rank = len(labels) * (problem.classes - 1)
    for role, block in ggn.items():
        exact = FactoredOperator(block.rows.double())  # a Gram matrix in float32 would drown the small eigenvalues
        rows += _spectrum(role, "GGN", exact, limits, seed)
        rows += _conditioning(role, exact, min(exact.size, samples_rank), limits.threshold)
    for role, second in problem.hessian().items() if hessian else ():
        method = "auto" if isinstance(second, DenseOperator) else "stochastic"
        difference = relative_difference(ggn[role], second, method, probes=limits.probes, seed=seed)
        rows.append(_row(role, "GGN to Hessian", "relative_difference", *difference))
        if isinstance(second, DenseOperator) or role in SUMMARISED:
            rows += _spectrum(role, "Hessian", second, limits, seed)
    for quantity, name in APPROXIMATIONS.items():
        for role, approximation in problem.approximate(quantity).items():
            found = fidelity(approximation, ggn[role], seed=seed)
            rows.append(_row(role, name, "cosine", *found.cosine))
            rows.append(_row(role, name, "relative_error", *found.relative_error))
    return rows


@dataclass(frozen=True)
class _Problem:
    """The blocks of one network, by role; those of a small network are cut out of the matrix of all parameters."""

    network: nn.Module
    batch: tuple[Tensor, Tensor]
    names: dict[str, str]
    limits: Limits

    @property
    def size(self) -> int:
        """Parameters of the network."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def classes(self) -> int:
        """Outputs of the network, K."""
        return [part for part in self.network.modules() if isinstance(part, nn.Linear)][-1].out_features

    def ggn(self) -> dict[str, FactoredOperator]:
        """Exact blocks by their factors."""
        if self.size > self.limits.whole:
            blocks = self._blocks("ggn", self.names.values())
            return {role: blocks[name].factored() for role, name in self.names.items()}  # type: ignore[attr-defined]
        whole = self._blocks("ggn").whole.factored()  # type: ignore[attr-defined]
        cut = {role: FactoredOperator(whole.rows[:, place]) for role, place in self._places().items()}
        return cut | {WHOLE: whole}

    def hessian(self) -> dict[str, SymmetricOperator]:
        """Dense blocks of a small network, else products."""
        if self.size <= min(self.limits.dense, self.limits.whole):
            matrix = self._blocks("hessian").whole.dense()
            places = self._places() | {WHOLE: slice(None)}
            return {role: DenseOperator(matrix[place, place]) for role, place in places.items()}
        blocks = self._blocks("hessian", self.names.values())
        found = {role: blocks[name] for role, name in self.names.items()}
        return found | ({WHOLE: self._blocks("hessian").whole} if self.size <= self.limits.whole else {})

    def approximate(self, quantity: str) -> dict[str, SymmetricOperator]:
        """K-FAC and the like."""
        blocks = self._blocks(quantity, self.names.values())
        return {role: blocks[name] for role, name in self.names.items()}

    def _blocks(self, quantity: str, names: Iterable[str] | None = None) -> CurvatureBlocks:
        return curvature_blocks(self.network, nn.CrossEntropyLoss(), self.batch, quantity, names)

    def _places(self) -> dict[str, slice]:
        """Where each block lies among all parameters."""
        places, start = {}, 0
        for name, parameter in self.network.named_parameters():
            places[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        return {role: places[name] for role, name in self.names.items()}


def block_names(model: nn.Module, largest: int) -> dict[str, str]:
    """The parameter names of the blocks: first, middle and last convolution, and the classifier.

    Not counted are convolutions with groups and those on shortcuts. Where one has more than `largest` weights, the nearest
    that has not stands in for it. Raises InputError when there is none.
    """
    convolutions = [
        (f"{name}.weight", part.weight.numel())
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d) and part.groups == 1 and "downsample" not in name
    ]
    linear = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not linear or all(size > largest for _, size in convolutions):
        raise InputError(f"{type(model).__name__}: no convolution of at most {largest:,} weights, or no linear layer")

    def nearest(place: int) -> str:
        able = [i for i, (_, size) in enumerate(convolutions) if size <= largest]
        return convolutions[min(able, key=lambda i: abs(i - place))][0]

    count = len(convolutions)
    return {"first": nearest(0), "middle": nearest(count // 2), "last": nearest(count - 1), "classifier": linear[-1]}


def _conditioning(role: str, block: FactoredOperator, rank: int, threshold: float) -> Iterator[Row]:
    """The measures of conditioning at a given possible rank, and eigenvalues at the same ranks for every head."""
    values = block.eigenvalues().flip(0).cpu()
    half = values[-(-rank // 2) - 1]
    yield _row(role, "GGN", "half_rank_condition", values[0] / half if half > 0 else torch.inf, 0.0)
    yield _row(role, "GGN", "largest_to_mean", values[0] * rank / values.sum(), 0.0)
    if role not in SUMMARISED:
        return
    for index in torch.logspace(0, torch.log10(torch.tensor(float(rank))), RANKS).round().long().unique().tolist():
        if values[index - 1] > threshold * values[0]:
            yield _row(role, "GGN", "eigenvalue", values[index - 1], 0.0, index)


def _spectrum(role: str, matrix: str, block: SymmetricOperator, limits: Limits, seed: int) -> Iterator[Row]:
    """The measures of a spectrum, exact for stored blocks; of products only the ends (Lanczos, from within) and the trace."""
    yield _row(role, matrix, "parameters", block.size, 0.0)
    if not isinstance(block, DenseOperator | FactoredOperator):
        for which in ("largest", "smallest"):
            top = top_eigenvalues(block, 1, which, tolerance=1e-3, max_iterations=limits.steps, seed=seed)
            yield _row(role, matrix, which, top.values[0], top.residuals[0])
        yield _row(role, matrix, "trace", *trace_estimate(block, "hutchinson", probes=limits.probes, seed=seed))
        return
    summary = spectral_summary(block, "exact", threshold=limits.threshold)
    for measure in SPECTRAL:
        yield _row(role, matrix, measure, *getattr(summary, measure))
    if isinstance(block, DenseOperator) and role in SUMMARISED:
        values = block.eigenvalues().flip(0).cpu()
        for rank in torch.linspace(1, len(values), RANKS).round().long().unique().tolist():
            yield _row(role, matrix, "eigenvalue", values[rank - 1], 0.0, rank)


def _row(block: str, matrix: str, measure: str, value: float | Tensor, error: float | Tensor, rank: int = 0) -> Row:
    return {
        "block": block,
        "matrix": matrix,
        "measure": measure,
        "rank": rank,
        "value": float(value),
        "error": float(error),
    }

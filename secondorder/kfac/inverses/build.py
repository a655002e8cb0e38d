"""How the inverses of all layers are made at once, and rebuilt from their states."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from secondorder.curvature.relative_damping import min_scale, safe_scale
from secondorder.errors import InputError, unknown
from secondorder.kfac.inverses.cholesky import Cholesky, cholesky
from secondorder.kfac.inverses.eigenbasis import Eigenbasis, eigenbasis
from secondorder.kfac.inverses.ekfac import CorrectedEigenbasis, corrected_eigenbasis
from secondorder.kfac.inverses.inverse import Factors, Identity, Inverse, Recipe, made
from secondorder.kfac.inverses.own_diagonal import OwnDiagonal
from secondorder.kfac.inverses.wide import WideCholesky, WideEigenbasis, wide_cholesky, wide_eigenbasis
from secondorder.kfac.state_check import check_entries, check_float, check_tensor, refused
from secondorder.matrix_power.transforms import full_precision, widened

CLASSES: dict[str, type[Inverse]] = {
    cls.kind: cls
    for cls in (Eigenbasis, Cholesky, CorrectedEigenbasis, WideEigenbasis, WideCholesky, OwnDiagonal, Identity)
}
"""The class of each state's kind."""
KINDS = ("eigen", "cholesky", "ekfac")
"""What `invert` makes; layers with rows have no corrected eigenvalues: "ekfac" is "eigen" there.

"ekfac" needs the eigenbases, so that `Damping(inverse="cholesky")` concerns only the layers whose approximation is "kfac".
"""
NO_CURVATURE = "no curvature, damping is absolute"
"""What is counted, after the layer's name, when relative damping finds the scale of a block (of one of the groups) zero."""


@torch.no_grad()
def invert(
    factors: Sequence[Factors],
    kind: str | Sequence[str],
    damping: Sequence[float],
    relative: bool,
    previous: Mapping[str, Inverse],
    report: Counter[str],
) -> dict[str, Inverse]:
    """The inverse of each layer by its name, of one of KINDS (for all, or each its own), each with its own damping.

    With `relative` a damping is in units of the scale of the block. A layer whose factors are not finite or cannot be decomposed
    keeps the inverse it had in `previous`, and without one its gradient is divided by lambda. What went wrong is counted in
    `report` under the names of EVENTS, and "<name>: NO_CURVATURE". Raises InputError for an unknown kind and a damping that is
    not positive.
    """
    kinds = [kind] * len(factors) if isinstance(kind, str) else kind
    for word in {kind} if isinstance(kind, str) else {*kind}:
        if word not in KINDS:
            raise unknown("kind of inverse", word, KINDS)
    for layer, value in zip(factors, damping, strict=True):
        if not 0 < value < float("inf"):
            raise InputError(f"damping {value} of layer {layer.name!r}: must be positive and finite")
    if not factors:
        return {}
    with full_precision(factors[0].B):
        layers = [_widened(layer) for layer in factors]
        finite, curved = _finite_and_curved(layers)
        if relative:
            flat = [layer.name for layer, ok, some in zip(layers, finite, curved, strict=True) if ok and not some]
            report.update(f"{name}: {NO_CURVATURE}" for name in flat)
        good = [place for place, ok in zip(zip(layers, kinds, damping, strict=True), finite, strict=True) if ok]
        recipes = (_recipe(layer, word, value, relative, previous.get(layer.name)) for layer, word, value in good)
        found = dict(zip((layer.name for layer, *_ in good), made(recipes, report), strict=True))
        return {layer.name: found.get(layer.name) or _fallback(layer, previous, report) for layer in layers}


def restored(state: Mapping[str, Tensor | float | str]) -> Inverse:
    """The inverse with the state of `Inverse.tensors`, bit for bit. Raises InputError for an unknown kind and a missing field."""
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise unknown("kind of inverse", kind, CLASSES)
    check_entries("inverse", state, ("kind", *(field.name for field in fields(CLASSES[kind]))))
    return CLASSES[kind].from_tensors(state)


def check_state(
    entry: str, state: object, sizes: Mapping[str, int], dtype: torch.dtype, diagonal: Collection[str] = ()
) -> None:
    """InputError, which names `entry`, unless a state is that of an inverse with these sizes (of G, O, D) and number format.

    Args:
        diagonal: those of O and D whose factor is kept as its diagonal.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("kind"), str):
        raise refused(entry, "is no state of an inverse")
    if state["kind"] not in CLASSES:
        raise unknown("kind of inverse", state["kind"], CLASSES)
    cls, lengths = CLASSES[state["kind"]], {"1": 1, **sizes}
    check_entries(entry, state, ("kind", *(field.name for field in fields(cls))))
    for field in fields(cls):
        value = state[field.name]
        if field.name not in cls.shapes:
            check_float(f"{entry}.{field.name}", value, most=1.0)
            continue
        letters = cls.shapes[field.name]
        for letter in diagonal:
            letters = letters.replace(2 * letter, letter)
        check_tensor(f"{entry}.{field.name}", value, [lengths.get(letter) for letter in letters], dtype)
        lengths |= dict(zip(letters, value.shape, strict=True))  # R is the same in all


def _recipe(layer: Factors, kind: str, damping: float, relative: bool, previous: Inverse | None) -> Recipe:
    wide = layer.A is None
    if kind == "cholesky":
        return (wide_cholesky if wide else cholesky)(layer, damping, relative)
    if wide:
        return wide_eigenbasis(layer)
    return eigenbasis(layer) if kind == "eigen" else corrected_eigenbasis(layer, previous)


def _finite_and_curved(layers: Sequence[Factors]) -> tuple[list[bool], list[bool]]:
    """Whether both factors of each layer are finite, and whether the scale of each group can be used; one synchronisation."""
    finite = [layer.given.sum().isfinite() & layer.B.sum().isfinite() for layer in layers]
    curved = [(layer.scale > min_scale(layer.scale.dtype)).all() for layer in layers]
    found = torch.stack(finite + curved).tolist()
    return found[: len(layers)], found[len(layers) :]


def _fallback(layer: Factors, previous: Mapping[str, Inverse], report: Counter[str]) -> Inverse:
    """The last good inverse, or W / lambda."""
    if layer.name in previous and not isinstance(previous[layer.name], Identity):
        report["kept"] += 1
        return previous[layer.name]
    report["identity"] += 1
    scale = layer.scale
    return Identity(safe_scale(torch.where(scale.isfinite(), scale, 0.0)))


def _widened(layer: Factors) -> Factors:
    """16-bit factors in float32."""
    A, rows = (None if factor is None else widened(factor) for factor in (layer.A, layer.rows))
    return Factors(layer.name, A, rows, widened(layer.B))

"""What a BackPACK extension propagates from a module's output to its input, and its options."""

from enum import Enum
from typing import Any

from backpack import extensions
from backpack.extensions.backprop_extension import BackpropExtension

from secondorder.errors import InputError


class Kind(Enum):
    """The quantity that goes from layer to layer, for V columns and N samples."""

    SQUARE_ROOT = "columns S [V, N, *out] with S S^T the Gauss-Newton matrix of each sample"
    AVERAGE = "the averaged Gauss-Newton matrix [D, D]"
    HESSIAN_FACTORS = "factors [V, N, *out] of the Hessian of each sample, each with a sign"
    GGN_PRODUCT = "a function V -> G V with the Gauss-Newton matrix G"
    HESSIAN_PRODUCT = "a function V -> H V with the Hessian H"


KINDS: dict[type[BackpropExtension], Kind] = {
    extensions.KFAC: Kind.SQUARE_ROOT,
    extensions.KFLR: Kind.SQUARE_ROOT,
    extensions.KFRA: Kind.AVERAGE,
    extensions.DiagGGNExact: Kind.SQUARE_ROOT,
    extensions.DiagGGNMC: Kind.SQUARE_ROOT,
    extensions.BatchDiagGGNExact: Kind.SQUARE_ROOT,
    extensions.BatchDiagGGNMC: Kind.SQUARE_ROOT,
    extensions.SqrtGGNExact: Kind.SQUARE_ROOT,
    extensions.SqrtGGNMC: Kind.SQUARE_ROOT,
    extensions.DiagHessian: Kind.HESSIAN_FACTORS,
    extensions.BatchDiagHessian: Kind.HESSIAN_FACTORS,
    extensions.GGNMP: Kind.GGN_PRODUCT,
    extensions.HMP: Kind.HESSIAN_PRODUCT,
}
"""Extension, or its base class -> what it propagates."""


def kind_of(extension: BackpropExtension) -> Kind | None:
    """The kind of a second-order extension; None for a first-order one, which propagates nothing.

    Raises InputError for PCHMP, whose residual is wrong in BackPACK, and for second-order extensions that are not in KINDS.
    """
    if not isinstance(extension, BackpropExtension):
        raise InputError(f"needs an instance of a BackPACK extension, got {extension!r}; e.g. KFAC()")
    for base, kind in KINDS.items():
        if isinstance(extension, base):
            return kind
    if not extension.expects_backpropagation_quantities():
        return None
    name = type(extension).__name__
    if isinstance(extension, extensions.PCHMP):
        raise InputError(f"{name} is refused: its residual term is wrong; use HMP or curvature_blocks(..., 'hessian')")
    raise InputError(f"unknown second-order extension {name}; supported: {', '.join(base.__name__ for base in KINDS)}")


def mc_samples(extension: BackpropExtension) -> Any:
    """The number of Monte-Carlo samples that an extension was given; None for an exact one."""
    return getattr(extension, "_mc_samples", None)


def subsampling(extension: BackpropExtension) -> Any:
    """The samples of the batch that an extension was given to look at; None: all."""
    return getattr(extension, "get_subsampling", lambda: None)()

"""Damped inverses of Kronecker-factored curvature, P = (B kron A + lambda I)^-1 of each layer.

`invert` makes them from `Factors`, `Inverse.solve` applies one to a gradient, `restored` rebuilds one from its state.
"""

from secondorder.kfac.inverses.build import CLASSES, KINDS, NO_CURVATURE, check_state, invert, restored
from secondorder.kfac.inverses.ekfac import CorrectedEigenbasis
from secondorder.kfac.inverses.inverse import Factors, Identity, Inverse, State
from secondorder.kfac.inverses.numerics import EVENTS

__all__ = [
    "CLASSES",
    "EVENTS",
    "KINDS",
    "NO_CURVATURE",
    "CorrectedEigenbasis",
    "Factors",
    "Identity",
    "Inverse",
    "State",
    "check_state",
    "invert",
    "restored",
]

"""The spectral function that a pooling head applies to the covariance, for those heads that have one."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from secondorder.errors import check_known
from secondorder.matrix_power.scalar_functions import Logarithm, Power, SquareRoot
from secondorder.matrix_power.spectrum import MatrixFunction, NewtonSchulz, Spectral
from secondorder.pooling import PoolingHead, pooling_head

HEAD_FUNCTIONS: dict[str, Callable[[Any], MatrixFunction | None]] = {
    "gap": lambda _: None,
    "covariance": lambda _: Spectral(Power(1.0)),
    "gcp": lambda root: Spectral(SquareRoot()) if root.method == "eigh" else NewtonSchulz(root.num_iter),
    "gcp_exact": lambda _: Spectral(SquareRoot()),
    "gcp_power": lambda power: Spectral(SquareRoot() if power.exponent == 0.5 else Power(float(power.exponent))),
    "gcp_log": lambda logarithm: Spectral(Logarithm(float(logarithm.eps))),
}
"""Pooling -> f of Z = f(S), from the layer before the triangle, which holds the options; None for the mean of positions."""


def head_and_function(
    pooling: str, channels: int, options: Mapping[str, Any]
) -> tuple[PoolingHead, MatrixFunction | None]:
    """The head of a key of HEAD_FUNCTIONS and its f. Raises InputError for other poolings and for unknown options."""
    check_known("pooling with a closed form", pooling, HEAD_FUNCTIONS)
    head = pooling_head(pooling, channels, **options)
    layer: nn.Module = head.layers[-2]
    return head, HEAD_FUNCTIONS[pooling](layer)

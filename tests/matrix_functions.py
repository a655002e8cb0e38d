"""The matrix functions under test as data: a new row is tested everywhere; and random inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from secondorder.matrix_power import (
    covariance_log,
    covariance_power,
    covariance_sqrt,
    matrix_log,
    matrix_power,
    matrix_sqrt,
)

F64 = torch.float64

# name -> (function of a matrix, the fused function of features)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "newton_schulz": (lambda S: matrix_sqrt(S, "newton_schulz"), lambda x: covariance_sqrt(x, "newton_schulz")),
    "auto": (matrix_sqrt, covariance_sqrt),
    "many_steps": (lambda S: matrix_sqrt(S, num_iter=9), lambda x: covariance_sqrt(x, num_iter=9)),
    "one_step": (lambda S: matrix_sqrt(S, num_iter=1), lambda x: covariance_sqrt(x, num_iter=1)),
    "eigh": (lambda S: matrix_sqrt(S, "eigh"), lambda x: covariance_sqrt(x, "eigh")),
    "power": (lambda S: matrix_power(S, 0.3), lambda x: covariance_power(x, 0.3)),
    "inverse_root": (lambda S: matrix_power(S, -0.5), lambda x: covariance_power(x, -0.5)),
    "identity": (lambda S: matrix_power(S, 1), lambda x: covariance_power(x, 1)),
    "square": (lambda S: matrix_power(S, 2), lambda x: covariance_power(x, 2)),
    "log": (matrix_log, covariance_log),
    "shifted_log": (lambda S: matrix_log(S, 0.1), lambda x: covariance_log(x, 0.1)),
}


def features(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def psd(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    A = torch.randn(*shape, shape[-1] + 3, dtype=dtype)
    return A[..., : shape[-1], :] @ A[..., : shape[-1], :].mT

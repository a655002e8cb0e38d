"""Refusals of tensors, in one line."""

import torch
from torch import Tensor

from secondorder.errors import InputError, short
from secondorder.matrix_power.checks import FLOATS

WHOLE = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
REAL = FLOATS | WHOLE


def check_tensor(what: str, value: object, dtypes: frozenset[torch.dtype], needed: str) -> Tensor:
    """The value, if it is a tensor that holds numbers of one of the types; InputError that says what is needed else."""
    if not isinstance(value, Tensor):
        raise InputError(f"{what} {short(value)}: must be {needed}")
    if value.is_meta or value.dtype not in dtypes or value.layout != torch.strided:
        of = "on the meta device, without numbers" if value.is_meta else f"{value.dtype}"
        raise InputError(f"{what} of shape {list(value.shape)}, {of}: must be {needed}")
    return value

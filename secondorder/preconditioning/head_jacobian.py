"""The Jacobian of a pooling head by automatic differentiation, the ground truth of its closed form."""

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.memory import BLOCK_BYTES, available_memory, check_memory
from secondorder.pooling import PoolingHead
from secondorder.preconditioning.features import svec_scale

COPIES = 3
"""Jacobians at one time: that of the head, and what its singular value decomposition makes of it."""


def jacobian_singular_values(features: Tensor, head: PoolingHead, svec: bool) -> Tensor:
    """All singular values of d head(X) / dX of each image `[N, C, H, W]`, descending: `[N, D]`, D outputs of the head.

    One dense matrix D x C M an image. With `svec` the outputs are an upper triangle that is taken in svec coordinates, else they
    are as the head gives them. Raises InputError when a matrix does not fit in memory.
    """
    _, C, H, W = features.shape
    outputs, inputs = head.out_features, C * H * W
    needed = COPIES * outputs * inputs * features.dtype.itemsize
    what = f"the Jacobian of {outputs} outputs with respect to {inputs} features ({needed} bytes)"
    check_memory(needed, available_memory(features.device), what, "use exact=False, or fewer channels")
    scale = svec_scale(C, features) if svec else features.new_ones(outputs)
    rows = max(1, BLOCK_BYTES // (4 * C * max(C, H * W) * features.dtype.itemsize))
    derivative = torch.func.jacrev(lambda x: scale * head(x[None])[0], chunk_size=rows)
    values = torch.stack([torch.linalg.svdvals(derivative(x).reshape(outputs, inputs)) for x in features])
    return torch.nn.functional.pad(values, (0, outputs - values.shape[-1]))

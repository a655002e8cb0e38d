"""Attention by operations that have derivatives of every order, in forward and in reverse mode.

PyTorch's fused kernels of softmax(Q K^T / sqrt d) V have a first derivative only, and `nn.MultiheadAttention` and transformer
layers in eval mode take a fast path without any where gradients are off, with zeros for padded positions. The math kernel has
them all and equal outputs up to rounding. A graph that was made with it keeps it, but for what is evaluated again in a backward
pass (`torch.utils.checkpoint`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, attention is evaluated by the math kernel and without a fast path; also a decorator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)

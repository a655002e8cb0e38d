"""Squared norms of individual gradients of convolutions with groups, which BackPACK's BatchL2Grad takes for one group."""

from typing import Any

from backpack.extensions import BatchL2Grad
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.firstorder.batch_l2_grad.batch_l2_base import BatchL2Base
from torch import Tensor


class GroupedNorms(BatchL2Base):
    """The row of a convolution for BatchL2Grad: |dl_n/dW|^2 `[N]`, from the gradients themselves where there are groups.

    Args:
        plain: BackPACK's own row, which is right for one group and faster.
    """

    def __init__(self, plain: BatchL2Base) -> None:
        super().__init__(["bias", "weight"], derivatives=plain.derivatives)
        self.plain: Any = plain

    def weight(self, ext: BackpropExtension, module: Any, g_inp: tuple, g_out: tuple, backproped: None) -> Tensor:
        """|dl_n/dW|^2 `[N]`, the squared norm of each sample's gradient of the weight."""
        if module.groups == 1:
            return self.plain.weight(ext, module, g_inp, g_out, backproped)
        gradients = self.derivatives.param_mjp("weight", module, g_inp, g_out, g_out[0], sum_batch=False)
        return gradients.flatten(1).square().sum(1)


def norms_row(extension: BackpropExtension, plain: BatchL2Base) -> GroupedNorms | None:
    """The row of a convolution for BatchL2Grad, given BackPACK's own; None for other extensions."""
    return GroupedNorms(plain) if isinstance(extension, BatchL2Grad) else None

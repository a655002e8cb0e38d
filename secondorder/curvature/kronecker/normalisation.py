"""The scale and shift of a normalisation as a layer: each channel a group with one input, its normalised value, and one output.

Index letters: N samples, T positions, C channels (or numbers of a LayerNorm's shape), which are the groups G.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.kronecker.weight_sharing import LayerKind


class Normalisation(LayerKind):
    """The scale of a normalisation: `z_c = w_c a_c + b_c` for each channel c, or each number of a LayerNorm's shape."""

    sample = 1
    has_factors = False

    @property
    def groups(self) -> int:
        """G, the number of channels, or of numbers of a LayerNorm's shape, each a group of its own."""
        return self.weight_shape.numel()

    @property
    def outputs(self) -> int:
        """O = 1: each channel is one output."""
        return 1

    @property
    def inputs(self) -> int:
        """D = 1: the normalised value is each channel's only input."""
        return 1

    @property
    def _last(self) -> int:
        """Dimensions at the end of an input that the weight has; 0: channels come second."""
        return len(getattr(self.module, "normalized_shape", ()))

    def batched(self, x: Tensor, leading: int = 0) -> Tensor:
        """A LayerNorm's input without a batch has no dimension but those of the weight."""
        return x.unsqueeze(leading) if self._last and x.ndim == self._last + leading else x

    def positions(self, x: Tensor) -> int:
        """T, the number of positions of a sample at which a channel is normalised and scaled."""
        return math.prod(x.shape[1 : x.ndim - self._last] if self._last else x.shape[2:])

    def samples_at_a_time(self, x: Tensor) -> int:
        """All N samples of the input: the mean and variance may be those of the batch."""
        return max(1, len(x))

    def input_vectors(self, x: Tensor) -> Tensor:
        """a `[N, G, T, 1]`: the input, normalised as the layer does it."""
        return self.output_vectors(_normalised(self.module, x))

    def output_vectors(self, s: Tensor, leading: int = 1) -> Tensor:
        """g `[*, G, T, 1]`: the gradients at the output, each channel a group."""
        if self._last:
            return s.flatten(-self._last).reshape(*s.shape[:leading], -1, self.groups).mT[..., None]
        return s.reshape(*s.shape[: leading + 1], -1)[..., None]


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a normalisation multiplies by its weight."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    mean, variance = module.running_mean, module.running_var
    if module.training or mean is None or variance is None:
        return F.batch_norm(x, None, None, training=True, eps=module.eps)
    return F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), training=False, eps=module.eps)

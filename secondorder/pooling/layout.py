"""Layouts of features: which axis is the channels, named by the caller and never guessed from a shape.

Index letters: N samples, C channels, M positions (H W of a map, L of a sequence, T H W of a video).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, check_known
from secondorder.matrix_power.checks import FLOATS
from secondorder.matrix_power.transforms import known_shape


class Layout(NamedTuple):
    """The axes of features, such as "NLC", and what kind of features have them."""

    axes: str
    """Letters of the axes in order, N first."""
    meaning: str
    """What kind of features come so."""

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the last axis (else the second)."""
        return self.axes[-1] == "C"

    @property
    def shape(self) -> str:
        """The axes for messages, as text: `[N, L, C]`."""
        return f"[{', '.join(self.axes)}]"


LAYOUTS: dict[str, Layout] = {
    axes: Layout(axes, meaning)
    for axes, meaning in [
        ("NCHW", "maps of a convolutional network"),
        ("NHWC", "maps with the channels last, as of Swin"),
        ("NCL", "sequences with the channels first"),
        ("NLC", "tokens, as of a vision transformer"),
        ("NCTHW", "video"),
        ("NTHWC", "video with the channels last"),
    ]
}
"""Name -> layout."""


def check_layout(layout: str) -> str:
    """The name of a layout. Raises InputError for one that is not in LAYOUTS."""
    check_known("layout", layout, LAYOUTS)
    return layout


def check_numbers(x: Tensor, what: str) -> None:
    """Raises InputError unless x is a tensor of real numbers of 16, 32 or 64 bits."""
    if not isinstance(x, Tensor):
        raise InputError(f"{what} needs a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise InputError(f"{what} needs real numbers of type float16, bfloat16, float32 or float64, got {x.dtype}")


def check_features(x: Tensor, layout: str, what: str) -> None:
    """Raises InputError unless x `[N, ...]` has this layout and at least one channel and position; N = 0 is allowed."""
    check_numbers(x, what)
    if x.ndim != len(layout) or 0 in known_shape(x)[1:]:
        others = [name for name in LAYOUTS if len(name) == x.ndim]
        way_out = f'; state another layout, e.g. layout="{others[-1]}"' if others and x.ndim != len(layout) else ""
        raise InputError(f"{what} needs features {LAYOUTS[layout].shape}, got shape {list(x.shape)}{way_out}")


def channels_first(x: Tensor, layout: str) -> Tensor:
    """x with its channels as the second axis: `[N, ..., C] -> [N, C, ...]`."""
    return x.movedim(-1, 1) if LAYOUTS[layout].channels_last else x


def as_maps(x: Tensor, layout: str) -> Tensor:
    """Features of any layout as maps `[N, C, H, W]`: a sequence as `[N, C, L, 1]`, a video as `[N, C, T H, W]`."""
    x = channels_first(x, layout)
    if x.ndim == 4:
        return x
    return x[..., None] if x.ndim == 3 else x.flatten(2, 3)


class AsMaps(nn.Module):
    """Features of a layout, a key of LAYOUTS, as maps `[N, C, H, W]`, the first module of the chain of such a head."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = check_layout(layout)

    def forward(self, x: Tensor) -> Tensor:
        """The features as maps `[N, C, H, W]`. Raises InputError for another number of axes than the layout's."""
        return checked_maps(x, self.layout)

    def extra_repr(self) -> str:
        """The name of the layout, as text."""
        return f"layout={self.layout}"


def checked_maps(x: Tensor, layout: str) -> Tensor:
    """Features of a layout as maps `[N, C, H, W]`.

    Raises InputError for features that have not this layout, or no channel or position.
    """
    check_features(x, layout, "pooling head")
    return as_maps(x, layout)


torch.fx.wrap("checked_maps")  # a node of its own in a traced graph, so that its checks stay

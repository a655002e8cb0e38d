"""Networks that send images to different layers, of which formulas are tried on those of the largest images only."""

from collections.abc import Callable

from small_networks import CLASSES, By, rows
from torch import Tensor, nn


def routed(x: Tensor, large: nn.Module, small: nn.Module, outputs: int) -> Tensor:
    """Large images `[n, D]` by one module, others by another, which is not called without any."""
    is_large, out = x.norm(dim=1) > 5, x.new_zeros(len(x), outputs)
    out = out.index_add(0, is_large.nonzero()[:, 0], large(x[is_large]))
    if not bool(is_large.all()):
        out = out.index_add(0, (~is_large).nonzero()[:, 0], small(x[~is_large]))
    return out


class Experts(nn.Module):
    """Large images by a layer with tanh, others by a module, and a last layer."""

    def __init__(self, small: nn.Module) -> None:
        super().__init__()
        self.large, self.small, self.last = nn.Linear(6, 4), small, nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(routed(x, nn.Sequential(self.large, nn.Tanh()), self.small, 4))  # type: ignore[no-any-return]


def experts(function: Callable[[Tensor], Tensor]) -> Experts:
    """Images that are not large by a layer with a function."""
    return Experts(nn.Sequential(nn.Linear(6, 4), By(function)))


def clipped(x: Tensor, most: float = 1e-3) -> Tensor:
    x = x.tanh()
    if x.requires_grad:
        x.register_hook(lambda g: g.clamp(-most, most))
    return x


def images(n: int = 9) -> tuple[Tensor, Tensor]:
    """Rows of norm 1, but for two."""
    x, y = rows(n)
    x = nn.functional.normalize(x)
    x[2:4] *= 10
    return x, y

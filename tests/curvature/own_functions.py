"""Autograd Functions as users write them, with derivatives that are missing or wrong."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Sine(torch.autograd.Function):
    """sin, whose derivative cannot be differentiated again, and without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class OwnForwardMode(Sine):
    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0].cos()


class WrongForwardMode(torch.autograd.Function):
    """sin with a wrong derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 1.01 * t


class BrokenForwardMode(WrongForwardMode):
    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        raise RuntimeError("not in forward mode")


class HalfTurn(torch.autograd.Function):
    """Pairs of columns as they are; tangents t come as (t - R t) / 2, R a quarter turn of each pair, which J v . J v hides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return (t - torch.stack([-t[:, 1::2], t[:, ::2]], 2).flatten(1)) / 2


class NoTangent(WrongForwardMode):
    """sin, whose derivative in forward mode is zero."""

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 0 * t


class Clipped(torch.autograd.Function):
    """The identity with a backward pass that is not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.1, 0.1)

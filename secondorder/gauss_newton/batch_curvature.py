"""The Gauss-Newton matrix G = J^T H J of the mini-batch that a model has just seen, from a second evaluation without a trace.

J = df/dw of the outputs with batch norm in the model's present mode, H the Hessian of the mean loss at the outputs. A forward
hook keeps the images and the random state at the beginning of the last forward pass; the graph of that pass is the user's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork, unwrapped
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.output_matrix import OutputMatrix
from secondorder.curvature.matrix_free.random_state import RandomState
from secondorder.curvature.matrix_free.separable_losses import CrossEntropy, LossCurvature, SquaredError
from secondorder.errors import InputError
from secondorder.kfac.capture.hooks import Hook, handles_of


def cross_entropy(z: Tensor) -> LossCurvature:
    """Curvature of F.cross_entropy at outputs `[N, K]`; labels are no part of it."""
    return CrossEntropy(z.new_full((len(z), 1), 1 / len(z)))


def mean_square(z: Tensor) -> LossCurvature:
    """Curvature of F.mse_loss at outputs `[N, K]`, a mean over all N K numbers; targets are no part of it."""
    return SquaredError(torch.zeros_like(z), z.numel())


LIKELIHOODS: dict[str, Callable[[Tensor], LossCurvature]] = {"cross_entropy": cross_entropy, "mse": mean_square}
"""Losses, means over the batch, by the names that `secondorder.kfac.Fisher` has for them."""

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of outputs: others have no arithmetic."""


class BatchCurvature:
    """Watches the forward passes of a model and gives G of the last one."""

    def __init__(self, model: nn.Module, likelihood: str) -> None:
        self.module, self.prefix = unwrapped(model)
        self.likelihood = LIKELIHOODS[likelihood]
        self._forward: tuple[Sequence[Any], Mapping[str, Any], RandomState] | None = None
        self._present: tuple[FrozenNetwork, Tensor, Tensor] | None = None
        self._own = False
        hook = Hook(self, BatchCurvature._record)
        handles_of(self).append(self.module.register_forward_pre_hook(hook, with_kwargs=True))

    def take(self, logits: Tensor) -> None:
        """Note that the step is about these outputs of the last forward pass; InputError for what cannot be evaluated again."""
        if self._present is not None:
            raise InputError(
                "update_curvature(logits) twice in a step: gradients of several forward passes cannot be accumulated here; "
                "use one batch a step, or KFAC"
            )
        if self._forward is None:
            raise InputError(
                "update_curvature(logits) without a forward pass of the model; call logits = model(images)"
            )
        (args, kwargs, random), self._forward = self._forward, None
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise InputError(
                f"the model was called with {len(args)} arguments and {len(kwargs)} by name; it must take one tensor"
            )
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(args[0]):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"update_curvature: logits are {got}; they must be a tensor [N, K], a row for each image")
        if logits.dtype not in FORMATS or logits.device.type == "meta":
            raise InputError(
                f"update_curvature: logits are {logits.dtype} on {logits.device}; they must be the floating-point numbers that "
                "the model has computed"
            )
        if logits.device != args[0].device:
            raise InputError(f"update_curvature: logits are on {logits.device}, the images on {args[0].device}")
        frozen = FrozenNetwork(self.module)
        frozen.random = random
        self._present = frozen, args[0].detach(), logits.detach()

    def forget(self) -> None:
        """Drop the outputs that `take` has noted: the step is over, or begins anew."""
        self._present = None

    @property
    def taken(self) -> bool:
        """Whether `take` has noted outputs in this step."""
        return self._present is not None

    def operator(self, names: Sequence[str]) -> GaussNewtonOperator:
        """G for these parameters; use it `quietly`. InputError when the network, evaluated again, gives other outputs."""
        assert self._present is not None
        frozen, images, logits = self._present
        jacobian = Jacobian(frozen, images, len(images), coupled=True)
        z = next(jacobian.parts()).z
        allowed = float(torch.finfo(z.dtype).eps) ** 0.5 * float(z.abs().max())
        there = z.shape == logits.shape and z.device == logits.device
        if not there or not float((z - logits).abs().max()) <= allowed:
            raise InputError(
                "update_curvature(logits): the model, evaluated again, has other outputs; pass the outputs of its last forward "
                "pass, without autocast"
            )
        return GaussNewtonOperator(jacobian, OutputMatrix(self.likelihood(z)), names)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Evaluations inside are not forward passes of the user."""
        self._own = True
        try:
            yield
        finally:
            self._own = False

    def _record(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled() and not self._own:
            self._forward = args, kwargs, RandomState()

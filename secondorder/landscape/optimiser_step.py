"""The step that an optimiser is about to take, as a direction of the landscape."""

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, failures_of
from secondorder.landscape.checks import Loss, check_arguments, loss_at, trainable
from secondorder.untouched import untouched


def optimiser_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, loss: Loss, images: Tensor, labels: Tensor
) -> list[Tensor]:
    """The change of the parameters that an optimiser would make on this batch, momentum and weight decay included.

    One tensor for each parameter that requires gradients, in the model's order. Neither the model nor the optimiser's state is
    changed.

    Args:
        model: any network.
        optimiser: of the model's parameters, with its present state and learning rate.
        loss: a function of outputs and labels to one number.
        images: `[N, ...]`.
        labels: `[N, ...]`.

    Raises:
        InputError: for bad arguments, and where the model or the loss fails.
    """
    check_arguments(model, loss, images, labels)
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise InputError(f"optimiser {type(optimiser).__name__}: must be a torch.optim.Optimizer")
    parameters = list(trainable(model).values())
    held = optimiser.state.items()
    before = {p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()} for p, state in held}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimiser.param_groups]
    with untouched(model):
        origin = [p.detach().clone() for p in parameters]
        with torch.enable_grad(), failures_of("the gradient"):
            value = loss_at(model, model, loss, images, labels)
            gradient = torch.autograd.grad(value, parameters, allow_unused=True)
        try:
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter.grad = g
            optimiser.step()
            return [p.detach() - start for p, start in zip(parameters, origin, strict=True)]
        finally:
            optimiser.state.clear()
            optimiser.state.update(before)
            for group, settings in zip(optimiser.param_groups, groups, strict=True):
                group.update(settings)

"""Parts of a network by name: those that are frozen, and learning rates of their own.

A name is of a module or of a parameter: ``features`` and ``features.0`` fit the parameter ``features.0.weight``, ``feat``
does not. Works for any network.
"""

from collections.abc import Iterable

import torch
from torch import nn

from secondorder.data.files import shown
from secondorder.errors import InputError
from secondorder.training.run import Run

# Optimisers whose parameter groups can be divided: the others keep one learning rate for what they do in one piece.
DIVISIBLE = ("sgd", "adamw", "kfac", "ekfac", "soap", "shampoo", "muon")


def fits(name: str, part: str) -> bool:
    """Whether the module or parameter ``name`` is ``part`` or below it."""
    return name == part or name.startswith(f"{part}.")


def check_parts(model: nn.Module, parts: Iterable[str], what: str) -> None:
    """Raise InputError for a part that fits no parameter or module of the network."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_modules()}
    for part in parts:
        if part not in names:
            children = [shown(name, 25) for name, _ in model.named_children()]
            raise InputError(
                f"{what}: the network has no part {shown(part, 60)!r}; it consists of {shown(', '.join(children), 140)}"
            )


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Let no gradient reach the parameters of these parts.

    Raises:
        InputError: for a part that is not there, and when nothing is left to train.
    """
    parts = tuple(parts)
    check_parts(model, parts, "frozen")
    for name, parameter in model.named_parameters():
        if any(fits(name, part) for part in parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the network has no trainable parameter; freeze less of it")


def train_mode(model: nn.Module, frozen: tuple[str, ...]) -> None:
    """Training mode, but eval mode for the frozen parts."""
    model.train()
    if frozen:
        for name, module in model.named_modules():
            if any(fits(name, part) for part in frozen):
                module.train(False)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the learning rate times its ``lr_factor``, 1 where it has none."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)


def divide_groups(optimizer: torch.optim.Optimizer, model: nn.Module, run: Run) -> None:
    """Divide each parameter group by the factors of the run's learning rates, kept in the groups as ``lr_factor``.

    Raises:
        InputError: for a part that is not there, and an optimiser with a single learning rate.
    """
    if not run.learning_rates:
        return
    if run.optimizer not in DIVISIBLE:
        raise InputError(
            f"optimizer {run.optimizer!r} has one learning rate; leave learning_rates out, or choose one of: "
            f"{', '.join(DIVISIBLE)}"
        )
    factors = dict(run.learning_rates)
    check_parts(model, factors, "learning_rates")
    factor_of = {}
    for name, parameter in model.named_parameters():
        longest = max((part for part in factors if fits(name, part)), key=len, default=None)
        factor_of[parameter] = 1.0 if longest is None else factors[longest]
    divided = []
    for group in optimizer.param_groups:
        for factor in sorted({factor_of[parameter] for parameter in group["params"]}):
            members = [parameter for parameter in group["params"] if factor_of[parameter] == factor]
            divided.append({**group, "params": members, "lr_factor": factor})
    optimizer.param_groups[:] = divided

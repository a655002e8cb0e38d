"""Weights from outside: initial ones, those of a network of the user's, and how a checkpoint tells them apart."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.accelerator import seed_random_numbers
from secondorder.data.files import expanded, reason, shown
from secondorder.errors import InputError
from secondorder.training import checkpoint
from secondorder.training.run import Run

Initial = Mapping[str, Tensor] | str | Path
OwnNetwork = nn.Module | Callable[[], nn.Module]


def own_network(run: Run, network: OwnNetwork) -> nn.Module:
    """A copy of the user's network, or what the user's function builds with torch's generator seeded by the run.

    Raises:
        InputError: for what is no network, cannot be copied, or has parameters without a shape yet.
    """
    if isinstance(network, nn.Module):
        try:
            model = copy.deepcopy(network)
        except Exception as error:  # a module may hold anything
            raise InputError(
                f"the network cannot be copied ({reason(error)}); pass a function that builds it"
            ) from error
    else:
        with torch.random.fork_rng(devices=[]):
            seed_random_numbers(run.seed)
            model = network()
    if not isinstance(model, nn.Module):
        raise InputError(
            f"network is {type(model).__name__}; it must be a torch.nn.Module, or a function that builds one"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise InputError(f"parameter {name} of the network has no shape yet; run the network once on a batch first")
    return model


def load_initial(model: nn.Module, initial: Initial) -> dict[str, Any]:
    """Give the network the weights of a state_dict, or of a file with one, or of a checkpoint; what is known of them.

    Raises:
        InputError: when there are none, or they are not exactly those of the network.
    """
    state, origin = (dict(initial), {}) if isinstance(initial, Mapping) else _read(initial)
    own = model.state_dict()
    odd = sorted(own.keys() ^ state.keys())
    if odd:
        lacking = sum(name not in state for name in odd)
        raise InputError(
            f"the initial weights lack {lacking} of the network's {len(own)} entries and have {len(odd) - lacking} others, "
            f"such as {shown(odd[0])!r}; give exactly those of network.state_dict()"
        )
    for name, value in own.items():
        if not isinstance(state[name], Tensor) or state[name].shape != value.shape:
            theirs = list(getattr(state[name], "shape", ()))
            raise InputError(
                f"the initial weight {shown(name)!r} has shape {theirs}, the network's {list(value.shape)}; give exactly "
                "those of network.state_dict(), the network's own where they are to be drawn anew"
            )
    model.load_state_dict(state)
    return origin


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights in a checkpoint (its folder or file) or in a file with a state_dict, and which training they are of."""
    file = checkpoint.file_of(expanded(path, "initial"))
    content = checkpoint.read(file)
    if content is None:
        raise InputError(
            f"there are no initial weights in {shown(file)}; give a checkpoint, or a file with a state_dict"
        )
    if (state := checkpoint.plain_weights(content)) is not None:
        return state, {}
    state = checkpoint.parse(content, file)
    return state["model"], {"initial_run": Run.from_dict(state["run"]).name, "initial_step": state["progress"]["step"]}


def description(model: nn.Module) -> dict[str, str]:
    """What tells networks apart that a name cannot: kind, structure and weights, the last two as 16 digits of a sha256."""
    structure = [repr(model)] + [
        f"{n} {list(p.shape)} {p.dtype} {p.requires_grad}" for n, p in model.named_parameters()
    ]
    return {
        "kind": f"{type(model).__module__}.{type(model).__qualname__}",
        "structure": hashlib.sha256("\n".join(structure).encode()).hexdigest()[:16],
        "initial_weights": digest(model),
    }


def digest(model: nn.Module) -> str:
    """16 digits of the sha256 of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            sha.update(f"{name} {list(value.shape)} {value.dtype}".encode() + content)
    return sha.hexdigest()[:16]

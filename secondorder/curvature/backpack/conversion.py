"""A network rewritten as a twin that BackPACK can walk: fresh leaf modules, branches as modules, the same parameters."""

import copy
from collections.abc import Iterator
from typing import TypeVar

from backpack import extend
from backpack.context import CTX
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from secondorder.curvature.backpack.branches import Concatenate, Sum
from secondorder.curvature.backpack.refusals import check_model, named
from secondorder.curvature.backpack.twins import rule_for
from secondorder.errors import InputError

AnyModule = TypeVar("AnyModule", bound=nn.Module)

WAY_OUT = (
    "write it as nn.Sequential of leaf modules, add a row for its class to secondorder.curvature.backpack.twins.TWINS, "
    "or use curvature_blocks, which is matrix-free and works for any network"
)


class Twin(nn.Module):
    """A network in modules that compute the same function, each used once, writing to new memory and `extend`ed.

    Parameters and buffers are the network's own objects. `names` has the network's name of each parameter, `paths` the
    path in the network of each module of the twin (of a module that stands for a function call: of its container).
    """

    def __init__(self, body: nn.Module, names: dict[nn.Parameter, str], paths: dict[nn.Module, str]) -> None:
        super().__init__()
        self.body = body
        self.names = names
        self.paths = paths

    def forward(self, x: Tensor) -> Tensor:
        """What the network that this is the twin of gives for x."""
        return self.body(x)

    def leaves(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of the modules that compute something, in the order in which they run."""
        for module in self.body.modules():
            if is_leaf(module):
                yield self.paths[module], module

    def branching(self) -> str | None:
        """The path of the first module with several inputs; None for a network without branches."""
        return next((path for path, leaf in self.leaves() if isinstance(leaf, Sum | Concatenate)), None)


def backpack_network(model: nn.Module) -> Twin:
    """The twin of this network in its present train/eval mode; the network itself is not changed in any way.

    Containers are rewritten by the table `TWINS`, by exact class; dropout in eval mode is left out. Raises InputError for
    a container without a row, and for everything that BackPACK would silently get wrong (see `refusals`).
    """
    check_model(model)
    paths: dict[nn.Module, str] = {}
    users: dict[nn.Parameter, str] = {}

    def build(module: nn.Module, path: str) -> nn.Module:
        if (rule := rule_for(type(module))) is not None:
            twin = rule(module, lambda name: build(module.get_submodule(name), f"{path}.{name}" if path else name))
        elif list(module.children()):
            raise InputError(f"{named(path, module)} has no twin; {WAY_OUT}")
        elif isinstance(module, _DropoutNd) and not module.training:
            twin = nn.Sequential()
        else:
            twin = fresh_leaf(module)
            claim(module, path, users)
        for part in twin.modules():
            paths.setdefault(part, path)
        return twin

    body = build(model, "")
    return extend_leaves(Twin(body, {p: name for name, p in model.named_parameters()}, paths))


def is_leaf(module: nn.Module) -> bool:
    """Whether the module computes something itself; an empty Sequential does not."""
    return not list(module.children()) and type(module) is not nn.Sequential


def claim(module: nn.Module, path: str, users: dict[nn.Parameter, str]) -> None:
    """Note that this module uses its parameters; InputError if another one does already.

    BackPACK keeps one quantity for a parameter: the second use would overwrite the first.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if parameter in users:
            raise InputError(
                f"the {name} of {named(path, module)} is used by {users[parameter]!r} too; BackPACK cannot add the parts of "
                "a shared parameter: use curvature_blocks, or give each module its own copy"
            )
        users[parameter] = path


def fresh_leaf(module: nn.Module) -> nn.Module:
    """A new module with the same settings, parameter and buffer objects, without hooks, that writes to new memory."""
    leaf = copy.copy(module)
    state = vars(leaf)
    for name, value in list(state.items()):
        if "hooks" in name and isinstance(value, dict):
            state[name] = type(value)()
        elif isinstance(value, dict):
            state[name] = value.copy()
    if state.pop("_backpack_extend", False):  # the user extended his network and ran it: inputs and output are kept
        for name in [name for name in state if name == "output" or name.startswith("input")]:
            del state[name]
    if getattr(leaf, "inplace", False):
        leaf.inplace = False  # type: ignore[assignment]
    return leaf


def extend_leaves(twin: AnyModule) -> AnyModule:
    """The module itself with BackPACK's hooks on its leaves.

    BackPACK keeps a handle of every hook for the whole process; those of twins, which come and go, are taken out again.
    """
    known = len(CTX.hook_handles)
    for module in twin.modules():
        if is_leaf(module):
            extend(module)
    del CTX.hook_handles[known:]
    return twin

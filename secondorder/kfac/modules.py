"""The modules that hold each parameter of a model, and why some of them have no Kronecker factors."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from secondorder.curvature.kronecker.layer_kinds import LAYER_KINDS
from secondorder.curvature.matrix_free.frozen_network import WRAPPERS
from secondorder.errors import InputError

KINDS: tuple[type[nn.Module], ...] = tuple(LAYER_KINDS)
"""What has a curvature block, unless it computes something else than its kind does."""
SHARDED = ("DTensor", "FlatParameter", "FullyShardedDataParallel")
"""Classes, by name, of parameters of which each process has a part, and of the modules that hold them: FSDP, tensor parallel."""
OPTIONS = (
    *("stride", "padding", "dilation", "groups", "padding_mode", "output_padding", "padding_idx"),
    *("normalized_shape", "num_groups", "eps", "momentum", "track_running_stats"),
)
"""What decides on the output of a module beside its weight and bias."""
EMBEDDING_OPTIONS = ("sparse", "scale_grad_by_freq", "max_norm")
"""Of an embedding whose weight's gradient is not the sum of the gradients at its output by token."""
WEIGHTS = {
    "weight": "bias",
    "in_proj_weight": "in_proj_bias",
    "q_proj_weight": "",
    "k_proj_weight": "",
    "v_proj_weight": "",
}
"""Names of weights, and of the bias that is added after each; one for three weights is none of theirs."""


@dataclass(frozen=True, eq=False)
class Place:
    """A module that holds a parameter, under the name `attribute`; path: without what wrappers add."""

    path: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        """The name of the parameter in `model.named_parameters()`, without what wrappers add."""
        return f"{self.path}.{self.attribute}".lstrip(".")


def clean_paths(model: nn.Module) -> dict[str, str]:
    """The dotted path of every module without what wrappers add to it, by its path in `model.named_modules()`.

    DataParallel and DistributedDataParallel add `module`, torch.compile `_orig_mod`; an attribute `module` of any other
    module is the user's own and stays.
    """
    modules = dict(model.named_modules())
    paths = {"": ""}
    for path in modules:
        parent, _, attribute = path.rpartition(".")
        if path:
            above = paths[parent]
            paths[path] = above if _wraps(modules[parent], attribute) else f"{above}.{attribute}".lstrip(".")
    return paths


def _wraps(module: nn.Module, attribute: str) -> bool:
    kinds = (kind.__name__ for kind in type(module).__mro__)
    return attribute == "_orig_mod" or any(WRAPPERS.get(kind) == attribute for kind in kinds)


def modules_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[Place]]:
    """Every module that holds a parameter; parameters in the order of `model.named_parameters()`."""
    paths = clean_paths(model)
    places: dict[nn.Parameter, list[Place]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append(Place(paths[path], module, attribute))
    return places


def check_parameters(model: nn.Module, places: Mapping[nn.Parameter, Sequence[Place]]) -> None:
    """InputError for parameters without numbers, or of which a process has a part only, and for two of one name."""
    for sharded in (*places, *model.modules()):
        if any(kind.__name__ in SHARDED for kind in type(sharded).__mro__):
            name = f"parameter {places[sharded][0].name}" if isinstance(sharded, nn.Parameter) else "the model"
            raise InputError(
                f"{name} is sharded over processes ({type(sharded).__name__}), and K-FAC needs the whole gradient of a layer: "
                "use DistributedDataParallel instead of fully_shard or tensor parallelism"
            )
    for parameter, holders in places.items():
        if is_lazy(parameter):
            raise InputError(f"parameter {holders[0].name} is not initialised yet; run the model once before this")
        if parameter.is_meta:
            raise InputError(
                f"parameter {holders[0].name} is on the device 'meta', which holds no numbers; load the weights before this"
            )
    name, count = Counter(holders[0].name for holders in places.values()).most_common(1)[0] if places else ("", 0)
    if count > 1:
        raise InputError(
            f"{count} parameters are called {name} without what wrappers (DataParallel, torch.compile) add; "
            "rename the module beside the wrapped one"
        )


def unsupported_modules(model: nn.Module, declared: Collection[nn.Module] = ()) -> dict[nn.Module, str]:
    """Modules whose own kind, or that of a module around them, excludes them, with the reason.

    Args:
        declared: modules whose kind the user vouches for (`Options.treat_as`), whatever their class.
    """
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and not _plain(module):
            reason = f"{type(module).__name__} uses its weights without calling its layers"
            found |= dict.fromkeys(module.modules(), reason)
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            found[module] = "parametrised"
        elif module not in found and module not in declared and not _plain(module):
            found[module] = type(module).__name__ + _what_differs(module)
    return found


def attention_modules(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The attention module that uses the weights of a module, itself or its output projection, without calling it."""
    found = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return {module: module for module in found} | {module.out_proj: module for module in found}


def _plain(module: nn.Module) -> bool:
    """Whether a module computes what its type, one of KINDS, does."""
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    if kind is None or "forward" in vars(module) or type(module).forward is not kind.forward:
        return False
    if not any(name in module._parameters for name in WEIGHTS):  # reparametrised by hooks or properties
        return False
    if isinstance(module, nn.MultiheadAttention) and not _plain(module.out_proj):
        return False
    if _embedding_option(module):
        return False
    return getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)


def _what_differs(module: nn.Module) -> str:
    if not isinstance(module, KINDS):
        return ""
    if "weight" not in module._parameters:
        return ", its weight is parametrised"
    option = _embedding_option(module)
    return f" with {option}" if option else ", with a forward of its own"


def _embedding_option(module: nn.Module) -> str:
    """The first option that makes an embedding another kind of layer, or nothing."""
    chosen = (name for name in EMBEDDING_OPTIONS if getattr(module, name))
    return next(chosen, "") if isinstance(module, nn.Embedding) else ""


def reason_without_factors(
    parameter: nn.Parameter, holders: Sequence[Place], unsupported: Mapping[nn.Module, str]
) -> str:
    """Why a weight has no Kronecker factors, empty if it has."""
    if len(holders) > 1 and any(not _alike(holders[0], other) for other in holders[1:]):
        users = " and ".join(f"{type(h.module).__name__} {h.path}".rstrip() for h in holders[:3])
        return f"shared by unlike modules: {users}"
    return next((unsupported[h.module] for h in holders if h.module in unsupported), "")


def _alike(a: Place, b: Place) -> bool:
    """Whether two modules are the same function of their input, up to nothing but its size."""
    return a.attribute == b.attribute and type(a.module) is type(b.module) and _options(a.module) == _options(b.module)


def _options(module: nn.Module) -> list[object]:
    """Everything that decides on the output beside the weight."""
    return [getattr(module, name, None) for name in OPTIONS] + [id(module._parameters.get("bias"))]

"""A network as a function of its parameters, frozen in the state it is in, and measured without leaving a trace."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import UninitializedParameter

from secondorder.curvature.matrix_free.graph import graph_nodes
from secondorder.curvature.matrix_free.layer_uses import LayerUse, recorded_uses
from secondorder.curvature.matrix_free.module_state import ModuleState
from secondorder.curvature.matrix_free.plain_attention import plain_attention
from secondorder.curvature.matrix_free.plain_functions import PlainFunctions, needed_by
from secondorder.curvature.matrix_free.random_state import RandomState
from secondorder.curvature.matrix_free.samples import Samples, arguments_of, floating_tensors
from secondorder.curvature.matrix_free.trial import all_finite, has_numbers
from secondorder.curvature.resuming.keys import Key, digest
from secondorder.errors import InputError, NonFiniteError, check_known
from secondorder.matrix_power.transforms import full_precision
from secondorder.pooling import AdaptiveChannelDropout

WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Modules that only wrap a network, and the attribute that holds it: the network itself is evaluated."""


class FrozenNetwork:
    """f(w) for images `[N, ...]`: the network in its present mode, buffers and random state, parameters w of our own.

    Images may be any `Samples`. `output` makes one tensor `[N, ...]` of what the network returns for N of them, None: it is one.

    w are detached views of the chosen parameters (by default those that require gradients), so that neither hooks on
    parameters nor `.grad` nor `requires_grad` of the network take part; with `copied` they are copies, and so are the other
    parameters: what is written into the network's own later (`.data` does that unnoticed) has no part in f, and what the
    forward pass writes into parameters (`max_norm` of an embedding) is lost. The network's modules are used but left as they
    were: mode, attributes, hooks and random state. Backward hooks do not run; forward hooks do, they may change the output.
    Every evaluation draws the same random numbers (dropout masks). Raises InputError for a network without parameters,
    unknown names, numbers of fewer than 32 bits, images that are not finite, and when parameters were changed after the
    construction. `meta`: parameters may be on the device meta, of a network of which only shapes matter.
    """

    def __init__(
        self,
        network: nn.Module,
        params: Iterable[str] | None = None,
        copied: bool = False,
        output: Callable[[Any, int], Tensor] | None = None,
        meta: bool = False,
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise InputError(
                "curvature needs gradients, which torch.inference_mode() rules out; leave it, or use no_grad"
            )
        if not isinstance(network, nn.Module):
            raise InputError(f"network {type(network).__name__}: must be a torch.nn.Module")
        self.module, self.prefix = unwrapped(network)
        named = {self.prefix + name: p for name, p in self.module.named_parameters()}
        for name, p in named.items():
            if isinstance(p, UninitializedParameter):
                raise InputError(f"parameter {name} is not initialised yet; run the network once before")
            if p.is_meta and not meta:
                raise InputError(f"parameter {name} is on the device 'meta', which holds no numbers")
            if p.is_floating_point() and torch.finfo(p.dtype).bits < 32:
                raise InputError(f"parameter {name} is {p.dtype}, too short for curvature; use network.float()")
        self.parameters = {name: named[name] for name in chosen_names(named, params)}
        for name, p in self.parameters.items():
            if not p.is_floating_point():
                raise InputError(f"parameter {name} is {p.dtype}; curvature is that of real floating-point numbers")
        own = {name: p.detach().clone() if copied else p.detach() for name, p in named.items()}
        self.weights = {name: own[name].requires_grad_() for name in self.parameters}
        self.constants = {name: p for name, p in own.items() if name not in self.weights}
        self._written = self._renormalised() if copied else []
        """The parameters that a forward pass writes into: each pass gets a copy of its own."""
        self._tried = not copied
        self._plain: dict[Callable[..., Any], Callable[..., Any]] | None = None
        """Functions of PyTorch that are to be replaced (`plain_functions`); None: no graph has told of them yet."""
        self.buffers = {self.prefix + name: b.detach().clone() for name, b in self.module.named_buffers()}
        self._modules = ModuleState(self.module)
        self.random = RandomState()
        self._output = output
        self.differentiates_images = False
        """Whether the images require gradients, as a network does that differentiates its outputs with respect to them."""
        first = next(iter(self.weights.values()))
        self.device, self.dtype = first.device, first.dtype
        self._fingerprint: Key | None = None
        self._versions = [(name, p, p._version) for name, p in named.items()]

    def differentiates_constants(self) -> bool:
        """Let parameters that were not chosen require gradients, for a network that differentiates with respect to its own.

        False: they do already. As long as they do not, graphs are smaller.
        """
        constants = [p for p in self.constants.values() if p.is_floating_point() and not p.requires_grad]
        for p in constants:
            p.requires_grad_()
        return bool(constants)

    @property
    def has_numbers(self) -> bool:
        """Whether its parameters hold numbers, and formulas can be tried on it."""
        return all(map(has_numbers, self.weights.values()))

    def outputs(self, images: Samples, weights: Mapping[str, Tensor] | None = None, part: int = 0) -> Tensor:
        """f `[N, ...]`. `part` counts the parts of a batch that is evaluated in pieces: each has random numbers of its own."""
        return self.outputs_and_uses(images, weights, part, {})[0]

    def outputs_and_uses(
        self,
        images: Samples,
        weights: Mapping[str, Tensor] | None,
        part: int,
        layers: Mapping[nn.Module, nn.Module | None],
    ) -> tuple[Tensor, list[LayerUse]]:
        """f, and what went into and came out of the given layers in each use."""
        self.check_unchanged()
        with (
            self.in_place(weights),
            self.random.replayed(part),
            recorded_uses(layers) as uses,
        ):
            x = images.clone()  # networks may write into their input
            for tensor in floating_tensors(x) if self.differentiates_images else ():
                tensor.requires_grad_()
            args, kwargs = arguments_of(x)
            outputs = self.module(*args, **kwargs)
            if self._output is not None:
                outputs = self._output(outputs, len(images))
        if not self._tried:
            self._tried = True
            if written := self._found_written():
                self._written += written
                return self.outputs_and_uses(images, weights, part, layers)
        if self._plain is None and isinstance(outputs, Tensor) and outputs.requires_grad:
            self._plain = {}
            if self.replaces_functions(graph_nodes([outputs])):
                return self.outputs_and_uses(images, weights, part, layers)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != len(images):
            got = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise InputError(f"the network returns {got} for {len(images)} images; it must return one tensor [N, ...]")
        return outputs, uses

    def replaces_functions(self, nodes: Iterable[Node]) -> bool:
        """Have the functions of PyTorch replaced from now on that a graph asks for (`plain_functions`); whether any are new."""
        needed = {f: plain for f, plain in needed_by(nodes).items() if f not in (self._plain or {})}
        self._plain = {**(self._plain or {}), **needed}
        return bool(needed)

    @contextmanager
    def in_place(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Inside, the network's modules compute f of these weights (None: w): for its forward pass, and for backward passes.

        Of those some parts are evaluated again (`torch.utils.checkpoint`).
        """
        buffers = {name: b.clone() for name, b in self.buffers.items()}  # batch norm writes into them
        state = {**self.constants, **buffers, **(self.weights if weights is None else weights)}
        state |= {name: state[name].clone() for name in self._written}
        tensors = {name.removeprefix(self.prefix): tensor for name, tensor in state.items()}
        plain = PlainFunctions(self._plain) if self._plain else nullcontext()
        with (
            self._modules.with_tensors(tensors),
            full_precision(next(iter(tensors.values()))),
            plain_attention(),
            plain,
        ):
            yield

    def _renormalised(self) -> list[str]:
        """The weights of embeddings that make their vectors no longer than `max_norm` whenever these are used."""
        modules = [part for part in self.module.modules() if getattr(part, "max_norm", None) is not None]
        own = {id(p) for part in modules for p in part._parameters.values()}
        return [self.prefix + name for name, p in self.module.named_parameters() if id(p) in own]

    @torch.no_grad()
    def _found_written(self) -> list[str]:
        """Other parameters that differ from the network's after a forward pass; they are then as before."""
        own = {self.prefix + name: p for name, p in self.module.named_parameters()}
        state = {**self.constants, **self.weights}
        written = [name for name, w in state.items() if not _same(w, own[name])]
        for name in written:
            state[name].detach().copy_(own[name])
        return written

    def fingerprint(self) -> Key:
        """What f is made from, as a long run notes it: modules, modes, parameters, buffers, random numbers if it draws any."""
        if self._fingerprint is None:
            tensors = {f"parameter {name}": w for name, w in {**self.weights, **self.constants}.items()}
            tensors |= {f"buffer {name}": b for name, b in self.buffers.items()}
            modes = [self._modules.modes[module] for module in self.module.modules()]
            self._fingerprint = {
                "the network": digest([repr(self.module), modes]),
                "the chosen parameters": digest(list(self.weights)),
                **{name: digest(tensor) for name, tensor in tensors.items()},
            }
        random = {"the random state": digest(self.random.numbers())} if self.random.drawn else {}
        return self._fingerprint | random

    def check_unchanged(self) -> None:
        """InputError when a parameter was written into since the construction, as far as PyTorch tells (not by `.data`)."""
        for name, parameter, version in self._versions:
            if parameter._version != version:
                raise InputError(f"parameter {name} has changed since this curvature was made; make it anew")

    def check_finite(self, outputs: Tensor, images: Samples, part: int = 0) -> None:
        """NonFiniteError that names the first module with a NaN or an infinity in its output, if f has one."""
        if all_finite(outputs):
            return
        found: list[str] = []
        handles = [
            module.register_forward_hook(_finds_non_finite(name or "the network", found))
            for name, module in self.module.named_modules()
        ]
        try:
            with torch.no_grad(), suppress(RuntimeError):  # of derivatives within the network
                self.outputs(images, part=part)
        finally:
            for handle in handles:
                handle.remove()
        where = self.prefix + found[0] if found else "the network"
        raise NonFiniteError(f"the output of {where} contains NaN or infinity; check its weights and input")

    def couples_samples(self) -> str | None:
        """Why a sample's output depends on the other samples of the batch, as far as modules tell, or None."""
        for name, module in self.module.named_modules():
            mode = self._modules.modes[module]
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (mode or module.running_mean is None):
                return f"{self.prefix + name} ({type(module).__name__}) uses the statistics of the whole batch in training mode"
            if mode and isinstance(module, AdaptiveChannelDropout):
                return (
                    f"{self.prefix + name} (AdaptiveChannelDropout) has one rate for the whole batch in training mode"
                )
        return None


def unwrapped(network: nn.Module) -> tuple[nn.Module, str]:
    """The network inside of wrappers, and the prefix of its parameters' names."""
    prefix = ""
    while (attribute := WRAPPERS.get(type(network).__name__)) is not None:
        prefix += attribute + "."
        network = getattr(network, attribute)
    return network, prefix


def chosen_names(named: Mapping[str, nn.Parameter], params: Iterable[str] | None) -> list[str]:
    """The names of the chosen parameters in the network's order."""
    if not named:
        raise InputError("the network has no parameters, so its loss has no curvature")
    if params is None:
        names = [name for name, p in named.items() if p.requires_grad]
        if not names:
            raise InputError("no parameter requires gradients; name those to be analysed in params")
        return names
    if not isinstance(params, Iterable) or isinstance(params, Tensor):
        raise InputError(f"params {params!r}: must be names of parameters, or None for all that require gradients")
    wanted = [params] if isinstance(params, str) else list(params)
    for name in wanted:
        check_known("parameter", name, named)
    if not wanted:
        raise InputError("params is empty; name at least one parameter, or use None for all that require gradients")
    return [name for name in named if name in wanted]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers, NaN being equal to NaN."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _finds_non_finite(name: str, found: list[str]):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            found.append(name)

    return hook

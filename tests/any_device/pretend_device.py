"""A pretend accelerator: tensors that say they live on the device "pretend" and are computed on the CPU.

Without a GPU it finds what a GPU would find: tensors of two devices in one operation, factory calls without ``device=``,
data that was never moved; and it counts the moments at which the CPU would wait for the device. It says nothing about
kernels, streams or speed.

Built on torch's Python backend for the dispatch key PrivateUse1. Importing this module registers it, once for the whole
process and for good: the files of this folder run in a process of their own (see `tests/test_any_device.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch

aten = torch.ops.aten
CPU, META = torch.device("cpu"), torch.device("meta")
float64 = True
"""Whether the device has double precision; a test may take it away, as Apple's MPS has none."""
waits: list[str] = []
"""The name of the operation for each moment at which the CPU would wait for the device."""

WAITING = {
    aten._local_scalar_dense.default,  # item, float, int, bool, a condition
    aten.equal.default,
    aten.nonzero.default,  # and all whose result has a size that depends on values
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten._linalg_check_errors.default,  # of linalg.cholesky, solve, inv
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
    aten._linalg_eigvals.default,
    aten.linalg_eig.default,
    aten.linalg_lstsq.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""CUDA, too, takes indices on the CPU here; a mask as index waits for the number of its elements."""
COPIES = {aten._to_copy.default, aten.copy_.default}
SPECIAL = WAITING | INDEXING | COPIES


FACTORIES = (
    *("eye", "eye.m", "arange", "arange.start", "arange.start_step", "randperm", "randperm.generator"),
    *("linspace", "logspace", "range", "range.step"),
)


SHORTENED = ("conv2d", "linear", "matmul")


class _Module(backend_registration._DummyBackendModule):
    """``torch.pretend``: one device, random numbers from the CPU's generator."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def get_device_name(self, device: object = None) -> str:
        return "a pretend accelerator"

    def synchronize(self, device: object = None) -> None:
        waits.append("synchronize")


class PretendTensor(Tensor):
    """A tensor on the pretend device; `inner` is the CPU tensor that it wraps."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendTensor":
        if inner.dtype is torch.float64 and not float64:
            raise TypeError("the pretend device has no float64 now")
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=HERE,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def __repr__(self, **kwargs: object) -> str:
        return f"pretend({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """torch's own would copy the CPU memory that data_ptr() shows."""
        if id(self) not in memo:
            copied = PretendTensor(self.inner.detach().clone())
            kept = isinstance(self, nn.Parameter)
            memo[id(self)] = (
                nn.Parameter(copied, self.requires_grad) if kept else copied.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file holds the CPU's numbers, as those that ``map_location="cpu"`` reads."""
        waits.append("save")
        return self.inner.detach().__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:
        """The same memory; what is assigned, e.g. by ``module.double()``, brings its own."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner  # type: ignore[attr-defined]

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` on the CPU tensors inside; refuses tensors of two devices, notes what waits."""
    remote: list[PretendTensor] = []
    strangers: list[Tensor] = []
    local_args = [_unwrapped(a, remote, strangers) for a in args]
    local_kwargs = {name: _unwrapped(a, remote, strangers) for name, a in kwargs.items()} if kwargs else {}
    device = local_kwargs.get("device")
    target = None if device is None else torch.device(device)
    if target == META or (strangers and any(tensor.is_meta for tensor in strangers)):
        return func(*local_args, **local_kwargs)  # shapes alone, which torch asks for on its way
    if func in SPECIAL:
        if func in WAITING and remote:
            waits.append(str(func))
        if func in COPIES:
            return _copied(func, args, local_args, local_kwargs, target)
        if func in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None):
            waits.append(f"{func} by a mask")
    elif remote and strangers:
        shapes = [list(tensor.shape) for tensor in strangers]
        raise RuntimeError(f"{func}: expected all tensors on the device pretend; on the CPU: {shapes}")
    writes = func._schema.is_mutable
    if writes and torch.Tag.inplace_view in func.tags:
        return _reshaped(func, args, kwargs)
    if target is not None:
        local_kwargs["device"] = CPU
    result = func(*local_args, **local_kwargs)
    if target == CPU or not (remote or target is not None):
        return result
    if writes and any(tensor.shape != tensor.inner.shape for tensor in remote):
        raise NotImplementedError(f"{func} resizes a tensor in place, which the pretend device cannot follow")
    return _wrapped(result, {id(tensor.inner): tensor for tensor in remote} if writes else {})


def _reshaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What changes the shape of a tensor alone, in place: done to the wrapper, then to what it wraps."""
    with no_dispatch():
        tensor = func(*args, **kwargs)
    tensor.inner = tensor.inner.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    return tensor


def _copied(func: Any, args: Any, local_args: Any, local_kwargs: Any, target: torch.device | None) -> Tensor:
    """Copies are the only way from one device to the other; the CPU waits for what comes back."""
    source = args[0] if func is aten._to_copy.default else args[1]
    if func is aten.copy_.default:
        if isinstance(source, PretendTensor) and not isinstance(args[0], PretendTensor):
            waits.append("copy to the CPU")
        func(*local_args, **local_kwargs)
        return args[0]
    target = target or source.device
    if isinstance(source, PretendTensor) and target == CPU:
        waits.append("copy to the CPU")
    copied = func(*local_args, **{**local_kwargs, "device": CPU})
    return copied if target == CPU else PretendTensor(copied)


def _unwrapped(value: Any, remote: list[PretendTensor], strangers: list[Tensor]) -> Any:
    """`value` with the CPU tensors that pretend ones wrap; collects these, and CPU tensors that are no numbers."""
    if isinstance(value, PretendTensor):
        if value.shape != value.inner.shape:  # after a change of the shape alone, in place
            value.inner = value.inner.as_strided(value.size(), value.stride(), value.storage_offset())
        remote.append(value)
        return value.inner
    if isinstance(value, Tensor):
        if value.ndim > 0:
            strangers.append(value)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_unwrapped(item, remote, strangers) for item in value)
    return value


def _wrapped(value: Any, known: dict[int, PretendTensor]) -> Any:
    if isinstance(value, Tensor):
        return known.get(id(value)) if id(value) in known else PretendTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_wrapped(item, known) for item in value)
    return value


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **options: Any) -> Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype, device=CPU))


def _empty(size: Any, dtype: Any = None, memory_format: Any = None, **options: Any) -> Tensor:
    layout = memory_format or torch.contiguous_format
    return PretendTensor(torch.empty(size, dtype=dtype, device=CPU, memory_format=layout))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return _compute(aten.copy_.default, (target, source), {})


def _zero_tensor(size: Any, dtype: Any = None, **options: Any) -> Tensor:
    return PretendTensor(torch.zeros(size, dtype=dtype, device=CPU))


def _factory(name: str) -> Callable[..., Tensor]:
    """A factory whose composite kernel would resize an empty tensor."""
    packet, _, overload = name.partition(".")
    made = getattr(getattr(aten, packet), overload or "default")

    def on_the_device(*args: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Tensor:
        return PretendTensor(made(*args, device=CPU, **options))

    return on_the_device


def _shortened(name: str) -> Callable[..., Tensor]:
    """What mixed precision computes in 16 bits."""
    function, autocast = getattr(aten, name), torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def in_short(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype("pretend")
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return function(*(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))

    return in_short


def _register() -> list[torch.library.Library]:
    """Make "pretend" a device of torch; the libraries must be kept."""
    backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
    kernels: dict[str, Callable[..., Tensor]] = {
        "empty_strided": _empty_strided,
        "empty.memory_format": _empty,
        "_copy_from": _copy_from,
        "_efficientzerotensor": _zero_tensor,
    }
    kernels |= {name: _factory(name) for name in FACTORIES}
    own, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for name, kernel in kernels.items():
        own.impl(name, kernel, "PrivateUse1")
    every.fallback(lambda func, *args, **kwargs: _compute(func, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in SHORTENED:
        own.impl(name, _shortened(name), "AutocastPrivateUse1")
    # the Python guard of torch 2.11 to 2.14 has no method for this
    torch._C._accelerator_synchronizeDevice = lambda index: waits.append("synchronize")
    return [own, every]


@contextmanager
def counted() -> Iterator[list[str]]:
    """The waits inside, in their order."""
    start = len(waits)
    found: list[str] = []
    try:
        yield found
    finally:
        found += waits[start:]


_LIBRARIES = _register()
HERE = torch.device("pretend", 0)

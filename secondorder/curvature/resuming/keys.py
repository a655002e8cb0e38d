"""What a result was made from, in few characters: digests of tensors, losses, settings."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.errors import short

Key = dict[str, Any]
"""What something is made from -> its value or digest; a tensor is compared up to rounding."""
MARK = "#"
"""First character of a digest, which says nothing to a reader."""


def digest(value: object) -> str:
    """A digest of a tensor, a plain value, a structure or dataclass of these, a module's settings, or a function's name."""
    found = hashlib.blake2b(digest_size=12)
    _add(value, found)
    return MARK + found.hexdigest()


def _add(value: object, found: Any) -> None:
    found.update(f"{type(value).__name__}:".encode())
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous()
        found.update(f"{numbers.dtype}{list(numbers.shape)}".encode())
        found.update(numbers.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, nn.Module):
        plain = {name: v for name, v in vars(value).items() if isinstance(v, bool | int | float | str | type(None))}
        _add({**plain, **value.state_dict(keep_vars=True)}, found)
    elif is_dataclass(value) and not isinstance(value, type):
        _add({field.name: getattr(value, field.name) for field in fields(value)}, found)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _add(name, found)
            _add(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _add(item, found)
    elif isinstance(value, bool | int | float | str | bytes | type(None) | slice):
        found.update(repr(value).encode())
    elif hasattr(value, "leaves"):  # labels in a structure
        _add(value.leaves, found)
    elif callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        found.update(f"{getattr(value, '__module__', '')}.{name}".encode())


def difference(key: Key, kept: Key) -> str | None:
    """In words, what is not the same in two keys; None where nothing is."""
    for name in [*key, *(name for name in kept if name not in key)]:
        if name not in key or name not in kept:
            return f"{name} is {'new' if name in key else 'gone'}"
        new, old = key[name], kept[name]
        if isinstance(new, Tensor) and isinstance(old, Tensor):
            if not _close(new, old):
                return f"{name} has changed"
        elif type(new) is not type(old) or new != old:
            digests = isinstance(new, str) and new.startswith(MARK)
            return f"{name} has changed" if digests else f"{name} is {short(new)}, was {short(old)}"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether numbers are the same up to rounding that differs between two runs on one machine."""
    if a.shape != b.shape:
        return False
    tolerance = torch.finfo(a.dtype).eps ** 0.5 * b.abs().max() if a.numel() else 0.0
    return bool(((a - b).abs() <= tolerance).all())

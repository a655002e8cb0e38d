"""What a refused call must leave as it was: the process's own state, and the modules, optimisers and tensors it was given."""

import hashlib
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import sklearn  # noqa: F401  sets variables of the environment when it is first imported, by a data set say
import torch
import torch._dynamo  # sets a variable of the environment when it is first imported, by a torch optimiser say
from torch import Tensor, nn


def process_state() -> dict[str, Any]:
    """The global state by name."""
    return {
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "working folder": os.getcwd(),  # noqa: PTH109  as it is, not resolved
        "environment": tuple(sorted(os.environ.items())),
    }


def random_state() -> dict[str, Any]:
    """The state of the global generators."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "NumPy's random state": str(numpy),
        "Python's random state": random.getstate(),
    }


def fingerprint(thing: Any) -> str:
    """A digest of all numbers, flags and names in a module, an optimiser, a tensor, or nested containers of them."""
    digest = hashlib.sha256()
    _add(digest, thing)
    return digest.hexdigest()


def _add(digest: Any, thing: Any) -> None:
    match thing:
        case Tensor():
            digest.update(f"{thing.dtype}{list(thing.shape)}{thing.requires_grad}{thing.layout}".encode())
            plain = thing.detach()
            plain = plain.to_dense() if plain.layout != torch.strided else plain
            if not plain.is_meta:
                digest.update(
                    plain.contiguous().flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
                )
        case nn.Module():
            for name, part in thing.named_modules():
                hooks = [len(getattr(part, kind)) for kind in HOOKS]
                digest.update(f"{name}{type(part).__name__}{part.training}{hooks}".encode())
            for name, tensor in (*thing.named_parameters(), *thing.named_buffers()):
                digest.update(name.encode())
                _add(digest, tensor)
                _add(digest, tensor.grad if isinstance(tensor, nn.Parameter) else None)
        case torch.optim.Optimizer():
            _add(digest, thing.state_dict())
        case Mapping():
            for key, value in thing.items():
                digest.update(repr(key).encode())
                _add(digest, value)
        case list() | tuple():
            for value in thing:
                _add(digest, value)
        case np.ndarray():
            digest.update(thing.tobytes())
        case _:
            digest.update(repr(thing).encode())


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

"""BackPACK's quantities: extensions, networks, batches and arguments of all kinds, against curvature_blocks."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from backpack import extensions
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks
from secondorder.curvature.backpack import backpack_network, backpack_quantity, register, supports

from .call import Call, shown
from .curvature import ODD, USERS, Odd, batch_for, chain
from .values import absurd, bad_tensor, named

EXTENSIONS: dict[str, Callable[[], Any]] = {
    "BatchGrad": extensions.BatchGrad,
    "SumGradSquared": extensions.SumGradSquared,
    "Variance": extensions.Variance,
    "DiagGGNExact": extensions.DiagGGNExact,
    "DiagGGNMC": extensions.DiagGGNMC,
    "DiagHessian": extensions.DiagHessian,
    "KFAC": extensions.KFAC,
    "KFLR": extensions.KFLR,
    "SqrtGGNExact": extensions.SqrtGGNExact,
    "KFRA": extensions.KFRA,
    "GGNMP": extensions.GGNMP,
    "HMP": extensions.HMP,
}


def backpack(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((truth, bad_argument, bad_argument, bad_network, others))(random)


def truth(random: Random) -> Call:
    """The diagonal of the Gauss-Newton matrix is that of the exact block."""
    model, loss = (
        chain(random),
        random.choice((nn.CrossEntropyLoss(), nn.MSELoss(), nn.CrossEntropyLoss(reduction="sum"))),
    )
    batch = batch_for(random, loss)
    name = random.choice(("DiagGGNExact", "DiagHessian"))
    quantity = {"DiagGGNExact": "ggn", "DiagHessian": "hessian"}[name]
    chunk = random.choice((None, 1, 2))

    def check(found: dict[str, Tensor]) -> str | None:
        blocks = curvature_blocks(model, loss, batch, quantity)
        for key, value in found.items():
            right = blocks[key].dense().diagonal()
            if not (value.flatten() - right).abs().max() <= 1e-7 * right.abs().max() + 1e-14:
                return f"the diagonal of {key} is not that of the exact block"
        return None if set(found) == set(blocks) else "not all parameters"

    run = lambda: backpack_quantity(model, loss, batch, EXTENSIONS[name](), chunk=chunk)  # noqa: E731
    words = f"backpack_quantity({type(model[2]).__name__}, {type(loss).__name__}, {name}, chunk={chunk})"
    return Call(words, run, watched=(model,), check=check, pure=True)


def bad_argument(random: Random) -> Call:
    """One argument that is absurd or does not fit."""
    model: Any = chain(random)
    loss = nn.CrossEntropyLoss()
    x, y = batch_for(random, loss)
    given: dict[str, Any] = {
        "network": model,
        "loss": loss,
        "batch": (x, y),
        "extension": random.choice(list(EXTENSIONS.values()))(),
    }
    field = random.choice((*given, "chunk", "memory", "seed", "loss", "batch"))
    bad: dict[str, Any] = {
        "loss": random.choice(
            (
                nn.CrossEntropyLoss(reduction="none"),
                nn.NLLLoss(),
                nn.MSELoss(),
                nn.CrossEntropyLoss,
                nn.CrossEntropyLoss(torch.ones(3)),
            )
        ),
        "batch": random.choice(
            (
                (bad_tensor(random, x), y),
                (x, bad_tensor(random, y.double())),
                (x,),
                (x, y + 9),
                (x.float(), y),
                (x, y[:1]),
            )
        ),
        "extension": random.choice((extensions.KFAC, extensions.DiagGGNExact, nn.ReLU(), "KFAC")),
    }
    value = bad[field] if field in bad and random.random() < 0.7 else absurd(random)
    given[field] = value
    names = (field, named(value)) if field in ("chunk", "memory", "seed") else ()
    words = f"backpack_quantity({type(given['extension']).__name__}, {field}={shown(value)})"
    return Call(words, lambda: backpack_quantity(**given), names=names, watched=(model,), pure=True)


def bad_network(random: Random) -> Call:
    """Networks with layers that BackPACK cannot walk through."""
    kind = random.choice((*ODD, "absurd", "frozen", "half", "no loss layer", "lstm", "shared", "empty", "training"))
    made: dict[str, Callable[[], Any]] = {
        "absurd": lambda: absurd(random),
        "frozen": lambda: chain(random).requires_grad_(False),
        "half": lambda: chain(random).half(),
        "no loss layer": lambda: nn.Sequential(nn.Conv2d(1, 2, 3)).double(),
        "lstm": lambda: nn.Sequential(nn.Flatten(2), nn.LSTM(16, 3)).double(),
        "shared": lambda: nn.Sequential(nn.Flatten(), layer := nn.Linear(16, 16), layer, nn.Linear(16, 3)).double(),
        "empty": nn.Sequential,
        "training": lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
        ).double(),
    }
    model = Odd(ODD[kind]) if kind in ODD else made[kind]()
    name = random.choice(list(EXTENSIONS))
    batch = batch_for(random, nn.CrossEntropyLoss())
    run = lambda: backpack_quantity(model, nn.CrossEntropyLoss(), batch, EXTENSIONS[name]())  # noqa: E731
    watched = (model,) if isinstance(model, nn.Module) else ()
    words = f"backpack_quantity({name}), network {kind} {shown(model) if kind == 'absurd' else ''}"
    return Call(words, run, watched=watched, pure=True, raises=USERS if "error" in kind or kind == "division" else ())


def others(random: Random) -> Call:
    """register, supports and backpack_network of anything."""
    name = random.choice(list(EXTENSIONS))
    value, model = absurd(random), chain(random)
    calls: dict[str, Callable[[], Any]] = {
        "register(it)": lambda: register(value),
        "supports(it, name)": lambda: supports(value, name),
        "supports(model, it)": lambda: supports(model, value),
        "backpack_network(it)": lambda: backpack_network(value),
    }
    words = random.choice(list(calls))
    return Call(f"{words}, it = {shown(value)}", calls[words])

"""Tiny trainings on digits with bad arguments, data sets, folders and checkpoints."""

import tempfile
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from secondorder.data import ImageDataset, load_dataset
from secondorder.networks import network
from secondorder.training import Run, check_run, evaluate, train

from .call import Call, arguments, shown
from .values import absurd, named


@lru_cache
def digits(limit: int = 16) -> ImageDataset:
    """Very few images."""
    return load_dataset("digits", limit=limit, test_limit=8)


def tiny(**changes: Any) -> Run:
    """A run of two steps."""
    settings: dict[str, Any] = {"backbone": "digits_tiny", "pooling": "gcp", "dataset": "digits", "epochs": 1}
    return Run(**(settings | {"batch_size": 8, "learning_rate": 0.1} | changes))


def training(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((bad_argument, bad_argument, options, resumed, evaluation, evaluation, fit))(random)


def in_folder(run: Run | Any, data: Any, **settings: Any) -> Any:
    """train in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return train(run, data, **({"folder": Path(folder), "progress": False} | settings))


def bad_argument(random: Random) -> Call:
    """train with one absurd argument."""
    field = random.choice(("run", "data", "folder", "observers", "resume", "checkpoint_every", "progress", "workers"))
    value = absurd(random)
    if field == "workers" and isinstance(value, int) and value > 16:
        value = 3
    if field == "folder" and isinstance(value, str | Path):
        value = random.choice(("/proc/no", "/dev/null", "\0", "x" * 5000, Path("/proc/1/x")))
    if field == "progress":
        value = random.choice((False, 0, None))
    given: dict[str, Any] = {"run": tiny(), "data": digits()} | {field: value}
    return Call(f"train({field}={shown(value)})", lambda: in_folder(**given), names=(field, named(value)), pure=True)


def options(random: Random) -> Call:
    """Optimisers and poolings with absurd options, learning rates at the ends of float32."""
    from secondorder.pooling import POOLINGS
    from secondorder.training import OPTIMIZERS

    value = absurd(random)
    settings: dict[str, Any] = {
        "optimizer": random.choice(list(OPTIMIZERS)),
        "pooling": random.choice(list(POOLINGS)),
        "learning_rate": random.choice((0.0, 1e-300, 0.1, 1.0, 1e3, 1e30, 3e38)),
        "weight_decay": random.choice((0.0, 1e-300, 1e-4, 1.0, 1e30)),
        "image_size": random.choice((None, None, 8)),
    }
    if isinstance(value, bool | int | float | str | None):
        option = random.choice(("damping", "momentum", "lr", "eps", "nesterov", "x", "clip", "factor_interval"))
        settings["optimizer_options"] = random.choice(({}, {}, {option: value}))
        settings["pooling_options"] = random.choice(
            ({}, {}, {random.choice(("num_iter", "eps", "y")): min_steps(value)})
        )
    return Call(
        f"train(Run({arguments(settings)}))", lambda: in_folder(tiny(**settings), digits()), pure=True, check=finite
    )


def min_steps(value: Any) -> Any:
    """Of Newton-Schulz steps, as many as take no time."""
    return value if not isinstance(value, int) or isinstance(value, bool) or value < 10**4 else 10**4


def finite(trained: Any) -> str | None:
    """A training that ends has finite weights and losses."""
    tensors = [*trained.model.state_dict().values(), torch.tensor(trained.step_losses)]
    return None if all(bool(t.isfinite().all()) for t in tensors) else "weights or losses that are not finite"


def resumed(random: Random) -> Call:
    """A checkpoint that was mutilated, or is none."""
    damage = random.choice(("cut", "flip", "empty", "text", "state_dict", "list", "keys", "folder", "whole", "tensor"))
    place, other = random.random(), tiny(seed=random.choice((0, 0, 1)))
    foreign = nn.Linear(2, 2).state_dict()

    def run() -> Any:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            train(tiny(), digits(), folder, progress=False)
            mutilate(folder / "checkpoint.pt", damage, place, foreign)
            return train(other, digits(), folder, progress=False, resume=True)

    return Call(
        f"train(resume=True) of a checkpoint: {damage} at {place:.3f}, seed {other.seed}", run, pure=True, check=finite
    )


def mutilate(file: Path, damage: str, place: float, foreign: dict[str, Any]) -> None:
    """Damage a file at a place in [0, 1)."""
    content = bytearray(file.read_bytes())
    at = int(place * len(content))
    if damage == "cut":
        file.write_bytes(content[:at])
    elif damage == "flip":
        content[at] ^= 0x55
        file.write_bytes(content)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("no checkpoint")
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage != "whole":
        state = torch.load(file, weights_only=True)
        keys = list(state)
        others: dict[str, Any] = {"state_dict": foreign, "list": [1, 2], "tensor": torch.zeros(3)}
        others["keys"] = {key: value for key, value in state.items() if key != keys[int(place * len(keys))]}
        torch.save(others[damage], file)


def evaluation(random: Random) -> Call:
    """evaluate with one absurd argument."""
    model: Any = network("digits_tiny", random.choice(("gap", "gcp")), 10, 1)
    given: dict[str, Any] = {"model": model, "dataset": digits().test}
    field = random.choice(("model", "dataset", "batch_size", "amp", "channels_last", "none"))
    value = random.choice((absurd(random), absurd(random), "bfloat16")) if field == "amp" else absurd(random)
    if field != "none":
        given[field] = value

    def check(found: Any) -> str | None:
        fits = 0 <= found.top1 <= found.top5 <= 1 and found.loss >= 0
        return None if fits else f"{found}"

    words = f"evaluate({field}={shown(value)})"
    return Call(words, lambda: evaluate(**given), names=(field, named(value)), watched=(model,), check=check, pure=True)


def fit(random: Random) -> Call:
    """check_run of a run that does not fit the data."""
    changes = {
        "dataset": random.choice(("digits", "cifar10", "fake")),
        "batch_size": random.choice((1, 16, 17, 10**9)),
        "train_limit": random.choice((None, 16, 15)),
        "image_size": random.choice((None, 8, 9, 10**30)),
        "backbone": random.choice(("digits_tiny", "resnet18", "cifar_resnet8")),
        "reduced_channels": random.choice((None, 4, 10**9)),
    }
    field = random.choice(list(changes))
    return Call(
        f"check_run({field}={changes[field]})", lambda: check_run(tiny(**{field: changes[field]}), digits()), pure=True
    )

"""Lines through the loss and planes: bad arguments, and a quadratic in closed form."""

from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.landscape import (
    equally_spaced,
    feature_landscape,
    filter_normalised_direction,
    landscape_plane,
    optimiser_step,
    parameter_directions,
    weight_landscape,
)
from secondorder.networks import network

from .call import Call, arguments, shown
from .values import absurd, bad_tensor, named, normal


def landscape(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((spacing, bad_argument, bad_argument, bad_plane, bad_vectors, quadratic))(random)


def spacing(random: Random) -> Call:
    """equally_spaced of anything."""
    settings: dict[str, Any] = {"low": 0.1, "high": 1.0, "points": 5}
    field = random.choice(list(settings))
    value = absurd(random)
    if field == "points" and isinstance(value, int) and value > 10**6:
        value = 10**6
    settings[field] = value

    def check(etas: Tensor) -> str | None:
        fine = etas.dtype == torch.float64 and bool(etas.isfinite().all()) and bool((etas > 0).all())
        return None if fine and len(etas) == settings["points"] else f"{shown(etas)}"

    return Call(
        f"equally_spaced({arguments(settings)})",
        lambda: equally_spaced(**settings),
        names=(field, named(value), "range"),
        check=check,
    )


def bad_argument(random: Random) -> Call:
    """A line with one argument that is absurd or does not fit."""
    model: Any = network("digits_tiny", random.choice(("gap", "gcp")), 3, 1)
    images, labels = normal(random, 4, 1, 8, 8, dtype=torch.float32), torch.arange(4) % 3
    given: dict[str, Any] = {"model": model, "loss": F.cross_entropy, "images": images, "labels": labels}
    function = random.choice((feature_landscape, weight_landscape, optimiser_step))
    if function is optimiser_step:
        given["optimiser"] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        given["etas"] = equally_spaced(0.1, 1.0, 3)
    own = {feature_landscape: "direction", weight_landscape: "step"}.get(function, "optimiser")
    field = random.choice([*given, own])
    bad = {
        "images": lambda: bad_tensor(random, images),
        "labels": lambda: random.choice((bad_tensor(random, labels.float()), labels[:3], labels + 5, labels.float())),
        "loss": lambda: random.choice(
            (nn.CrossEntropyLoss(reduction="none"), lambda z, y: 1.0, lambda z, y: z.sum() * torch.nan)
        ),
        "step": lambda: random.choice(([torch.zeros(2)], [absurd(random)] * len(list(model.parameters())))),
        "etas": lambda: random.choice(
            (bad_tensor(random, torch.ones(3)), torch.zeros(3), [0.1, 0.2], torch.tensor([-1.0]))
        ),
        "model": lambda: random.choice((nn.Linear(2, 2), nn.Sequential(), model.requires_grad_(False))),
    }
    value = bad[field]() if field in bad and random.random() < 0.6 else absurd(random)
    if field == "labels" and isinstance(value, Tensor):
        value = (
            value.long()
            if value.ndim and random.random() < 0.5 and not value.is_complex() and not value.is_meta
            else value
        )
    given[field] = value

    words = f"{function.__name__}({field}={shown(value)})"
    return Call(words, lambda: function(**given), watched=(model,), pure=True)


def bad_plane(random: Random) -> Call:
    """A plane, or a direction for it, with one argument that is absurd or does not fit."""
    model: Any = network("digits_tiny", random.choice(("gap", "gcp")), 3, 1)
    images, labels = normal(random, 4, 1, 8, 8, dtype=torch.float32), torch.arange(4) % 3
    if random.random() < 0.3:
        given: dict[str, Any] = {"model": model}
        field = random.choice(("model", "seed", "normalisation", "vectors"))
        given[field] = absurd(random)
        words = f"filter_normalised_direction({field}={shown(given[field])})"
        return Call(words, lambda: filter_normalised_direction(**given), watched=(model,), pure=True)
    d = filter_normalised_direction(model)
    given = {"model": model, "loss": F.cross_entropy, "batches": [(images, labels)], "first": d, "second": d}
    given["x"] = torch.tensor([0.0, 1.0])
    field = random.choice([*given, "y", "batch_norm", "reduction"])
    bad = {
        "batches": lambda: random.choice(
            (
                (bad_tensor(random, images), labels),
                [(images, bad_tensor(random, labels.float()))],
                [(images, labels), absurd(random)],
                iter([(images, labels), (images, labels[:2])]),
            )
        ),
        "first": lambda: d | {"stem.0.weight": bad_tensor(random, d["stem.0.weight"])},
        "second": lambda: random.choice(({"nowhere": images}, {3: images}, [*d.values()][:-1])),
        "x": lambda: bad_tensor(random, torch.ones(3)),
        "loss": lambda: random.choice((nn.CrossEntropyLoss(reduction="none"), lambda z, y: 1.0)),
    }
    given[field] = bad[field]() if field in bad and random.random() < 0.6 else absurd(random)
    words = f"landscape_plane({field}={shown(given[field])})"
    return Call(words, lambda: landscape_plane(**given), watched=(model,), pure=True)


def bad_vectors(random: Random) -> Call:
    """Vectors that do not fit a model's parameters."""
    model = nn.Linear(2, 2)
    given: dict[str, Any] = {"vectors": normal(random, 6, 2), "model": model, "params": None}
    field = random.choice([*given])
    given[field] = bad_tensor(random, given["vectors"]) if field == "vectors" else absurd(random)
    words = f"parameter_directions({field}={shown(given[field])})"
    return Call(words, lambda: parameter_directions(**given), watched=(model,), pure=True)


class Quadratic(nn.Module):
    """stem: the identity; rest: x -> x A x / 2 for each image."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=A.dtype))
        self.A = A

    def stem(self, images: Tensor) -> Tensor:
        """The images."""
        return images * 1

    def rest(self, activation: Tensor) -> Tensor:
        """The values [N]."""
        return self.scale * (activation @ self.A * activation).sum(-1) / 2


def quadratic(random: Random) -> Call:
    """Loss, gradient distance and beta of a quadratic in closed form."""
    C, direction = random.randint(1, 4), random.choice(("ascent", "descent"))
    root = normal(random, C, C)
    A, x = root @ root.mT, normal(random, 1, C)
    etas = equally_spaced(0.1, random.choice((0.2, 2.0, 100.0)), random.randint(1, 4))
    model, sign = Quadratic(A), 1.0 if direction == "ascent" else -1.0

    def check(line: Any) -> str | None:
        g = (x @ A)[0]
        distances = etas * float((A @ g).norm())
        losses = torch.stack([(x[0] + sign * e * g) @ A @ (x[0] + sign * e * g) / 2 for e in etas])
        beta = float((A @ g).norm() / g.norm())
        wrong = [
            name
            for name, a, b in (
                ("loss", line.loss, losses),
                ("distance", line.gradient_distance, distances),
                ("beta", torch.tensor(line.beta, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)),
            )
            if not torch.allclose(a.double(), b, rtol=1e-8)
        ]
        return f"{wrong[0]} is not that of the quadratic" if wrong else None

    run = lambda: feature_landscape(model, lambda z, y: z.sum(), x, torch.zeros(1), etas, direction)  # noqa: E731
    return Call(f"a quadratic in {C} dimensions, {direction}", run, watched=(model,), check=check, pure=True)

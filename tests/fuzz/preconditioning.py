"""Head spectra, backward passes, directions and conjugate gradients."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.pooling import pooling_head
from secondorder.preconditioning import (
    alignment,
    bootstrap_interval,
    conjugate_gradients,
    gcp_backward,
    head_spectrum,
    kfac_direction,
    loss_gradient,
    natural_gradient_direction,
    partial_correlation,
    whitened_features,
)
from secondorder.preconditioning.backward import FORMS

from .call import Call, arguments, shown
from .curvature import batch_for, chain
from .pooling import shape_of
from .values import absurd, bad_tensor, named, normal

HEADS: dict[str, dict[str, Any]] = {
    "gap": {}, "covariance": {}, "gcp": {"num_iter": 5}, "gcp_exact": {}, "gcp_power": {"exponent": 0.7},
    "gcp_log": {"eps": 0.01}, "gap_lifted": {},
}  # fmt: skip


def preconditioning(random: Random) -> Call:
    """Any of the kinds below."""
    kinds = (
        spectrum,
        bad_spectrum,
        backward,
        bad_backward,
        solver,
        bad_solver,
        direction,
        bad_direction,
        angles,
        resampled,
    )
    return random.choice(kinds)(random)


def maps(random: Random) -> Tensor:
    """Feature maps of some rank and size."""
    N, C, H, W = random.randint(1, 2), random.randint(1, 5), random.randint(1, 3), random.randint(2, 4)
    x = normal(random, N, C, H, W) * random.choice((1.0, 1.0, 1e-10, 1e10))
    if C > 1 and random.random() < 0.3:
        x[:, 0] = x[:, 1]
    return x


def spectrum(random: Random) -> Call:
    """The closed form against the dense Jacobian."""
    x, name = maps(random), random.choice(list(HEADS))

    def check(pair: Any) -> str | None:
        a, b = (found.singular_values for found in pair)
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        return None if error <= 1e-4 * largest else f"differ by {error:.2g} of {largest:.2g}"

    options = HEADS[name]
    run = lambda: (head_spectrum(x, name, **options), head_spectrum(x, name, exact=True, **options))  # noqa: E731
    return Call(
        f"head_spectrum({list(x.shape)} x {float(x.abs().max()):.2g}, {name}), closed and dense",
        run,
        check=check,
        pure=True,
    )


def bad_spectrum(random: Random) -> Call:
    """One absurd argument."""
    x: Any = maps(random)
    name = random.choice(list(HEADS))
    settings = {"pooling": name} | HEADS[name]
    field = random.choice(
        ("features", "pooling", "exact", "coordinates", "trace_term", "num_iter", "exponent", "eps", "x")
    )
    value = absurd(random)
    if field == "features":
        x = bad_tensor(random, x) if random.random() < 0.8 else value
    elif field == "num_iter" and isinstance(value, int) and value > 100:
        settings["num_iter"] = 30
    else:
        settings[field] = value
    words = f"head_spectrum({shape_of(x)}, {arguments(settings)})"
    return Call(
        words,
        lambda: head_spectrum(x, **settings),
        names=() if field == "features" else (field, named(value)),
        pure=True,
    )


def backward(random: Random) -> Call:
    """The exact form is the gradient of the head with the exact root."""
    x = maps(random)
    C = x.shape[1]
    G = normal(random, len(x), C * (C + 1) // 2)
    full_rank = x.shape[2] * x.shape[3] > C and not (C > 1 and torch.equal(x[:, 0], x[:, 1]))

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        gradient = torch.autograd.grad(pooling_head("gcp_exact", C)(leaf), leaf, G)[0]
        return gcp_backward(x, G), gradient

    def check(pair: tuple[Tensor, Tensor]) -> str | None:
        a, b = pair
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        return None if not full_rank or error <= 1e-5 * largest else f"differ by {error:.2g} of {largest:.2g}"

    return Call(f"gcp_backward({list(x.shape)})", run, check=check, pure=True)


def bad_backward(random: Random) -> Call:
    """Features, gradients and forms that do not fit."""
    x: Any = maps(random)
    C = x.shape[1]
    G: Any = normal(random, len(x), C, C)
    form: Any = random.choice(list(FORMS))
    which = random.choice(("features", "gradient", "form", "whitened"))
    if which in ("features", "whitened"):
        x = random.choice((bad_tensor(random, x), absurd(random)))
    elif which == "gradient":
        G = random.choice((bad_tensor(random, G), absurd(random), G[..., :1]))
    else:
        form = absurd(random)
    if which == "whitened":
        return Call(f"whitened_features({shape_of(x)})", lambda: whitened_features(x), pure=True)
    return Call(
        f"gcp_backward({shape_of(x)}, {shape_of(G)}, {shown(form)})", lambda: gcp_backward(x, G, form), pure=True
    )


def solver(random: Random) -> Call:
    """Conjugate gradients against a dense solution, of any size of the right side."""
    P = random.randint(1, 6)
    root, scale = normal(random, P, P), random.choice((1.0, 1e-200, 1e200, 1e-300))
    A, b = root @ root.mT + torch.eye(P).double(), normal(random, P) * scale
    damping = random.choice((0.0, 0.1, 10.0))

    def check(found: Any) -> str | None:
        right = torch.linalg.solve(A + damping * torch.eye(P).double(), b / scale) * scale
        error = float(((found.x - right) / scale).norm() / (right / scale).norm())
        return None if error <= 1e-6 and found.converged else f"off by {error:.2g}: {found.status}"

    run = lambda: conjugate_gradients(lambda v: A @ v, b, damping=damping, tolerance=1e-10)  # noqa: E731
    return Call(f"conjugate_gradients([{P}] x {scale:g}, {damping})", run, check=check, pure=True)


def bad_solver(random: Random) -> Call:
    """One absurd argument, or a product that is no matrix."""
    A, b = torch.eye(3).double(), normal(random, 3)
    settings: dict[str, Any] = {"product": lambda v: A @ v, "b": b}
    products: tuple[Callable[[Tensor], Any], ...] = (
        lambda v: -v, lambda v: v[:2], lambda v: v * math.nan, lambda v: None, lambda v: "x", lambda v: v.float(),
        lambda v: v.tolist(),
        lambda v: v.flip(0) - 3 * v, lambda v: 0 * v,
    )  # fmt: skip
    field = random.choice(("product", "product", "b", "damping", "tolerance", "iterations", "start"))
    bad: dict[str, Any] = {
        "product": random.choice(products),
        "b": bad_tensor(random, b),
        "start": bad_tensor(random, b),
    }
    value = bad.get(field, absurd(random)) if random.random() < 0.7 else absurd(random)
    settings[field] = value
    words = f"conjugate_gradients({field}={shown(value)})"
    return Call(
        words, lambda: conjugate_gradients(**settings), pure=True, names=("product", "b", "start", field, named(value))
    )


DIRECTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "kfac_direction": (kfac_direction, {"damping": 0.1}),
    "natural_gradient_direction": (natural_gradient_direction, {"damping": 0.1}),
    "loss_gradient": (loss_gradient, {}),
}


def direction(random: Random) -> Call:
    """Gradients against autograd; with much absolute damping P g is g / damping."""
    model = chain(random)
    batch = batch_for(random, nn.CrossEntropyLoss())
    g = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
    name = random.choice(list(DIRECTIONS))
    settings: dict[str, Any] = {} if name == "loss_gradient" else {"damping": 1e9, "relative": False}

    def check(found: Any) -> str | None:
        tensors = found.direction if hasattr(found, "direction") else found
        scale = 1.0 if name == "loss_gradient" else 1e9
        for (key, p), right in zip(model.named_parameters(), g, strict=True):
            if tensors[key].shape != p.shape or not torch.allclose(tensors[key] * scale, right, rtol=1e-5, atol=1e-8):
                return f"{key} is not the gradient"
        return None

    run = lambda: DIRECTIONS[name][0](model, batch, **settings)  # noqa: E731
    return Call(f"{name}({arguments(settings)})", run, watched=(model,), check=check, pure=True)


def bad_direction(random: Random) -> Call:
    """One absurd argument."""
    model: Any = chain(random)
    batch: Any = batch_for(random, nn.CrossEntropyLoss())
    name = random.choice(list(DIRECTIONS))
    settings = {"network": model, "batch": batch} | DIRECTIONS[name][1]
    fields = {
        "kfac_direction": ("damping", "fisher", "sharing", "curvature_batch", "gradient", "relative"),
        "natural_gradient_direction": ("damping", "tolerance", "iterations", "curvature_batch", "gradient", "relative"),
    }
    field = random.choice(("network", "batch", "loss", "params", *fields.get(name, ())))
    bad: dict[str, Any] = {
        "batch": random.choice(
            ((bad_tensor(random, batch[0]), batch[1]), (batch[0], bad_tensor(random, batch[1].double())))
        ),
        "params": random.choice((["x"], [], "0.weight", ["0.bias"], [3])),
        "gradient": random.choice(
            ({}, {"0.weight": torch.zeros(2)}, {"0.weight": None}, {"x": torch.zeros(1)}, {"0.weight": "x"})
        ),
        "loss": random.choice(
            (nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(reduction="sum"), lambda z, y: 1.0)
        ),
    }
    value = bad[field] if field in bad and random.random() < 0.6 else absurd(random)
    settings[field] = value
    words = f"{name}({field}={shown(value)})"
    return Call(words, lambda: DIRECTIONS[name][0](**settings), watched=(model,), pure=True)


def angles(random: Random) -> Call:
    """alignment and partial_correlation of tensors by name, some odd."""

    def tensors(scale: float) -> dict[str, Any]:
        return {
            "a.weight": normal(random, 2, 3) * scale,
            "a.bias": normal(random, 2) * scale,
            "b.weight": normal(random, 4) * scale,
        }

    function = random.choice((alignment, partial_correlation))
    given: list[Any] = [
        tensors(random.choice((1.0, 1e-200, 1e200, 0.0))) for _ in range(2 if function is alignment else 3)
    ]
    kind = random.choice(("good", "good", "missing", "bad", "absurd", "value"))
    place = random.randrange(len(given))
    if kind == "missing":
        given[place].popitem()
    elif kind == "bad":
        given[place]["b.weight"] = bad_tensor(random, given[place]["b.weight"])
    elif kind == "absurd":
        given[place] = absurd(random)
    elif kind == "value":
        given[place]["a.bias"] = absurd(random)

    def check(found: Any) -> str | None:
        numbers = [*found.layers.values(), found.whole]
        return None if all(-1 <= v <= 1 for v in numbers) else f"{numbers}"

    words = f"{function.__name__}, argument {place} {kind} {shown(given[place])}"
    return Call(words, lambda: function(*given), check=check, pure=True)


def resampled(random: Random) -> Call:
    """bootstrap_interval of any values and options."""
    settings: dict[str, Any] = {
        "values": [random.gauss(0, 1) for _ in range(random.choice((0, 1, 2, 9)))],
        "resamples": 100,
    }
    field = random.choice(("values", "statistic", "confidence", "resamples", "seed", "none"))
    value = absurd(random)
    if field == "values":
        value = random.choice(
            (value, [1.0] * 4, [math.nan, 1.0], [[1.0, 2.0]], ["a", "b"], [1e308, -1e308], np.zeros((2, 2)))
        )
    if field == "resamples" and isinstance(value, int) and value > 1000:
        value = 1000
    if field != "none":
        settings[field] = value

    def check(found: Any) -> str | None:
        numbers = (found.low, found.estimate, found.high)
        return None if all(map(math.isfinite, numbers)) and found.low <= found.high else f"{found}"

    words = f"bootstrap_interval({arguments(settings)})"
    return Call(
        words, lambda: bootstrap_interval(**settings), check=check, names=(field, named(value), "values"), pure=True
    )

"""K-FAC and Gauss-Newton: options, groups, and steps that are misused."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.gauss_newton import GaussNewton
from secondorder.kfac import KFAC, Damping, Fisher, KFACPreconditioner, LevenbergMarquardt, Options

from .call import Call, arguments, shown
from .values import absurd, bad_tensor, named, normal

FIELDS: dict[Any, tuple[str, ...]] = {
    KFAC: (
        "lr", "step_rule", "momentum", "weight_decay", "damping", "ema_decay", "factor_interval", "inverse_interval", "fisher",
        "approximation", "sharing", "clip", "options", "model", "no_such_option",
    ),
    KFACPreconditioner: (
        "damping", "ema_decay", "factor_interval", "inverse_interval", "fisher", "approximation", "sharing", "options", "model",
    ),
    GaussNewton: (
        "lr", "momentum", "weight_decay", "damping", "tolerance", "iterations", "clip", "likelihood", "decoupled", "model",
    ),
    Damping: ("value", "relative", "inverse", "adapt"),
    Fisher: ("kind", "likelihood", "reduction", "samples", "seed", "grad_scaler"),
    LevenbergMarquardt: ("every", "factor", "least", "most"),
    Options: (
        "groups", "fallback", "fallback_lr", "decoupled", "wide_inputs", "warm_up", "stagger", "check", "synchronise", "timing",
    ),
}  # fmt: skip


def model(random: Random) -> nn.Module:
    """A small network for images [N, 1, 5, 5]."""
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)]
    if random.random() < 0.3:
        layers[1] = nn.Identity()
    return nn.Sequential(*layers).to(random.choice((torch.float32, torch.float64)))


def batch(random: Random, network: nn.Module, images: int = 4) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    x = normal(random, images, 1, 5, 5, dtype=next(network.parameters()).dtype)
    return x, torch.arange(images) % 3


def kfac(random: Random) -> Call:
    """Options of K-FAC and what belongs to it, and its steps."""
    kind = random.choice(("options", "options", "groups", "step", "step", "step", "rates", "update", "quadratic"))
    if kind == "options":
        return construction(random, *[k for k in FIELDS if k is not GaussNewton])
    if kind == "groups":
        return groups(random)
    return {"step": misused_step, "rates": absurd_rates, "update": bad_update, "quadratic": bad_quadratic}[kind](
        random, KFAC
    )


def gauss_newton(random: Random) -> Call:
    """The same for the Gauss-Newton optimiser."""
    kind = random.choice((construction, misused_step, absurd_rates, bad_update))
    return kind(random, GaussNewton)


def construction(random: Random, *kinds: Any) -> Call:
    """One absurd option; what is made takes three steps, and the weights stay finite."""
    kind = random.choice(kinds)
    network, field, value = model(random), random.choice(FIELDS[kind]), absurd(random)
    if field in ("approximation", "groups") and random.random() < 0.5:
        value = {random.choice(("0", "4", "*", "x", "", "[", 3)): absurd(random)}
    if field == "samples" and isinstance(value, int) and value > 1000:
        value = 7
    settings: dict[str, Any] = {field: value}

    def made() -> Any:
        if kind in (KFAC, GaussNewton):
            return kind(**({"model": network, "lr": 0.1} | settings))
        if kind is KFACPreconditioner:
            return kind(**({"model": network} | settings))
        part = kind(**settings)
        part = Damping(adapt=part) if kind is LevenbergMarquardt else part
        name = {Damping: "damping", LevenbergMarquardt: "damping", Fisher: "fisher", Options: "options"}[kind]
        return KFAC(network, 0.1, **{name: part})

    def run() -> nn.Module:
        optimizer = made()
        for _ in range(3):
            take_step(network, optimizer, *batch(random, network))
        return network

    words = f"{kind.__name__}({arguments(settings)}), 3 steps"
    names = (field, named(value), "model", "adapt", "likelihood", "loss", "group")
    return Call(words, run, names=names, check=finite_weights)


def take_step(network: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """One step as the docstrings say."""
    losses = {"cross_entropy": F.cross_entropy, "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z))}
    losses["bce"] = lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).to(z))
    pre = optimizer if isinstance(optimizer, KFACPreconditioner) else getattr(optimizer, "preconditioner", None)
    fisher = getattr(pre, "fisher", Fisher())
    loss: Callable[..., Tensor] = losses[getattr(fisher, "likelihood", "cross_entropy")]
    scale = len(x) * (3 if fisher.likelihood != "cross_entropy" else 1) if fisher.reduction == "sum" else 1

    def closure() -> Tensor:
        network.zero_grad()
        if hasattr(optimizer, "zero_grad"):
            optimizer.zero_grad()
        z = network(x)
        optimizer.update_curvature(z)
        value = loss(z, y) * scale
        value.backward()
        return value

    if isinstance(optimizer, KFAC) and optimizer.preconditioner.damping.adapt is not None:
        optimizer.step(closure)
        return
    closure()
    optimizer.step()


def finite_weights(network: nn.Module) -> str | None:
    """The first that is not; statistics of batch norm are the user's images'."""
    broken = [name for name, tensor in network.named_parameters() if not bool(tensor.isfinite().all())]
    return f"{broken[0]} is not finite" if broken else None


def groups(random: Random) -> Call:
    """Options(groups=...) of any kind."""
    network = model(random)
    pattern = random.choice(("0.*", "*.bias", "*", "x*", "[", "", "4.weight"))
    name = random.choice(("lr", "momentum", "weight_decay", "damping", "nesterov", "params", ""))
    value = random.choice((absurd(random), absurd(random), 0.01))
    settings = {pattern: {name: value}} | random.choice(({}, {"*": {"lr": 0.2}}))

    def run() -> nn.Module:
        take_step(network, KFAC(network, 0.1, options=Options(groups=settings)), *batch(random, network))
        return network

    return Call(f"Options(groups={shown(settings)})", run, check=finite_weights, names=("group", name, named(value)))


def ready(random: Random, kind: Any, **settings: Any) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A network that has taken a step, its optimiser, and the next batch."""
    network = model(random)
    x, y = batch(random, network)
    optimizer = kind(network, 0.1, **settings)
    take_step(network, optimizer, x, y)
    return network, optimizer, x, y


def misused_step(random: Random, kind: Any) -> Call:
    """step() with something that is no closure, without what belongs before it, or of gradients that are not finite."""
    network, optimizer, x, y = ready(random, kind)
    ways = ("argument", "closure raises", "nothing before", "no update", "nan gradient", "huge images", "other mode")
    way, value = (
        random.choice(ways),
        random.choice(("x", 3, 0, "", [], True, object, lambda a: a, {"a": 1}, torch.zeros(1))),
    )

    def raises() -> None:
        raise ZeroDivisionError("of the user")

    def run() -> nn.Module:
        optimizer.zero_grad()
        if way == "argument":
            optimizer.step(value)
        elif way == "closure raises":
            try:
                optimizer.step(raises)
            except ZeroDivisionError:
                take_step(network, optimizer, x, y)
        elif way == "nothing before":
            optimizer.step()
        elif way == "no update":
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
        elif way == "nan gradient":
            z = network(x)
            optimizer.update_curvature(z)
            (F.cross_entropy(z, y) * math.nan).backward()
            optimizer.step()
        elif way == "huge images":
            take_step(network, optimizer, x * 1e30, y)
        else:
            take_step(network.eval(), optimizer, x, y)
        return network

    words = f"{kind.__name__}: {way} {shown(value) if way == 'argument' else ''}"
    return Call(words, run, watched=list(network.parameters()), check=finite_weights)


def absurd_rates(random: Random, kind: Any) -> Call:
    """Settings of the parameter group that are changed to something absurd between two steps."""
    decoupled = random.random() < 0.7
    given = {"decoupled": decoupled} if kind is GaussNewton else {"options": Options(decoupled=decoupled)}
    network, optimizer, x, y = ready(random, kind, clip=random.choice((None, 0.01)), **given)
    name, value = random.choice(("lr", "momentum", "weight_decay", "damping")), absurd(random)
    optimizer.param_groups[0][name] = value

    def run() -> nn.Module:
        for _ in range(2):
            take_step(network, optimizer, x, y)
        return network

    words = f"{kind.__name__}.param_groups[0][{name!r}] = {shown(value)}, decoupled {decoupled}, clip {optimizer.clip}"
    return Call(words, run, names=(name, named(value)), watched=list(network.parameters()), check=finite_weights)


def bad_update(random: Random, kind: Any) -> Call:
    """update_curvature of something that is not the logits."""
    network, optimizer, x, y = ready(random, kind)
    z = network(x)
    value = random.choice(
        (absurd(random), bad_tensor(random, z.detach()), z.sum(), z[:2], z[:, :1], [z, z], [], z * math.nan, z.mT)
    )

    def run() -> nn.Module:
        optimizer.update_curvature(value)
        F.cross_entropy(z, y).backward()
        optimizer.step()
        return network

    words = f"{kind.__name__}.update_curvature({shown(value)})"
    return Call(words, run, watched=list(network.parameters()), check=finite_weights)


def bad_quadratic(random: Random, kind: Any) -> Call:
    """quadratic_step with one bad argument."""
    network, optimizer, x, y = ready(random, kind)
    given: list[Any] = [F.cross_entropy, x, y]
    place = random.randrange(3)
    bad = absurd(random) if place == 0 else bad_tensor(random, given[place])
    given[place] = random.choice((absurd(random), bad))

    def run() -> nn.Module:
        optimizer.zero_grad()
        optimizer.quadratic_step(*given)
        return network

    words = f"KFAC.quadratic_step, argument {place} = {shown(given[place])}"
    return Call(words, run, watched=list(network.parameters()), check=finite_weights)

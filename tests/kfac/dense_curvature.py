"""The Gauss-Newton matrix of small networks entry by entry, by torch.func, and what one step of K-FAC does; float64."""

from collections.abc import Callable

import torch
from natural import KFAC
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from secondorder.kfac import Damping, Fisher, Options
from secondorder.untouched import untouched

Loss = Callable[[Tensor, Tensor], Tensor]
Named = dict[str, Tensor]


def gauss_newton(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """J^T H J `[P, P]` over all trainable parameters in their order; buffers and random state are left as they are."""
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def outputs(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in named.values()])
        weights = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, {**buffers, **weights}, (x,))

    w = torch.cat([p.flatten() for p in named.values()])
    with torch.random.fork_rng():
        J = jacrev(outputs)(w).flatten(0, -2)
    with torch.random.fork_rng():
        z = outputs(w)
    H = hessian(lambda f: loss(f.view_as(z), y))(z.flatten())
    return J.mT @ H @ J


def blocks(model: nn.Module) -> dict[str, slice]:
    """Where the parameters of each module are in the vector of all."""
    found, start = {}, 0
    for name, module in model.named_modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
        if size:
            found[name] = slice(start, start + size)
            start += size
    return found


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def gradient(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Of the loss `[P]`; the model and the random state stay as they are."""
    with untouched(model):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def optimiser(
    model: nn.Module, likelihood: str = "cross_entropy", kind: str = "exact", damping: float = 0.1, **options: object
) -> KFAC:
    """K-FAC that inverts at every step, with absolute damping, learning rate 1 and no momentum unless said otherwise."""
    given = {name: options.pop(name) for name in ("reduction", "samples") if name in options}
    fisher = Fisher(kind, likelihood, **given)  # type: ignore[arg-type]
    value = Damping(
        damping, relative=bool(options.pop("relative", False)), inverse=str(options.pop("inverse", "eigen"))
    )
    settings = {"lr": 1.0, "momentum": 0.0, "factor_interval": 1, "inverse_interval": 1, "options": Options()}
    return KFAC(model, damping=value, fisher=fisher, **({"clip": None} | settings | options))  # type: ignore[arg-type]


def step(opt: KFAC, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """One step; the change of the weights `[P]`."""
    before = weights(opt.model)
    opt.zero_grad()
    z = opt.model(x)
    opt.update_curvature(z)
    loss(z, y).backward()
    opt.step()
    return weights(opt.model) - before


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).detach().norm() / b.detach().norm())

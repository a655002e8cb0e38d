"""Dense ground truth of a layer's factors: no unfolding and no hook of K-FAC, only runs of layers and autograd; float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from secondorder.curvature.kronecker.layer_kinds import layer_kind

Run = Callable[[Tensor], Tensor]


def weighted(module: nn.Module, x: Tensor, bias: bool) -> Tensor:
    """a [N, T, G, D]: the outputs of the layer for a weight that is 1 at one input and 0 at the others, 1 last for a bias."""
    weight, kind = module.get_parameter("weight"), layer_kind(module)
    nothing = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    columns = []
    for unit in torch.eye(kind.inputs, dtype=weight.dtype):
        ones = kind.weight(unit.repeat(kind.groups, kind.outputs, 1))
        out = functional_call(module, nothing | {"weight": ones}, (x,)).detach()
        columns.append(positions_last(module, out)[..., :: kind.outputs])  # [N, T, G]
    a = torch.stack(columns, -1)
    return torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias else a


def positions_last(module: nn.Module, out: Tensor) -> Tensor:
    """[N, T, channels] of an output."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return out.reshape(len(out), -1, out.shape[-1])
    return out.flatten(2).transpose(1, 2)


def recorded(module: nn.Module, run: Run, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every call."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = lambda _, args, out: seen.append((args[0].detach().clone(), out.detach().clone()))  # noqa: E731
    handle = module.register_forward_hook(hook)
    run(x)
    handle.remove()
    return seen


def output_jacobians(module: nn.Module, run: Run, x: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """For each call, s [K, N, T, channels]: d z_nk / d output_n, from changes added to the outputs."""

    def summed(*changes: Tensor) -> Tensor:
        left = iter(changes)
        handle = module.register_forward_hook(lambda _, args, out: out + next(left))
        try:
            return run(x).flatten(1).sum(0)
        finally:
            handle.remove()

    zeros = [torch.zeros_like(out) for out in outputs]
    found = jacrev(summed, argnums=tuple(range(len(zeros))))(*zeros)
    return [torch.stack([positions_last(module, s) for s in jacobian.detach()]) for jacobian in found]


def true_factors(
    module: nn.Module,
    run: Run,
    x: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    sharing: str,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """A [G, D, D] and B [G, O, O] of the mean over samples of J^T H J, H of a sample's own loss; all calls in one forward."""
    calls = recorded(module, run, x)
    N, G = len(x), getattr(module, "groups", 1)
    a = torch.cat([weighted(module, inputs, bias) for inputs, _ in calls], 1)
    s = torch.cat(output_jacobians(module, run, x, [out for _, out in calls]), 2)
    s = s.unflatten(-1, (G, -1))  # [K, N, T, G, O]
    z = run(x).detach()
    own = [hessian(lambda row, i=i: loss(row[None], target[i : i + 1]))(z[i]) for i in range(N)]
    H = torch.stack(own).reshape(N, z[0].numel(), z[0].numel())
    A, B = a.new_zeros(G, a.shape[-1], a.shape[-1]), a.new_zeros(G, s.shape[-1], s.shape[-1])
    for n in range(N):
        rows = a[n] if sharing == "expand" else a[n].mean(0, keepdim=True)
        A += sum(torch.einsum("gd,ge->gde", row, row) for row in rows) / (N * len(rows))
        back = s[:, n] if sharing == "expand" else s[:, n].sum(1, keepdim=True)
        B += torch.einsum("ktgo,kl,ltgp->gop", back, H[n], back) / N
    return A, B


def dense_block(A: Tensor, B: Tensor) -> Tensor:
    """B kron A over the flattened [G, O, D]."""
    return torch.block_diag(*(torch.kron(b, a) for a, b in zip(A, B, strict=True)))

"""Ground truth of Kronecker-factored blocks, from runs of single layers and Jacobians that torch.func computes.

Nothing is shared with the factors under test: no unfolding, no layer's own geometry. Index letters: N samples, K outputs
(k, l) of the network, T positions, G groups, D inputs (d, e) and O outputs (o, p) of a group of a layer.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

OVER_POSITIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "expand": lambda a, s: (a, s),
    "reduce": lambda a, s: (a.mean(-1, keepdim=True), s.sum(-1, keepdim=True)),
}
"""Weight sharing -> what it makes of inputs and gradients `[..., T]` before their outer products."""


def true_blocks(
    network: nn.Module, loss: nn.Module, batch: tuple[Tensor, Tensor], names: Iterable[str] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Weight sharing -> parameter -> B kron A of a weight or B of a bias, dense.

    names: of parameters of linear layers on `[N, D]` and of convolutions that are used once; None: all of them. The
    samples must not see each other.
    """
    if names is None:
        layers = {path: part for path, part in network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
        names = [f"{path}.{name}" for path, layer in layers.items() for name, _ in layer.named_parameters()]
    places = {name: name.rpartition(".")[::2] for name in names}
    M = output_hessians(loss, network(batch[0]).detach(), batch[1])
    found = {
        path: inputs_and_gradients(network, network.get_submodule(path), batch[0])
        for path in dict.fromkeys(path for path, _ in places.values())
    }
    return {
        sharing: {name: block(*shared(*found[path]), M, kind) for name, (path, kind) in places.items()}
        for sharing, shared in OVER_POSITIONS.items()
    }


def block(a: Tensor, s: Tensor, M: Tensor, kind: str) -> Tensor:
    """B kron A of a weight, B of a bias, block diagonal over the groups; a and s as `weighted` and `gradients` give them.

    A = sum_nt a a^T / (N T),    B = sum_nt s^T M s
    """
    B = torch.einsum("kngot,nkl,lngpt->gop", s, M, s).contiguous()
    if kind == "bias":
        return torch.block_diag(*B)
    A = torch.einsum("ngdt,nget->gde", a, a).contiguous() / (a.shape[0] * a.shape[-1])
    return torch.block_diag(*map(torch.kron, B, A))


def output_hessians(loss: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    """M `[N, K, K]`, the second derivatives of the loss of the whole batch at the outputs z of each sample."""
    return torch.einsum("nknl->nkl", hessian(lambda z: loss(z, labels))(z))


def inputs_and_gradients(network: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """a and s of a layer where the network uses it."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, y: seen.extend((args[0].detach().clone(), y.detach().clone())))
    try:
        network(images)
    finally:
        handle.remove()
    x, y = seen
    return weighted(layer, x), gradients(network, layer, images, y)


def weighted(layer: nn.Module, x: Tensor) -> Tensor:
    """a `[N, G, D, T]`, what the weight multiplies: the layer's outputs for weights that are 1 at d, else 0."""
    weight = layer.get_parameter("weight")
    nothing = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    G, D = groups(layer), weight[0].numel()

    def output(unit: Tensor) -> Tensor:
        return functional_call(layer, nothing | {"weight": unit.view_as(weight[0]).expand_as(weight)}, (x,))

    a = vmap(output)(torch.eye(D, dtype=x.dtype, device=x.device))
    a = a.reshape(D, len(x), G, len(weight) // G, -1)[:, :, :, 0]  # the same at each output of a group
    return a.permute(1, 2, 0, 3).detach()


def gradients(network: nn.Module, layer: nn.Module, images: Tensor, y: Tensor) -> Tensor:
    """s `[K, N, G, O, T]`, the Jacobian of each sample's outputs with respect to the layer's output y."""

    def summed_outputs(change: Tensor) -> Tensor:
        handle = layer.register_forward_hook(lambda module, args, y: y + change)
        try:
            return network(images).sum(0)
        finally:
            handle.remove()

    s = jacrev(summed_outputs)(torch.zeros_like(y)).detach()
    G = groups(layer)
    return s.reshape(len(s), len(images), G, y.shape[1] // G, -1)


def groups(layer: nn.Module) -> int:
    """G, 1 for a linear layer."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1

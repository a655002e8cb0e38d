"""The update of every parameter by a step rule: what `secondorder.kfac.step_rule` describes, for many layers at a time."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.kfac.blocks import Blocks, Directions
from secondorder.kfac.inverses.eigenbasis import Rotated
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.step_rule import StepRule
from secondorder.kfac.update import State, accumulated, adam_scales, root_mean_squares
from secondorder.matrix_power.transforms import full_precision

EPS = 1e-5
"""Of Adam's denominators, relative to their root mean square in a layer: the scale of the loss does not matter, and in directions
in which the loss is flat (a shift of all logits) the step is not that of rounding errors."""
LEAST = {"signal": 1.0, "fixed": 0.01}
"""Root mean square of m / sqrt(v) below which a length is in proportion shorter. It is 1 for gradients that all agree, about a
quarter for noise, and goes to 0 once a gradient has vanished, which is all that concerns a fixed length."""
BUFFERS = ("momentum_buffer", "square", "size", "squares")
"""Of a layer, with its weight: m and v `[G, O, D]`, in the eigenbasis where there is one, the mean length of P g without one, and
the number of gradients in them."""
SPARSE_DECAY = 0.999
"""Of the running mean of squares of an embedding, most of whose rows have no gradient in a step. Its step in the eigenbasis has
Adam's own length: a fixed one, of the whole table, would go to the few rows of a batch. Held-out loss of a small transformer,
three seeds: 1.499, a fixed length with the rule's decay 1.507, the fallback 1.496; natural step 2.277, fallback 2.295."""
TOGETHER = 2**18
"""Numbers in layers whose updates are computed together."""


def updates(
    rule: StepRule,
    gradients: Directions,
    blocks: Blocks,
    state: State,
    momenta: Mapping[nn.Parameter, float],
    fallback_lr: float,
    events: Counter[str],
) -> Directions:
    """The update of every parameter by a rule that is not plain: lr times it is subtracted.

    Layers without an eigenbasis (wide inputs, damping of Cholesky factors, no factors yet) go in the natural direction, with a
    length that is not free; parameters without factors take Adam's step.

    Args:
        rule: direction and length.
        gradients: of the mean loss, by parameter.
        blocks: the layers and their inverses.
        state: the optimiser's of each parameter; gets the buffers momentum_buffer, square, size and squares, those of a layer,
            `[G, O, D]`, with its weight.
        momenta: of each parameter, 0 to 1: the decay of the mean of gradients.
        fallback_lr: of parameters without factors, in units of lr.
        events: counts what goes wrong.
    """
    bases = blocks.eigenbases() if rule.direction == "eigenbasis" else {}
    found: Directions = {}
    with full_precision(next(iter(gradients.values()))):
        natural = blocks.solve(gradients, events, [name for name in blocks.layers if name not in bases])
        tracks = [
            Track(layer, g, state[layer.weight], momenta[layer.weight], bases.get(name))
            for name, layer in blocks.layers.items()
            if (g := blocks.matrix(layer, natural)) is not None
        ]
        for together in _buckets(tracks):
            sparse = together[0].basis is not None and together[0].layer.kind.diagonal_input
            own = replace(rule, length="free", decay=SPARSE_DECAY) if sparse else rule
            for track, update in zip(together, _of_layers(own, together), strict=True):
                layer = track.layer
                parts = zip((layer.weight, layer.bias), layer.parts(update), strict=True)
                found |= {p: part for p, part in parts if p in gradients and part is not None}
    others = [parameter for parameter in gradients if parameter not in found]
    return found | _adam(others, gradients, state, momenta, fallback_lr)


@dataclass
class Track:
    """A layer on its way: g `[G, O, D]`, its gradient or, without a basis, P grad; the state of its weight, and momentum."""

    layer: KroneckerLayer
    g: Tensor
    state: dict[str, Any]
    beta: float
    basis: Rotated | None

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether it has an eigenbasis, and sparse gradients: layers of one kind take their steps together."""
        return self.basis is not None, self.layer.kind.diagonal_input

    def buffer(self, name: str) -> Tensor:
        """A buffer of the state, zero at first and after a change of the layer's shape."""
        if name not in self.state or self.state[name].shape != self.g.shape:
            self.state[name] = torch.zeros_like(self.g, dtype=self.layer.weight.dtype)
        return self.state[name]


def carry(before: Mapping[str, Rotated], blocks: Blocks, state: State) -> None:
    """Momenta in eigenbases that were renewed, from the old bases to the new: m <- Q'^T (Q m Q_A^T) Q'_A.

    A layer that has got or lost its eigenbasis begins anew: the momentum of P g means nothing to g.
    """
    after = blocks.eigenbases()
    for name, layer in blocks.layers.items():
        old, new, own = before.get(name), after.get(name), state.get(layer.weight, {})
        if old is new or "momentum_buffer" not in own:
            continue
        if old is None or new is None:
            for buffer in BUFFERS:
                own.pop(buffer, None)
            continue
        m = own["momentum_buffer"]
        with full_precision(m):
            m.copy_(new.rotated(old.rotated_back(m.to(layer.dtype))))


def _buckets(tracks: Sequence[Track]) -> Iterator[list[Track]]:
    """Layers of one kind, as many at a time as are small: a call has its price, and memory another."""
    for kind in {track.kind: None for track in tracks}:
        bucket: list[Track] = []
        size = 0
        for track in tracks:
            if track.kind == kind:
                if bucket and size + track.g.numel() > TOGETHER:
                    yield bucket
                    bucket, size = [], 0
                bucket.append(track)
                size += track.g.numel()
        if bucket:
            yield bucket


def _of_layers(rule: StepRule, tracks: Sequence[Track]) -> list[Tensor]:
    """The updates `[G, O, D]` of layers of one kind."""
    for track in tracks:
        track.state["squares"] = track.state.get("squares", 0) + 1
    g = [track.g if track.basis is None else track.basis.rotated(track.g) for track in tracks]
    rotates = rule.direction == "eigenbasis"
    free = rule.length == "free" and (not rotates or tracks[0].basis is not None)
    u = _momenta(tracks, g, nesterov=not free)
    if tracks[0].basis is not None or rule.direction == "preconditioned":
        torch._foreach_div_(u, _denominators(tracks, g, rule.decay))
    if not free:
        _set_lengths(rule, tracks, u, g)
    return [
        m if track.basis is None else track.basis.rotated_back(m).to(track.g.dtype)
        for track, m in zip(tracks, u, strict=True)
    ]


def _momenta(tracks: Sequence[Track], g: list[Tensor], nesterov: bool) -> list[Tensor]:
    """m <- beta m + (1 - beta) g; with it Nesterov's beta m + (1 - beta) g, or m bias-corrected."""
    betas, steps = [track.beta for track in tracks], [track.state["squares"] for track in tracks]
    new = torch._foreach_mul(g, [1 - beta for beta in betas])
    m = accumulated([track.buffer("momentum_buffer") for track in tracks], new, betas)
    if not nesterov:
        return list(torch._foreach_div(m, [1 - beta**n for beta, n in zip(betas, steps, strict=True)]))
    u = torch._foreach_mul(m, betas)
    torch._foreach_add_(u, new)
    return list(u)


def _denominators(tracks: Sequence[Track], g: list[Tensor], decay: float) -> list[Tensor]:
    """sqrt(v) with EPS of its size in the layer added: above 0."""
    buffers, counts = [track.buffer("square") for track in tracks], [track.state["squares"] for track in tracks]
    roots = root_mean_squares(buffers, g, decay, counts)
    least = (EPS * _sizes(roots)).clamp_min(torch.finfo(roots[0].dtype).tiny)
    torch._foreach_add_(roots, least.unbind())
    return roots


def _set_lengths(rule: StepRule, tracks: Sequence[Track], u: list[Tensor], g: list[Tensor]) -> None:
    """Give the updates u, in place, the length of the rule; that of a layer without a gradient is 0."""
    tiny = torch.finfo(u[0].dtype).tiny
    largest = torch.stack(torch._foreach_norm(u, torch.inf)).clamp_min(tiny)
    torch._foreach_div_(u, largest.unbind())  # squares are numbers
    sizes = _sizes(u).clamp_min(tiny)  # 1 / sqrt(entries) to 1, unless u is zero
    largest_of_g = torch.stack(torch._foreach_norm(g, torch.inf))
    factors = rule.rms / sizes * (largest_of_g > 0)
    if tracks[0].basis is not None:
        factors *= (largest * sizes / LEAST[rule.length]).clamp_max(1)
    elif rule.length == "signal":
        factors *= (largest * sizes / _mean_sizes(tracks, g, largest_of_g)).clamp_max(1)
    torch._foreach_mul_(u, factors.unbind())


def _mean_sizes(tracks: Sequence[Track], g: list[Tensor], largest: Tensor) -> Tensor:
    """Running means of the root mean squares of g, one for each layer, with the weights that the momentum has; above 0.

    Args:
        largest: the largest entry of each g.
    """
    tiny = torch.finfo(g[0].dtype).tiny
    largest = largest.clamp_min(tiny)
    new = largest * _sizes(torch._foreach_div(g, largest.unbind()))
    betas = new.new_tensor([track.beta for track in tracks])
    means = torch.stack(
        [track.state.get("size", torch.zeros_like(own)).to(own) for track, own in zip(tracks, new, strict=True)]
    )
    means = betas * means + (1 - betas) * new
    for track, mean in zip(tracks, means, strict=True):
        track.state["size"] = mean.to(track.layer.weight.dtype)
    steps = new.new_tensor([track.state["squares"] for track in tracks])
    return (means / (1 - betas**steps)).clamp_min(tiny)


def _sizes(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The root mean square of each."""
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms / norms.new_tensor([tensor.numel() for tensor in tensors]).sqrt()


def _adam(
    parameters: Sequence[nn.Parameter],
    gradients: Directions,
    state: State,
    momenta: Mapping[nn.Parameter, float],
    relative_lr: float,
) -> Directions:
    """Adam's updates of parameters without factors: bias-corrected running means of g over `adam_scales`."""
    if not parameters:
        return {}
    g = [gradients[p] for p in parameters]
    scales = adam_scales(parameters, g, state)
    betas, steps = [momenta[p] for p in parameters], [state[p]["squares"] for p in parameters]
    buffers = [state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
    m = accumulated(buffers, torch._foreach_mul(g, [1 - beta for beta in betas]), betas)
    u = torch._foreach_mul(m, [relative_lr / (1 - beta**n) for beta, n in zip(betas, steps, strict=True)])
    torch._foreach_div_(u, scales)
    return dict(zip(parameters, u, strict=True))

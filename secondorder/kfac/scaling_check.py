"""Verification on the first factor step that the factors' inputs and gradients are those of the loss: sum_nt g a^T = dL/dW.

What enters the factors, the recorded inputs a and the gradients g of the user's own backward, has to reproduce the gradient
of weight and bias; the ratio <expected, actual> / <actual, actual> says by how much it does not. The gradient at the logits
of a cross-entropy with hard labels, c (p - e_y), tells the loss's scale c: 1/N for reduction "mean", 1 for "sum". What a
gradient has lost between backward and step, to the unscaling of a GradScaler or to clipping, does not count against the loss.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secondorder.accelerator import widest
from secondorder.errors import InputError
from secondorder.kfac.capture import Capture
from secondorder.kfac.hooks import Hook, handles_of, is_pulling, remove
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.uses import Use
from secondorder.kfac.vectors import batched, weight_gradient

TOLERANCE = 1e-2
HALF_TOLERANCE = 1e-1
"""Relative errors of the whole gradient of a layer; autocast rounds inputs, gradients and the sum to three digits or fewer."""
SUM, HALF_SUM, SURE = 1e-3, 2e-2, 1e-5
"""How far from zero the gradient at the logits may sum over the classes: shares of its size, and of that of one class, which a
network that is sure of every label rounds away."""


@dataclass(eq=False)
class Watched:
    """Logits, the loss's gradients at them by backward pass, and the batch they belong to: heads share one."""

    logits: Tensor
    fisher: Any
    batch: Hashable
    gradients: list[tuple[int, Tensor]] = field(default_factory=list)

    def gradient(self, backwards: set[int]) -> Tensor | None:
        """The sum over these backward passes; None: there was none."""
        terms = [gradient for backward, gradient in self.gradients if backward in backwards]
        return sum(terms[1:], terms[0]) if terms else None

    def ratio(self, gradient: Tensor) -> float | None:
        """`loss_ratio` of a gradient at the logits."""
        return loss_ratio(self.logits, gradient, self.fisher.likelihood, self.fisher.reduction)


class ScalingCheck:
    """Compares, layer by layer, the gradients of the backward passes it watches with those the factors imply."""

    def __init__(self, layers: Sequence[KroneckerLayer]) -> None:
        self.layers = list(layers)
        self._expected: dict[KroneckerLayer, Tensor] = {}
        self._actual: dict[KroneckerLayer, Tensor] = {}
        self._size: dict[KroneckerLayer, Tensor] = {}
        self._half = False
        self._capture: Capture | None = None
        self._handles: list[Any] = handles_of(self)
        self._biases: set[KroneckerLayer] = set()
        self._losses: list[Watched] = []
        self._backwards: set[int] = set()

    def watch(
        self, capture: Capture, logits: Tensor | None = None, fisher: Any = None, batch: Hashable | None = None
    ) -> None:
        """Watch the backward passes to come of what `capture` records.

        logits and fisher (its likelihood and reduction): watch the loss's gradient at these logits, too. batch: the same for
        several outputs of one forward pass.
        """
        self._capture = capture
        if not capture.has(self._compare):
            capture.listen(self._compare)
            for layer in self.layers:
                if layer.bias is not None and layer.bias.requires_grad:
                    self._biases.add(layer)
                    self._handles.append(layer.bias.register_hook(Hook(self, ScalingCheck._add_bias, layer)))
        if logits is not None:
            watched = Watched(logits.detach(), fisher, object() if batch is None else batch)
            self._handles.append(logits.register_hook(Hook(self, ScalingCheck._add_loss, watched)))

    def stop(self) -> None:
        """Watch no more."""
        remove(self._handles)
        self._biases = set()
        if self._capture is not None:
            self._capture.dismiss(self._compare)

    def clear(self) -> None:
        """Forget the backward passes seen so far, and go on watching."""
        self._expected, self._actual, self._size = {}, {}, {}
        self._losses, self._backwards = [], set()

    def verify(self, fisher: Any = None) -> bool:
        """InputError for the first layer or loss that does not fit. False: no finite gradient was seen, nothing is known.

        fisher: if its kind is "empirical", gradients divided by a power of two since backward, as by a GradScaler that it
        does not know, are an error, too.
        """
        self.stop()
        if not self._expected or not all(bool(torch.isfinite(W).all()) for W in self._expected.values()):
            self.clear()
            return False
        for layer in self.layers:
            self._verify_layer(layer)
        rescaled = self._rescaled()
        if fisher is not None and fisher.kind == "empirical":
            verify_unscaled(rescaled * known_scale(fisher))
        self._verify_losses(rescaled)
        return True

    def _verify_losses(self, rescaled: float) -> None:
        """Each loss is a mean over its rows times their share in all rows, or divided by the number of batches.

        A gradient at the logits counts that went on to the weights, not one that the user asked for with autograd.grad.
        """
        found = [(watched, watched.gradient(self._backwards)) for watched in self._losses]
        ratios = []
        for watched, gradient in found:
            if gradient is not None:
                verify_likelihood(gradient, watched.fisher.likelihood, watched.fisher.reduction)
                ratios.append((watched, watched.ratio(gradient)))
        rows = {w.batch: len(w.logits) for w in self._losses if any(task in self._backwards for task, _ in w.gradients)}
        for watched, ratio in ratios:
            if ratio is None:
                continue
            declared, shares = watched.fisher, [1.0]
            if declared.reduction == "mean":
                shares = [1 / len(rows), rows[watched.batch] / sum(rows.values())]
            share = min(shares, key=lambda share: abs(ratio / share - 1))
            seen = ratio if ratio <= share else max(share, ratio * min(1.0, rescaled))
            verify_loss(seen, declared.likelihood, declared.reduction, len(rows), share)

    def _rescaled(self) -> float:
        """Norm of the gradients as they are now over that of the gradients that backward made."""
        made = now = 0.0
        for layer, W in self._expected.items():
            if layer.weight.grad is not None:
                wide = widest(W.device)
                made += float(W[..., : layer.weight[0].numel()].to(wide).square().sum())
                now += float(layer.weight.grad.to(wide).square().sum())
        return math.sqrt(now / made) if made > 0 else 1.0

    def _compare(
        self, layer: KroneckerLayer, uses: Sequence[Use], gradients: Sequence[Tensor], weight_grad: Tensor
    ) -> None:
        """Add one backward of one layer to both sides."""
        self._backwards.add(torch._C._current_graph_task_id())
        weight = weight_grad.detach().to(layer.dtype)
        bias = None if layer.bias is None else layer.bias.new_zeros(layer.bias.shape, dtype=layer.dtype)
        _add(self._expected, layer, layer.matrix(weight, bias).clone())
        for use, g in zip(uses, gradients, strict=True):
            self._half |= g.dtype.itemsize < 4
            x = batched(layer.module, use.input.to(layer.dtype))
            g = batched(layer.module, g.to(layer.dtype))
            actual = weight_gradient(layer.geometry, x, g, layer.bias is not None)
            if layer.bias is not None and layer not in self._biases:
                actual[..., -1] = 0.0  # frozen since
            _add(self._actual, layer, actual)
            _add(self._size, layer, x.norm() * g.norm())

    def _add_bias(self, layer: KroneckerLayer, gradient: Tensor) -> None:
        if not layer.weight.requires_grad:
            return
        with torch.no_grad():
            weight = layer.weight.new_zeros(layer.weight.shape, dtype=layer.dtype)
            _add(self._expected, layer, layer.matrix(weight, gradient.to(layer.dtype)))

    def _add_loss(self, watched: Watched, gradient: Tensor) -> None:
        if not is_pulling():
            if watched not in self._losses:
                self._losses.append(watched)
            made = gradient.detach() / known_scale(watched.fisher)
            watched.gradients.append((torch._C._current_graph_task_id(), made))

    def _verify_layer(self, layer: KroneckerLayer) -> None:
        if layer not in self._expected:
            return
        expected = self._expected[layer]
        actual = self._actual.get(layer, torch.zeros_like(expected))
        size = self._size.get(layer, torch.zeros((), device=expected.device))
        norm = torch.maximum(expected.norm(), actual.norm())
        rounding = 10 * torch.finfo(layer.dtype).eps * size  # of sums that cancel
        tolerance = HALF_TOLERANCE if self._half or layer.weight.dtype.itemsize < 4 else TOLERANCE
        error = (expected - actual).norm()
        if bool(error <= tolerance * norm + rounding):
            return
        ratio = float((expected * actual).sum() / actual.square().sum()) if layer in self._actual else 0.0
        raise InputError(_message(layer, ratio, float(error / norm), layer in self._actual))


def known_scale(fisher: Any) -> float:
    """The factor of the loss by the GradScaler that is given."""
    scaler = fisher.grad_scaler
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def verify_unscaled(rescaled: float) -> None:
    """InputError for gradients that were divided by 2, 4, 8, ... since backward."""
    halvings = -math.log2(rescaled) if rescaled > 0 else 0.0
    if round(halvings) >= 1 and abs(halvings - round(halvings)) < 1e-5:
        raise InputError(
            f"the gradients were divided by {2 ** round(halvings)} between backward() and step(), which fisher='empirical' has "
            "to know: pass Fisher('empirical', grad_scaler=scaler), or divide the losses instead"
        )


def loss_ratio(logits: Tensor, gradient: Tensor, likelihood: str, reduction: str, scale: float = 1.0) -> float | None:
    """How many times larger the loss's gradient at the logits is than that of F.cross_entropy with this reduction.

    scale: a factor of the loss that is known. None: not a cross-entropy with hard labels (smoothed, mixed, weighted or ignored
    labels), or half precision, where the loss is likely scaled.
    """
    if likelihood != "cross_entropy" or logits.ndim < 2 or logits.dtype.itemsize < 4:
        return None
    z, d = (t.movedim(1, -1).flatten(0, -2).to(widest(t.device)) for t in (logits, gradient))
    p = z.softmax(-1)
    y = d.argmin(-1, keepdim=True)
    direction = p.scatter_add(-1, y, -torch.ones_like(y, dtype=p.dtype))  # p - e_y
    length = direction.square().sum(-1)
    sure = length > 1e-4
    if not bool(sure.any()):
        return None
    d, direction, length = d[sure], direction[sure], length[sure]
    c = (d * direction).sum(-1) / length
    mean = c.mean()
    residual = (d - mean * direction).norm(dim=-1) / length.sqrt()
    if not bool((residual <= 1e-2 * mean.abs()).all()) or not float(mean) > 0:
        return None
    return float(mean) * (len(z) if reduction == "mean" else 1) / scale


def verify_likelihood(gradient: Tensor, likelihood: str, reduction: str = "mean") -> None:
    """InputError for a gradient at the outputs that no cross-entropy has, where that is the likelihood.

    Over the classes, dim 1, it sums to zero, whatever the labels are: soft, smoothed, weighted or ignored.
    """
    if likelihood != "cross_entropy" or gradient.ndim < 2:
        return
    d = gradient.to(widest(gradient.device))
    least = SURE * (d.numel() / d.shape[1] if reduction == "sum" else 1)
    most = (HALF_SUM if gradient.dtype.itemsize < 4 else SUM) * float(d.abs().sum()) + least
    if not math.isfinite(most) or float(d.sum(1).abs().sum()) <= most:
        return
    if d.ndim > 2 and float(d.sum(-1).abs().sum()) <= most:
        raise InputError(
            f"outputs {list(gradient.shape)} have their classes in the last dimension: pass them as F.cross_entropy takes them, "
            "update_curvature(logits.flatten(0, 1)) or logits.movedim(-1, 1)"
        )
    raise InputError(
        "the loss's gradient at the outputs does not sum to zero over dim 1, as that of a cross-entropy of logits does: pass "
        "fisher=Fisher(likelihood='mse') or 'bce', or logits without a softmax of the model's own; Options(check=False) accepts "
        "a further term of the loss on the logits"
    )


def verify_loss(
    ratio: float | None, likelihood: str, reduction: str, batches: int = 1, expected: float | None = None
) -> None:
    """InputError for a loss whose scale is off by more than 1 % from `expected`: 1, or 1 / batches for accumulated means."""
    if expected is None:
        expected = 1 / batches if reduction == "mean" else 1.0
    if ratio is None or abs(ratio / expected - 1) <= 1e-2:
        return
    other = "sum" if reduction == "mean" else "mean"
    advice = f"pass reduction={other!r} if that is the loss's, or divide the loss by the factor"
    if batches > 1:
        advice = f"divide the loss of each of the {batches} accumulated batches by {batches}, or weight it by its share of rows"
    raise InputError(
        f"the loss's gradient is {ratio / expected:.4g} times that of {likelihood} with reduction {reduction!r}; {advice}; "
        "a deliberate factor on the loss is harmless with relative damping: Options(check=False) accepts it"
    )


def _message(layer: KroneckerLayer, ratio: float, error: float, called: bool) -> str:
    out = f"use approximation={{{layer.name!r}: 'fallback'}}, or switch this check off with Options(check=False)"
    if not called:
        return (
            f"layer {layer.name}: its weight has a gradient, but its forward was never called under the hooks (ratio 0): "
            f"compiled, checkpointed with use_reentrant=True, or used as a function? {out}"
        )
    return (
        f"layer {layer.name}: the gradient of its weight is {ratio:.4g} times what its inputs and output gradients give "
        f"(error {error:.1%}): a penalty in the loss (use weight_decay), or a use of the weight outside the layer? {out}"
    )


def _add(sums: dict[KroneckerLayer, Tensor], layer: KroneckerLayer, term: Tensor) -> None:
    sums[layer] = sums[layer] + term if layer in sums else term

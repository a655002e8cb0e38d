"""Verification on the first factor step that the factors' inputs and gradients are those of the loss: sum_nt g a^T = dL/dW.

What enters the factors, the recorded inputs a and the gradients g of the user's own backward, has to reproduce the gradient
of weight and bias; the ratio <expected, actual> / <actual, actual> says by how much it does not. The gradient at the outputs
tells whether the loss is the declared likelihood, and its scale (`likelihood_check`). What a gradient has lost between backward
and step, to the unscaling of a GradScaler or to clipping, does not count against the loss.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.kfac.agreement import Agreement, agreements, rescaling
from secondorder.kfac.capture import Capture
from secondorder.kfac.capture.calls import LayerCall
from secondorder.kfac.capture.hooks import Hook, handles_of, is_pulling, remove
from secondorder.kfac.graph import made_by
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.loss_factors import Watched, verify_losses

TOLERANCE = 1e-2
HALF_TOLERANCE = 1e-1
"""Relative errors of the whole gradient of a layer; autocast rounds inputs, gradients and the sum to three digits or fewer."""


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
        self,
        capture: Capture,
        logits: Tensor | None = None,
        fisher: Any = None,
        batch: Hashable | None = None,
        weight: float = 1.0,
    ) -> None:
        """Watch the backward passes to come of what `capture` records, and the loss's gradient at logits that are given.

        fisher: has the loss's likelihood and reduction. batch: the same for several outputs of one forward pass. weight: the
        declared factor of the loss.
        """
        if capture.listener is not self:
            self.stop()
            self._capture = capture
            capture.listen(self)
            for layer in self.layers:
                if layer.bias is not None and layer.bias.requires_grad:
                    self._biases.add(layer)
                    self._handles.append(layer.bias.register_hook(Hook(self, ScalingCheck._add_bias, layer)))
        if logits is not None:
            batch = object() if batch is None else batch
            watched = Watched(logits.detach(), fisher, batch, weight, made_by(logits))
            self._handles.append(logits.register_hook(Hook(self, ScalingCheck._add_loss, watched)))

    def stop(self) -> None:
        """Remove the hooks: backward passes are not watched any longer."""
        remove(self._handles)
        self._biases = set()
        if self._capture is not None:
            self._capture.listen(None)

    def clear(self) -> None:
        """Forget the backward passes seen so far, and go on watching."""
        self._expected, self._actual, self._size = {}, {}, {}
        self._losses, self._backwards = [], set()

    def forget(self, layers: Sequence[KroneckerLayer]) -> None:
        """Forget what backward passes before the present one brought to these layers: it has been cleared."""
        for layer in layers:
            for sums in (self._expected, self._actual, self._size):
                sums.pop(layer, None)
        present = torch._C._current_graph_task_id()
        self._backwards &= {present}
        for watched in self._losses:
            watched.gradients = [(task, gradient) for task, gradient in watched.gradients if task == present]

    def verify(self, fisher: Any = None) -> bool:
        """InputError for the first layer or loss that does not fit. False: no finite gradient was seen, nothing is known.

        fisher: if its kind is "empirical", gradients divided by a power of two since backward, as by a GradScaler that it
        does not know, are an error, too.
        """
        self.stop()
        found = agreements(self._expected, self._actual, self._size)
        if not found or not all(agreement.finite for agreement in found.values()):
            self.clear()
            return False
        for layer in self.layers:
            if layer in found:
                self._verify_layer(layer, found[layer])
        rescaled = rescaling(found.values())
        if fisher is not None and fisher.kind == "empirical":
            verify_unscaled(rescaled * known_scale(fisher))
        for watched in self._losses:
            watched.to_host()
        known = self._capture is not None and not self._capture.uncounted
        verify_losses(self._losses, self._backwards, rescaled, known)
        return True

    def compare(
        self, layer: KroneckerLayer, calls: Sequence[LayerCall], gradients: Sequence[Tensor], weight_grad: Tensor
    ) -> None:
        """Add one backward of one layer to both sides."""
        self._backwards.add(torch._C._current_graph_task_id())
        weight = weight_grad.detach().to(layer.dtype)
        bias = None if layer.bias is None else layer.bias.new_zeros(layer.bias.shape, dtype=layer.dtype)
        _add(self._expected, layer, layer.matrix(weight, bias).clone())
        for call, g in zip(calls, gradients, strict=True):
            self._half |= g.dtype.itemsize < 4
            x = layer.kind.batched(layer.kind.numbers(call.input, layer.dtype))
            g = layer.kind.batched(g.to(layer.dtype))
            actual = layer.kind.weight_gradient(x, g, layer.bias is not None)
            if layer.bias is not None and layer not in self._biases:
                actual[..., -1] = 0.0  # frozen since
            _add(self._actual, layer, actual)
            _add(self._size, layer, layer.kind.input_norm(x) * g.norm())

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
            made = gradient.detach() / (known_scale(watched.fisher) * watched.weight)
            watched.gradients.append((torch._C._current_graph_task_id(), made))

    def _verify_layer(self, layer: KroneckerLayer, found: Agreement) -> None:
        rounding = 10 * torch.finfo(layer.dtype).eps * found.size  # of sums that cancel
        tolerance = HALF_TOLERANCE if self._half or layer.weight.dtype.itemsize < 4 else TOLERANCE
        if found.error <= tolerance * found.norm + rounding:
            return
        ratio = found.ratio if layer in self._actual else 0.0
        derived = self._capture is not None and any(one < max(self._backwards) for one in self._capture.differentiable)
        raise InputError(_message(layer, ratio, found.error / found.norm, layer in self._actual, derived))


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


def _message(layer: KroneckerLayer, ratio: float, error: float, called: bool, derived: bool) -> str:
    """What is wrong; derived: the loss was made with autograd.grad(create_graph=True)."""
    if derived:
        return (
            f"layer {layer.name}: the gradient of its weight is not that of its inputs and outputs: the loss has derivatives of "
            "the model in it, autograd.grad(create_graph=True), as PINNs and gradient penalties, which K-FAC's factors leave "
            "out: use finite differences and fisher='empirical', or another optimiser"
        )
    out = f"use approximation={{{layer.name!r}: 'fallback'}}, or switch this check off with Options(check=False)"
    if not called:
        return (
            f"layer {layer.name}: its weight has a gradient, but its forward was never called under the hooks (ratio 0): "
            f"compiled, checkpointed with use_reentrant=True, or used as a function? {out}"
        )
    cause = "a penalty in the loss (use weight_decay), or a use of the weight outside the layer"
    if layer.declared:
        cause = f"is it {layer.declared!r}, as Options(treat_as=...) says"
    return (
        f"layer {layer.name}: the gradient of its weight is {ratio:.4g} times what its inputs and output gradients give "
        f"(error {error:.1%}): {cause}? {out}"
    )


def _add(sums: dict[KroneckerLayer, Tensor], layer: KroneckerLayer, term: Tensor) -> None:
    sums[layer] = sums[layer] + term if layer in sums else term

"""The outputs of a model that `update_curvature` is given: where they came from, and where K-FAC's backward passes start."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.kfac.capture.calls import Output
from secondorder.kfac.exact_columns import parts_of_columns
from secondorder.kfac.fisher import output_gradients
from secondorder.kfac.options import Fisher


def as_outputs(logits: Any) -> list[Tensor]:
    """The outputs that `update_curvature` is given; InputError unless it is a tensor with rows, or some."""
    outputs = list(logits) if isinstance(logits, list | tuple) else [logits]
    for z in outputs:
        if not isinstance(z, Tensor):
            raise InputError(
                f"update_curvature(logits): {type(z).__name__} is not a tensor; pass the model's logits, or a list of them"
            )
        if z.ndim == 0:
            raise InputError("update_curvature(logits): a number; pass the model's logits [N, K, ...], not the loss")
        if z.numel() == 0:
            raise InputError(f"update_curvature(logits): logits {list(z.shape)} of an empty batch; leave the batch out")
    if not outputs:
        raise InputError("update_curvature([]): pass the model's logits")
    return outputs


def batches_of(below: Sequence[tuple[Tensor, Sequence[Output]]]) -> list[tuple[int, list[Tensor]]]:
    """Rows and heads of the outputs that share forward passes of the model."""
    batches: list[tuple[set[Any], int, list[Tensor]]] = []
    for z, found in below:
        forwards, rows, heads = {output.call.forward for output in found}, len(z), [z]
        joined = [batch for batch in batches if batch[0] & forwards]
        batches = [batch for batch in batches if not batch[0] & forwards]
        for batch in joined:
            forwards, rows, heads = forwards | batch[0], max(rows, batch[1]), batch[2] + heads
        batches.append((forwards, rows, heads))
    return [(rows, heads) for _, rows, heads in batches]


def starts_of(
    heads: Mapping[Tensor, tuple[Fisher, float]], kind: str, generator: torch.Generator
) -> Iterable[Sequence[tuple[Tensor, Tensor]]]:
    """Where each backward pass starts: drawn gradients of heads are independent and may go together, columns may not.

    Args:
        heads: of each output, what is declared of its loss, and its weight. kind: "mc" or "exact". generator: draws the labels.
    """

    def gradients_at(z: Tensor, columns: range | None = None) -> Tensor:
        own, weight = heads[z]
        words = own.kind, str(own.likelihood), own.reduction
        return output_gradients(z.detach(), *words, generator, own.samples, weight, columns)

    if kind == "exact":
        parts = ((z, part) for z in heads for part in parts_of_columns(z))
        return ([(z, column)] for z, part in parts for column in gradients_at(z, part))
    gradients = [gradients_at(z) for z in heads]
    return (list(zip(heads, drawn, strict=True)) for drawn in zip(*gradients, strict=True))

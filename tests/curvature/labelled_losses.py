"""Losses with several labels for each sample, and a network for them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, C, D = 4, 3, (2, 2)
F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


CLASSES = drawn(N, *D, seed=1).mul(3).long().abs() % C
IGNORED = CLASSES.clone().index_fill_(0, torch.tensor([1]), -100)
SHARES = drawn(N, C, *D, seed=2).softmax(1)
TARGETS = drawn(N, C, *D, seed=3).sigmoid()
WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
CASES: dict[str, tuple[Any, Tensor]] = {
    "classes": (nn.CrossEntropyLoss(), CLASSES),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "ignored": (nn.CrossEntropyLoss(), IGNORED),
    "weights, smoothing": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2), IGNORED),
    "probabilities": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), SHARES),
    "function": (F.cross_entropy, CLASSES),
    "binary": (nn.BCEWithLogitsLoss(), TARGETS),
    "binary sum": (nn.BCEWithLogitsLoss(reduction="sum"), TARGETS.round()),
    "binary weights": (nn.BCEWithLogitsLoss(weight=WEIGHTS[:, None, None], pos_weight=WEIGHTS[:2]), TARGETS),
    "binary function": (F.binary_cross_entropy_with_logits, TARGETS),
}
LABELLED = pytest.mark.parametrize("case", CASES)


def segmentation() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, C, 1)).double()

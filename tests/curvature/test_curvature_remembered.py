"""What a network remembers of the images that it has seen is forgotten, wherever it keeps it."""

import pytest
import torch
from small_networks import CLASSES, around, relative, reverse_ggn, rows
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks

CE = nn.CrossEntropyLoss()


class Notes:
    """What a network has seen."""

    mean: Tensor | None = None


@pytest.mark.parametrize("place", ["nested", "object"])
def test_what_a_network_remembers_of_few_images_is_forgotten(place: str) -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, CLASSES)
            self.seen: dict[str, dict[str, Tensor]] = {"first": {}}
            self.notes = Notes()

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if place == "nested":
                h = h - self.seen["first"].setdefault("mean", h.detach().mean(0))
            else:
                self.notes.mean = h.detach().mean(0) if self.notes.mean is None else self.notes.mean
                h = h - self.notes.mean
            return self.last(h.tanh())  # type: ignore[no-any-return]

    model, data = Remembering().double(), rows(9)
    whole = curvature_blocks(model, CE, data, "ggn").whole
    assert not model.seen["first"]
    assert model.notes.mean is None
    v = torch.randn(whole.size).double()
    product, dense = whole @ v, whole.dense()
    G = reverse_ggn(model, CE, data)
    assert relative(product, G @ v) <= 1e-12
    assert relative(dense, G) <= 1e-12


def test_large_containers_are_copied_but_not_looked_into() -> None:
    looked: list[str] = []

    class Word:
        @property
        def __dict__(self) -> dict[str, int]:  # type: ignore[override]
            looked.append("at")
            return {}

    model, data = around(torch.tanh), rows()
    model.vocabulary = {n: Word() for n in range(100)}  # type: ignore[assignment]
    model.few = [Word()]  # type: ignore[assignment]
    G = reverse_ggn(model, CE, data)
    assert relative(curvature_blocks(model, CE, data, "ggn").whole.dense(), G) <= 1e-12
    times = len(looked)
    assert 0 < times < 100  # of the one word, once for each evaluation
    assert len(model.vocabulary) == 100  # type: ignore[arg-type]

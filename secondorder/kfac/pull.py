"""Gradients of one backward pass on their way into the statistics."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secondorder.kfac.statistics import LayerStatistics
from secondorder.kfac.uses import Use, by_forward


class Pull:
    """Gathers the gradients at the outputs of uses.

    A gradient is freed as soon as those of all uses of the layer in the same forward are there: together they are as large as
    the outputs of all layers.
    """

    def __init__(self, statistics: Mapping[str, LayerStatistics], uses: Sequence[Use]) -> None:
        self.statistics = statistics
        self._together = {use: uses for uses in by_forward(uses) for use in uses}
        self._here: dict[Use, Tensor] = {}

    def take(self, use: Use, g: Tensor) -> None:
        """The gradient at the output of a use; into the statistics when those of the uses that go with it are there."""
        self._here[use] = g
        if all(other in self._here for other in self._together[use]):
            self._add(self._together[use])

    def take_from(self, use: Use, index: int, gradients: tuple[Tensor | None, ...]) -> None:
        """That of a node that the backward pass goes through."""
        g = gradients[index]
        if g is not None:
            self.take(use, g)

    def finish(self) -> None:
        """Into the statistics with those whose companions are not below the logits."""
        for uses in by_forward(sorted(self._here, key=lambda use: use.order)):
            self._add(uses)

    @torch.no_grad()
    def _add(self, uses: Sequence[Use]) -> None:
        gradients = [self._here.pop(use)[None] for use in uses]
        with torch.autocast(gradients[0].device.type, enabled=False):
            self.statistics[uses[0].layer.name].add_gradients([use.input for use in uses], gradients)

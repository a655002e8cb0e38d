"""The damped inverses of all layers: made from the factors, applied to gradients."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.curvature.relative_damping import safe_scale, tikhonov
from secondorder.kfac.diagonal_statistics import DiagonalStatistics
from secondorder.kfac.distributed import Processes
from secondorder.kfac.inverses import CorrectedEigenbasis, Factors, Inverse, State, check_state, invert, restored
from secondorder.kfac.inverses.diagonal import times, times_right
from secondorder.kfac.inverses.eigenbasis import Rotated
from secondorder.kfac.inverses.own_diagonal import OwnDiagonal, own_scale
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.options import Damping
from secondorder.kfac.state_check import check_entries, check_float, refused
from secondorder.kfac.statistics import LayerStatistics

Directions = dict[nn.Parameter, Tensor]


class Blocks:
    """P = (B kron A + lambda I)^-1 of each layer, with a damping of its own; each is computed by one of the processes."""

    def __init__(
        self,
        layers: Mapping[str, KroneckerLayer],
        statistics: Mapping[str, LayerStatistics],
        damping: Damping,
        processes: Processes,
    ) -> None:
        self.layers, self.statistics, self.damping, self.processes = layers, statistics, damping, processes
        self.dampings: dict[str, float] = {}
        self.inverses: dict[str, Inverse] = {}
        self.adopt(layers)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights, that of the first layer."""
        return next(iter(self.layers.values())).weight.device

    def adopt(self, fresh: Collection[str]) -> None:
        """Go on with what is in `layers` now, of which the `fresh` ones have neither an inverse nor a damping of their own."""
        self.costs = {name: _cost(layer) for name, layer in self.layers.items()}
        self.owners = self.processes.owners(self.costs)
        kept = [name for name in self.layers if name not in fresh]
        self.dampings = dict.fromkeys(self.layers, self.damping.value) | {name: self.dampings[name] for name in kept}
        self.inverses = {name: self.inverses[name] for name in kept if name in self.inverses}

    def follow_weights(self) -> None:
        """Take the devices and the number formats of the weights, which have changed them."""
        self.inverses = self.restored(
            {"inverses": {name: inverse.tensors() for name, inverse in self.inverses.items()}}
        )
        self._share_bases()

    def invert(self, names: Sequence[str], events: Counter[str]) -> None:
        """New inverses of the named layers, all of which have factors; what goes wrong is counted in `events`."""
        if not names:
            return

        def compute(mine: list[str]) -> dict[str, State]:
            return {name: inverse.tensors() for name, inverse in self.inverted(mine, events).items()}

        if self.processes.world == 1:
            self.inverses |= self.inverted(names, events)
        else:
            contents = self.processes.computed_by_owners(names, self.owners, compute, self.device)
            self.inverses |= {name: restored(content) for name, content in contents.items()}
        self._share_bases()

    def inverted(self, names: Sequence[str], events: Counter[str]) -> dict[str, Inverse]:
        """New inverses of the named layers from their present factors and dampings, by name.

        What goes wrong is counted in `events`.
        """
        own = {name: OwnDiagonal.of(S) for name in names if (S := self.squares(name)) is not None}
        chosen = [name for name in names if name not in own]
        factors, dampings = [self.factors(name) for name in chosen], [self.dampings[name] for name in chosen]
        kinds = ["ekfac" if self.layers[name].approximation == "ekfac" else self.damping.inverse for name in chosen]
        return own | invert(factors, kinds, dampings, self.damping.relative, self.inverses, events)

    def correct(self, statistics: Sequence[LayerStatistics], ema_decay: float) -> None:
        """Take the squared gradients of a step into EKFAC's second moments."""
        for one in statistics:
            inverse = self.inverses.get(one.layer.name)
            if isinstance(inverse, CorrectedEigenbasis) and one.squares is not None:
                inverse.update(one.squares, ema_decay)

    def solve(self, gradients: Directions, events: Counter[str], names: Collection[str] | None = None) -> Directions:
        """P grad for layers with an inverse (those of `names`), the gradient itself for all other parameters."""
        directions = dict(gradients)
        for name in self.layers if names is None else names:
            layer = self.layers[name]
            W = self.matrix(layer, directions)
            if W is None:
                continue
            if name not in self.inverses:
                events[f"{name}: no factors yet, its gradient is used as it is"] += 1
                continue
            solution = self.inverses[name].solve(W, self.dampings[name], self.damping.relative)
            weight, bias = layer.parts(solution)
            directions[layer.weight] = weight
            if layer.bias is not None and layer.bias in directions:
                assert bias is not None
                directions[layer.bias] = bias
        return directions

    def eigenbases(self) -> dict[str, Rotated]:
        """The present inverses that are diagonal in an eigenbasis, by layer name."""
        return {name: inverse for name, inverse in self.inverses.items() if isinstance(inverse, Rotated)}

    def quadratic_form(self, directions: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """sum of tr(W^T B W A) over the layers, W a direction: d^T F d of K-FAC's model, undamped."""
        total = torch.zeros((), device=self.device)
        for name, layer in self.layers.items():
            W = self.matrix(layer, directions)
            if W is None or not self.statistics[name].ready:
                continue
            if (S := self.squares(name)) is not None:
                total = total + (S * W * W).sum()
                continue
            factors = self.factors(name)
            WA = W @ factors.given.mT @ factors.given if factors.A is None else times_right(W, factors.A)
            total = total + (times(factors.B, W) * WA).sum()
        return total

    def penalty(self, a: Mapping[nn.Parameter, Tensor], b: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """a^T (lambda I) b over the layers, with the lambda of each group."""
        total = torch.zeros((), device=self.device)
        for name, layer in self.layers.items():
            V, W = self.matrix(layer, a), self.matrix(layer, b)
            if V is not None and W is not None:
                total = total + (self.tikhonov(name) * V * W).sum()
        return total

    def tikhonov(self, name: str) -> Tensor | float:
        """lambda of a layer, one number or `[G, 1, 1]`: that of its inverse, without one that of its factors."""
        damping, relative = self.dampings[name], self.damping.relative
        if name in self.inverses:
            return self.inverses[name].tikhonov(damping, relative)
        if not relative or not self.statistics[name].ready:
            return damping
        if (S := self.squares(name)) is not None:
            return tikhonov(own_scale(S), damping, relative)
        return tikhonov(safe_scale(self.factors(name).scale), damping, relative)

    def squares(self, name: str) -> Tensor | None:
        """S of a layer of which only a diagonal is kept, None of all others."""
        statistics = self.statistics[name]
        return statistics.S if isinstance(statistics, DiagonalStatistics) else None

    def factors(self, name: str) -> Factors:
        """A or its rows, and B, of a layer that has been used."""
        statistics = self.statistics[name]
        assert statistics.B is not None
        return Factors(name, statistics.A, statistics.rows, statistics.B)

    def work(self) -> tuple[dict[str, float], float]:
        """Floating-point operations of an inversion of each layer from its present factors, and of the passes that made them."""
        costs = {name: _work(statistics, self.damping.inverse) for name, statistics in self.statistics.items()}
        return costs, sum(statistics.work for statistics in self.statistics.values())

    def state_dict(self) -> dict[str, object]:
        """Dampings and inverses of all layers by name, plain values and tensors; `restored` and `continue_with` read them."""
        return {
            "dampings": dict(self.dampings),
            "inverses": {name: inverse.tensors() for name, inverse in self.inverses.items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """InputError unless a state has dampings of all layers, and inverses of their sizes."""
        check_entries("kfac.dampings", state["dampings"], self.layers)
        for name, value in state["dampings"].items():
            check_float(f"kfac.dampings.{name}", value)
            if not value:
                raise refused(f"kfac.dampings.{name}", "is zero")
        check_entries("kfac.inverses", state["inverses"], (), self.layers)
        for name, content in state["inverses"].items():
            layer = self.layers[name]
            sizes = {"G": layer.groups, "O": layer.outputs, "D": layer.inputs}
            diagonal = ("D" if layer.kind.diagonal_input else "") + ("O" if layer.diagonal_outputs else "")
            check_state(f"kfac.inverses.{name}", content, sizes, layer.dtype, diagonal)

    def restored(self, state: Mapping[str, Mapping]) -> dict[str, Inverse]:
        """The inverses in a state that `check_state` has found right."""
        found = {}
        for name, content in state["inverses"].items():
            place = (self.layers[name].weight.device, self.layers[name].dtype)
            found[name] = restored({k: v.to(*place) if isinstance(v, Tensor) else v for k, v in content.items()})
        return found

    def continue_with(self, inverses: dict[str, Inverse], dampings: Mapping[str, float]) -> None:
        """Use these inverses and dampings of the layers, by name, in place of the present ones."""
        self.inverses, self.dampings = inverses, dict(dampings)
        self._share_bases()

    def _share_bases(self) -> None:
        """Squared gradients are gathered in the bases of the present inverses."""
        for name, inverse in self.inverses.items():
            if isinstance(inverse, CorrectedEigenbasis):
                self.statistics[name].bases = (inverse.Q_A, inverse.Q_B)

    def matrix(self, layer: KroneckerLayer, directions: Mapping[nn.Parameter, Tensor]) -> Tensor | None:
        """Weight and bias of a layer's directions as one matrix `[G, O, D]`, or None for a layer without one.

        A bias that has no direction counts as zero.
        """
        if layer.weight not in directions:
            return None
        bias = None
        if layer.bias is not None:
            bias = directions[layer.bias] if layer.bias in directions else torch.zeros_like(layer.bias)
        return layer.matrix(directions[layer.weight], bias)


def _work(statistics: LayerStatistics, inverse: str) -> float:
    """Operations of products of float32 matrices that take as long as the inversion of a layer.

    An eigendecomposition takes as long as about eight products, an inverse by Cholesky as one and a half. Of R rows there are a
    Gram matrix, its eigenvectors and their product with the rows, in float64, which takes twice as long.
    """
    layer, rows = statistics.layer, statistics.rows
    if layer.diagonal:
        return 0.0
    dense = 3.0 if inverse == "cholesky" and layer.approximation == "kfac" else 16.0
    outputs = 0.0 if layer.diagonal_outputs else dense * layer.outputs**3
    if layer.kind.diagonal_input:
        inputs = 0.0
    elif rows is None:
        inputs = dense * layer.inputs**3 if statistics.dense else 0.0
    else:
        R = rows.shape[1]
        inputs = 32.0 * R**3 + 8.0 * R**2 * layer.inputs
    return layer.groups * (inputs + outputs)


def _cost(layer: KroneckerLayer) -> float:
    """About proportional to the time of an inversion."""
    if layer.diagonal:
        return float(layer.groups * layer.inputs * layer.outputs)
    inputs = 0 if layer.wide or layer.kind.diagonal_input else layer.inputs
    outputs = 0 if layer.diagonal_outputs else layer.outputs
    return layer.groups * (inputs**3 + outputs**3)

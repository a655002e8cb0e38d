"""Sums of one step and averages over steps of a layer's Kronecker factors A and B.

    expand  A = sum_nt a a^T / (N T)                      B = sum_nt g g^T / N
    reduce  A = sum_n (mean_t a) (mean_t a)^T / N         B = sum_n (sum_t g) (sum_t g)^T / N

Of a layer with very many outputs B is the diagonal of this, `[G, O]` (`KroneckerLayer.diagonal_outputs`).
Staged are plain sums and counts, which add over batches and processes; `commit` makes averages of them. The average over
steps is F <- d F + (1 - d) new, w <- d w + (1 - d), read as F / w. Several uses of a layer in one forward are positions.
A layer with many inputs (`wide`) keeps the last step's rows a instead of A, as long as those of all processes together are
fewer than the inputs; A from then on. Whether they are is known to all once the counts in `staged_tensors` are summed, so
that all exchange the same thing in `staged_rows`. A process that has so many rows by itself holds their A meanwhile.

Index letters: V backpropagated vectors a sample, N samples, T positions, G groups, D inputs, O outputs, R rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from secondorder.curvature.kronecker.factors import (
    joint_gradient_sum,
    joint_input_rows,
    joint_input_sum,
    joint_squared_sum,
)
from secondorder.curvature.kronecker.squares import squared_products
from secondorder.kfac.layers import KroneckerLayer
from secondorder.kfac.state_check import check_entries, check_float, check_tensor, refused


class Counts(NamedTuple):
    """Numbers of what is staged: vectors in the sum of A, samples, and floating-point operations of the passes."""

    rows: float = 0.0
    samples: float = 0.0
    work: float = 0.0


class LayerStatistics:
    """The factors of one layer: A `[G, D, D]` or its rows `[G, R, D]` with A = rows^T rows, and B `[G, O, O]`.

    bases: eigenvectors (Q_A `[G, D, D]`, Q_B `[G, O, O]`) in which squared gradients are summed, too (EKFAC), or None.
    squares: those of the last step, `[G, O, D]`. samples: N of the last step. work: of its passes through the layer, in
    floating-point operations, 6 G O D at each position. dense: whether A is kept, not its rows. A of an embedding is its
    diagonal `[G, D]`, B of very many outputs `[G, O]`.
    """

    averaged: ClassVar[tuple[str, ...]] = ("A", "B")

    def __init__(self, layer: KroneckerLayer) -> None:
        self.layer = layer
        self.bases: tuple[Tensor, Tensor] | None = None
        self.squares: Tensor | None = None
        self.rows: Tensor | None = None
        self.samples = self.work = 0.0
        self.dense = not layer.wide
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._staged: dict[str, Tensor] = {}
        self._staged_rows: list[Tensor] = []
        self._counts: Counts | None = None

    @property
    def A(self) -> Tensor | None:
        """The averaged input factor; None before the first step and where its rows are kept."""
        return self._averaged("A")

    @property
    def B(self) -> Tensor | None:
        """The averaged gradient factor; None before the first step."""
        return self._averaged("B")

    @property
    def ready(self) -> bool:
        """Whether there is anything to make an inverse of."""
        return self.averaged[-1] in self._sums

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: averages, rows, squares and what is staged."""
        tensors = [*self._sums.values(), *self._staged.values(), *self._staged_rows, self.rows, self.squares]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def used(self) -> bool:
        """Whether anything is staged in this step."""
        return self._counts is not None or "counts" in self._staged

    @property
    def staged_samples(self) -> float:
        """N of this step: of all processes once the staged tensors are summed."""
        return self.counts.samples

    @property
    def counts(self) -> Counts:
        """Vectors, samples and operations of this step, of all processes once the staged tensors are summed."""
        if "counts" in self._staged:
            self._counts = Counts(*self._staged.pop("counts").tolist())
        return Counts() if self._counts is None else self._counts

    def add_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Add the inputs `[N, *]` of all uses of the layer in one forward pass to what is staged."""
        layer, kind, bias = self.layer, self.layer.kind, self.layer.bias is not None
        xs = [self._batched(x) for x in inputs]
        N = len(xs[0])
        positions = sum(len(x) * kind.positions(x) for x in xs)
        counted = positions if layer.sharing == "expand" else N
        if self.dense or "A" in self._staged or counted + self._row_count >= layer.inputs:
            self._stage("A", joint_input_sum(kind, xs, layer.sharing, bias))
            self._rows_to_factor()
        else:
            self._staged_rows.append(joint_input_rows(kind, xs, layer.sharing, bias))
        self._count(counted, N, positions)

    def add_gradients(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add the gradients `[V, N, *out]` at the outputs of all uses in one forward; inputs: of the same uses, for EKFAC."""
        layer, kind = self.layer, self.layer.kind
        gs = [kind.batched(g.to(layer.dtype), leading=1) for g in gradients]
        sum_of_products = joint_squared_sum if layer.diagonal_outputs else joint_gradient_sum
        self._stage("B", sum_of_products(kind, gs, layer.sharing))
        if self.bases is not None:
            xs = [self._batched(x) for x in inputs]
            Q_A, Q_B = (Q.to(gs[0]) for Q in self.bases)  # of the format that the model had when they were made
            self._stage("S", squared_products(kind, xs, gs, Q_A, Q_B, layer.bias is not None))

    def staged_tensors(self) -> list[Tensor]:
        """The sums and counts of this step, which add over processes: A where it is dense, B, squares, counts."""
        names = [name for name in self.averaged if self.dense or name != "A"]
        names += [*([] if self.bases is None else ["S"]), "counts"]
        if "counts" not in self._staged:  # on the CPU: they are read without a wait
            self._staged["counts"], self._counts = torch.tensor(self.counts, dtype=self.layer.dtype), None
        for name in names:
            if name not in self._staged:
                self._staged[name] = self._zeros(*self._shapes[name])
        return [self._staged[name] for name in names]

    def staged_rows(self) -> Tensor:
        """What processes exchange, after `staged_tensors`, of a layer that is not dense: the rows a `[G, R, D]` of this step.

        Not normalised. Where those of all processes are no fewer than the inputs it is A `[G, D, D]` instead.
        """
        if self._many_rows:
            self._rows_to_factor()
            return self._staged["A"]
        if len(self._staged_rows) > 1:
            self._staged_rows = [torch.cat(self._staged_rows, 1)]
        return self._staged_rows[0] if self._staged_rows else self._zeros(self.layer.groups, 0, self.layer.inputs)

    def replace_staged_rows(self, rows: Tensor) -> None:
        """Take the `staged_rows` of all processes, one after another, for one's own; nothing where A is dense."""
        if self.dense:
            return
        if self._many_rows:
            self._staged["A"] = rows.unflatten(1, (-1, self.layer.inputs)).sum(1)
        else:
            self._staged_rows = [rows]

    def is_finite(self) -> Tensor:
        """Whether everything staged is finite, a scalar that stays on the device: the diagonals tell for A and B."""
        staged = self._staged
        matrices = [staged[name] for name in ("A", "B") if name in staged]
        sums = [(F if F.ndim == 2 else F.diagonal(dim1=-2, dim2=-1)).sum() for F in matrices]
        sums += [rows.sum() for rows in self._staged_rows] + ([staged["S"].sum()] if "S" in staged else [])
        return torch.isfinite(torch.stack(sums).sum()) if sums else torch.tensor(True)

    def commit(self, ema_decay: float, gradient_scale: float) -> None:
        """Take the staged sums into the averages, A as their mean, B and the squares times gradient_scale."""
        self.squares = None
        if not self.staged_samples:  # not used here, nor by another process
            return self.discard()
        staged = self._staged
        counts = self.counts
        if not self.dense and self._many_rows:
            self._rows_to_factor()
            self.dense, self.rows = True, None
        elif not self.dense:
            self.rows = self.staged_rows() / torch.tensor(counts.rows, dtype=self.layer.dtype).sqrt()
        if "A" in staged:
            self._average("A", staged["A"].div_(counts.rows), ema_decay)
        if "B" in staged:
            self._average("B", staged["B"].mul_(gradient_scale), ema_decay)
        if "S" in staged:
            self.squares = staged["S"].mul_(gradient_scale)
        self.samples, self.work = counts.samples, counts.work
        return self.discard()

    def discard(self) -> None:
        """Forget the sums, rows and counts that are staged in this step."""
        self._staged, self._staged_rows, self._counts = {}, [], None

    def state_dict(self) -> dict[str, Any]:
        """The averages, their weights, rows and the number of samples; nothing staged."""
        state: dict[str, Any] = {"samples": self.samples, "dense": self.dense}
        for name in self._sums:
            state |= {name: self._sums[name].clone(), f"{name}_weight": self._weights[name]}
        return state | ({} if self.rows is None else {"rows": self.rows.clone()})

    def check_state(self, entry: str, state: object) -> None:
        """InputError, which names `entry`, unless a state has whole factors of this layer's sizes and number format."""
        weights = tuple(f"{name}_weight" for name in self.averaged)
        check_entries(entry, state, ("samples", "dense"), (*self.averaged, *weights, "rows"))
        assert isinstance(state, Mapping)
        check_float(f"{entry}.samples", state["samples"])
        if not isinstance(state["dense"], bool):
            raise refused(f"{entry}.dense", f"is {state['dense']!r:.40}, not True or False")
        for name, weight in zip(self.averaged, weights, strict=True):
            if (name in state) != (weight in state):
                raise refused(entry, f"has only one of {name!r} and {weight!r}")
            if name in state:
                check_tensor(f"{entry}.{name}", state[name], self._shapes[name], self.layer.dtype)
                check_float(f"{entry}.{weight}", state[weight], most=1.0)
                if state[weight] == 0:
                    raise refused(f"{entry}.{weight}", "is zero")
        if "rows" in state:
            G, _, D = self._shapes["rows"]
            check_tensor(f"{entry}.rows", state["rows"], (G, None, D), self.layer.dtype)
        if ("rows" if state["dense"] else "A") in state or ("B" in state and not {"A", "rows"} & state.keys()):
            raise refused(entry, "has not one of 'A' and 'rows'")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; InputError, and nothing has changed, for a state that `check_state` refuses."""
        self.check_state(f"kfac.statistics.{self.layer.name}", state)
        self._sums = {name: self._moved(state[name]) for name in self.averaged if name in state}
        self._weights = {name: float(state[f"{name}_weight"]) for name in self._sums}
        self.rows = self._moved(state["rows"]) if "rows" in state else None
        self.samples, self.dense, self.squares = float(state["samples"]), state["dense"], None
        self.discard()

    def continue_with(self, other: "LayerStatistics") -> None:
        """Take over what statistics of the same layer hold."""
        self._sums, self._weights, self.rows = other._sums, other._weights, other.rows
        self.samples, self.work, self.dense = other.samples, other.work, other.dense
        self.squares = self.bases = None
        self.discard()

    def follow_weight(self) -> None:
        """Take the device and the number format of the weight, which has changed them."""
        self._sums, self._staged = ({k: self._moved(v) for k, v in held.items()} for held in (self._sums, self._staged))
        self._staged_rows = [self._moved(rows) for rows in self._staged_rows]
        self.rows = None if self.rows is None else self._moved(self.rows)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        G, D, outputs = self.layer.groups, self.layer.inputs, self.layer.outputs
        A = (G, D) if self.layer.kind.diagonal_input else (G, D, D)
        B = (G, outputs) if self.layer.diagonal_outputs else (G, outputs, outputs)
        return {"A": A, "B": B, "S": (G, outputs, D), "rows": (G, 0, D)}

    @property
    def _many_rows(self) -> bool:
        """Whether the rows of this step, those of all processes once the counts are summed, are no fewer than the inputs."""
        return self.used and self.counts.rows >= self.layer.inputs

    @property
    def _row_count(self) -> int:
        return sum(rows.shape[1] for rows in self._staged_rows)

    def _rows_to_factor(self) -> None:
        """A of the rows staged here, in their place; zero where there are none."""
        rows, self._staged_rows = self._staged_rows, []
        if "A" not in self._staged:
            self._staged["A"] = self._zeros(*self._shapes["A"])
        for part in rows:
            self._staged["A"].baddbmm_(part.mT, part)

    def _average(self, name: str, new: Tensor, decay: float) -> None:
        """F <- d F + (1 - d) new."""
        if name in self._sums:
            self._sums[name].lerp_(new, 1 - decay)
        else:
            self._sums[name] = new.mul_(1 - decay)
        self._weights[name] = decay * self._weights.get(name, 0.0) + (1 - decay)

    def _averaged(self, name: str) -> Tensor | None:
        return self._sums[name] / self._weights[name] if name in self._sums else None

    def _count(self, rows: int, samples: int, positions: int) -> None:
        """Count the inputs of one forward; an embedding looks its rows up, without a product."""
        layer, before = self.layer, self.counts
        work = 0 if layer.kind.diagonal_input else 6 * positions * layer.groups * layer.outputs * layer.inputs
        self._staged.pop("counts", None)
        self._counts = Counts(before.rows + rows, before.samples + samples, before.work + work)

    def _stage(self, name: str, value: Tensor) -> None:
        self._staged[name] = self._staged[name].add_(value) if name in self._staged else value

    def _batched(self, x: Tensor) -> Tensor:
        return self.layer.kind.batched(self.layer.kind.numbers(x, self.layer.dtype))

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.layer.weight.device, self.layer.dtype, copy=True)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.layer.dtype, device=self.layer.weight.device)

"""What K-FAC does to every parameter, and what it costs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

import torch

from secondorder.accelerator import wait_for
from secondorder.kfac.inverses import Inverse
from secondorder.kfac.inverses.numerics import EVENTS
from secondorder.kfac.layers import KroneckerLayer, Treatment
from secondorder.kfac.statistics import LayerStatistics
from secondorder.optional import needed_by

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ParameterRow:
    """What K-FAC does to one parameter and why, the sizes of its layer's factors, and their memory in bytes."""

    parameter: str
    shape: tuple[int, ...]
    treatment: str
    """kfac, ekfac, diagonal, fallback or frozen."""
    reason: str
    input_factor: str
    """Size of A: groups x D x D, or "R x D rows" of a wide layer, "D diagonal"."""
    gradient_factor: str
    """Size of B: groups x O x O, or "O diagonal" of a layer with very many outputs."""
    factor_bytes: int
    inverse_bytes: int


@dataclass(frozen=True)
class Report:
    """Parameters, seconds and calls of each phase, events (what went wrong, how often), and steps done; `print` shows a table.

    Args:
        shortened: how many steps the trust region shortened, and the geometric mean of the factors, since the optimiser was made.
        exploded: how many natural steps were longer than all weights together.
    """

    parameters: list[ParameterRow]
    seconds: Mapping[str, float]
    calls: Mapping[str, int]
    events: Mapping[str, int]
    steps: int
    shortened: tuple[int, float] = (0, 1.0)
    exploded: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the factors and inverses of all layers."""
        return sum(row.factor_bytes + row.inverse_bytes for row in self.parameters)

    def table(self) -> pd.DataFrame:
        """A pandas table with a row for each parameter and the fields of `ParameterRow` as columns.

        MissingLibraryError without pandas.
        """
        with needed_by("the table of a report"):
            import pandas as pd
        return pd.DataFrame([asdict(row) for row in self.parameters])

    def __str__(self) -> str:
        lines = [
            *_aligned([tuple(field.name for field in fields(ParameterRow)), *map(_cells, self.parameters)]),
            f"{self.steps} steps, {self.bytes / 2**20:.1f} MiB of factors and inverses",
        ]
        for phase, seconds in self.seconds.items():
            lines.append(f"{phase}: {seconds:.3f} s in {self.calls[phase]} calls")
        if self.shortened[0]:
            count, factor = self.shortened
            lines.append(
                f"trust region: {count} steps shortened, to {factor:.2g} of their length in the geometric mean"
            )
        if self.exploded:
            lines.append(
                f"{self.exploded} steps were longer than all weights together: lower lr or clip, or use another step_rule"
            )
        lines.extend(f"{count} x {EVENTS.get(event, event)}" for event, count in self.events.items())
        return "\n".join(lines)


def _cells(row: ParameterRow) -> tuple[str, ...]:
    return tuple(str(value) for value in vars(row).values())


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A line of text for each row, columns right-aligned and two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


@dataclass
class Stopwatch:
    """Wall-clock seconds by phase; on an accelerator only when asked, since every phase then waits for the device."""

    device: torch.device
    synchronise: bool
    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what is inside as this phase."""
        if self.device.type != "cpu" and not self.synchronise:
            yield
            return
        start = self._now()
        yield
        self.seconds[phase] += self._now() - start  # type: ignore[assignment]
        self.calls[phase] += 1

    def _now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


def parameter_rows(
    treatments: Sequence[Treatment],
    layers: Mapping[str, KroneckerLayer],
    statistics: Mapping[str, LayerStatistics],
    inverses: Mapping[str, Inverse],
) -> list[ParameterRow]:
    """A row for each parameter; the memory of a layer is counted at its weight."""
    rows = []
    for treatment in treatments:
        layer = layers[treatment.layer] if treatment.layer is not None else None
        weight = layer is not None and treatment.parameter is layer.weight
        inverse = inverses.get(layer.name) if layer is not None else None
        rows.append(
            ParameterRow(
                treatment.name,
                tuple(treatment.parameter.shape),
                treatment.how,
                treatment.why,
                _input_size(layer, statistics) if layer is not None else "",
                _size(layer.groups, layer.outputs, layer.diagonal_outputs)
                if layer is not None and not layer.diagonal
                else "",
                statistics[layer.name].nbytes if layer is not None and weight else 0,
                inverse.nbytes if inverse is not None and weight else 0,
            )
        )
    return rows


def _input_size(layer: KroneckerLayer, statistics: Mapping[str, LayerStatistics]) -> str:
    if layer.diagonal or layer.kind.diagonal_input:
        return _size(layer.groups, layer.inputs, diagonal=True)
    if statistics[layer.name].dense:
        return _size(layer.groups, layer.inputs)
    rows = statistics[layer.name].rows
    return f"{'?' if rows is None else rows.shape[-2]} x {layer.inputs} rows"


def _size(groups: int, side: int, diagonal: bool = False) -> str:
    size = f"{side} diagonal" if diagonal else f"{side} x {side}"
    return size if groups == 1 else f"{groups} x {size}"

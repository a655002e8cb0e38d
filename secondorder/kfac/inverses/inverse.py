"""What a damped inverse of one layer's curvature block is: P = (B kron A + lambda I)^-1, made from the factors A and B.

Index letters of this package: G groups, D inputs and O outputs of a group, R rows of a wide layer's input factor. The
gradient W `[G, O, D]` is row-major, so that (B kron A) vec(W) = vec(B W A). A factor of very many outputs
or inputs is its diagonal, `[G, O]` or `[G, D]`, and so is what is made of it (`secondorder.kfac.inverses.diagonal`).

Damping has one meaning, Tikhonov on the block F = B kron A. Absolute: lambda = damping. Relative, for each group: lambda =
damping times the scale |F|_F^2 / tr F = (|A|_F^2 / tr A) (|B|_F^2 / tr B), the mean eigenvalue where each counts with its own
size. Directions without curvature do not enter it; the plain mean falls with their number, 30 times lower for the classifier
of a GCP network than for that of a GAP network whose curvature is as large. A scale of zero (below `min_scale`), as of a layer
whose gradients are all zero, counts as 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Self

from torch import Tensor

from secondorder.curvature.relative_damping import tikhonov
from secondorder.kfac.inverses.diagonal import mean_eigenvalue, weighted_eigenvalue
from secondorder.kfac.inverses.numerics import Problem, Result, solutions

State = dict[str, Tensor | float | str]
"""What a checkpoint keeps of an inverse."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The Kronecker factors of a layer: B `[G, O, O]`, and A `[G, D, D]` or rows `[G, R, D]` with A = rows^T rows.

    A or B that is diagonal is its diagonal, `[G, D]` or `[G, O]`.
    """

    name: str
    A: Tensor | None
    rows: Tensor | None
    B: Tensor

    @cached_property
    def scale(self) -> Tensor:
        """|F|_F^2 / tr F of the block F = B kron A, `[G]`, 0 where it is zero."""
        if self.A is not None:
            return weighted_eigenvalue(self.A) * weighted_eigenvalue(self.B)
        return weighted_eigenvalue(self.given @ self.given.mT) * weighted_eigenvalue(self.B)

    @property
    def given(self) -> Tensor:
        """The input factor as it is kept: A `[G, D, D]` (or its diagonal `[G, D]`), or its rows `[G, R, D]`."""
        found = self.rows if self.A is None else self.A
        assert found is not None
        return found

    def means(self) -> tuple[Tensor, Tensor]:
        """The mean eigenvalues tr A / D and tr B / O, each `[G]`."""
        if self.A is not None:
            return mean_eigenvalue(self.A), mean_eigenvalue(self.B)
        rows = self.given
        return rows.square().sum((1, 2)) / rows.shape[-1], mean_eigenvalue(self.B)


@dataclass(eq=False)
class Inverse(ABC):
    """P of one layer; its fields, tensors and numbers, are its complete state."""

    kind: ClassVar[str]
    shapes: ClassVar[Mapping[str, str]]
    """Of the fields that are tensors, in the index letters: a length that is a letter is the layer's, R is any."""

    @abstractmethod
    def solve(self, gradient: Tensor, damping: float, relative: bool) -> Tensor:
        """P W `[G, O, D]` for the gradient W `[G, O, D]`, in its dtype.

        Args:
            damping, relative: as in `secondorder.kfac.Damping`; not used by an inverse that was damped when it was
                made.
        """

    @abstractmethod
    def tikhonov(self, damping: float, relative: bool) -> Tensor | float:
        """The lambda that `solve` adds, one number or `[G, 1, 1]`, for this damping, relative to the block's scale or not."""

    def tensors(self) -> State:
        """The complete state, fields by name with the kind; `from_tensors` reads it."""
        return {"kind": self.kind} | {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor | float | str]) -> Self:
        """The inverse with this state, bit for bit."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the inverse."""
        return sum(value.nbytes for value in self.tensors().values() if isinstance(value, Tensor))


@dataclass(eq=False)
class Identity(Inverse):
    """W / lambda, when there is nothing better; scale `[G, 1, 1]`."""

    kind = "identity"
    shapes = MappingProxyType({"scale": "G11"})
    scale: Tensor

    def solve(self, gradient: Tensor, damping: float, relative: bool) -> Tensor:
        """P W = W / lambda `[G, O, D]` for the gradient W, in its dtype."""
        return (gradient / self.tikhonov(damping, relative)).to(gradient.dtype)

    def tikhonov(self, damping: float, relative: bool) -> Tensor | float:
        """lambda: the damping times the scale `[G, 1, 1]` where it is relative, otherwise the damping itself."""
        return tikhonov(self.scale, damping, relative)


@dataclass(frozen=True)
class Recipe:
    """How an inverse is made: `make` of the solutions of these problems."""

    problems: Sequence[Problem]
    make: Callable[..., Inverse]


def made(recipes: Iterable[Recipe], report: Counter[str]) -> list[Inverse | None]:
    """The inverse of each recipe, None where a problem has no solution.

    On a CPU one after another, so that what is needed on the way is held for one layer only; on an accelerator all at once,
    with one synchronisation.
    """
    found: list[Inverse | None] = []
    waiting: list[Recipe] = []
    for recipe in recipes:
        waiting.append(recipe)
        if recipe.problems[0].S.device.type == "cpu":
            found += _made_at_once(waiting, report)
            waiting = []
    return found + _made_at_once(waiting, report)


def _made_at_once(recipes: Sequence[Recipe], report: Counter[str]) -> list[Inverse | None]:
    solved = iter(solutions([problem for recipe in recipes for problem in recipe.problems], report))
    found: list[Inverse | None] = []
    for recipe in recipes:
        own: list[Result | None] = [next(solved) for _ in recipe.problems]
        found.append(None if any(solution is None for solution in own) else recipe.make(*own))
    return found

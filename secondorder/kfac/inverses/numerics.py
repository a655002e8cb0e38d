"""Decompositions that do not fail: each step of a ladder is tried when the one before it fails, and counted.

inverse        Cholesky -> Cholesky with growing jitter on the diagonal -> eigenvalues in float64, on the CPU
eigenvalues    in the matrix's own precision -> in float64, on the CPU
either         -> the layer's last good inverse -> W / lambda when there was none yet

Whether an attempt has succeeded is asked once for all matrices: one synchronisation with an accelerator. A diagonal matrix,
given by its diagonal `[G, n]`, is its own decomposition.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EVENTS = {
    "jitter": "a factor needed more on its diagonal for its Cholesky decomposition",
    "float64": "a factor was decomposed in float64",
    "kept": "a layer kept its last good inverse",
    "identity": "a layer had no good inverse yet: its gradient was divided by the damping",
}
"""What is counted."""
JITTERS = (1e-6, 1e-4, 1e-2)
"""Times the mean of the diagonal."""

Result = tuple[Tensor, ...]
Eigen = tuple[Tensor, Tensor]
"""Eigenvalues `[G, n]`, none below zero, and eigenvectors `[G, n, n]` in columns."""
Attempt = tuple[Result, Tensor]
"""A result, and whether it can be used, as a number on the device."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A positive semi-definite matrix S `[G, n, n]`, or its diagonal `[G, n]`: its eigenvalues and -vectors are wanted.

    With a shift `[G, 1, 1]` the inverse (S + shift I)^-1 is.
    """

    S: Tensor
    shift: Tensor | None = None


def solutions(problems: Sequence[Problem], report: Counter[str]) -> list[Result | None]:
    """`Eigen`, or an inverse alone in a tuple, of each problem, None where all attempts failed.

    torch.linalg.eigh is LAPACK's syevd on a CPU, the fastest driver (one thread, float32, ms for n = 145, 289, 577: syevd
    0.7, 3.2, 17; syevr 1.2, 5.0, 25; syev 2.0, 12, 97; syevd in float64 1.3, 7.6, 40).
    """
    found: dict[int, Result | None] = {
        i: _of_diagonal(problem) for i, problem in enumerate(problems) if problem.S.ndim == 2
    }
    dense = [i for i in range(len(problems)) if i not in found]
    batches: list[tuple[list[int], Attempt | None]] = []
    for kind in (True, False):
        own = [i for i in dense if (problems[i].shift is None) == kind]
        for places in _of_one_size([problems[i].S for i in own]) if own else []:
            indices = [own[place] for place in places]
            batches.append((indices, _attempt([problems[i] for i in indices])))
    for (indices, attempt), good in zip(batches, _succeeded([attempt for _, attempt in batches]), strict=True):
        if attempt is not None and good:
            sizes = [len(problems[i].S) for i in indices]
            parts = zip(*(part.split(sizes) for part in attempt[0]), strict=True)
            found |= dict(zip(indices, parts, strict=True))
        else:
            found |= {i: _alone(problems[i], report, len(indices) > 1) for i in indices}
    return [found[i] for i in range(len(problems))]


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether the numbers of each tensor, and their sum, are finite; one synchronisation for all."""
    return torch.stack([tensor.sum().isfinite() for tensor in tensors]).tolist() if tensors else []


def _of_diagonal(problem: Problem) -> Result:
    """Of a matrix that is its diagonal `[G, n]`, whose eigenvectors are the unit vectors."""
    values = problem.S.clamp(min=0)
    return (
        (values, torch.ones_like(values)) if problem.shift is None else ((values + problem.shift[:, 0]).reciprocal(),)
    )


def _attempt(together: Sequence[Problem]) -> Attempt | None:
    """All matrices of a size in one call."""
    matrices = [p.S if p.shift is None else _shifted(p.S, p.shift) for p in together]
    S = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    return _eigh(S) if together[0].shift is None else _cholesky_inverse(S)


def _alone(problem: Problem, report: Counter[str], again: bool) -> Result | None:
    """A matrix by itself: once more, if the first attempt was with others, and then by the rest of the ladder."""
    found = _checked(_attempt([problem])) if again else None
    if found is not None:
        return found
    if problem.shift is None:
        return _eigh_float64(problem.S, report)
    return _jittered(_shifted(problem.S, problem.shift), report) or _spectral_inverse(problem.S, problem.shift, report)


def _of_one_size(matrices: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the matrices that are decomposed in one call: those of a size on an accelerator.

    On a CPU each is by itself: LAPACK takes them one by one anyway, and stacking only copies.
    """
    groups: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        key = i if matrix.device.type == "cpu" else (matrix.shape[1:], matrix.dtype, matrix.device)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _succeeded(attempts: Sequence[Attempt | None]) -> list[bool]:
    """Whether each attempt has a result that can be used: one synchronisation."""
    asked = [attempt[1] for attempt in attempts if attempt is not None]
    answers = iter(torch.stack(asked).tolist() if asked else [])
    return [attempt is not None and next(answers) for attempt in attempts]


def _checked(attempt: Attempt | None) -> Result | None:
    return attempt[0] if attempt is not None and _succeeded([attempt])[0] else None


def _eigh(S: Tensor) -> Attempt | None:
    try:
        values, vectors = torch.linalg.eigh(S)
    except torch.linalg.LinAlgError:
        return None
    return (values.clamp_(min=0), vectors), values.sum().isfinite() & vectors.sum().isfinite()


def _eigh_float64(S: Tensor, report: Counter[str]) -> Result | None:
    report["float64"] += 1
    found = _checked(_eigh(S.cpu().double()))
    return None if found is None else tuple(part.to(S) for part in found)


def _cholesky_inverse(S: Tensor) -> Attempt | None:
    L, info = torch.linalg.cholesky_ex(S)
    try:
        inverse = torch.cholesky_inverse(L)
    except torch.linalg.LinAlgError:  # a zero on the diagonal of what is no root
        return None
    return (inverse,), inverse.sum().isfinite() & ~info.any()


def _jittered(S: Tensor, report: Counter[str]) -> Result | None:
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    for jitter in JITTERS:
        found = _checked(_cholesky_inverse(_shifted(S, jitter * mean)))
        if found is not None:
            report["jitter"] += 1
            return found
    return None


def _spectral_inverse(S: Tensor, shift: Tensor, report: Counter[str]) -> Result | None:
    found = _eigh_float64(S, report)
    if found is None:
        return None
    values, Q = found
    inverse = (Q / (values[:, None] + shift)) @ Q.mT
    return (inverse,) if all(all_finite([inverse])) else None


def _shifted(S: Tensor, shift: Tensor) -> Tensor:
    """S + shift I."""
    total = S.clone()
    total.diagonal(dim1=-2, dim2=-1).add_(shift[:, 0])
    return total

"""Spectra, traces and fidelity of operators whose eigenvalues are known."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from secondorder.curvature import fidelity, relative_difference, spectral_density, spectral_summary, top_eigenvalues
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.spectrum.trace_estimates import diagonal_estimate, frobenius_norm_estimate, trace_estimate

from .call import Call, arguments, shown
from .values import absurd, bad_tensor, named, normal

ONE: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "spectral_summary": (spectral_summary, ("method", "threshold", "probes", "steps", "deflate", "seed", "memory")),
    "spectral_density": (spectral_density, ("probes", "steps", "deflate", "zero", "seed", "memory")),
    "top_eigenvalues": (top_eigenvalues, ("k", "which", "tolerance", "max_iterations", "block", "seed", "memory")),
    "trace_estimate": (trace_estimate, ("method", "probes", "distribution", "seed", "memory")),
    "frobenius_norm_estimate": (frobenius_norm_estimate, ("method", "probes", "distribution", "seed", "memory")),
    "diagonal_estimate": (diagonal_estimate, ("method", "probes", "distribution", "seed", "memory")),
}
TWO = {"fidelity": fidelity, "relative_difference": relative_difference}
METHODS = {
    "spectral_summary": ("auto", "exact", "lanczos"),
    "fidelity": ("auto", "dense", "structured", "stochastic"),
    "relative_difference": ("auto", "dense", "stochastic"),
}


def operator(random: Random, size: int | None = None) -> tuple[str, SymmetricOperator]:
    """An operator of known kind, some of extreme size or null."""
    P = size or random.choice((1, 2, 5, 12))
    root = normal(random, P, P) / P**0.5
    scale = random.choice((1.0, 1.0, 1.0, 1e-200, 1e100, 0.0))
    kind = random.choice(("dense", "indefinite", "diagonal", "factored", "blocks", "kronecker"))
    A = scale * root @ root.mT
    made: dict[str, Callable[[], SymmetricOperator]] = {
        "dense": lambda: DenseOperator(A),
        "indefinite": lambda: DenseOperator(scale * (root + root.mT)),
        "diagonal": lambda: DiagonalOperator(scale * root[0]),
        "factored": lambda: FactoredOperator(scale**0.5 * root[: max(1, P // 2)]),
        "blocks": lambda: BlockDiagonalOperator(
            [DenseOperator(A[: P // 2 + 1, : P // 2 + 1])]
            + [DiagonalOperator(A[0, P // 2 + 1 :])] * (P > 1 and P // 2 + 1 < P)
        ),
        "kronecker": lambda: KroneckerOperator(DenseOperator(A), DiagonalOperator(torch.ones(1).double())),
    }
    found = made[kind]()
    if random.random() < 0.2 and kind == "dense" and 1e-30 < scale < 1e30:
        return f"float32 {kind} [{P}]", DenseOperator(A.float())
    return f"{kind} [{P}] x {scale:g}", found


def spectra(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((bad_one, bad_one, bad_two, truth, truth, exact_pair, bad_operator))(random)


def options(random: Random, name: str, fields: tuple[str, ...]) -> tuple[dict[str, Any], str, Any]:
    """One absurd option."""
    field, value = random.choice(fields), absurd(random)
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and 10**3 < value < 10**29
        and field in ("probes", "steps", "max_iterations")
    ):
        value = 200
    settings = (
        {"method": random.choice(METHODS.get(name, ("auto", "exact", "hutchinson", "hutch++")))}
        if "method" in fields
        else {}
    )
    settings |= {"k": 1} if name == "top_eigenvalues" else {}
    return settings | {field: value}, field, value


def bad_one(random: Random) -> Call:
    """An estimator with one absurd option."""
    name = random.choice(list(ONE))
    words, A = operator(random)
    settings, field, value = options(random, name, ONE[name][1])
    names = (field, named(value), "order" if field == "which" else "GiB", "rows", "eigenvalues")
    run = lambda: ONE[name][0](A, **settings)  # noqa: E731
    return Call(f"{name}({words}, {arguments(settings)})", run, names=names, pure=True)


def bad_two(random: Random) -> Call:
    """A comparison with one absurd option or operators that do not fit."""
    name = random.choice(list(TWO))
    words, A = operator(random)
    other, B = operator(random, random.choice((A.size, A.size, A.size + 1)))
    settings = options(random, name, ("method", "probes", "seed", "memory"))[0]
    if random.random() < 0.1:
        B = absurd(random)
    run = lambda: TWO[name](A, B, **settings)  # noqa: E731
    return Call(
        f"{name}({words}, {other if isinstance(B, SymmetricOperator) else shown(B)}, {arguments(settings)})",
        run,
        pure=True,
    )


def truth(random: Random) -> Call:
    """Summaries, exact and by Lanczos, against eigenvalues of the dense matrix."""
    words, A = operator(random)
    method = random.choice(("auto", "exact", "lanczos"))
    values = torch.linalg.eigvalsh(A.dense().double())
    top = float(values.abs().max())
    loose = 1e-4 if A.dtype == torch.float32 else 1e-8

    def check(summary: Any) -> str | None:
        pairs = {"largest": float(values[-1]), "smallest": float(values[0]), "largest_magnitude": top}
        if method != "lanczos":
            pairs["trace"] = float(values.sum())
        wrong = [n for n, v in pairs.items() if not abs(getattr(summary, n).value - v) <= loose * top * len(values)]
        for name, estimate in vars(summary).items():
            if hasattr(estimate, "error") and math.isnan(estimate.error) and top > 0:
                return f"the error of {name} is NaN"
            if hasattr(estimate, "value") and math.isnan(estimate.value) and top > 0:
                return f"{name} is NaN"
        return f"{wrong[0]} is not that of the eigenvalues" if wrong else None

    run = lambda: spectral_summary(A, method, probes=4, steps=20, deflate=3)  # noqa: E731
    return Call(f"spectral_summary({words}, {method})", run, check=check, pure=True)


def exact_pair(random: Random) -> Call:
    """Fidelity and relative difference of dense matrices; scaling both changes neither."""
    words, A = operator(random)
    other, B = operator(random, A.size)
    a, b = A.dense().double(), B.dense().double()
    inside = all(1e-100 < float(m.norm()) < 1e100 for m in (a, b)) and A.dtype == B.dtype == torch.float64

    def check(found: Any) -> str | None:
        if not inside:
            return None
        cosine, difference = found[0].cosine.value, found[1].value
        right = float((a * b).sum() / (a.norm() * b.norm())), float((a - b).norm() / b.norm())
        for what, x, y in (("cosine", cosine, right[0]), ("difference", difference, right[1])):
            if not abs(x - y) <= 1e-6 * max(1.0, abs(y)):
                return f"{what} {x:.6g}, dense {y:.6g}"
        return None

    run = lambda: (fidelity(A, B), relative_difference(A, B))  # noqa: E731
    return Call(f"fidelity({words}, {other})", run, check=check, pure=True)


def bad_operator(random: Random) -> Call:
    """Operators of bad matrices, given to an estimator."""
    P = random.choice((1, 3))
    matrix = bad_tensor(random, normal(random, P, P))
    kinds: dict[str, Callable[[Any], SymmetricOperator]] = {
        "DenseOperator": DenseOperator,
        "DiagonalOperator": DiagonalOperator,
        "FactoredOperator": FactoredOperator,
        "BlockDiagonalOperator": BlockDiagonalOperator,
        "nothing": lambda matrix: matrix,
    }
    kind, name = random.choice(list(kinds)), random.choice(list(ONE))
    settings = {"k": 1} if name == "top_eigenvalues" else {}
    fed: Any = random.choice((matrix, matrix, absurd(random)))
    finite = (
        isinstance(fed, Tensor) and not fed.is_meta and fed.is_floating_point() and bool(fed.float().isfinite().all())
    )
    run = lambda: ONE[name][0](kinds[kind](fed), **settings)  # noqa: E731
    what = f"{str(fed.dtype)[6:]} {list(fed.shape)} {fed.device}" if isinstance(fed, Tensor) else shown(fed)
    return Call(f"{name}({kind}({what}), finite {finite})", run, pure=True)

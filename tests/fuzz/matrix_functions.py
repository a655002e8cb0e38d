"""Roots, powers and logarithms of matrices with known eigenvalues, against those eigenvalues."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from secondorder.matrix_power import (
    covariance,
    covariance_log,
    covariance_power,
    covariance_sqrt,
    matrix_log,
    matrix_power,
    matrix_sqrt,
    newton_schulz_sqrt,
    upper_triangle,
)

from .call import Call, arguments
from .pooling import TOLERANCE, shape_of
from .values import SCALES, absurd, bad_tensor, named, normal

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[Any, ...]]]] = {
    "matrix_sqrt": (matrix_sqrt, {"method": ("auto", "newton_schulz", "eigh"), "num_iter": (1, 5, 10, 15, 28, 40)}),
    "matrix_power": (matrix_power, {"exponent": (0.3, 0.5, 1, 2, -1.0, -0.5, 3, 0.0)}),
    "matrix_log": (matrix_log, {"eps": (0.0, 1e-6, 1e-3, 1.0)}),
    "covariance_sqrt": (covariance_sqrt, {"method": ("auto", "newton_schulz", "eigh"), "num_iter": (1, 5, 15, 30)}),
    "covariance_power": (covariance_power, {"exponent": (0.3, 0.5, 1, 2, -0.5)}),
    "covariance_log": (covariance_log, {"eps": (0.0, 1e-3, 1.0)}),
    "covariance": (covariance, {}),
    "newton_schulz_sqrt": (newton_schulz_sqrt, {"num_iter": (1, 5, 15, 30)}),
    "upper_triangle": (upper_triangle, {}),
}


def matrix_functions(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((bad_option, bad_matrix, exact, exact, ways_agree, ways_agree, steps_converge))(random)


def settings_of(random: Random, name: str) -> dict[str, Any]:
    """Good options, those without a default always."""
    needed = {"exponent"}
    return {k: random.choice(v) for k, v in FUNCTIONS[name][1].items() if k in needed or random.random() < 0.8}


def bad_option(random: Random) -> Call:
    """A good matrix and one absurd option."""
    name = random.choice([name for name, (_, options) in FUNCTIONS.items() if options])
    function, options = FUNCTIONS[name]
    settings = settings_of(random, name)
    field, value = random.choice([*options, "triangle"] if "covariance" in name else list(options)), absurd(random)
    settings[field] = value
    S = torch.eye(3)
    small = not isinstance(value, int) or isinstance(value, bool) or value < 10**5  # steps: as many as were asked for
    call = Call(
        f"{name}(I, {arguments(settings)})", lambda: function(S, **settings), names=(field, named(value)), watched=(S,)
    )
    return call if small else Call(f"{name}(I)", lambda: function(S, **settings_of(random, name)))


def bad_matrix(random: Random) -> Call:
    """Something that is no symmetric positive semi-definite matrix."""
    name = random.choice(list(FUNCTIONS))
    settings = settings_of(random, name)
    good = spectrum_matrix(random, torch.tensor([1.0, 2.0, 3.0]).double())[None].repeat(2, 1, 1)
    kind = random.choice(("tensor", "tensor", "asymmetric", "indefinite", "oblong"))
    S: Any = good
    if kind == "tensor":
        S = bad_tensor(random, good)
    elif kind == "asymmetric":
        S = good + torch.triu(torch.ones(3, 3), 1)
    elif kind == "indefinite":
        S = good - 5 * torch.eye(3)
    else:
        S = good[:, :2]
    must = kind in ("asymmetric", "indefinite") and name.startswith("matrix_")
    return Call(
        f"{name}({kind} {shape_of(S)}, {arguments(settings)})",
        lambda: FUNCTIONS[name][0](S, **settings),
        expected="refuse" if must else "either",
        watched=(S,),
        pure=True,
    )


def spectrum_matrix(random: Random, values: Tensor) -> Tensor:
    """Q diag(values) Q^T in float64, exactly symmetric."""
    Q = torch.linalg.qr(normal(random, len(values), len(values))).Q
    S = (Q * values.double()) @ Q.mT
    return (S + S.mT) / 2


def eigenvalues(random: Random) -> tuple[str, Tensor]:
    """At most 1, of some kind."""
    C = random.randint(1, 8)
    kind = random.choice(("uniform", "decay", "rank one", "half null", "equal", "zero", "pair"))
    values = {
        "uniform": normal(random, C).abs() + 0.1,
        "decay": 10.0 ** -torch.arange(C).double(),
        "rank one": torch.eye(C).double()[0],
        "half null": torch.where(torch.arange(C) < (C + 1) // 2, 1.0, 0.0).double(),
        "equal": torch.ones(C).double(),
        "zero": torch.zeros(C).double(),
        "pair": torch.where(torch.arange(C) < 2, 1.0, 0.5).double(),
    }[kind]
    return f"{kind} [{C}]", values / max(1.0, float(values.max()))


def matrices(random: Random, *dtypes: torch.dtype) -> tuple[str, Tensor, float]:
    """A matrix in a format, with words and its size."""
    dtype = random.choice(dtypes or (torch.float32, torch.float64))
    scale = random.choice(SCALES[dtype])
    words, values = eigenvalues(random)
    return f"{words} {str(dtype)[6:]} x {scale:g}", (spectrum_matrix(random, values) * scale).to(dtype), scale


def exact(random: Random) -> Call:
    """Value by eigenvalues in float64, finite value and gradient."""
    words, S, scale = matrices(random)
    name = random.choice(("matrix_sqrt", "matrix_power", "matrix_log"))
    settings = {"matrix_sqrt": {"method": "eigh"}}.get(name) or settings_of(random, name)
    p = {"matrix_sqrt": 0.5, "matrix_power": settings.get("exponent", 1.0), "matrix_log": 1.0}[name]
    power = float(p)  # type: ignore[arg-type]
    fine = not any(word in words for word in ("decay", "zero"))
    low, high = torch.finfo(S.dtype).tiny, torch.finfo(S.dtype).max
    inside = fine and all(1e3 * low < size < 1e-3 * high for size in safe_powers(scale, power))
    eps = float(settings.get("eps", 0.0) or 0.0)  # type: ignore[arg-type]
    inside &= name != "matrix_log" or 1e-3 < scale < 1e4
    t = S.double() / scale
    values, Q = torch.linalg.eigh((t + t.mT) / 2)
    live = values > 1e-5 * values.max()

    def f(values: Tensor) -> Tensor:
        if name == "matrix_log":
            return (
                torch.log1p(values.clamp_min(0) * scale / eps)
                if eps
                else torch.where(live, (values * scale).abs().log(), 0)
            )
        return torch.where(live, values.abs().clamp_min(1e-30) ** power, 0) * scale**power

    def run() -> tuple[Tensor, Tensor]:
        leaf = S.clone().requires_grad_()
        Z = FUNCTIONS[name][0](leaf, **settings)
        return Z.detach(), torch.autograd.grad(Z.sum(), leaf)[0]

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        Z, gradient = result
        if not inside:
            return None
        if not Z.isfinite().all() or not gradient.isfinite().all():
            return f"{'gradient' if Z.isfinite().all() else 'value'} is not finite"
        expected = (Q * f(values)) @ Q.mT
        error, largest = float((Z.double() - expected).abs().max()), float(expected.abs().max())
        if name == "matrix_log":  # log l is off by the relative error of l, also where it is zero
            largest = max(1.0, largest)
        allowed = TOLERANCE[S.dtype] * largest + low
        if eps and not live.all():  # the rounding of S itself decides what it has in null directions
            allowed += math.log1p(2 * torch.finfo(S.dtype).eps * scale / eps)
        return None if error <= allowed else f"off by {error:.2g} of {largest:.2g}"

    words = f"{name}({words}, {arguments(settings)})"
    return Call(words, run, check=check, watched=(S,), pure=True, expected="accept" if inside else "either")


def safe_powers(scale: float, power: float) -> list[float]:
    """The sizes of matrix, function and derivative."""
    logs = (math.log10(scale), power * math.log10(scale), (power - 1) * math.log10(scale))
    return [10.0 ** max(-320.0, min(308.0, log)) for log in logs]


def ways_agree(random: Random) -> Call:
    """auto and newton_schulz are one polynomial, with one first and one second derivative."""
    words, S, scale = matrices(random, torch.float64, torch.float32)
    K, dtype = random.choice((1, 2, 5, 8, 15, 20, 30)), S.dtype
    inside = 1e-15 < scale < 1e15
    order = random.choice((0, 1, 2))

    def derivative(method: str) -> Tensor:
        leaf = S.clone().requires_grad_()
        Z = matrix_sqrt(leaf, method, K)
        weight = torch.cos(torch.arange(Z.numel(), dtype=dtype)).view_as(Z)
        for _ in range(order):
            Z = torch.autograd.grad((Z * (weight + weight.mT)).sum(), leaf, create_graph=True)[0] * scale
        return Z.detach() / scale**0.5

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        a, b = result
        if not inside:
            return None
        if not (a.isfinite().all() and b.isfinite().all()):
            return f"derivative {order}: not finite ({'auto' if b.isfinite().all() else 'newton_schulz'})"
        error, largest = float((a - b).abs().max()), float(a.abs().max())
        allowed = {0: 1.0, 1: 30.0, 2: 1e3}[order] * (1e-6 if dtype == torch.float64 else 1e-2)
        return (
            None if error <= allowed * largest + 1e-6 else f"derivative {order}: differ by {error:.2g} of {largest:.2g}"
        )

    run = lambda: (derivative("auto"), derivative("newton_schulz"))  # noqa: E731
    return Call(
        f"matrix_sqrt({words}, auto and newton_schulz, {K}), derivative {order}", run, check=check, watched=(S,)
    )


def steps_converge(random: Random) -> Call:
    """Many steps give the exact root, and stay there."""
    words, S, scale = matrices(random, torch.float64, torch.float32)
    method, K = random.choice(("auto", "newton_schulz")), random.choice((25, 30, 40, 60, 100))
    inside = 1e-15 < scale < 1e15 and "decay" not in words

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        a, b = result
        if not inside:
            return None
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        allowed = 1e-4 if S.dtype == torch.float64 else 3e-2
        return None if error <= allowed * largest + 1e-12 * scale**0.5 else f"off by {error:.2g} of {largest:.2g}"

    run = lambda: (matrix_sqrt(S, method, K), matrix_sqrt(S, "eigh"))  # noqa: E731
    return Call(f"matrix_sqrt({words}, {method}, {K}) against eigh", run, check=check, watched=(S,), pure=True)

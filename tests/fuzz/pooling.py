"""Pooling heads: options, feature maps at the ends of every format, and what no head can pool."""

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from secondorder.pooling import POOLINGS, PoolingHead, pooling_head

from .call import Call, arguments, shown
from .values import SCALES, absurd, bad_tensor, named, normal

OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gap": {},
    "covariance": {},
    "gcp": {"num_iter": (1, 2, 3, 5, 7, 10, 15, 20, 30, 40), "method": ("auto", "newton_schulz", "eigh")},
    "gcp_exact": {},
    "gcp_power": {"exponent": (0.1, 0.25, 0.5, 0.75, 1, 1.0, 1.5, 2, -0.5)},
    "gcp_log": {"eps": (1e-8, 1e-3, 0.1, 1.0, 10.0)},
    "dropcov": {"kernel_size": (1, 3, 5)},
    "gap_lifted": {"seed": (0, 1, 7)},
}
DEGREE = {"gap": 1.0, "covariance": 2.0, "gcp": 1.0, "gcp_exact": 1.0, "dropcov": 2.0}
"""f(s x) = s^degree f(x)."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-3, torch.bfloat16: 3e-2, torch.float16: 2e-2}


def pooling(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((construction, bad_features, sizes, truth, truth, invariance, derivative))(random)


def options_of(random: Random, name: str) -> dict[str, Any]:
    """Good options."""
    return {key: random.choice(values) for key, values in OPTIONS[name].items() if random.random() < 0.7}


def construction(random: Random) -> Call:
    """pooling_head with one argument that is absurd."""
    name = random.choice(list(POOLINGS))
    settings: dict[str, Any] = {"name": name, "in_channels": 4} | options_of(random, name)
    field = random.choice([*settings, "reduced_channels", *OPTIONS[random.choice(list(POOLINGS))], "activation"])
    value = absurd(random)
    settings[field] = value
    return Call(
        f"pooling_head({arguments(settings)})",
        lambda: pooling_head(**settings),
        names=(field, named(value), type(value).__name__),
    )


def bad_features(random: Random) -> Call:
    """A head on something that is no feature map."""
    name, head = good_head(random, 3)
    x = bad_tensor(random, normal(random, 2, 3, 4, 4, dtype=random.choice((torch.float32, torch.float64))))
    return Call(f"{name}({shape_of(x)})", lambda: head(x), watched=(head,), check=finite_if(x))


def finite_if(x: Any) -> Any:
    """NaN may only come from NaN; a meta tensor has no values."""

    def check(z: Tensor) -> str | None:
        if z.is_meta or not isinstance(x, Tensor) or not x.isfinite().all():
            return None
        return None if z.isfinite().all() else "NaN or infinity from finite features"

    return check


def good_head(random: Random, channels: int, *names: str) -> tuple[str, PoolingHead]:
    """A head in evaluation, and its words."""
    name = random.choice(names or list(POOLINGS))
    options = options_of(random, name)
    words = f"pooling_head({name!r}, {channels}, {arguments(options)})"
    return words, pooling_head(name, channels, **options).eval()


def features(random: Random, dtype: torch.dtype, scale: float = 1.0) -> tuple[str, Tensor]:
    """Feature maps of any shape with at least two positions, of a kind of spectrum."""
    N, C, H, W = random.randint(1, 3), random.randint(1, 7), random.randint(1, 5), random.randint(2, 5)
    x = normal(random, N, C, H, W)
    kind = random.choice(
        ("normal", "normal", "relu", "low rank", "constant channel", "equal channels", "constant", "decay")
    )
    if kind == "relu":
        x = x.relu()
    elif kind == "low rank":
        x[:, C // 2 :] = x[:, :1] * 0.5
    elif kind == "constant channel":
        x[:, 0] = 1.0
    elif kind == "equal channels":
        x = x[:, :1].expand(N, C, H, W).clone()
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "decay":
        x = x * 10.0 ** -torch.arange(C)[:, None, None]
    return f"{kind} {[N, C, H, W]} {str(dtype)[6:]} x {scale:g}", (x * scale).to(dtype)


def degree(head: PoolingHead, name: str) -> float | None:
    """How the outputs grow with the features, None where they do not by a power."""
    if "gcp_power" in name:
        return 2 * float(head.layers[-2].exponent)  # type: ignore[arg-type, union-attr]
    return next((d for key, d in DEGREE.items() if f"{key!r}" in name), None)


def representable(dtype: torch.dtype, scale: float, head: PoolingHead, name: str) -> bool:
    """Whether features of this size have outputs well within the format."""
    power = 2.0 if "'gap_lifted'" in name else degree(head, name)  # its largest outputs, the products
    if power is None:  # the logarithm of S + eps I
        return abs(math.log10(scale)) < 12
    low, high = math.log10(torch.finfo(dtype).tiny), math.log10(torch.finfo(dtype).max)
    return (
        0.9 * low < math.log10(scale) * max(power, 1.0) < 0.9 * high
        and 0.9 * low < math.log10(scale) * power < 0.9 * high
    )


def sizes(random: Random) -> Call:
    """Value and gradient are finite, whatever the size of the features, where the result is a number of the format."""
    dtype = random.choice(list(SCALES))
    scale = random.choice(SCALES[dtype])
    words, x = features(random, dtype, scale)
    name, head = good_head(random, x.shape[1])
    finite = representable(dtype, scale, head, name)

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        z = head(leaf)
        (gradient,) = torch.autograd.grad(z.float().sum() if dtype.itemsize < 4 else z.sum(), leaf)
        return z, gradient

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        if not finite:
            return None
        for what, tensor in zip(("value", "gradient"), result, strict=True):
            if not tensor.isfinite().all():
                return f"{what} is not finite"
        return None

    return Call(f"{name} on {words}", run, watched=(head,), check=check, expected="accept" if finite else "either")


def reference(head: PoolingHead, name: str, x: Tensor) -> Tensor | None:
    """The head by eigenvalues in float64; None where that is no independent truth."""
    x = x.double()
    if "'gap'" in name:
        return x.mean((2, 3))
    if "'gap_lifted'" in name:
        z, lift = x.mean((2, 3)), head.layers[-1]
        u = z @ lift.rotation.double().T  # type: ignore[operator, union-attr]
        i, j = torch.triu_indices(z.shape[1], z.shape[1], offset=1)
        return torch.cat([z, float(lift.scale) * u[:, i] * u[:, j]], 1)  # type: ignore[arg-type]
    Xc = x.flatten(2) - x.flatten(2).mean(-1, keepdim=True)
    scale = Xc.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
    S = (Xc / scale) @ (Xc / scale).mT / Xc.shape[-1]
    values, Q = torch.linalg.eigh(S)
    values = values.clamp_min(0)
    live = values > 1e-12 * values.amax(-1, keepdim=True)
    layer, s = head.layers[-2], scale[..., 0] ** 2
    if "'covariance'" in name or "'dropcov'" in name:
        f = values * s
    elif "'gcp_exact'" in name or getattr(layer, "method", "") == "eigh":
        f = values.sqrt() * scale[..., 0]
    elif "'gcp_power'" in name:
        p = float(layer.exponent)  # type: ignore[arg-type]
        f = torch.where(live, values.clamp_min(1e-300) ** p, 0) * scale[..., 0] ** (2 * p)
        if p < 0 and not bool(live.all()):
            return None
    elif "'gcp_log'" in name:
        f = torch.log1p(values * s / float(layer.eps))  # type: ignore[arg-type]
    else:
        return None
    Z = (Q * f[:, None, :]) @ Q.mT
    row, column = torch.triu_indices(x.shape[1], x.shape[1])
    return Z[:, row, column]


def truth(random: Random) -> Call:
    """Against eigenvalues in float64."""
    dtype = random.choice(list(SCALES))
    scale = random.choice([s for s in SCALES[dtype] if 1e-30 < s < 1e30])
    words, x = features(random, dtype, scale)
    name, head = good_head(random, x.shape[1])
    fits = representable(dtype, scale, head, name)
    if "decay" in words:  # down to far below the rounding level of the format: left out, which a root hardly shows
        fits &= "gcp_log" not in name and not ("gcp_power" in name and (degree(head, name) or 0) < 1)
    expected = reference(head, name, x)

    def check(z: Tensor) -> str | None:
        if expected is None or not fits:
            return None
        rounding = (torch.finfo(dtype).eps * float(x.double().abs().max())) ** (
            degree(head, name) or 1.0
        )  # of the mean
        allowed = TOLERANCE[dtype] * float(expected.abs().max()) + rounding + 1e-3 * torch.finfo(dtype).tiny
        error = float((z.double() - expected).abs().max())
        return None if error <= allowed else f"off by {error:.2g}, largest entry {float(expected.abs().max()):.2g}"

    return Call(f"{name} on {words}", lambda: head(x), watched=(head,), check=check)


def invariance(random: Random) -> Call:
    """Permuted positions, one image of a batch, another size, the chain of leaf modules: the same numbers."""
    words, x = features(random, torch.float64)
    name, head = good_head(random, x.shape[1])
    kind = random.choice(("positions", "single", "scale", "chain", "memory format", "fresh nan"))
    power = degree(head, name)
    exact_rank = "decay" not in words

    def other() -> tuple[Tensor, Tensor]:
        z = head(x)
        if kind == "positions":
            order = torch.randperm(x.shape[2] * x.shape[3], generator=torch.Generator().manual_seed(1))
            return z, head(x.flatten(2)[..., order].view_as(x))
        if kind == "single":
            return z, torch.cat([head(one[None]) for one in x])
        if kind == "scale" and power is not None:
            return z, head(x * 8.0) / 8.0**power
        if kind == "chain":
            return z, head.chain().eval()(x)
        if kind == "fresh nan":  # one broken image stays alone
            broken = torch.cat([x, torch.full_like(x[:1], math.nan)])
            return z, head(broken)[:-1]
        return z, head(x.contiguous(memory_format=torch.channels_last))

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        a, b = result
        error, largest = float((a - b).abs().max()), float(a.abs().max())
        if not error <= (1e-6 if exact_rank else 1e-3) * largest + 1e-12:
            return f"{kind}: differs by {error:.2g} of {largest:.2g}"
        return None

    return Call(f"{name} on {words}, {kind}", other, watched=(head,), check=check)


def derivative(random: Random) -> Call:
    """First and second derivatives against central differences along a random line, in float64."""
    _, x = features(random, torch.float64)
    x = normal(random, *x.shape)  # of full spread: differences of a function that is smooth here
    name, head = good_head(random, x.shape[1])
    direction, weight = normal(random, *x.shape), None

    def slope(at: Tensor, create: bool = False) -> tuple[Tensor, Tensor]:
        z = head(at)
        w = torch.cos(torch.arange(z.numel(), dtype=z.dtype)).view_as(z) if weight is None else weight
        value = (z * w).sum()
        return value, torch.autograd.grad(value, at, create_graph=create)[0]

    def run() -> tuple[float, float, float, float]:
        leaf = x.clone().requires_grad_()
        _, first = slope(leaf, create=True)
        second = torch.autograd.grad(first, leaf, direction, allow_unused=True)[0] if first.requires_grad else None
        second = torch.zeros_like(x) if second is None else second
        h = 1e-5
        (up, g_up), (down, g_down) = (slope((x + s * direction).requires_grad_()) for s in (h, -h))
        return (
            float((first.detach() * direction).sum()), float(up.detach() - down.detach()) / (2 * h),
            float((second * direction).sum()), float(((g_up - g_down) * direction).sum()) / (2 * h),
        )  # fmt: skip

    def check(result: tuple[float, float, float, float]) -> str | None:
        for what, a, b in (("first", *result[:2]), ("second", *result[2:])):
            size = max(1.0, *map(abs, result))
            if not abs(a - b) <= 1e-4 * size * (100 if "num_iter" in name or "-0.5" in name else 1):
                return f"{what} derivative {a:.6g}, by differences {b:.6g}"
        return None

    smooth = x.shape[2] * x.shape[3] > x.shape[1] + 1  # of full rank; else null directions are cut, which jumps
    words = f"{name}, derivatives on {list(x.shape)}"
    return Call(words, run, watched=(head,), check=check if smooth else (lambda result: None))


def shape_of(x: Any) -> str:
    """A tensor's kind."""
    return f"{str(x.dtype)[6:]} {list(x.shape)} {str(x.layout)[6:]} {x.device}" if isinstance(x, Tensor) else shown(x)

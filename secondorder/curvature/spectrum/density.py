"""The distribution of an operator's eigenvalues, exact or by stochastic Lanczos quadrature.

S. Ubaru, J. Chen, Y. Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature", SIMAX 38 (2017); for networks
B. Ghorbani, S. Krishnan, Y. Xiao, ICML 2019, and V. Papyan, arXiv 1811.07062.

Index letters: P rows of the operator, K probes, M nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.density_curve import SCALES, DensityCurve, cumulative, density_curve
from secondorder.curvature.spectrum.estimate import Estimate, exact, half_sampling, jackknife, mean
from secondorder.curvature.spectrum.lanczos import top_eigenvalues
from secondorder.curvature.spectrum.products import (
    MEMORY,
    affordable,
    check_count,
    check_name,
    check_operator,
    check_positive,
    check_threshold,
    default_tolerance,
    generator,
    norm,
    refuse_memory,
)
from secondorder.curvature.spectrum.quadrature import lanczos_quadrature
from secondorder.errors import InputError


@dataclass(frozen=True)
class SpectralDensity:
    """Eigenvalue nodes `[K, M]` and the number of eigenvalues that each stands for, as K random probes see them.

    Float64 on the CPU; the weights of each probe sum to P. |node| <= zero counts as the eigenvalue zero. When `is_exact`,
    K is 1, the nodes are the P eigenvalues and all errors are 0.
    """

    nodes: Tensor
    weights: Tensor
    zero: float
    is_exact: bool

    @property
    def size(self) -> int:
        """P."""
        return round(float(self.weights[0].sum()))

    def integral(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The sum of a function over all P eigenvalues: tr f(A)."""
        values = (function(self.nodes).double() * self.weights).sum(1)
        return exact(values) if self.is_exact else mean(values)

    def statistic(self, function: Callable[[Tensor, Tensor], float], smooth: bool = True) -> Estimate:
        """A function of (eigenvalues, their numbers), averaged over probes; with smooth = False of their quantiles."""

        def of_probes(index: Tensor) -> float:
            return function(self.nodes[index].flatten(), self.weights[index].flatten() / len(index))

        if self.is_exact:
            return exact(of_probes(torch.tensor([0])))
        return (jackknife if smooth else half_sampling)(of_probes, len(self.nodes))

    def moment(self, power: int) -> Estimate:
        """tr A^power: 0 gives P, 1 the trace, 2 the squared Frobenius norm. InputError for a negative power."""
        check_count("power", power, least=0)
        return self.integral(lambda values: values**power)

    @property
    def trace(self) -> Estimate:
        """The sum of the eigenvalues."""
        return self.moment(1)

    @property
    def frobenius_norm(self) -> Estimate:
        """The root of the sum of squared eigenvalues."""
        return self.statistic(lambda values, weights: float(norm(values * weights.clamp_min(0).sqrt(), 0)))

    @property
    def zero_share(self) -> Estimate:
        """The share of eigenvalues that are zero: the relative size of the null space."""
        P = self.size
        return self.integral(lambda values: (values.abs() <= self.zero).double() / P)

    def cumulative(self, point: float) -> Estimate:
        """The share of eigenvalues up to a point; exact at gaps, and up to the weight of one node where they are dense."""
        at = torch.tensor([point], dtype=torch.float64)
        share = cumulative(self.nodes, self.weights / self.size, self.zero, at)[:, 0]
        return exact(share) if self.is_exact else mean(share)

    def curve(
        self, scale: str = "symlog", *, points: int = 400, width: float | None = None, linear: float | None = None
    ) -> DensityCurve:
        """Broadened density and cumulative distribution at `points` points of a "linear" or "symlog" axis.

        `width` is the standard deviation of the Gaussians in units of the axis (default a hundredth of its range), `linear`
        the eigenvalue up to which a symlog axis is about linear (default: `zero`, or 1e-8 of the largest magnitude).
        """
        check_name("scale", scale, SCALES)
        check_count("points", points, least=2)
        for name, value in (("width", width), ("linear", linear)):
            if value is not None:
                check_positive(name, value)
        linear = linear or max(self.zero, 1e-8 * float(self.nodes.abs().max())) or 1.0
        curve = density_curve(self.nodes, self.weights / self.size, self.zero, scale, points, width, linear)
        if not self.is_exact:
            return curve
        none = torch.zeros_like(curve.density)
        return DensityCurve(**{**vars(curve), "density_error": none, "cumulative_error": none})


def exact_density(eigenvalues: Tensor, zero: float) -> SpectralDensity:
    """The distribution of known eigenvalues `[P]`; magnitudes up to `zero` (absolute) count as zero."""
    values = eigenvalues.double().cpu()[None]
    return SpectralDensity(values, torch.ones_like(values), zero, is_exact=True)


def spectral_density(
    operator: SymmetricOperator,
    *,
    probes: int = 10,
    steps: int = 80,
    deflate: int = 0,
    zero: float | None = None,
    seed: int = 0,
    memory: int = MEMORY,
) -> SpectralDensity:
    """The distribution of the eigenvalues by `steps` steps of Lanczos from each of `probes` random vectors.

    The first `deflate` eigenvalues of largest magnitude are computed by themselves (those that converge) and the probes
    see the rest: a network's few large eigenvalues would otherwise carry most of the standard error. Magnitudes up to
    `zero` times the largest count as zero (default 1e-8, for float32 operators 1.2e-5): Lanczos finds a null space when
    a gap separates it from the other eigenvalues, not when they decay through `zero`. Sums of f(A) over probes are
    unbiased for polynomials up to degree 2 steps - 1, so trace and Frobenius norm have only the error of the probes.
    `memory` bounds the bytes of Lanczos vectors; probes that do not fit side by side run one after the other.

    Raises InputError for bad arguments and too little memory; NonFiniteError.
    """
    check_operator(operator)
    check_count("probes", probes)
    check_count("steps", steps)
    check_count("deflate", deflate, least=0)
    zero = default_tolerance(operator.dtype) if zero is None else zero
    check_threshold("zero", zero)
    if deflate >= operator.size:
        raise InputError(f"deflate must be less than the number of rows, {operator.size}, got {deflate}")
    apart, without = _deflated(operator, deflate, seed, memory)
    rest = operator.size - len(apart)
    steps = min(steps, rest)
    together = affordable(probes * (steps + 4), operator.size, memory) // (steps + 4)
    if together < 1:
        raise refuse_memory(steps + 4, operator.size, memory, "take fewer steps, a smaller block, or raise memory")
    run = partial(lanczos_quadrature, operator, steps=steps, without=without, source=generator(seed))
    parts = [run(min(together, probes - start)) for start in range(0, probes, together)]
    nodes = torch.cat([apart.expand(probes, -1), torch.cat([part[0] for part in parts])], 1)
    weights = rest * torch.cat([part[1] for part in parts])
    weights = torch.cat([weights.new_ones(probes, len(apart)), weights], 1)
    return SpectralDensity(nodes, weights, zero * float(nodes.abs().max()), is_exact=False)


def _deflated(operator: SymmetricOperator, count: int, seed: int, memory: int) -> tuple[Tensor, Tensor]:
    """The converged among `count` eigenvalues of largest magnitude `[L]` and their vectors `[L, P]`."""
    if count == 0:
        none = torch.zeros(0, dtype=torch.float64)
        return none, torch.zeros(0, operator.size, dtype=torch.float64, device=operator.device)
    top = top_eigenvalues(operator, count, "magnitude", seed=seed, memory=memory)
    return top.values[top.converged], top.vectors[:, top.converged].mT.to(operator.device).contiguous()

"""The distribution of an operator's eigenvalues, exact or by stochastic Lanczos quadrature.

S. Ubaru, J. Chen, Y. Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature", SIMAX 38 (2017); for networks
B. Ghorbani, S. Krishnan, Y. Xiao, ICML 2019, and V. Papyan, arXiv 1811.07062.

Index letters: P rows of the operator, K probes, M nodes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.resuming.long_run import planned, resumable
from secondorder.curvature.spectrum.counting_bounds import CountingBounds
from secondorder.curvature.spectrum.density_curve import SCALES, DensityCurve, cumulative, density_curve
from secondorder.curvature.spectrum.estimate import Estimate, between, exact, half_sampling, jackknife, mean
from secondorder.curvature.spectrum.exact import known_eigenvalues, rounding
from secondorder.curvature.spectrum.krylov_basis import BREAKDOWN
from secondorder.curvature.spectrum.lanczos import top_eigenvalues
from secondorder.curvature.spectrum.products import (
    PROBES,
    STEPS,
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
from secondorder.curvature.spectrum.quadrature import Quadrature, joined, lanczos_quadrature
from secondorder.errors import InputError


@dataclass(frozen=True)
class SpectralDensity:
    """Eigenvalue nodes `[K, M]` and the number of eigenvalues that each stands for, as K random probes see them.

    Float64 on the CPU; the weights of each probe sum to P. |node| <= zero counts as the eigenvalue zero. `bounds`: how far
    Lanczos tells numbers of eigenvalues; None for known eigenvalues, when K is 1, the nodes are all P, and errors are 0.
    """

    nodes: Tensor
    weights: Tensor
    zero: float
    bounds: CountingBounds | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the nodes are the eigenvalues themselves, so that errors are 0."""
        return self.bounds is None

    @property
    def size(self) -> int:
        """P, the number of rows of the operator and of its eigenvalues."""
        return round(float(self.weights[0].sum()))

    def integral(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The sum of a function over all P eigenvalues, tr f(A), and the standard error over the probes.

        Right for polynomials of degree 2 steps - 1, and for smooth functions that such polynomials come close to; functions
        with jumps have an error of up to the weight of the nodes beside them (`zero_share` and `cumulative` count it).
        """
        values = (function(self.nodes).double() * self.weights).sum(1)
        return exact(values) if self.is_exact else mean(values)

    def statistic(self, function: Callable[[Tensor, Tensor], float], smooth: bool = True) -> Estimate:
        """A function of (eigenvalues `[M]`, their numbers `[M]`) to a number, averaged over probes, with their standard error.

        Args:
            smooth: False for quantiles, which leaving out a single probe may not move. What functions are right for, `integral`
                says.
        """

        def of_probes(index: Tensor) -> float:
            return function(self.nodes[index].flatten(), self.weights[index].flatten() / len(index))

        if self.bounds is None:
            return exact(of_probes(torch.tensor([0])))
        return (jackknife if smooth else half_sampling)(of_probes, len(self.nodes))

    def moment(self, power: int) -> Estimate:
        """tr A^power: 0 gives P, 1 the trace, 2 the squared Frobenius norm. InputError for a negative power."""
        check_count("power", power, least=0)
        return self.integral(lambda values: values**power)

    @property
    def trace(self) -> Estimate:
        """The sum of the eigenvalues, tr A, with its standard error over the probes."""
        return self.moment(1)

    @property
    def frobenius_norm(self) -> Estimate:
        """|A|_F, the root of the sum of squared eigenvalues, with its standard error over the probes."""
        return self.statistic(lambda values, weights: float(norm(values * weights.clamp_min(0).sqrt(), 0)))

    @property
    def zero_share(self) -> Estimate:
        """The share of eigenvalues that are zero: the relative size of the null space."""
        share = float(self.integral(lambda values: (values.abs() <= self.zero).double()).value) / self.size
        if self.bounds is None:
            return exact(share)
        low, high = (
            float(1 - n / self.size) for n in self.bounds.beyond(torch.tensor([self.zero], dtype=torch.float64))
        )
        return between(share, min(low, high), max(low, high), len(self.nodes))

    def cumulative(self, point: float) -> Estimate:
        """The share of eigenvalues <= `point`, on [0, 1].

        Its error is small at gaps, and the weight of a node where eigenvalues are dense.
        """
        at = torch.tensor([point], dtype=torch.float64)
        value, error = self._cumulative(at)
        return Estimate(float(value), float(error))

    def _cumulative(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Shares up to the points `[X]` and their errors `[X]`."""
        share = cumulative(self.nodes, self.weights / self.size, self.zero, points).mean(0)
        if self.bounds is None:
            return share, torch.zeros_like(share)
        inside = torch.where(points < 0, points.new_tensor(-self.zero), points.new_tensor(self.zero))
        low, high = self.bounds.up_to(torch.where(points.abs() <= self.zero, inside, points))
        error = (share - low / self.size).maximum(high / self.size - share).clamp_min(0)
        return share, torch.full_like(error, math.inf) if len(self.nodes) == 1 else error

    def curve(
        self, scale: str = "symlog", *, points: int = 400, width: float | None = None, linear: float | None = None
    ) -> DensityCurve:
        """Broadened density and cumulative distribution of the eigenvalues along an axis.

        Args:
            scale: "linear" or "symlog".
            points: of the axis, at least 2.
            width: standard deviation of the Gaussians in units of the axis; None: a hundredth of its range.
            linear: eigenvalue up to which a symlog axis is about linear; None: `zero`, or 1e-8 of the largest magnitude.

        Raises:
            InputError: for an unknown scale, too few points, and a width or `linear` that is not positive.
        """
        check_name("scale", scale, SCALES)
        check_count("points", points, least=2)
        for name, value in (("width", width), ("linear", linear)):
            if value is not None:
                check_positive(name, value)
        linear = linear or max(self.zero, 1e-8 * float(self.nodes.abs().max())) or 1.0
        curve = density_curve(self.nodes, self.weights / self.size, self.zero, scale, points, width, linear)
        none = torch.zeros_like(curve.density)
        error = none if self.is_exact else curve.density_error
        return replace(curve, density_error=error, cumulative_error=self._cumulative(curve.eigenvalue)[1])


def exact_density(eigenvalues: Tensor, zero: float) -> SpectralDensity:
    """The distribution of known eigenvalues `[P]`, in any order; magnitudes up to `zero` (absolute) count as zero."""
    values = eigenvalues.double().cpu()[None]
    return SpectralDensity(values, torch.ones_like(values), zero)


@resumable
def spectral_density(
    operator: SymmetricOperator,
    method: str = "auto",
    *,
    probes: int = PROBES,
    steps: int = STEPS,
    deflate: int = 0,
    zero: float | None = None,
    seed: int = 0,
    memory: int | None = None,
) -> SpectralDensity:
    """The distribution of the eigenvalues: exact, or by `steps` steps of Lanczos from each of `probes` random vectors.

    By Lanczos, sums of f(A) over probes are unbiased for polynomials up to degree 2 steps - 1, so trace and Frobenius norm
    have only the error of the probes. Lanczos finds a null space when a gap separates it from the other eigenvalues, not when
    they decay through `zero`; the errors say so.

    Args:
        operator: A `[P, P]`.
        method: "auto" is "exact" where no matrix with more than 2048 rows has to be decomposed (that of a factored operator is
            its smaller Gram matrix), else "lanczos", to which probes, steps, deflate, seed and memory belong.
        probes: K, random vectors.
        steps: of Lanczos for each, at most P.
        deflate: eigenvalues of largest magnitude that are computed by themselves (those that converge), so that the probes see
            the rest: a network's few large ones would otherwise carry most of the standard error. Less than P.
        zero: magnitudes up to `zero` times the largest count as zero, in [0, 1); None: 1e-8 (float32: 1.2e-5), P eps if exact.
        seed: of the probes.
        memory: bytes of Lanczos vectors; None: what is available, and 2 GiB at least. Probes that do not fit side by side run one
            after the other.

    Raises:
        InputError: for bad arguments and too little memory.
        NonFiniteError: for a product that is not finite.
    """
    _check_arguments(operator, probes, steps, deflate, zero)
    source = generator(seed)
    values = known_eigenvalues(operator, method)
    if values is not None:
        share = min(rounding(operator), 0.5) if zero is None else zero
        return exact_density(values, share * float(values.abs().max()))
    zero = default_tolerance(operator.dtype) if zero is None else zero
    apart, residual, without = _deflated(operator, deflate, seed, memory)
    rest = operator.size - len(apart)
    steps = min(steps, rest)
    together = affordable(probes * (steps + 4), operator, memory) // (steps + 4)
    if together < 1:
        raise refuse_memory(steps + 4, operator, memory, "take fewer steps, a smaller block, or raise memory")
    runs, state = [], source.get_state()
    for start in range(0, probes, together):
        run, state = _lanczos(operator, min(together, probes - start), steps, without, state)
        runs.append(run)
    seen = joined(runs)
    nodes = torch.cat([apart.expand(probes, -1), seen.nodes], 1)
    weights = torch.cat([seen.weights.new_ones(probes, len(apart)), rest * seen.weights], 1)
    scale = float(nodes.abs().max())
    slack = 10 * max(BREAKDOWN, torch.finfo(operator.dtype).eps) * scale + residual
    bounds = CountingBounds(seen, apart, rest, slack)
    return SpectralDensity(nodes, weights, zero * scale, bounds)


def _check_arguments(operator: SymmetricOperator, probes: int, steps: int, deflate: int, zero: float | None) -> None:
    check_operator(operator)
    check_count("probes", probes)
    check_count("steps", steps)
    check_count("deflate", deflate, least=0)
    if zero is not None:
        check_threshold("zero", zero)
    if deflate >= operator.size:
        raise InputError(f"deflate must be less than the number of rows, {operator.size}, got {deflate}")


@resumable
def _lanczos(
    operator: SymmetricOperator, probes: int, steps: int, without: Tensor, state: Tensor
) -> tuple[Quadrature, Tensor]:
    """The quadrature of some probes, drawn from the state of a generator, and its state after that."""
    planned(probes * steps)
    source = torch.Generator()
    source.set_state(state)
    return lanczos_quadrature(operator, probes, steps, without, source), source.get_state()


def _deflated(operator: SymmetricOperator, count: int, seed: int, memory: int | None) -> tuple[Tensor, float, Tensor]:
    """The converged among `count` eigenvalues of largest magnitude `[L]`, their residuals together, and vectors `[L, P]`."""
    if count == 0:
        none = torch.zeros(0, dtype=torch.float64)
        return none, 0.0, torch.zeros(0, operator.size, dtype=torch.float64, device=operator.device)
    top = top_eigenvalues(operator, count, "magnitude", seed=seed, memory=memory)
    vectors = top.vectors[:, top.converged].mT.to(operator.device).contiguous()
    return top.values[top.converged], float(norm(top.residuals[top.converged], 0)) if len(vectors) else 0.0, vectors

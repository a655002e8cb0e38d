"""Which mode gives J v: that whose J is the adjoint of J^T, u . (J v) = (J^T u) . v for random u and v.

J^T is a backward pass, and what users mean by the derivative. Forward mode gives another J where a network hides something from
the backward pass only (no_grad, hooks on gradients) or has an autograd Function with a wrong jvp; reverse mode of reverse mode,
where a Function's backward pass cannot be differentiated. With random vectors of all parameters the identity fails for each of
these, whatever block was asked for. It is tried on a few images, once for each batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from secondorder.curvature.matrix_free.graph import custom_functions
from secondorder.curvature.matrix_free.linearisation import Linearisation, RandomPullBack
from secondorder.curvature.matrix_free.trial import inner, random_like
from secondorder.errors import InputError, first_line

SURE, POSSIBLE = 0.7, 0.4
"""Powers of the rounding unit: below the first no formula is wrong, 4 times what networks with covariance heads show in float32
and 100 times in float64; above the second no rounding is to blame."""
Push = Callable[[Mapping[str, Tensor]], Tensor]
"""Tangents by the names of parameters -> J v."""


class AdjointTest:
    """Random u `[n, K]` and v at some images, with J^T u; parameters have a part in u . J v as equal as rounding allows."""

    def __init__(self, tried: RandomPullBack) -> None:
        self.failures: list[str] = []
        """Why a mode has failed."""
        self.u, source = tried.u, torch.Generator().manual_seed(1)
        self.gradients = {name: g for name, g in tried.weights.items() if bool(g.isfinite().all())}
        """Of a parameter with an infinite derivative no product is finite, and nothing is to be compared."""
        sizes = {name: float(g.norm()) for name, g in self.gradients.items()}
        largest = max(sizes.values()) or 1.0
        # A gradient that is zero but for rounding stays that small: it has no digit that two modes could share.
        least = torch.finfo(self.u.dtype).eps ** 0.25 * largest
        self.v = {name: random_like(g, source) / max(sizes[name], least) for name, g in self.gradients.items()}

    def mismatch(self, push: Push) -> float:
        """|u . J v - J^T u . v| in units of |J v|, about the size of a random u's product with it; infinite if J v fails."""
        try:
            Jv = push(self.v)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as failure:  # NotImplementedError among them
            self.failures.append(first_line(failure))
            return math.inf
        terms = torch.stack([inner(g, self.v[name]) for name, g in self.gradients.items()])
        size = float(Jv.to(terms).norm() + terms.norm())
        error = float((inner(self.u, Jv) - terms.sum()).abs())
        if not error > 0:
            return 0.0 if error == 0 else math.inf
        return error / size


def forward_mode_is_right(part: Linearisation, tried: RandomPullBack, check: Callable[[], None]) -> bool:
    """Whether J v is to be taken from forward mode, or else from reverse mode; InputError where neither is the adjoint of J^T.

    J^T is known by what has been `tried` at the part; `check` tells of what else may be the cause.
    """
    if not part.graph.requires_grad:
        return True
    test = AdjointTest(tried)
    eps = torch.finfo(part.z.dtype).eps
    if not test.gradients:
        return True
    forward = test.mismatch(part.push_forward)
    if forward <= eps**SURE:
        return True
    check()
    reverse = test.mismatch(part.push_forward_by_reverse)
    if min(forward, reverse) <= eps**POSSIBLE:  # rounding of ill-conditioned functions
        return forward <= reverse
    raise no_adjoint(part, test.failures)


def no_adjoint(part: Linearisation, failures: Sequence[str]) -> InputError:
    """The error for a part of which neither mode gives the adjoint of J^T, with why modes have failed."""
    functions = custom_functions(part.nodes)
    cause = f"the autograd Function {' or '.join(functions)}" if functions else "a function of the network"
    if failures and not functions:
        return InputError(f"products with the Jacobian need forward mode or second derivatives: {failures[-1]}")
    return InputError(
        f"no product J v is the adjoint of the backward pass: {cause} has a wrong or no jvp, and a backward pass that cannot be "
        "differentiated; give it a right jvp, or use .dense(), which needs backward passes only"
    )

"""The Hessian as signed factors H = sum_k sign_k F_k F_k^T on networks with branches.

Let x feed the branches y_1 = f_1(x) and y_2 = f_2(x), which a later module merges. A factor of the joint Hessian of (y_1, y_2)
has a part in each, F = (F_1, F_2), and reaches x as J_1^T F_1 + J_2^T F_2, whereas the residual of a module inside a branch
has factors in that branch only. So what was one factor at the merge is added where the branches begin, and everything
else is kept side by side. The sign of a factor remembers: at a merge it becomes a `SharedSign`, an object that goes
unchanged through BackPACK's rows along each branch; the signs that rows append for residuals are plain numbers.
"""

from typing import Any

from secondorder.errors import InputError

HessianFactors = dict[str, Any]
"""BackPACK's `{"matrices": [F [V, N, *out], ...], "signs": [+-1.0, ...]}`."""


class SharedSign(float):
    """The sign of a factor that several branches carry a part of; the same object in all of them."""


def tagged(quantity: HessianFactors) -> HessianFactors:
    """A copy whose factors are recognised where the branches begin; for the row of a module that merges branches."""
    signs = [sign if isinstance(sign, SharedSign) else SharedSign(sign) for sign in quantity["signs"]]
    return {"matrices": list(quantity["matrices"]), "signs": signs}


def merged(existing: HessianFactors, other: HessianFactors) -> HessianFactors:
    """The factors of two branches at their common input: parts of one factor added, all others side by side.

    Raises InputError when nothing is shared: then the branches end in a module that does not tag them.
    """
    matrices, signs = list(existing["matrices"]), list(existing["signs"])
    place = {id(sign): k for k, sign in enumerate(signs) if isinstance(sign, SharedSign)}
    shared = [place.get(id(sign)) for sign in other["signs"]]
    if all(k is None for k in shared):
        raise InputError(
            "the Hessian diagonal needs branches that end in Sum or Concatenate; use curvature_blocks(..., 'hessian')"
        )
    for k, matrix, sign in zip(shared, other["matrices"], other["signs"], strict=True):
        if k is None:
            matrices.append(matrix)
            signs.append(sign)
        else:
            matrices[k] = matrices[k] + matrix
    return {"matrices": matrices, "signs": signs}

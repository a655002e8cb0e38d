"""Whether a loss that is known by its values only is a function of the outputs: what else it depends on has no curvature here."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secondorder.curvature.matrix_free.captured_parameters import captured, tracked
from secondorder.curvature.matrix_free.graph import graph_nodes
from secondorder.curvature.matrix_free.loss_curvature import AnyLoss, loss_name
from secondorder.curvature.matrix_free.second_derivatives import check, gradients
from secondorder.errors import InputError, failures_of
from secondorder.untouched import same_randomness


def check_loss(loss: AnyLoss, z: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
    """InputError for a loss of outputs z `[N, K]` that also reads parameters whose curvature is asked for (weight decay).

    And for one that differs from one evaluation to the next, and one whose second derivatives are wrong.
    """
    _check_repeated(loss, z)
    with torch.enable_grad(), tracked(parameters.values()), failures_of(f"the loss {loss_name(loss.loss)}"):
        at = {"outputs": z.detach().requires_grad_()}
        value = loss.value(at["outputs"])
        names = captured(value, parameters)
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(
            f"{loss_name(loss.loss)} depends on parameter {names[0]}{others} itself (weight decay, a penalty), not only on the "
            "outputs; leave that out, and add c |w|^2 / 2 by DampedOperator(block, c)"
        )
    with torch.enable_grad(), failures_of(f"a second derivative of {loss_name(loss.loss)}"):

        def again(at: Mapping[str, Tensor]) -> list[Tensor]:
            return gradients(loss.value(at["outputs"]), at)

        check(gradients(value, at), at, graph_nodes([value]), again, f"the loss {loss_name(loss.loss)}")
    if loss.separable and len(z) > 1:
        _check_sum(loss, z, float(value.detach()))


def _check_repeated(loss: AnyLoss, z: Tensor) -> None:
    """InputError for a loss that draws random numbers or keeps a state."""
    with torch.enable_grad(), same_randomness(), failures_of(f"the loss {loss_name(loss.loss)}"):
        before, z = torch.get_rng_state(), z.detach().requires_grad_()
        value, again = loss.value(z).detach(), loss.value(z).detach()
        drawn = not torch.equal(before, torch.get_rng_state())
    if drawn or not torch.allclose(value, again, rtol=torch.finfo(z.dtype).eps ** 0.5, atol=0, equal_nan=True):
        raise InputError(
            f"{loss_name(loss.loss)} differs from one evaluation to the next, by random numbers (dropout, samples) or a state "
            "that it keeps: no function of the outputs; draw before, and give what was drawn with the labels"
        )


def _check_sum(loss: AnyLoss, z: Tensor, value: float) -> None:
    """InputError for a loss declared to be a sum over samples that is not, on its own, the sum of those of two parts."""
    cut = len(z) // 2
    with torch.no_grad():
        both = [float(loss.part(rows).value(z[rows])) for rows in (slice(0, cut), slice(cut, len(z)))]
    scale = max(abs(value), *map(abs, both))
    if abs(sum(both) - value) > 1e3 * torch.finfo(z.dtype).eps * scale:
        raise InputError(
            f"{loss_name(loss.loss)} of {len(z)} samples is {value:g}, of {cut} and {len(z) - cut} of them {both[0]:g} and "
            f"{both[1]:g}: no sum over samples; divide a sum by a number of your own instead of taking a mean"
        )

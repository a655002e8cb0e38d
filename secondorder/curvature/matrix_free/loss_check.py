"""Whether a loss that is known by its values only is a function of the outputs: what else it depends on has no curvature here."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secondorder.curvature.matrix_free.captured_parameters import captured, tracked
from secondorder.curvature.matrix_free.graph import graph_nodes
from secondorder.curvature.matrix_free.loss_curvature import AnyLoss, loss_name
from secondorder.curvature.matrix_free.second_derivatives import check, gradients
from secondorder.errors import InputError, failures_of


def check_loss(loss: AnyLoss, z: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
    """InputError for a loss of outputs z `[N, K]` that also reads parameters whose curvature is asked for (weight decay).

    And for one whose second derivatives are wrong.
    """
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

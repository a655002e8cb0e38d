"""Whether second derivatives by differentiating a gradient are right: symmetric, and whole.

A gradient g(w) is itself differentiated for products H v = dg/dw v. That goes wrong without a word where a function's backward
pass is not differentiable (`once_differentiable`: its part is missing), takes for constants what it has kept in `ctx`, or has a
wrong derivative of its own (those of PyTorch that are known have been replaced, see `plain_functions`). Tried on random vectors,
u . H v = v . H u; and where a network or loss has autograd Functions that nobody has tested, in numbers of 64 bits,
H v = (g(w + h v) - g(w - h v)) / 2 h.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import copy

import torch
from torch import Tensor
from torch.autograd.graph import Node

from secondorder.curvature.matrix_free.graph import custom_functions, graph_nodes
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.linearisation import Linearisation, along
from secondorder.curvature.matrix_free.trial import FEW, inner, random_like
from secondorder.errors import InputError

Gradient = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Tensors that require gradients, by name -> the gradients of a function with respect to them, with a graph."""

ONCE = "torch::autograd::Error"
"""The node that stands for a backward pass which cannot be differentiated."""
SYMMETRIC = 0.4
"""Power of the rounding unit above which no rounding is to blame."""
STEPS = (1e-7, 1e-8)
"""h, relative to w. A kink that lies within the first lies hardly within the second."""
DIFFERENCE, NOISE = 1e-4, 1e-5
"""Share of H v, and of the gradient, up to which rounding makes differences: about 1e-8 at h."""


def check_network(jacobian: Jacobian) -> None:
    """InputError where the second derivative of the network with respect to its parameters is wrong, tried on two images."""
    trial = jacobian.trial(FEW)
    _check_part(trial)
    jacobian.tried_functions |= set(custom_functions(trial.nodes))


def check_functions(jacobian: Jacobian, part: Linearisation) -> None:
    """The same for a part of the batch with autograd Functions that the two images have not come by, an expert's for one."""
    functions = set(custom_functions(part.nodes))
    if jacobian.network.has_numbers and not functions <= jacobian.tried_functions:
        _check_part(part)
        jacobian.tried_functions |= functions


def _check_part(trial: Linearisation) -> None:
    if custom_functions(trial.nodes):
        with suppress(RuntimeError, TypeError):  # a network, or a device, without numbers of 64 bits
            trial = _in_double(trial)
    source = torch.Generator().manual_seed(0)
    towards = random_like(trial.z, source) * trial.z.abs().max()

    def value(z: Tensor) -> Tensor:
        return (z * (towards + z / 2)).sum()  # every second derivative of z has a part

    def again(weights: Mapping[str, Tensor]) -> list[Tensor]:
        z = trial.network.outputs(trial.images, weights, trial.part)
        with trial.network.in_place(weights):
            return gradients(value(z.reshape(towards.shape)), weights)

    weights = trial.network.weights
    with trial.network.in_place():
        with torch.enable_grad():
            g = gradients(value(trial.graph), weights)
        check(g, weights, trial.nodes, again, "the network", "use quantity 'ggn'")


def check(
    g: list[Tensor],
    inputs: Mapping[str, Tensor],
    nodes: Iterable[Node],
    again: Gradient,
    what: str,
    way_out: str = "replace it",
) -> None:
    """InputError that names the cause unless the derivative of a gradient is symmetric and whole.

    Args:
        g: the gradients of a function with respect to the inputs, with a graph.
        inputs: tensors that require gradients, by name.
        nodes: of the function's graph.
        again: the gradients at other inputs.
        what: the function is.
        way_out: for the message.
    """
    nodes = [*nodes, *graph_nodes(g)]
    names, functions = {node.name() for node in nodes}, custom_functions(nodes)
    if not functions and not any(t.requires_grad for t in g):
        return
    cause = f"a function of {what}"
    if functions:
        cause = f"the autograd Function {' or '.join(functions)}"
    if ONCE in names:
        raise InputError(
            f"{cause} can be differentiated once only (once_differentiable), and would have no part in second derivatives; "
            f"{way_out}, or write its backward pass with differentiable operations"
        )
    v, Hv, asymmetry = _asymmetry(dict(zip(inputs, g, strict=True)), inputs)
    if asymmetry > torch.finfo(g[0].dtype).eps ** SYMMETRIC:
        raise InputError(
            f"second derivatives of {what} are not symmetric (by {asymmetry:.1g}): {cause} has a wrong one; {way_out}, or do "
            "without that function"
        )
    if functions and g[0].dtype == torch.float64 and not any(_is_difference(again, inputs, v, Hv, h) for h in STEPS):
        raise InputError(
            f"second derivatives of {what} are not those of its gradient: {cause} has a backward pass that is not the derivative "
            f"or takes variables for constants; {way_out}, or write it with differentiable operations of saved tensors"
        )


def gradients(value: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The derivatives of a number with respect to each input, with a graph; zeros where it does not depend on one."""
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in inputs.values()]
    return list(torch.autograd.grad(value, list(inputs.values()), create_graph=True, materialize_grads=True))


def _asymmetry(g: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor], float]:
    """v, H v, and |u . H v - v . H u| in units of its terms, of which each input has about the same."""
    source, leaves = torch.Generator().manual_seed(1), list(inputs.values())
    v = {name: random_like(t, source) * (_size(t) or 1.0) for name, t in inputs.items()}
    Hv = along(g, v, leaves)
    least = torch.finfo(leaves[0].dtype).eps ** 0.25 * max(_size(t) for t in Hv)
    u = {name: random_like(t, source) / (max(_size(t), least) or 1.0) for name, t in zip(inputs, Hv, strict=True)}
    Hu = along(g, u, leaves)
    left = torch.stack([inner(a, b) for a, b in zip(u.values(), Hv, strict=True)])
    right = torch.stack([inner(a, b) for a, b in zip(v.values(), Hu, strict=True)])
    difference, size = float((left.sum() - right.sum()).abs()), float(left.norm() + right.norm())
    return v, Hv, difference / size if difference > 0 else 0.0


def _in_double(part: Linearisation) -> Linearisation:
    """The same with numbers of 64 bits, in which a difference says something."""
    network = copy(part.network)
    network.weights = {name: w.detach().double().requires_grad_() for name, w in network.weights.items()}
    network.constants, network.buffers = (
        {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        for tensors in (network.constants, network.buffers)
    )
    images = part.images.double() if part.images.is_floating_point() else part.images
    return Linearisation(network, images, slice(None), part.part)


def _is_difference(
    again: Gradient, inputs: Mapping[str, Tensor], v: Mapping[str, Tensor], Hv: list[Tensor], h: float
) -> bool:
    """Whether H v is the central difference of the gradient, input by input."""
    with torch.enable_grad():
        ahead, behind = (
            [
                g.detach()
                for g in again({name: (t.detach() + step * v[name]).requires_grad_() for name, t in inputs.items()})
            ]
            for step in (h, -h)
        )
    for after, before, product in zip(ahead, behind, Hv, strict=True):
        found = (after - before) / (2 * h)
        allowed = DIFFERENCE * (found.norm() + product.norm()) + NOISE * (after.norm() + before.norm())
        if not (found - product).norm() <= allowed:
            return False
    return True


def _size(x: Tensor) -> float:
    """The root of the mean square."""
    return float(x.detach().norm()) / math.sqrt(max(1, x.numel()))

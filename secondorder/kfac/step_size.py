"""Step sizes from the quadratic model of a batch's loss, and damping from how well the model predicts.

    M(delta) = grad . delta + delta^T C delta / 2,    C = G + lambda I + weight_decay I

with G the Gauss-Newton matrix and lambda that of each layer's inverse (0 for parameters without factors). J. Martens, R. Grosse,
"Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, sections 6 and 7.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import jvp

from secondorder.accelerator import widest
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.random_state import RandomState
from secondorder.errors import InputError, failures_of
from secondorder.kfac.groups import setting_by_parameter
from secondorder.kfac.preconditioner import KFACPreconditioner
from secondorder.untouched import untouched

Vector = Mapping[nn.Parameter, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]


class PreconditionedOptimizer(Protocol):
    """What the quadratic model needs of `secondorder.kfac.KFAC`: its network, factors, parameter groups and state."""

    model: nn.Module
    preconditioner: KFACPreconditioner
    param_groups: list[dict[str, Any]]
    state: Any


class Trial:
    """A step whose change of the loss, as K-FAC's own model predicts it, is compared with the actual one."""

    def __init__(self, optimizer: PreconditionedOptimizer, loss: Any, random: RandomState) -> None:
        self.optimizer, self.loss, self.random = optimizer, loss_value(loss), random
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.before = {p: p.detach().clone() for p in parameters}

    def adapt(self, closure: Callable[[], Any]) -> None:
        """Evaluate the closure at the new weights and set the damping of every group; the model is otherwise untouched.

        The closure sees the random numbers it has seen in the step, so that dropout masks are the same.
        """
        optimizer, preconditioner = self.optimizer, self.optimizer.preconditioner
        with untouched(optimizer.model), preconditioner.watching_nothing(), torch.enable_grad(), self.random.replayed():
            after = loss_value(closure())
        with torch.no_grad():
            delta = {p: p - old for p, old in self.before.items()}
            linear = sum(float((p.grad * delta[p]).sum()) for p in delta if p.grad is not None)
            square = float(preconditioner.blocks.quadratic_form(delta)) + _penalty(optimizer, delta, delta, {})
        scale = preconditioner.mean_scale
        adapt_damping(optimizer, scale * _over_processes(optimizer, after - self.loss), scale * linear + square / 2)


def check_batch(loss_function: object, inputs: object, targets: object) -> None:
    """InputError unless the arguments of `KFAC.quadratic_step` are a function and two tensors."""
    if not callable(loss_function):
        raise InputError(f"quadratic_step: loss_function {loss_function!r}: must be a function of outputs and targets")
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"quadratic_step: {name} {type(tensor).__name__}: must be a tensor")


def quadratic_step(
    optimizer: PreconditionedOptimizer, loss_function: LossFunction, inputs: Tensor, targets: Tensor
) -> Tensor:
    """`KFAC.quadratic_step` once gradients are cleared and the layers have the dampings of their groups; returns the loss."""
    preconditioner = optimizer.preconditioner
    decay = setting_by_parameter(optimizer.param_groups, "weight_decay")
    network = FrozenNetwork(optimizer.model)  # before the forward pass: it draws the same dropout masks
    with torch.enable_grad():
        with failures_of(f"quadratic_step: the model on inputs {list(inputs.shape)}"):
            outputs = optimizer.model(inputs)
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"quadratic_step: the model returned a {type(outputs).__name__}; it must return one tensor"
            )
        preconditioner.update_curvature(outputs)
        with failures_of(
            f"quadratic_step: the loss of outputs {list(outputs.shape)} and targets {list(targets.shape)}"
        ):
            loss = loss_function(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InputError(
                "quadratic_step: loss_function must return one number that depends on the outputs, the mean loss"
            )
        loss.backward()
    loss = loss.detach()
    directions = preconditioner.directions(decay)
    if directions is None:
        return loss
    with torch.no_grad(), preconditioner.watching_nothing():
        basis: list[Vector] = [{p: -direction for p, direction in directions.items()}]
        if any("update" in optimizer.state[p] for p in directions):
            basis.append({p: optimizer.state[p].get("update", torch.zeros_like(p)) for p in directions})
        C = _curvature(optimizer, network, loss_function, inputs, targets, basis, decay)
        slopes = torch.tensor([_slope(vector, decay, preconditioner.mean_scale) for vector in basis], dtype=C.dtype)
        coefficients = _minimiser(C, slopes)
        change = float(slopes @ coefficients + coefficients @ C @ coefficients / 2)
        _take(optimizer, basis, coefficients.tolist())
        adapt = preconditioner.damping.adapt
        if adapt is not None and preconditioner.intervals.step % adapt.every == 0:
            moved = FrozenNetwork(optimizer.model)
            moved.random = network.random
            after = float(loss_function(moved.outputs(inputs), targets))
            actual = preconditioner.mean_scale * _over_processes(optimizer, after - float(loss))
            adapt_damping(optimizer, actual + _change_of_decay(optimizer, directions, decay), change)
    return loss


def adapt_damping(optimizer: PreconditionedOptimizer, actual: float, predicted: float) -> None:
    """The damping of every group by Levenberg-Marquardt's rule for actual / predicted; a predicted rise counts as failure."""
    rule = optimizer.preconditioner.damping.adapt
    assert rule is not None
    ratio = actual / predicted if predicted < 0 else float("nan")
    for group in optimizer.param_groups:
        group["damping"] = rule.adapted(group["damping"], ratio)


def _curvature(
    optimizer: PreconditionedOptimizer,
    network: FrozenNetwork,
    loss_function: LossFunction,
    inputs: Tensor,
    targets: Tensor,
    basis: Sequence[Vector],
    decay: Mapping[nn.Parameter, float],
) -> Tensor:
    """b_i . C b_j, float64 on the CPU: one product with the Jacobian for each vector, (J b_i) . H (J b_j)."""
    weights = {name: w.detach() for name, w in network.weights.items()}

    def outputs(w: Mapping[str, Tensor]) -> Tensor:
        return network.outputs(inputs, w)

    pushed = []
    for vector in basis:
        tangent = {name: vector.get(p, torch.zeros_like(p)) for name, p in network.parameters.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # PyTorch's own call
            z, Jv, *_ = jvp(outputs, (weights,), (tangent,))
        pushed.append(Jv)
    HJ = _hessian_products(loss_function, z, targets, pushed)
    size = range(len(basis))
    C = torch.stack([torch.stack([(pushed[i] * HJ[j]).sum() for j in size]) for i in size])
    C = C.to(widest(C.device))
    preconditioner = optimizer.preconditioner
    preconditioner.processes.sum_in_one_bucket([C])
    penalties = [[_penalty(optimizer, basis[i], basis[j], decay) for j in size] for i in size]
    scale = preconditioner.mean_scale / preconditioner.processes.world
    return C.cpu().double() * scale + torch.tensor(penalties, dtype=torch.float64)


def _hessian_products(
    loss_function: LossFunction, z: Tensor, targets: Tensor, vectors: Sequence[Tensor]
) -> list[Tensor]:
    """H v, H the Hessian of the loss at the outputs z; zero for a loss that is piecewise linear."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        [gradient] = torch.autograd.grad(loss_function(z, targets), z, create_graph=True)
    if not gradient.requires_grad:
        return [torch.zeros_like(v) for v in vectors]
    return [torch.autograd.grad(gradient, z, v, retain_graph=True, materialize_grads=True)[0] for v in vectors]


def _minimiser(C: Tensor, slopes: Tensor) -> Tensor:
    """c with slopes . c + c . C c / 2 least, the shortest one where C is singular; the basis is taken at C's length one."""
    scale = torch.where(C.diagonal() > 0, C.diagonal(), 1.0).rsqrt()
    unit = scale[:, None] * C * scale
    return scale * torch.linalg.lstsq(unit, -scale * slopes, driver="gelsd").solution


def loss_value(loss: Any) -> float:
    """The number that a closure has returned; InputError unless it is one."""
    try:
        return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"step(closure): the closure returned {loss!r}; Levenberg-Marquardt damping needs the loss, a number"
        ) from error


def _over_processes(optimizer: PreconditionedOptimizer, value: float) -> float:
    """The mean over the processes."""
    processes = optimizer.preconditioner.processes
    device = optimizer.preconditioner.device
    total = torch.tensor(value, dtype=widest(device), device=device)
    processes.sum_in_one_bucket([total])
    return float(total) / processes.world


def _penalty(optimizer: PreconditionedOptimizer, a: Vector, b: Vector, decay: Mapping[nn.Parameter, float]) -> float:
    """a . (lambda I + weight_decay I) b."""
    total = sum(factor * float((a[p] * b[p]).sum()) for p, factor in decay.items() if factor and p in a)
    return total + float(optimizer.preconditioner.blocks.penalty(a, b))


def _slope(vector: Vector, decay: Mapping[nn.Parameter, float], scale: float) -> float:
    """(scale grad + weight_decay w) . vector."""
    return sum(float(((scale * p.grad + decay[p] * p) * v).sum()) for p, v in vector.items() if p.grad is not None)


def _take(optimizer: PreconditionedOptimizer, basis: Sequence[Vector], coefficients: Sequence[float]) -> None:
    """Add the combination of the basis to the weights, and keep it for the next step."""
    for p in basis[0]:
        update = coefficients[0] * basis[0][p]
        for c, vector in zip(coefficients[1:], basis[1:], strict=True):
            update = update + c * vector[p]
        optimizer.state[p]["update"] = update
        p.add_(update)


def _change_of_decay(optimizer: PreconditionedOptimizer, moved: Vector, decay: Mapping[nn.Parameter, float]) -> float:
    """Change of weight_decay |w|^2 / 2 by the last update."""
    total = 0.0
    for p in moved:
        if decay[p]:
            update = optimizer.state[p]["update"]
            total += decay[p] * float((update * p).sum() - (update * update).sum() / 2)
    return total

"""The K-FAC optimiser: a step rule for layers with factors, a stated fallback for every other parameter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from secondorder.curvature.matrix_free.random_state import RandomState
from secondorder.errors import InputError
from secondorder.kfac.blocks import Directions
from secondorder.kfac.groups import (
    begin_buffers,
    follow_model,
    group_to_add,
    groups_by_pattern,
    layer_dampings,
    names_by_group,
    remove_from,
    setting_by_parameter,
    ungrouped,
)
from secondorder.kfac.optimizer_state import as_buffer, check_groups_and_buffers, from_buffer, in_distributed_checkpoint
from secondorder.kfac.options import (
    Damping,
    Fisher,
    Options,
    check_closure,
    check_group,
    check_positive,
    checked_settings,
)
from secondorder.kfac.preconditioner import KFACPreconditioner
from secondorder.kfac.report import Report
from secondorder.kfac.rule_updates import carry, updates
from secondorder.kfac.state import check_state, treats_otherwise
from secondorder.kfac.step_rule import StepRule, as_step_rule
from secondorder.kfac.step_size import Trial, check_batch, loss_value, quadratic_step
from secondorder.kfac.update import Lengths, fall_back, move, move_within

CLIP = 10.0
"""Default of `clip`: keeps the first steps, whose factors are of one batch, from overshooting; `report()` counts when it acts."""


class KFAC(torch.optim.Optimizer):
    """w <- (1 - lr weight_decay) w - lr u,  u from the gradient, its momentum and K-FAC's factors by a step rule.

        opt = KFAC(model)
        for images, labels in loader:
            opt.zero_grad()
            logits = model(images)
            opt.update_curvature(logits)  # nothing in most steps; not needed with fisher="empirical"
            F.cross_entropy(logits, labels).backward()
            opt.step()

    Linear layers, convolutions, attention and embeddings have Kronecker factors; batch norm and other parameters get the
    fallback in the same step (`Options.fallback`); `report()` says which is which. Works with learning-rate schedulers,
    closures, gradient accumulation, autocast with GradScaler, DistributedDataParallel. `state_dict()` is complete: a resumed
    training takes the same steps, bit for bit on a CPU.

    Args:
        model: the network, also wrapped by DistributedDataParallel or torch.compile.
        lr: learning rate at the top of the schedule; that of the step rule when not given: 0.06, natural 0.1.
        step_rule: "adam" (Adam in the eigenbasis of the factors, the root mean square of a layer's update 0.2 lr, less where
            gradients disagree); "natural" (the published step, v <- momentum v + P grad, u = v, with P = (B kron A + lambda I)^-1
            of each layer; for theory, and where the quadratic model is right); "adam_fixed", "natural_fixed", "adam_free",
            "natural_adam"; or a `StepRule`.
        momentum: of the gradients, 0 to 1; heavy-ball momentum of P grad for "natural".
        weight_decay: decoupled by default (`Options.decoupled`).
        damping, ema_decay, factor_interval, inverse_interval, fisher, sharing: see `KFACPreconditioner`.
        approximation: see `KFACPreconditioner`. Layers with "ekfac" are damped in their eigenbases, also with
            `Damping(inverse="cholesky")`, which concerns those with "kfac" only.
        clip: trust region of a natural step: the largest length of the velocity v in the Fisher metric, that is
            sqrt(v^T (F + lambda I) v) with K-FAC's own F and lambda for layers and the identity for other parameters. Every
            direction d = P grad is shortened to (1 - momentum) clip, which bounds whatever they sum up to. lr multiplies what
            comes out, so that it and its schedule always act; half the square of lr clip is about the largest KL divergence
            between the model before and after a step, as far as layers change it. None: no limit. Other rules have none.
        options: the rest, parameter groups among them.

    Raises:
        InputError: for a bad value, or a model without a layer to precondition.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        step_rule: str | StepRule = "adam",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float | Damping = Damping(),  # noqa: B008  a frozen dataclass
        ema_decay: float = 0.95,
        factor_interval: int = 10,
        inverse_interval: int = 10,
        fisher: str | Fisher = "mc",
        approximation: str | Mapping[str, str] = "kfac",
        sharing: str = "expand",
        clip: float | None = CLIP,
        options: Options = Options(),  # noqa: B008
    ) -> None:
        self.preconditioner = KFACPreconditioner(
            model,
            damping=damping,
            ema_decay=ema_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            fisher=fisher,
            approximation=approximation,
            sharing=sharing,
            options=options,
        )
        self.options, self.model, self.step_rule = options, model, as_step_rule(step_rule)
        rate = self.step_rule.learning_rate if lr is None else lr
        self.step_rule.check_formats(self.preconditioner.model_layers.parameters)
        settings = {"lr": rate, "momentum": momentum, "weight_decay": weight_decay}
        settings = checked_settings(settings | {"damping": self.preconditioner.damping.value}, options.decoupled)
        if clip is not None:
            check_positive("clip", clip)
        self.clip, self._lengths = None if clip is None else float(clip), Lengths()
        super().__init__(groups_by_pattern(self.preconditioner.treatments, options.groups), settings)
        self.check_groups()
        self._complete = True
        begin_buffers(self.param_groups, self.state)

    @property
    def factor_step(self) -> bool:
        """Whether the present step updates the factors."""
        return self.preconditioner.factor_step

    @torch._disable_dynamo
    def update_curvature(self, logits: Tensor | Sequence[Tensor]) -> None:
        """As `KFACPreconditioner.update_curvature`, from outputs `[N, K, ...]`, all in one call, before `backward()`."""
        if self.factor_step:
            self._follow_model()
        self.preconditioner.update_curvature(logits)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the statistics that a skipped step has left."""
        self.preconditioner.discard()
        super().zero_grad(set_to_none)

    def report(self) -> Report:
        """What every parameter is treated as, sizes, memory, time by phase, and what went wrong how often."""
        shortened, exploded = self._lengths.read()
        return replace(self.preconditioner.report(), shortened=shortened, exploded=exploded)

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a batch whose gradients are not finite changes nothing. Returns what the closure returns.

        Adopts what has become trainable. InputError when no parameter has a gradient, when `update_curvature` was due and not
        called, for a module that came into the model and is in no group, for Levenberg-Marquardt damping without a closure, for
        a closure that is no function, and for settings of a parameter group that cannot be used.
        """
        check_closure(closure)
        self.check_groups()
        adapt = self.preconditioner.damping.adapt
        if adapt is not None and not self.step_rule.is_plain:
            raise InputError("Damping(adapt=...) needs a quadratic model: step_rule='natural', or quadratic_step")
        if adapt is not None and closure is None:
            raise InputError("Levenberg-Marquardt damping compares two losses: use step(closure) or quadratic_step")
        loss, random = None, RandomState() if self._adapts else None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if random is not None:
            loss_value(loss)
        self._follow_model()
        with self._momenta_carried():
            gradients = self._gradients()
        if gradients is None:
            return loss
        directions = self.preconditioner.solve(gradients) if self.step_rule.is_plain else gradients
        trial = None if random is None else Trial(self, loss, random)
        with self.preconditioner.stopwatch("update"), torch.no_grad():
            self._update(directions)
        if trial is not None and closure is not None:
            trial.adapt(closure)
        return loss

    def quadratic_step(
        self, loss_function: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
    ) -> Tensor:
        """One step with learning rate and momentum that minimise the quadratic model of this batch's loss; returns the loss.

        The update is delta = -alpha P grad + mu delta_before with (alpha, mu) minimising grad . delta + delta^T C delta / 2,
        C = exact GGN + damping (+ weight decay), from two products with the Jacobian (Martens & Grosse, ICML 2015, section 7).
        For large batches, whatever the step rule: lr and momentum of the groups are not used, weight decay is part of the loss
        loss_function(model(inputs), targets). It does all passes and the damping's adaptation. InputError for bad arguments.
        """
        check_batch(loss_function, inputs, targets)
        self.check_groups()
        self.zero_grad()
        self._follow_model(between_steps=True)
        self.preconditioner.damp(layer_dampings(self.param_groups, self.preconditioner.layers))
        with self._momenta_carried():
            return quadratic_step(self, loss_function, inputs, targets)

    def check_groups(self) -> None:
        """InputError for settings of a group that have been changed to something that cannot be used."""
        for group in self.param_groups:
            check_group(group, self.options.decoupled)

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict with the entry "kfac": factors, inverses, counters, random state.

        torch.distributed.checkpoint saves and loads it, too, but not with its options to flatten or to gather full states.
        """
        names = names_by_group(self.param_groups, self.preconditioner.treatments)
        own = {"groups": names, "step_rule": self.step_rule.words}
        state = super().state_dict() | {"kfac": self.preconditioner.state_dict() | own}
        return as_buffer(state, self.param_groups) if in_distributed_checkpoint() else state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a copy of `state_dict()`.

        InputError, which names the entry, and nothing has changed, for a state of another architecture, of other groups or
        settings, and for one that is not whole (see `KFACPreconditioner.load_state_dict`), torch's own part included.
        """
        whole = from_buffer(state_dict)
        state = whole["kfac"]
        if treats_otherwise(state, self.preconditioner.treatments):  # it may be of the model as it has become since
            self._follow_model(between_steps=True)
        check_state(self.preconditioner, state)
        names = names_by_group(self.param_groups, self.preconditioner.treatments)
        check_groups_and_buffers(whole, names, self.step_rule, self.param_groups, self.preconditioner.layers.values())
        super().load_state_dict(deepcopy({name: whole[name] for name in ("state", "param_groups")}))
        begin_buffers(self.param_groups, self.state)
        self.preconditioner.continue_with(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adopt parameters of the model in a group of their own: those of a new module, and those that were frozen till now.

            model.fc = nn.Linear(512, 10)
            optimizer.add_param_group({"params": model.fc.parameters(), "lr": 0.01})

        Settings that are not given are those of the construction. InputError for parameters that are not of the model, or are
        trained already, and for settings that cannot be used.
        """
        if not hasattr(self, "_complete"):
            super().add_param_group(param_group)
            return
        group = group_to_add(param_group, self.model, self.param_groups, self.preconditioner.treatments, self.defaults)
        check_group(group, self.options.decoupled)
        remove_from(self.param_groups, group["params"])
        super().add_param_group(group)
        if not ungrouped(self.model, self.param_groups):  # else there is a group to come
            self._follow_model(between_steps=True)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refused: a copy, or what pickle makes, would watch no model."""
        raise InputError(
            "a KFAC cannot be copied or pickled, it watches the layers of its model: make a new KFAC of the copied model and "
            "load_state_dict(optimizer.state_dict())"
        )

    def _gradients(self) -> Directions | None:
        """The gradients, with weight decay in them where it is not decoupled."""
        decay = {} if self.options.decoupled else setting_by_parameter(self.param_groups, "weight_decay")
        self.preconditioner.damp(layer_dampings(self.param_groups, self.preconditioner.layers))
        return self.preconditioner.gradients({p: value for p, value in decay.items() if value})

    def _follow_model(self, between_steps: bool = False) -> None:
        """Adopt what has become trainable; InputError, and nothing has changed, for a module that is in no group."""
        follow_model(self.preconditioner, self.param_groups, self.state, self.step_rule, between_steps)

    @contextmanager
    def _momenta_carried(self) -> Iterator[None]:
        """Momenta in the eigenbases that are renewed inside go over to the new ones."""
        blocks = self.preconditioner.blocks
        before = blocks.eigenbases() if self.step_rule.direction == "eigenbasis" else {}
        try:
            yield
        finally:
            if self.step_rule.direction == "eigenbasis":
                carry(before, blocks, self.state)

    @property
    def _adapts(self) -> bool:
        """Whether the present step adapts the damping."""
        adapt = self.preconditioner.damping.adapt
        return adapt is not None and (self.preconditioner.intervals.step + 1) % adapt.every == 0

    def _update(self, directions: Directions) -> None:
        """Directions P grad, or gradients where the step rule wants these, become steps, and steps new weights."""
        treatments, options = self.preconditioner.treatments, self.options
        if not self.step_rule.is_plain:
            momenta = setting_by_parameter(self.param_groups, "momentum")
            blocks, events = self.preconditioner.blocks, self.preconditioner.events
            steps = updates(self.step_rule, directions, blocks, self.state, momenta, options.fallback_lr, events)
            move(steps, self.param_groups, self.state, options.decoupled, momentum=False)
            return
        others = [t.parameter for t in treatments if t.how == "fallback" and t.parameter in directions]
        fall_back(directions, others, self.state, options.fallback, options.fallback_lr)
        scale = self.preconditioner.mean_scale
        move_within(directions, self.param_groups, self.state, options.decoupled, self.clip, scale, self._lengths)

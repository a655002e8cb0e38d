"""Optimisers by name: functions (network, run) -> torch optimiser over the network's parameters.

The run gives learning rate, momentum and weight decay; `run.optimizer_options` everything else, under the names of the
optimiser's own arguments. The training loop sets ``lr`` of every parameter group before each step and, of an optimiser that has
``update_curvature``, calls it with the logits before the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import torch
from torch import nn

from secondorder.errors import InputError
from secondorder.gauss_newton import GaussNewton
from secondorder.kfac import KFAC
from secondorder.optional import needed_by
from secondorder.training.optimizer_state import Together, plain, with_objects

WIDE = 8192
"""Inputs of a layer, the bias among them, from which on SINGD's preconditioner of them is diagonal: a matrix takes 256 MiB."""


class OptimizerSettings(Protocol):
    """What an optimiser is made of: these fields of a `secondorder.training.Run`, which says what they mean."""

    @property
    def optimizer(self) -> str:
        """The optimiser's name, a key of OPTIMIZERS."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of all parameter groups, until the training loop sets theirs."""

    @property
    def momentum(self) -> float:
        """Heavy-ball momentum, or the decay of the first moment."""

    @property
    def weight_decay(self) -> float:
        """Coefficient of the L2 penalty, or of decoupled decay."""

    @property
    def optimizer_options(self) -> tuple[tuple[str, Any], ...]:
        """The optimiser's own arguments as (name, value) pairs."""

    @property
    def amp(self) -> str:
        """The mixed precision of the training: off, float16 or bfloat16."""


Builder = Callable[[nn.Module, OptimizerSettings], torch.optim.Optimizer]


def named_errors(build: Builder) -> Builder:
    """InputError that names the optimiser for an option that it does not have, or a value that it refuses."""

    @wraps(build)
    def checked(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
        try:
            return build(model, run)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"optimizer {run.optimizer!r} refuses optimizer_options {dict(run.optimizer_options)}: {reason}"
            ) from error

    return checked


def check_options(kind: type, options: dict[str, Any]) -> None:
    """TypeError for an option that is no argument of the optimiser: pytorch_optimizer ignores what it does not know."""
    known = inspect.signature(kind).parameters
    for name in options:
        if name not in known or known[name].kind is inspect.Parameter.VAR_KEYWORD:
            raise TypeError(f"it has no option {name!r}")


def sgd(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """SGD with heavy-ball momentum: v <- momentum v + g + weight_decay w, w <- w - learning_rate v."""
    settings: dict[str, Any] = {"momentum": run.momentum, "weight_decay": run.weight_decay}
    return torch.optim.SGD(model.parameters(), lr=run.learning_rate, **settings, **dict(run.optimizer_options))


def adamw(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), beta1 = momentum, decoupled weight decay."""
    options: dict[str, Any] = dict(run.optimizer_options)
    betas = (run.momentum, options.pop("beta2", 0.999))
    return torch.optim.AdamW(
        model.parameters(), lr=run.learning_rate, betas=betas, weight_decay=run.weight_decay, **options
    )


def kfac(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """K-FAC with the published step, else this package's defaults where the options say nothing: `secondorder.kfac.KFAC`."""
    return _kfac(model, run, {"step_rule": "natural"})


def kfac_adam(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """K-FAC with its default step, Adam in its eigenbasis, of fixed length: `secondorder.kfac.KFAC`."""
    return _kfac(model, run, {})


def ekfac(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """EKFAC: K-FAC with second moments corrected in its eigenbasis, and the published step."""
    return _kfac(model, run, {"step_rule": "natural", "approximation": "ekfac"})


def _kfac(model: nn.Module, run: OptimizerSettings, settings: dict[str, Any]) -> torch.optim.Optimizer:
    settings = {"momentum": run.momentum, "weight_decay": run.weight_decay} | settings
    return KFAC(model, run.learning_rate, **settings | dict(run.optimizer_options))


def gauss_newton(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """The exact counterpart of K-FAC, for small networks: `secondorder.gauss_newton.GaussNewton`."""
    if run.amp != "off":
        raise InputError(f"optimizer 'gauss_newton' cannot be used with amp {run.amp}; choose off")
    settings: dict[str, Any] = {"momentum": run.momentum, "weight_decay": run.weight_decay}
    return GaussNewton(model, run.learning_rate, **settings, **dict(run.optimizer_options))


def soap(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """SOAP (Vyas et al. 2024): AdamW in Shampoo's eigenbasis, beta1 = momentum; of pytorch_optimizer."""
    with needed_by("optimizer 'soap'"):
        from pytorch_optimizer.optimizer.soap import SOAP

    options: dict[str, Any] = dict(run.optimizer_options)
    betas = (run.momentum, options.pop("beta2", 0.95))
    check_options(SOAP, options)
    return SOAP(model.parameters(), lr=run.learning_rate, betas=betas, weight_decay=run.weight_decay, **options)


def shampoo(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """Shampoo with SGD's step length by layer (Anil et al. 2020), beta1 = momentum; of pytorch_optimizer.

    The preconditioner is computed every 10 steps and used from step 10 on, unless the options say otherwise: the package's own
    1,000 and 25 are for long trainings.
    """
    with needed_by("optimizer 'shampoo'"):
        from pytorch_optimizer import ScalableShampoo

    class Shampoo(ScalableShampoo):
        """With a state_dict of plain values."""

        def state_dict(self) -> dict[str, Any]:
            return plain(super().state_dict())

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            torch.optim.Optimizer.load_state_dict(self, with_objects(state_dict))

    options: dict[str, Any] = {"preconditioning_compute_steps": 10, "start_preconditioning_step": 10}
    options |= dict(run.optimizer_options)
    betas = (run.momentum, options.pop("beta2", 0.999))
    check_options(ScalableShampoo, options)
    return Shampoo(model.parameters(), lr=run.learning_rate, betas=betas, weight_decay=run.weight_decay, **options)


def muon(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024): orthogonalised momentum for convolutions, AdamW for all else; of pytorch_optimizer.

    Updates are scaled by shape as by Liu et al. (2025), so that one learning rate serves both kinds of parameters.
    """
    with needed_by("optimizer 'muon'"):
        from pytorch_optimizer import Muon

    check_options(Muon, dict(run.optimizer_options))
    convolutions = [p for p in model.parameters() if p.ndim > 2]
    others = [p for p in model.parameters() if p.ndim <= 2]
    rate: dict[str, Any] = {"lr": run.learning_rate, "weight_decay": run.weight_decay}
    groups = [
        {"params": convolutions, "use_muon": True, "use_adjusted_lr": True, "momentum": run.momentum, **rate},
        {"params": others, "use_muon": False, **rate},
    ]
    return Muon([group for group in groups if group["params"]], **dict(run.optimizer_options))


def singd(model: nn.Module, run: OptimizerSettings) -> torch.optim.Optimizer:
    """Inverse-free K-FAC of the empirical Fisher (Lin et al. 2024), and SGD for what it leaves out (batch norm); of singd.

    The step of its preconditioner is normalised unless the options say otherwise, which its authors advise for early training.
    The preconditioner of inputs wider than WIDE is diagonal: a matrix of the 32,896 that a classifier has behind GCP of 256
    channels takes 4 GiB, and there are several.
    """
    with needed_by("optimizer 'singd'"):
        from singd.optim.optimizer import SINGD

    if run.amp == "float16":
        raise InputError("optimizer 'singd' cannot be used with amp float16 here; choose off or bfloat16")
    settings: dict[str, Any] = {"lr": run.learning_rate, "momentum": run.momentum, "weight_decay": run.weight_decay}
    options: dict[str, Any] = {"normalize_lr_cov": True, "warn_unsupported": False} | dict(run.optimizer_options)
    layers = SINGD(model, _by_width(model, SINGD.SUPPORTED_MODULES), **settings, **options)
    taken = {id(p) for group in layers.param_groups for p in group["params"]}
    left = [p for p in model.parameters() if id(p) not in taken]
    return Together([layers, torch.optim.SGD(left, **settings)] if left else [layers])


def _by_width(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[dict[str, Any]] | None:
    """Groups of SINGD's layers with narrow and with wide inputs; None where no input is wide."""
    narrow: dict[int, nn.Parameter] = {}
    wide: dict[int, nn.Parameter] = {}
    for layer in model.modules():
        if isinstance(layer, kinds):
            width = layer.weight[0].numel() + (layer.bias is not None)  # type: ignore[index]
            group = wide if width > WIDE else narrow
            group.update({id(p): p for p in layer.parameters(recurse=False) if p.requires_grad})
    if not wide:
        return None
    diagonal = {"params": list(wide.values()), "structures": ("diagonal", "dense")}
    return [{"params": list(narrow.values())}, diagonal] if narrow else [diagonal]


OPTIMIZERS: dict[str, Builder] = {
    "sgd": named_errors(sgd),
    "adamw": named_errors(adamw),
    "kfac": named_errors(kfac),
    "kfac_adam": named_errors(kfac_adam),
    "ekfac": named_errors(ekfac),
    "gauss_newton": named_errors(gauss_newton),
    "soap": named_errors(soap),
    "shampoo": named_errors(shampoo),
    "muon": named_errors(muon),
    "singd": named_errors(singd),
}

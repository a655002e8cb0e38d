"""K-FAC of every kind and Gauss-Newton on any device: the steps of the CPU, and how often the CPU waits."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import check, images_and_labels, moved, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.gauss_newton import GaussNewton
from secondorder.kfac import KFAC, STEP_RULES, Damping, Fisher, Options

KINDS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "ekfac": {"approximation": "ekfac"},
    "cholesky": {"damping": Damping(inverse="cholesky")},
    "wide": {"options": Options(wide_inputs=10)},
    "wide cholesky": {"damping": Damping(inverse="cholesky"), "options": Options(wide_inputs=10)},
    "empirical": {"fisher": "empirical"},
    "exact": {"fisher": "exact"},
    "two draws": {"fisher": Fisher(samples=2)},
    "reduce": {"sharing": "reduce"},
    "adam fallback": {"options": Options(fallback="adam", fallback_lr=0.1)},
    "no clip": {"clip": None, "weight_decay": 0.1},
}
KINDS = {kind: {"step_rule": "natural"} | settings for kind, settings in KINDS.items()}
KINDS |= {f"step rule {name}": {"step_rule": name} for name in STEP_RULES}


def trained(model: nn.Module, optimizer: Any, images: Tensor, labels: Tensor, steps: int) -> dict[str, Tensor]:
    model.train()
    for _ in range(steps):
        torch.manual_seed(0)
        optimizer.zero_grad()
        logits = model(images)
        optimizer.update_curvature(logits)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "wide cholesky", "step rule adam"])
def test_a_model_that_moves_in_the_middle_of_training(kind: str, device: str) -> None:
    """Statistics, inverses and momentum follow the weights; a device to which torch moves them as new parameters is refused."""

    def after_steps(model: nn.Module, place: str) -> dict[str, Tensor]:
        images, labels = images_and_labels(12)
        optimizer = KFAC(model, 0.1, factor_interval=2, inverse_interval=2, **KINDS[kind])
        trained(model, optimizer, images, labels, 3)
        before = set(model.parameters())
        if set(model.to(place).parameters()) != before:
            with pytest.raises(InputError, match="came into the model after the optimiser was made"):
                trained(model, optimizer, *moved((images, labels), place), 1)
            return {}
        trained(model, optimizer, *moved((images, labels), place), 3)
        return dict(model.named_parameters())

    there = after_steps(tiny(), device)
    if there:
        check(there, after_steps(tiny(), "cpu"), device, 1e-5, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_kfac(kind: str, device: str) -> None:
    def after_steps(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        optimizer = KFAC(model, 0.1, factor_interval=2, inverse_interval=2, **KINDS[kind])
        trained(model, optimizer, images, labels, 2)
        copied = KFAC(model, 0.1, factor_interval=2, inverse_interval=2, **KINDS[kind])
        copied.load_state_dict(optimizer.state_dict())
        assert str(copied.report())
        return trained(model, copied, images, labels, 2)

    model, (images, labels) = tiny(), images_and_labels(12)
    there = after_steps(*moved((model, images, labels), device))
    check(there, after_steps(model, images, labels), device, 1e-5, 1e-8)


def test_quadratic_and_adaptive_steps_of_kfac(device: str) -> None:
    def after_steps(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        optimizer = KFAC(model, 0.1, step_rule="natural")
        for _ in range(2):
            optimizer.quadratic_step(F.cross_entropy, images, labels)
        return dict(model.named_parameters())

    model, (images, labels) = tiny(), images_and_labels(12)
    there = after_steps(*moved((model, images, labels), device))
    check(there, after_steps(model, images, labels), device, 1e-5, 1e-8)


def test_steps_of_gauss_newton(device: str) -> None:
    def after_steps(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return trained(model, GaussNewton(model, 0.1), images, labels, 2)

    model, (images, labels) = tiny(), images_and_labels()
    there = after_steps(*moved((model, images, labels), device))
    check(there, after_steps(model, images, labels), device, 1e-4, 1e-6)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "two draws"])
def test_waits_of_a_plain_step_of_kfac(kind: str, device: str, waits: Callable[[], AbstractContextManager]) -> None:
    """At most one, in steps that update neither factors nor inverses: whether the gradients are finite."""
    model, (images, labels) = moved((tiny().float(), images_and_labels(12)), device)
    images = images.float()
    options = replace(KINDS[kind].get("options", Options()), warm_up=False)
    optimizer = KFAC(model, 0.1, factor_interval=100, inverse_interval=100, **KINDS[kind] | {"options": options})
    trained(model, optimizer, images, labels, 1)
    with waits() as found:
        trained(model, optimizer, images, labels, 3)
    assert len(found) <= 3, found


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "two draws"])
def test_waits_of_steps_that_update_the_factors(
    kind: str, device: str, waits: Callable[[], AbstractContextManager]
) -> None:
    """At most two, and four in the first, which verifies the gradients; beside those of the inverses."""
    model, (images, labels) = moved((tiny().float(), images_and_labels(12)), device)
    images = images.float()
    options = replace(KINDS[kind].get("options", Options()), warm_up=False)
    optimizer = KFAC(model, 0.1, factor_interval=1, inverse_interval=1, **KINDS[kind] | {"options": options})
    invert, inverting = optimizer.preconditioner.blocks.invert, []

    def counted_invert(*args: Any) -> None:
        with waits() as found:
            invert(*args)
        inverting.extend(found)

    optimizer.preconditioner.blocks.invert = counted_invert
    for most in (4, 2, 2):
        inverting.clear()
        with waits() as found:
            trained(model, optimizer, images, labels, 1)
        assert len(found) - len(inverting) <= most, found

"""Every schedule against the published formula, epoch by epoch, and stretched to other lengths."""

import itertools
import math
from collections.abc import Callable

import pytest

from secondorder.training import SCHEDULES

STEPS = 3  # per epoch

# Learning rate at 1-based epoch e (or, for ShuffleNetV2 and cosine, at 0-based step of total), as the protocol has it.
PUBLISHED: dict[str, Callable[[int], float]] = {
    "resnet_norm": lambda e: 0.1 * 0.1 ** (e // 30),
    "resnet_fast": lambda e: 0.1 * (1 - (e - 1) / 52) ** 11,
    "resnet_adju": lambda e: 0.1 * (1 - (e - 1) / 49) ** 2,
    "mobilenet_norm": lambda e: 0.045 * 0.98**e,
    "mobilenet_fast": lambda e: 0.06 * 0.92**e,
    "mobilenet_adju": lambda e: (
        6e-2 - 5e-2 * (e - 1) / 49
        if e <= 50
        else 1e-2 - 9e-3 * (e - 50) / 50
        if e <= 100
        else 1e-3 - 9.9e-4 * (e - 100) / 50
    ),
}
SHUFFLENET = ("shufflenet_norm", "shufflenet_fast", "shufflenet_adju")  # at every step of any length, below
LENGTHS = {
    "resnet_norm": 100,
    "resnet_fast": 53,
    "resnet_adju": 50,
    "mobilenet_norm": 400,
    "mobilenet_fast": 100,
    "mobilenet_adju": 150,
    "shufflenet_norm": 240,
    "shufflenet_fast": 60,
    "shufflenet_adju": 100,
    "constant": None,
    "cosine": None,
}


def rates(name: str, epochs: int) -> list[float]:
    """The learning rate of every step, from the published base learning rate (1 where there is none)."""
    schedule = SCHEDULES[name]
    base = schedule.learning_rate or 1.0
    return [base * schedule.factor_at(step, STEPS, epochs) for step in range(STEPS * epochs)]


def test_all_nine_are_compared_value_by_value() -> None:
    families = ("resnet", "mobilenet", "shufflenet")
    assert {*PUBLISHED, *SHUFFLENET} == {f"{family}_{kind}" for family in families for kind in ("norm", "fast", "adju")}


@pytest.mark.parametrize(
    ("name", "first", "published_code"),
    [
        ("resnet_fast", 0.1, 0.1 * (53 / 52) ** 11),
        ("resnet_adju", 0.1, 0.1 * (50 / 49) ** 2),
        ("resnet_norm", 0.1, 0.1),
        ("mobilenet_norm", 0.0441, 0.045),
        ("mobilenet_fast", 0.0552, 0.06),
    ],
)
def test_the_first_epoch_is_epoch_1_and_not_0_as_in_the_published_code(
    name: str, first: float, published_code: float
) -> None:
    assert rates(name, LENGTHS[name])[0] == pytest.approx(first, rel=1e-12)
    assert PUBLISHED[name](0) == pytest.approx(published_code, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_epoch_at_the_published_length(name: str) -> None:
    epochs = LENGTHS[name]
    assert epochs == SCHEDULES[name].epochs
    expected = [PUBLISHED[name](e) for e in range(1, epochs + 1) for _ in range(STEPS)]
    assert rates(name, epochs) == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_resnet_norm_drops_at_exact_epochs() -> None:
    per_epoch = rates("resnet_norm", 100)[::STEPS]
    assert [round(math.log10(rate), 9) for rate in per_epoch] == [-1.0] * 29 + [-2.0] * 30 + [-3.0] * 30 + [-4.0] * 11


def test_resnet_fast_ends_at_zero() -> None:
    assert rates("resnet_fast", 53)[-1] == 0.0
    assert rates("resnet_fast", 53)[-1 - STEPS] > 0


@pytest.mark.parametrize(
    ("epoch", "rate"), [(1, 6e-2), (50, 1e-2), (75, 5.5e-3), (100, 1e-3), (125, 5.05e-4), (150, 1e-5)]
)
def test_mobilenet_adju_is_linear_between_its_knots(epoch: int, rate: float) -> None:
    assert rates("mobilenet_adju", 150)[(epoch - 1) * STEPS] == pytest.approx(rate, rel=1e-12)


def test_mobilenet_fast_ends_where_mobilenet_norm_ends() -> None:
    assert rates("mobilenet_fast", 100)[-1] == pytest.approx(rates("mobilenet_norm", 400)[-1], rel=0.05)


@pytest.mark.parametrize("name", SHUFFLENET)
@pytest.mark.parametrize("epochs", [240, 100, 60, 7])
def test_shufflenet_falls_linearly_at_every_step(name: str, epochs: int) -> None:
    total = STEPS * epochs
    assert rates(name, epochs) == pytest.approx([0.5 * (1 - step / total) for step in range(total)], rel=1e-12)


def test_cosine_and_constant() -> None:
    assert rates("cosine", 2) == pytest.approx([math.cos(math.pi * step / 12) ** 2 for step in range(6)], rel=1e-12)
    assert rates("constant", 4) == [1.0] * 12


def test_resnet_norm_stretched_keeps_the_fractions_of_training() -> None:
    # Epoch k of 10 starts when a fraction (k - 1)/10 is done: reference epochs 1, 11, 21, 31, ..., 91.
    per_epoch = rates("resnet_norm", 10)[::STEPS]
    assert per_epoch == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3 + [0.0001])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("epochs", [1, 2, 7, 53, 777])
def test_stretched_to_any_length(name: str, epochs: int) -> None:
    stretched, native = rates(name, epochs), rates(name, SCHEDULES[name].epochs or 100)
    assert SCHEDULES[name].epochs == LENGTHS[name]
    assert stretched[0] == native[0] > 0  # even a single epoch trains
    assert all(later <= earlier for earlier, later in itertools.pairwise(stretched))
    assert stretched[-1] >= 0
    if not SCHEDULES[name].per_step:
        assert all(len(set(stretched[k : k + STEPS])) == 1 for k in range(0, len(stretched), STEPS))

"""What a K-FAC step costs beside a step of SGD with momentum: time over a whole period of the intervals, and peak memory.

Three kinds of steps are timed by themselves, each next to SGD steps, refreshes neither staggered nor denser at first:

    plain                   no hooks, gradients preconditioned and weights updated
    factors                 the same, and the factors of all layers updated
    factors and inverses    the same, and all layers inverted

Staggering spreads the inversions over steps, it does not change their number. So a period of f steps between two updates of
the factors and i >= f between two inversions has the mean, in SGD steps,

    (1 - 1/f) plain + (1/f - 1/i) factors + (1/i) factors and inverses

Rows: a method is an `optimizer`, a kind of step or a part of one is a `layer`, a repeat an `index`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from secondorder.kfac import KFAC
from secondorder.kfac.options import Damping, Options
from secondorder.networks import network
from secondorder.untouched import same_randomness
from studies.engine.records import Row
from studies.optimisers.costs import Stepper, state_bytes
from studies.timing import peak_bytes, seconds

CLASSES, LEARNING_RATE = 10, 1e-4
NEVER = 10**9
"""An interval that no measurement reaches; the first step updates and inverts in any case."""
PLAIN, FACTORS, WHOLE = "plain", "factors", "factors and inverses"
KINDS = {PLAIN: (NEVER, NEVER), FACTORS: (1, NEVER), WHOLE: (1, 1)}
"""Kind of step -> (factor interval, inverse interval) of an optimiser that takes no others."""
STEPS = {PLAIN: 3, FACTORS: 1, WHOLE: 1}
"""Steps in a repeat, each after one of SGD: a plain step differs least from SGD's."""
METHODS: dict[str, dict[str, Any]] = {
    "K-FAC, eigen": {},
    "K-FAC, Cholesky": {"damping": Damping(inverse="cholesky")},
    "EKFAC": {"approximation": "ekfac"},
}
"""Name -> arguments of KFAC."""
PERIODS = ((1, 1), (10, 10), (10, 100))
"""Steps between two updates of the factors, and between two inversions."""
TARGETS = {"(1, 1)": 2.8, "(10, 10)": 1.20, "(10, 100)": 1.15, "plain step": 1.02, "peak memory": 1.25}
"""Quantity, relative to SGD's -> what it should stay below."""


def shares(factor_interval: int, inverse_interval: int) -> dict[str, float]:
    """How often each kind of step is taken in a period."""
    of_factors, of_inverses = 1 / factor_interval, 1 / inverse_interval
    return {PLAIN: 1 - of_factors, FACTORS: of_factors - of_inverses, WHOLE: of_inverses}


def steppers(
    backbone: str, head: str, images: int, device: torch.device
) -> tuple[Stepper, dict[tuple[str, str], Stepper]]:
    """SGD, and each method and kind of step, all after their first steps."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(images, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(CLASSES, (images,), generator=generator).to(device)

    def stepper(method: Mapping[str, Any] | None, factors: int = 1, inverses: int = 1) -> Stepper:
        torch.manual_seed(0)
        model = network(backbone, head, CLASSES, 3).to(device)
        optimizer: torch.optim.Optimizer
        if method is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        else:
            options = Options(warm_up=False, stagger=False, timing=inverses == 1)
            optimizer = KFAC(
                model, LEARNING_RATE, factor_interval=factors, inverse_interval=inverses, options=options, **method
            )
        return Stepper(model, optimizer, F.cross_entropy, [(batch, labels)])

    timed = {
        (name, kind): stepper(method, *intervals)
        for name, method in METHODS.items()
        for kind, intervals in KINDS.items()
    }
    sgd = stepper(None)
    for one in (sgd, *timed.values()):
        one()
    return sgd, timed


def measure_kfac(settings: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of all kinds of steps of a network, each with that of the SGD steps next to it, and of the parts of the largest."""
    device = torch.device(settings["device"])
    with same_randomness():
        sgd, timed = steppers(settings["network"], settings["head"], settings["images"], device)
    own_memory = {"sgd": _bytes(sgd, device)} | {name: _bytes(timed[name, WHOLE], device) for name in METHODS}
    for name, (peak, state) in own_memory.items():
        yield {"optimizer": name, "quantity": "peak MiB", "value": peak / 2**20}
        yield {"optimizer": name, "quantity": "state MiB", "value": state / 2**20}
    for repeat in range(settings["repeats"]):
        start = repeat % len(timed)
        order = [*timed.items()][start:] + [*timed.items()][:start]
        for (name, kind), stepper in order:
            before = _milliseconds(stepper)
            pairs = [(seconds(sgd, device), seconds(stepper, device)) for _ in range(STEPS[kind])]
            sgd_ms, own_ms = (1e3 * sum(times) / len(pairs) for times in zip(*pairs, strict=True))
            at = {"optimizer": name, "layer": kind, "index": repeat}
            yield at | {"quantity": "milliseconds", "value": own_ms}
            yield at | {"quantity": "milliseconds of SGD", "value": sgd_ms}
            if kind == WHOLE:
                for part, after in _milliseconds(stepper).items():
                    yield at | {"layer": part, "quantity": "milliseconds of a part", "value": after - before[part]}


def _milliseconds(stepper: Stepper) -> dict[str, float]:
    """Of each part, in all steps so far."""
    return {part: mean * stepper.steps for part, mean in stepper.parts().items()}


def _bytes(stepper: Stepper, device: torch.device) -> tuple[float, int]:
    """Peak memory of a step beyond what is held between steps, and the optimiser's state, which is held."""
    return peak_bytes(stepper, device), state_bytes(stepper.optimizer.state_dict())

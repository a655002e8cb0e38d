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

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from secondorder.kfac import KFAC
from secondorder.kfac.options import Damping, Options
from secondorder.networks import network
from secondorder.untouched import same_randomness
from studies.engine.records import Row
from studies.optimisers.costs import Stepper, memory, next_to
from studies.performance.curvature_costs import CLASSES, random_batch
from studies.timing import MILLISECONDS, PEAK, in_turn

LEARNING_RATE = 1e-4
STATE, OF_SGD, OF_PART = "state MiB", "milliseconds of SGD", "milliseconds of a part"
NEVER = 10**9
"""An interval that no measurement reaches; the first step updates and inverts in any case."""
PLAIN, FACTORS, WHOLE = "plain", "factors", "factors and inverses"
KINDS = {PLAIN: (NEVER, NEVER, 3), FACTORS: (1, NEVER, 1), WHOLE: (1, 1, 1)}
"""Kind of step -> (factor interval, inverse interval) of an optimiser that takes no others, and how many are taken in a repeat,
each after one of SGD: a plain step differs least from SGD's."""
METHODS: dict[str, dict[str, Any]] = {
    "K-FAC, Adam step": {},
    "K-FAC, natural": {"step_rule": "natural"},
    "K-FAC, natural, Cholesky": {"step_rule": "natural", "damping": Damping(inverse="cholesky")},
    "EKFAC": {"step_rule": "natural", "approximation": "ekfac"},
}
"""Name -> arguments of KFAC; the first is its default."""
PERIODS = ((1, 1), (10, 10), (10, 100))
"""Steps between two updates of the factors, and between two inversions."""
TARGETS = {
    "cifar_resnet20": {"(1, 1)": 2.2, "(10, 10)": 1.12, "(10, 100)": 1.08, "plain step": 1.02, "peak memory": 1.25},
    "digits_tiny": {"(10, 10)": 1.25},  # whose steps take 2 ms: Python
}
"""Network -> quantity, relative to SGD's -> what it should stay below under each head; of the larger one in batches of 128."""
OF_EKFAC = {"(10, 10)": 1.2}
"""Of EKFAC and the larger network another one."""


def target(network: str, method: str, quantity: str) -> float:
    """What a quantity of a method should stay below; nan where no target was set."""
    own = OF_EKFAC if method == "EKFAC" and network == "cifar_resnet20" else {}
    return (TARGETS.get(network, {}) | own).get(quantity, math.nan)


def shares(factor_interval: int, inverse_interval: int) -> dict[str, float]:
    """How often each kind of step is taken in a period."""
    of_factors, of_inverses = 1 / factor_interval, 1 / inverse_interval
    return {PLAIN: 1 - of_factors, FACTORS: of_factors - of_inverses, WHOLE: of_inverses}


def _steppers(settings: Mapping[str, Any], device: torch.device) -> dict[tuple[str, str], Stepper]:
    """SGD, ("sgd", ""), and each method and kind of step, all after their first steps."""
    batch = random_batch(settings["images"], device)
    found = {}
    kinds = [("sgd", "")] + [(name, kind) for name in METHODS for kind in KINDS]
    for name, kind in kinds:
        torch.manual_seed(0)
        model = network(settings["network"], settings["head"], CLASSES, 3).to(device)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
        if kind:
            own = METHODS[name] | {"options": Options(warm_up=False, stagger=False, timing=kind == WHOLE)}
            factors, inverses, _ = KINDS[kind]
            optimizer = KFAC(model, LEARNING_RATE, factor_interval=factors, inverse_interval=inverses, **own)
        found[name, kind] = Stepper(model, optimizer, F.cross_entropy, [batch])
        found[name, kind]()
    return found


def measure_kfac(settings: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of all kinds of steps of a network, each with that of the SGD steps next to it, and of the parts of the largest."""
    device = torch.device(settings["device"])
    with same_randomness():
        steppers = _steppers(settings, device)
    for (name, kind), stepper in steppers.items():
        if kind in ("", WHOLE):
            peak, state = memory(stepper, device)
            yield {"optimizer": name, "quantity": PEAK, "value": peak}
            yield {"optimizer": name, "quantity": STATE, "value": state}
    sgd = steppers.pop(("sgd", ""))
    for repeat, (name, kind) in in_turn([*steppers], settings["repeats"]):
        stepper, at = steppers[name, kind], {"optimizer": name, "layer": kind, "index": repeat}
        before = stepper.milliseconds()
        of_sgd, own = next_to(sgd, stepper, device, KINDS[kind][-1])
        yield at | {"quantity": MILLISECONDS, "value": own}
        yield at | {"quantity": OF_SGD, "value": of_sgd}
        if kind == WHOLE:
            for part, after in stepper.milliseconds().items():
                yield at | {"layer": part, "quantity": OF_PART, "value": after - before[part]}

"""The settings of a training run."""

import json
from random import Random
from typing import Any

from secondorder.networks import NETWORKS
from secondorder.pooling import POOLINGS
from secondorder.training import OPTIMIZERS, SCHEDULES, Run

from .call import Call, arguments
from .values import absurd, named

FIELDS = list(Run.__dataclass_fields__)


def good_run(random: Random) -> dict[str, Any]:
    """Fields of a run that can be made."""
    return {
        "backbone": random.choice(list(NETWORKS)),
        "pooling": random.choice(list(POOLINGS)),
        "dataset": random.choice(("digits", "cifar10", "fake")),
        "epochs": random.choice((1, 90)),
        "batch_size": random.choice((1, 64)),
        "learning_rate": random.choice((0.0, 0.1, 1)),
        "schedule": random.choice(list(SCHEDULES)),
        "optimizer": random.choice(list(OPTIMIZERS)),
        "pooling_options": random.choice(((), {}, {"num_iter": 3}, (("num_iter", 3),))),
    }


def runs(random: Random) -> Call:
    """One or two absurd fields, made directly or by from_dict; a run that is made has a name and goes through JSON."""
    settings = good_run(random)
    changed = random.sample([*FIELDS, "no_such_field"], random.choice((1, 1, 2)))
    values = {field: options(random) if field.endswith("_options") else absurd(random) for field in changed}
    settings |= values
    complete = random.random() >= 0.1
    if not complete:
        del settings[random.choice(list(settings))]
    make = random.choice((Run, Run.from_dict))

    def run() -> Run:
        return Run(**settings) if make is Run else Run.from_dict(settings)

    def check(made: Run) -> str | None:
        again = Run.from_dict(json.loads(json.dumps(made.to_dict())))
        if again != made or again.name != made.name:
            return "another run after JSON"
        return None if "/" not in made.name and len(made.name) < 255 else f"a name that is no file's: {made.name!r}"

    names = [word for field, value in values.items() for word in (field, named(value))]
    return Call(f"Run({arguments(settings)})", run, names=names if complete else (), check=check, pure=True)


def options(random: Random) -> Any:
    """What an option field may be given."""
    value = absurd(random)
    return random.choice(
        (value, {"a": value}, {value: 1} if isinstance(value, str | int | None) else {}, [("a", value)], [("a",)])
    )

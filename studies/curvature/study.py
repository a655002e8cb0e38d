"""Curvature study: are the curvature blocks of a GCP network better conditioned than those of a GAP network?

Networks that differ in the head alone are measured when they are trained, as far as they reach a stated accuracy: at chance level
nothing depends on the curvature. What is explored besides, on some of the networks: other heads, initial weights, and trained
backbones with every head put on them.
"""

from dataclasses import dataclass, field, replace
from itertools import product

from secondorder.accelerator import check_float64
from secondorder.errors import InputError, check_known
from secondorder.networks import NETWORKS
from secondorder.pooling import POOLINGS
from secondorder.training import Snapshot
from studies.backbones import check_sharing
from studies.checks import check_count, check_names
from studies.curvature.claims import ACCURACY, CLAIMS
from studies.curvature.measures import (
    MANY,
    Limits,
    PutOn,
    dry_parts,
    measure_blocks,
    measure_dry,
    measure_hessian,
    measure_put_on,
)
from studies.curvature.page import folds
from studies.engine.plan import Measurement, Trained
from studies.engine.records import Row
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.training import PRESETS, Training, TrainingFlags

CLAIMED = ("gap", "gcp")


@dataclass(frozen=True)
class Settings:
    """Settings of the curvature study."""

    training: TrainingFlags = field(default_factory=Training)
    """How networks are trained, and the one that is explored."""
    networks: tuple[str, ...] = ("digits_slim", "digits_small")
    """Further networks, trained in the same way under GAP and GCP: the claim is about networks, not about one."""
    accuracy: float = 0.9
    """Test top-1 that a trained network needs to count, a fraction."""
    heads: tuple[str, ...] = ("gap", "gap_lifted", "covariance", "gcp", "gcp_exact")
    """Pooling heads of the network that is explored."""
    explored_seeds: int = 3
    """Seeds of it whose GAP and GCP networks are measured at initial weights, too, and with other heads put on when trained."""
    put_on: tuple[str, ...] = CLAIMED
    """Heads that are put on backbones trained under GAP and GCP, classifiers fitted anew; none: no backbone is shared."""
    limits: Limits = field(default_factory=Limits)
    """How much is measured."""

    def __post_init__(self) -> None:
        check_names("heads", self.heads)
        check_names("networks", (self.training.network, *self.networks))
        for name in self.networks:
            check_known("network", name, NETWORKS)
        for name in self.put_on:
            check_known("pooling to put on", name, POOLINGS)
        if not 0 <= self.accuracy <= 1:
            raise InputError(f"accuracy {self.accuracy:g}: a fraction of the test images, from 0 to 1")
        check_count("explored_seeds", self.explored_seeds, least=0)


def plan(context: Context) -> Plan:
    """All heads of a seed before the next seed, network by network. InputError for what cannot be measured."""
    settings, common = context.settings, context.common
    check_float64(common.torch_device, "the curvature study")
    if settings.put_on and settings.explored_seeds and not common.dry_run:
        check_sharing(settings.training.data(common), settings.training.weight_decay)
    last, limits = settings.training.steps(common), settings.limits
    classes = settings.training.data(common).num_classes
    dry = (measure_dry, dry_parts(limits, classes)) if classes > MANY else None
    blocks = Measurement("GGN blocks", measure_blocks, limits, dry=dry)
    usual = [(last, blocks), (last, Measurement(ACCURACY, stated_accuracy, settings.accuracy))]
    explored = [*usual, (0, blocks), (0, Measurement("Hessian", measure_hessian, limits))]
    if settings.put_on:
        explored.append((last, Measurement("heads put on", measure_put_on, PutOn(settings.put_on, limits))))
    tasks = []
    for network in (settings.training.network, *settings.networks):
        training, further = replace(settings.training, network=network), network in settings.networks
        for seed, head in product(context.seeds, CLAIMED if further else settings.heads):
            at = explored if not further and seed < settings.explored_seeds and head in CLAIMED else usual
            tasks.append(Trained(training.subject(common, head, seed), tuple(at)))
    yield tasks


def stated_accuracy(at: Snapshot, accuracy: float) -> list[Row]:
    """What is asked of a network, beside what it reached."""
    return [{"quantity": ACCURACY, "value": accuracy, "error": 0.0}]


STUDY = Study(
    name="curvature",
    title="conditioning of the GGN blocks of trained networks, and K-FAC and Hessian against them",
    presets={
        "smoke": Settings(
            PRESETS["smoke"],
            ("digits_small",),
            accuracy=0.0,
            heads=("gap", "gcp", "gcp_exact"),
            explored_seeds=1,
            limits=Limits(images=4, probes=2),
        ),
        "quick": Settings(),
        "cifar10": Settings(PRESETS["cifar10"], ("cifar_resnet20",), accuracy=0.6, limits=Limits(images=24)),
        "paper": Settings(
            PRESETS["paper"],
            ("mobilenet_v2",),
            accuracy=0.6,
            heads=CLAIMED,
            explored_seeds=0,
            put_on=(),
            limits=Limits(images=8, block=50_000),
        ),
    },
    seeds={"smoke": 2, "quick": 4, "cifar10": 3, "paper": 3},
    plan=plan,
    claims=CLAIMS,
    folds=folds,
    may_grow=("heads", "networks", "explored_seeds"),
)

"""The preconditioning study: its settings, and what is measured of which backbones."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro

from secondorder.accelerator import check_float64
from secondorder.errors import check_known
from secondorder.pooling import POOLINGS
from secondorder.training import Snapshot
from studies.backbones import check_sharing
from studies.checks import check_names
from studies.engine.plan import Measurement, Trained
from studies.engine.records import Row
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.preconditioning.backbone import Backbone, Measures
from studies.preconditioning.blocks import block_rows
from studies.preconditioning.claims import CLAIMS
from studies.preconditioning.gradients import gradient_rows
from studies.preconditioning.heads import backward_rows, head_rows
from studies.preconditioning.page import folds
from studies.training import PRESETS, Training, TrainingFlags


@dataclass(frozen=True)
class Settings:
    """Settings of the preconditioning study."""

    training: TrainingFlags = field(default_factory=Training)
    """How the backbones are trained."""
    trained: tuple[str, ...] = ("gap", "gcp")
    """Heads that they are trained under."""
    measures: Annotated[Measures, tyro.conf.arg(name="")] = field(default_factory=Measures)
    """What is measured of them."""

    def __post_init__(self) -> None:
        check_names("trained", self.trained)
        for head in self.trained:
            check_known("pooling", head, POOLINGS)


def measure_untrained(at: Snapshot, measures: Measures) -> Iterator[Row]:
    """The conditioning of heads on the features of initial weights."""
    yield from head_rows(Backbone(at.model, at.data, measures, at.run.seed))


def measure_trained(at: Snapshot, measures: Measures) -> Iterator[Row]:
    """Everything, with classifiers that are fitted once to the features of a trained backbone."""
    backbone = Backbone(at.model, at.data, measures, at.run.seed)
    for rows in (head_rows, backward_rows, gradient_rows, block_rows):
        yield from rows(backbone)


def plan(context: Context) -> Plan:
    """Every trained backbone after its last step, and the initial weights, which are the same under every head."""
    settings, common, training = context.settings, context.common, context.settings.training
    check_float64(common.torch_device, "the preconditioning study")
    first = (0, Measurement("untrained backbone", measure_untrained, settings.measures))
    last = (training.steps(common), Measurement("trained backbone", measure_trained, settings.measures, version=2))
    wanted: dict[str, Any] = dict.fromkeys(settings.trained, (last,)) | {settings.trained[0]: (first, last)}
    data = training.data(common)
    if common.dry_run and len(data.train.labels.unique()) < data.num_classes:
        wanted = dict.fromkeys(wanted, ())  # no classifier can be fitted to these fake images: training alone
    else:
        check_sharing(data, settings.measures.penalty)
    yield [Trained(training.subject(common, head, seed), wanted[head]) for seed in context.seeds for head in wanted]


STUDY = Study(
    name="preconditioning",
    title="is GCP a second-order method in disguise: its head, its gradients, its curvature",
    presets={
        "smoke": Settings(
            replace(PRESETS["smoke"], train_limit=256),
            measures=Measures(
                ("gap", "covariance", "gcp"), images=64, head_images=8, newton_schulz_steps=(1,), dampings=(1.0,)
            ),
        ),
        "quick": Settings(),
        "cifar10": Settings(
            PRESETS["cifar10"],
            measures=Measures(curvature_images=24, precision="float32"),
        ),
        "paper": Settings(
            replace(PRESETS["paper"], reduced_channels=256, channels_last=False),
            measures=Measures(images=512, curvature_images=2, precision="float32"),
        ),
    },
    seeds={"smoke": 2, "quick": 4, "cifar10": 3, "paper": 3},
    plan=plan,
    claims=CLAIMS,
    folds=folds,
    may_grow=(),
)

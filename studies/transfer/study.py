"""Transfer study: do features that were trained under GCP serve detection, segmentation and other tasks better?

Networks that differ in the head alone are trained to classify images; at CIFAR-10's scale they are those of the convergence study
under the normal schedule. Then, from the weights after the last step, and from initial ones ("random"):

- detectors are trained on a few images for several small budgets, each with its own schedule, all weights or frozen ones;
- linear probes learn to classify images of other classes, and dense probes pixels, from a few samples and frozen features.

Batch-norm statistics of frozen networks are renewed on the new images, for every network alike. The seed is that of the
pretraining, and draws the samples, images and initial weights of the other task.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

from secondorder.errors import InputError, check_known
from secondorder.networks import NETWORKS
from secondorder.transfer import ADAPTATIONS
from studies.checks import check_count, check_names
from studies.engine.plan import Measurement, Trained
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.training import PRESETS, Training, TrainingFlags
from studies.transfer.checks import check_linear, check_scenes
from studies.transfer.claims import CLAIMS
from studies.transfer.detectors import Detection, Model, dry_steps, measure_detector, measure_dry
from studies.transfer.page import folds
from studies.transfer.probes import Dense, Linear, measure_dense, measure_linear
from studies.transfer.targets import digest_of, scenes_of

CLAIMED = ("gap", "gcp")


@dataclass(frozen=True)
class Settings:
    """Settings of the transfer study."""

    heads: tuple[str, ...] = ("gap", "gap_lifted", "covariance", "gcp")
    """Pooling heads that networks are trained under; gap is there for the initial weights, too."""
    training: TrainingFlags = field(default_factory=lambda: Training(dataset="digits_0_to_4"))
    """How networks are trained before the transfer."""
    control_seeds: int = 2
    """Seeds of the controls, every head but gap and gcp; at most those of gap and gcp."""
    linear: tuple[str, ...] = ("digits_5_to_9",)
    """Data sets whose classes a linear probe learns: images, or folders in COCO format, of which windows around objects."""
    shots: tuple[int, ...] = (2, 5, 20)
    """Samples of a class that it learns from."""
    draws: int = 5
    """How often these are drawn."""
    dense: tuple[str, ...] = ()
    """Folders in COCO format with masks, whose foreground a dense probe learns."""
    dense_images: int = 10
    """Images that it learns from."""
    detection: tuple[str, ...] = ()
    """Folders in COCO format, inside the data root, that detectors are trained on."""
    budgets: tuple[int, ...] = (2, 4, 8)
    """Epochs of detectors, each a training of its own."""
    detector: Model = field(default_factory=Model)
    """Size and training of detectors."""

    def __post_init__(self) -> None:
        check_names("heads", self.heads)
        for name in ("linear", "dense", "detection"):
            if getattr(self, name):
                check_names(name, getattr(self, name))
        if not (self.linear or self.dense or self.detection):
            raise InputError("no other task: give --linear, --dense or --detection")
        for name in ("shots", "budgets"):
            values = getattr(self, name)
            check_names(name, tuple(map(str, values)))
            for value in values:
                check_count(name, value)
        check_count("control_seeds", self.control_seeds, least=0)
        check_count("draws", self.draws)
        check_count("dense_images", self.dense_images, least=2)  # one has no batch-norm statistics
        check_known("adaptation", self.detector.adaptation, ADAPTATIONS)
        check_count("detector.images", self.detector.images, least=2)
        for name in ("width", "hidden", "roi_size", "proposals", "sampled", "test_images", "batch_size"):
            check_count(f"detector.{name}", getattr(self.detector, name))
        if not 0 < self.detector.learning_rate < float("inf"):
            raise InputError(f"--detector.learning-rate {self.detector.learning_rate:g}: must be a number above 0")


def measurements(
    settings: Settings, root: Path | None, digests: Mapping[str, str], adapted: bool = False, pictures: bool = False
) -> Iterator[Measurement]:
    """All that is measured of a network; where the data lie is no part of a measurement's key, what is in them is."""
    for name in settings.linear:
        of = Linear(name, digests[name], settings.shots, settings.draws)
        yield Measurement("linear probe", partial(measure_linear, root=root), of)
    for name in settings.dense:
        dense = Dense(name, digests[name], settings.dense_images, settings.detector.test_images)
        yield Measurement("dense probe", partial(measure_dense, root=root), dense)
    for name, frozen, epochs in product(settings.detection, (False, True), settings.budgets):
        shown = pictures and not frozen and epochs == max(settings.budgets)
        detection = Detection(name, digests[name], epochs, frozen, adapted, shown, settings.detector)
        dry = (measure_dry, dry_steps(detection))
        yield Measurement("detector", partial(measure_detector, root=root), detection, dry=dry)


def plan(context: Context) -> Plan:
    """Every head with every seed, all heads of a seed before the next seed; initial weights are those of gap."""
    settings, common, training = context.settings, context.common, context.settings.training
    for name in settings.dense:
        if not scenes_of(name).masks:
            raise InputError(f"--dense {name}: a dense probe needs masks, which this data set does not have")
    if (settings.dense or settings.detection) and training.data(common).in_channels != 3:
        raise InputError(
            f"--dataset {training.dataset}: detectors and dense probes need a network for images of 3 channels; leave "
            "--detection and --dense without a data set"
        )
    root = common.data_root
    if common.dry_run:  # without data: detectors, whose images are fake, and a probe of digits if there are probes
        settings = replace(settings, linear=("digits",) if settings.linear or not settings.detection else (), dense=())
    else:
        look_at_data(settings, root)
    names = [*settings.linear, *settings.dense, *settings.detection]
    digests = {name: "" if common.dry_run else digest_of(name, root) for name in names}
    total = training.steps(common)
    tasks = []
    for seed, head in product(context.seeds, settings.heads):
        if head in CLAIMED or seed < settings.control_seeds:
            shown = seed == 0 and head in CLAIMED
            adapted = _adapted(training, head)
            last = measurements(settings, root, digests, adapted, shown)
            first = measurements(settings, root, digests, adapted) if head == "gap" else ()
            at = (*((0, measurement) for measurement in first), *((total, measurement) for measurement in last))
            tasks.append(Trained(training.subject(common, head, seed), at))
    yield tasks


def look_at_data(settings: Settings, root: Path | None) -> None:
    """InputError for data of other tasks that would stop a measurement, after hours of training perhaps."""
    for name in settings.linear:
        check_linear(name, root, max(settings.shots))
    for name in settings.dense:
        check_scenes("dense", name, root, True, settings.detector.test_images)
    for name in settings.detection:
        check_scenes("detection", name, root, scenes_of(name).masks, settings.detector.test_images)


def _adapted(training: Training, head: str) -> bool:
    """Whether the last stage of the network has stride 1 where that of the published GAP network has stride 2."""
    strides = NETWORKS[training.network].last_stride
    return strides is not None and strides[0] != strides[1] and (head != "gap" or training.stride == "same")


STUDY = Study(
    name="transfer",
    title="do features trained under GCP serve detection, segmentation and other tasks better",
    presets={
        "smoke": Settings(("gap", "gcp"), replace(PRESETS["smoke"], dataset="digits_0_to_4"), shots=(2, 5), draws=2),
        "quick": Settings(("gap", "gap_lifted", "gcp"), control_seeds=2),
        "cifar10": Settings(
            training=PRESETS["cifar10"],
            linear=("digits", "bccd"),
            dense=("nuclei",),
            detection=("nuclei", "bccd"),
        ),
        "paper": Settings(
            ("gap", "gcp"),
            replace(PRESETS["paper"], network="resnet50", stride="published"),
            linear=(),
            detection=("coco",),
            budgets=(12,),
            detector=Model(256, 1024, 7, 1000, 256, "gcp_m", 118_287, 5000, 16),
        ),
    },
    seeds={"smoke": 2, "quick": 4, "cifar10": 5, "paper": 1},
    plan=plan,
    claims=CLAIMS,
    folds=folds,
    may_grow=("heads", "control_seeds", "linear", "dense", "detection"),
)

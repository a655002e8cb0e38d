"""Robustness study: is a network under GCP more robust to corruptions and perturbations of its images?

The networks are those of the convergence study under the normal schedule, which differ in the head alone. Each is measured after
its last step on clean, corrupted and perturbed test images, and along the gradient over the later half of its training as in the
landscape study: is it the smoother ones that are robust?
"""

from dataclasses import dataclass, field
from itertools import product

from secondorder.errors import check_known
from secondorder.robustness import CORRUPTIONS, SEQUENCES
from studies.checks import check_count, check_names
from studies.engine.plan import Trained, every
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.landscape import descent_along
from studies.robustness.claims import CLAIMS
from studies.robustness.measures import measurements
from studies.robustness.page import folds
from studies.training import PRESETS, Training, TrainingFlags

BENCHMARK, PERTURBATIONS = (
    tuple(name for name, row in table.items() if not row.extra) for table in (CORRUPTIONS, SEQUENCES)
)


@dataclass(frozen=True)
class Settings:
    """Settings of the robustness study."""

    heads: tuple[str, ...] = ("gap", "gap_lifted", "covariance", "gcp")
    """Pooling heads to compare."""
    training: TrainingFlags = field(default_factory=Training)
    """How they are trained."""
    control_seeds: int = 3
    """Seeds of the controls, every head but gap and gcp; at most those of gap and gcp."""
    corruptions: tuple[str, ...] = BENCHMARK
    """Corruptions; those outside of the benchmark of 15 enter no mean."""
    sequences: tuple[str, ...] = PERTURBATIONS
    """Perturbation sequences; those outside of the benchmark of 10 enter no mean. None: none is measured."""
    images: int = 10_000
    """Test images that are corrupted, evenly spaced (all if there are fewer)."""
    sequence_images: int = 60
    """Test images that sequences are made of, evenly spaced."""
    measure_every: int = 40
    """Training steps between two measurements of smoothness, in the later half of training."""
    rho: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Predicted improvements of the loss along -g, as shares of it; none: smoothness is not measured."""

    def __post_init__(self) -> None:
        check_names("heads", self.heads)
        check_names("corruptions", self.corruptions)
        for name in self.corruptions:
            check_known("corruption of --corruptions", name, CORRUPTIONS)
        for name in self.sequences:
            check_known("perturbation of --sequences", name, SEQUENCES)
        if self.sequences:
            check_names("sequences", self.sequences)
        for name in ("control_seeds", "images", "sequence_images", "measure_every"):
            check_count(name, getattr(self, name))


def plan(context: Context) -> Plan:
    """Every head with every seed, all heads of a seed before the next seed."""
    settings, common = context.settings, context.common
    total = settings.training.steps(common)
    wanted = measurements(settings.corruptions, settings.sequences, settings.images, settings.sequence_images)
    descent = descent_along(settings.rho)
    steps = [step for step in every(settings.measure_every, total) if 2 * step >= total] if settings.rho else []
    at = (*((step, descent) for step in steps), *((total, measurement) for measurement in wanted))
    yield [
        Trained(settings.training.subject(common, head, seed), at)
        for seed, head in product(context.seeds, settings.heads)
        if head in ("gap", "gcp") or seed < settings.control_seeds
    ]


STUDY = Study(
    name="robustness",
    title="is a network under GCP more robust to corruptions and perturbations of its images",
    presets={
        "smoke": Settings(
            ("gap", "gcp"),
            PRESETS["smoke"],
            corruptions=("gaussian_noise", "contrast"),
            sequences=("brightness",),
            images=20,
            sequence_images=4,
            measure_every=2,
            rho=(0.1, 0.5),
        ),
        "quick": Settings(control_seeds=2, images=120, sequence_images=20),
        "cifar10": Settings(training=PRESETS["cifar10"], images=2000, sequence_images=200, measure_every=624),
        "paper": Settings(
            ("gap", "gcp"), PRESETS["paper"], images=50_000, sequence_images=10_000, measure_every=50_000
        ),
    },
    seeds={"smoke": 2, "quick": 5, "cifar10": 5, "paper": 3},
    plan=plan,
    claims=CLAIMS,
    folds=folds,
    may_grow=("heads", "control_seeds", "corruptions", "sequences"),
)

"""Settings of the preconditioning study: the shared backbones, and the factorial training."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from secondorder.errors import InputError, unknown
from secondorder.pooling import POOLINGS
from secondorder.training import SCHEDULES
from studies.checks import check_count, check_names
from studies.optimisers.settings import ARMS, TunedTraining


@dataclass(frozen=True)
class FactorialSettings(TunedTraining):
    """The factorial training: every pooling with every optimiser."""

    poolings: tuple[str, ...] = ("gap", "covariance", "gcp")
    """Levels of the first factor; gap and gcp are the two of the interaction."""
    optimisers: tuple[str, ...] = ("sgd", "kfac", "gauss_newton")
    """Levels of the second factor, arms of the optimiser study; sgd is the reference."""
    epochs: int = 3
    """Passes over the training images in the runs that are compared."""
    trials: int = 3
    """Trials in the tuning of each cell."""
    trial_epochs: int = 3
    """Passes over the training images in a trial."""
    seeds: int = 5
    """Seeds of each cell after tuning; at least 5 for an interval worth having."""
    timing_steps: int = 20
    """Steps of each optimiser that are timed, interleaved."""
    flags: ClassVar[str] = "factorial."

    def __post_init__(self) -> None:
        check_names("factorial.poolings", self.poolings)
        for pooling in self.poolings:
            if pooling not in POOLINGS:
                raise unknown("pooling", pooling, POOLINGS)
        for arm in self.optimisers:
            if arm not in ARMS:
                raise unknown("optimiser", arm, ARMS)
        check_names("factorial.optimisers", self.optimisers)
        for needed, values in (("gap", self.poolings), ("gcp", self.poolings), ("sgd", self.optimisers)):
            if needed not in values:
                raise InputError(f"the factorial needs {needed!r} among {', '.join(values)}")
        super().__post_init__()
        check_count("factorial.seeds", self.seeds)


@dataclass(frozen=True)
class Settings:
    """Settings of the preconditioning study."""

    backbone: str = "digits_net"
    """Network below the heads that share it."""
    dataset: str = "digits"
    """Images to train on."""
    train_limit: int | None = None
    """Train on only this many images; all when not given."""
    trained: tuple[str, ...] = ("gap", "gcp")
    """Heads that the backbones are trained under; the untrained backbone is measured too."""
    reduced_channels: int = 0
    """Channels after a 1x1 reduction under every head, GAP too; 0: no reduction."""
    epochs: int = 6
    """Passes over the training images."""
    batch_size: int = 64
    """Images a training step."""
    learning_rate: float = 0.1
    """Initial learning rate of SGD."""
    schedule: str = "resnet_norm"
    """Learning-rate schedule, stretched to the number of epochs."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-3
    """L2 penalty on the weights, also of the classifiers that are fitted on a shared backbone."""
    measurements: int = 3
    """Equally spaced moments of training at which is measured; the first and the last step are among them."""
    images: int = 64
    """Training images whose features (head conditioning) are measured."""
    curvature_images: int = 12
    """Training images whose curvature blocks are measured."""
    reference_images: int = 256
    """Training images that give batch-norm statistics and K-FAC's factors on a shared backbone."""
    gradient_batches: int = 8
    """Mini-batches whose gradients under two heads are compared."""
    gradient_batch_size: int = 64
    """Images in each of them."""
    dampings: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)
    """Dampings of K-FAC in the comparison of directions, relative to the scale of a block; 0.01 is the optimiser's default."""
    newton_schulz_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    """Numbers of Newton-Schulz steps whose head is measured."""
    natural_gradient: bool = True
    """Whether the exact natural gradient, by conjugate gradients, is compared too."""
    precision: Literal["float32", "float64"] = "float64"
    """Number format of curvature; heads are measured in float64, directions of gradients in float32."""
    processes: int = 2
    """Processes that train and measure side by side; they share the threads."""
    factorial: FactorialSettings = field(default_factory=FactorialSettings)
    """The factorial training."""

    def __post_init__(self) -> None:
        check_names("trained", self.trained)
        for pooling in self.trained:
            if pooling not in POOLINGS:
                raise unknown("pooling", pooling, POOLINGS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        least = {"measurements": 2, "images": 1, "curvature_images": 2, "reference_images": 2, "gradient_batches": 2}
        for name, low in (least | {"epochs": 1, "gradient_batch_size": 1, "processes": 1}).items():
            check_count(name, getattr(self, name), low)
        for name in ("dampings", "newton_schulz_steps"):
            check_names(name, tuple(f"{value:g}" for value in getattr(self, name)))
        for damping in self.dampings:
            if not damping > 0:
                raise InputError(f"--dampings {damping:g}: every value must be above 0")
        for steps in self.newton_schulz_steps:
            check_count("newton_schulz_steps", steps)


PRESETS = {
    "smoke": Settings(
        backbone="digits_tiny",
        train_limit=256,
        epochs=1,
        measurements=2,
        images=8,
        curvature_images=8,
        reference_images=64,
        gradient_batches=3,
        gradient_batch_size=16,
        dampings=(0.01, 1.0),
        newton_schulz_steps=(1, 5),
        processes=1,
        factorial=FactorialSettings(
            optimisers=("sgd", "kfac"), train_limit=192, epochs=1, trials=1, trial_epochs=1, seeds=2, timing_steps=4
        ),
    ),
    "quick": Settings(),
    "cifar10": Settings(
        backbone="cifar_resnet8",
        dataset="cifar10",
        train_limit=10_000,
        epochs=5,
        batch_size=128,
        images=64,
        curvature_images=24,
        precision="float32",
        gradient_batches=16,
        gradient_batch_size=128,
        factorial=FactorialSettings(
            optimisers=("sgd", "kfac"),
            backbone="cifar_resnet8",
            train_limit=10_000,
            batch_size=128,
            epochs=4,
            trials=5,  # as in the optimiser study, whose runs these are where both have them
            trial_epochs=2,
            timing_steps=40,
            channels_last=True,
        ),
    ),
    "paper": Settings(
        backbone="resnet18",
        dataset="imagefolder",
        reduced_channels=256,
        epochs=50,
        batch_size=256,
        schedule="resnet_adju",
        weight_decay=1e-4,
        measurements=6,
        precision="float32",
        natural_gradient=False,  # some hundred passes over the reference images
        curvature_images=16,
        reference_images=2048,
        gradient_batch_size=256,
        factorial=FactorialSettings(
            optimisers=("sgd", "kfac"),
            backbone="resnet18",
            batch_size=256,
            epochs=50,
            trials=16,
            trial_epochs=10,
            timing_steps=40,
        ),
    ),
}

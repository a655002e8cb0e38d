"""Settings of the optimiser study: the arms, what is tuned of each and how far, and the size of everything."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from secondorder.errors import InputError, unknown
from secondorder.networks.autoencoder import ACTIVATIONS, INITIALISATIONS
from secondorder.training import SCHEDULES
from secondorder.training.run import Option
from studies.checks import check_count, check_names

TUNING_SEED = 1000
"""Trials use this seed; the seeds that are reported are 0, 1, 2, ..."""


@dataclass(frozen=True)
class Tuned:
    """A setting to tune, on a logarithmic scale from `low` to `high`; of decay rates, 1 - value is logarithmic."""

    name: str
    low: float
    high: float

    def at(self, u: float) -> float:
        """The value at the fraction `u` in [0, 1] of the range, with 3 digits."""
        if self.name in ("momentum", "beta2", "ema_decay"):
            return round(1 - (1 - self.low) * ((1 - self.high) / (1 - self.low)) ** u, 4)
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")


@dataclass(frozen=True)
class Arm:
    """One optimiser of the comparison: a key of OPTIMIZERS, what is tuned, and what differs from its defaults."""

    label: str
    optimizer: str
    learning_rate: Tuned
    second: Tuned
    options: Mapping[str, Option] = field(default_factory=dict)

    def settings(self, u: tuple[float, float]) -> dict[str, float]:
        """The tuned settings at a point of the unit square."""
        return {one.name: one.at(x) for one, x in zip((self.learning_rate, self.second), u, strict=True)}


def rate(low: float, high: float) -> Tuned:
    """A range of learning rates."""
    return Tuned("learning_rate", low, high)


ARMS: dict[str, Arm] = {
    "sgd": Arm("SGD with momentum", "sgd", rate(0.05, 3.0), Tuned("momentum", 0.8, 0.98)),
    "adamw": Arm("AdamW", "adamw", rate(5e-3, 2e-1), Tuned("weight_decay", 1e-4, 1e-1)),
    "kfac": Arm("K-FAC", "kfac", rate(0.01, 0.3), Tuned("momentum", 0.8, 0.98)),
    "ekfac": Arm("EKFAC", "ekfac", rate(0.01, 0.3), Tuned("momentum", 0.8, 0.98)),
    "soap": Arm("SOAP", "soap", rate(5e-3, 2e-1), Tuned("beta2", 0.9, 0.99)),
    "shampoo": Arm("Shampoo", "shampoo", rate(0.05, 3.0), Tuned("beta2", 0.9, 0.999)),
    "muon": Arm("Muon", "muon", rate(1e-2, 5e-1), Tuned("momentum", 0.8, 0.98)),
    "singd": Arm("SINGD", "singd", rate(0.05, 3.0), Tuned("damping", 1e-3, 1.0)),
    "gauss_newton": Arm("Gauss-Newton by CG", "gauss_newton", rate(0.03, 1.0), Tuned("momentum", 0.8, 0.98)),
}
"""K-FAC, EKFAC and Gauss-Newton keep their default damping and are tuned in what SGD is; K-FAC's damping has a map."""
LARGE_SCALE = tuple(name for name in ARMS if name != "gauss_newton")
"""Arms whose steps cost at most some of SGD's; Gauss-Newton's is for small networks, in the preconditioning study."""


def unit_points(count: int) -> list[tuple[float, float]]:
    """`count` points that fill the unit square evenly, the same for every arm: x_n = x_0 + n (1/p, 1/p^2) mod 1, p^3 = p + 1.

    The quasi-random sequence R2 (Roberts 2018); x_0 is such that few points already spread over both coordinates.
    """
    p = 1.32471795724474602596
    return [((0.95 + n / p) % 1, (0.5 + n / p**2) % 1) for n in range(count)]


@dataclass(frozen=True)
class AutoencoderSettings:
    """The deep autoencoder."""

    dataset: str = "digits"
    """Images to encode; made grey, pixels in [0, 1]."""
    images: int | None = None
    """Number of training images; all when not given."""
    image_size: int = 8
    """Central part of the images, in pixels a side."""
    widths: tuple[int, ...] = (60, 30, 10)
    """Layers of the encoder, the code last; the decoder mirrors them. Published: 1000 500 250 30."""
    activation: str = "tanh"
    """tanh or sigmoid."""
    initialisation: str = "glorot"
    """glorot, from which SGD is several times faster, or sparse, as published."""
    batch_size: int = 256
    """Images an update."""
    updates: int = 500
    """Updates of SGD; the other arms have their share of them."""
    trials: int = 3
    """Trials in the tuning of each arm."""
    evaluations: int = 20
    """Times that the loss of all training images is computed in a run, equally spaced; not timed."""
    timing_steps: int = 40
    """Updates of each arm that are timed, interleaved."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if self.initialisation not in INITIALISATIONS:
            raise unknown("initialisation", self.initialisation, INITIALISATIONS)
        for name in ("image_size", "batch_size", "updates", "trials", "evaluations", "timing_steps"):
            check_count(f"autoencoder.{name}", getattr(self, name))


@dataclass(frozen=True)
class TunedTraining:
    """Trainings of tuned optimisers: of this study, and of the factorial of the preconditioning study."""

    backbone: str = "digits_tiny"
    """Network below the head."""
    train_limit: int | None = None
    """Use only this many training images; all when not given."""
    batch_size: int = 64
    """Images a step."""
    epochs: int = 4
    """Passes over the training images in the runs that are compared."""
    schedule: str = "cosine"
    """Learning-rate schedule of every optimiser, stretched to the number of epochs."""
    weight_decay: float = 1e-4
    """Weight decay of every optimiser that does not tune it."""
    trials: int = 4
    """Trials in the tuning of each optimiser on each network."""
    trial_epochs: int = 4
    """Passes over the training images in a trial."""
    timing_steps: int = 60
    """Steps of each optimiser that are timed, interleaved."""
    channels_last: bool = False
    """Memory layout of the convolutions."""
    flags: ClassVar[str] = ""
    """What the flags of these settings begin with."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name in ("batch_size", "epochs", "trials", "trial_epochs", "timing_steps"):
            check_count(f"{self.flags}{name}", getattr(self, name))


@dataclass(frozen=True)
class Settings(TunedTraining):
    """Settings of the optimiser study."""

    arms: tuple[str, ...] = LARGE_SCALE
    """Optimisers to compare; sgd is the reference of every comparison."""
    poolings: tuple[str, ...] = ("gap", "gcp")
    """Pooling heads of the networks that are trained."""
    dataset: str = "digits"
    """Images to train on."""
    dampings: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """Dampings of K-FAC's sensitivity map."""
    damping_rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Learning rates of the map, in units of K-FAC's tuned one."""
    processes: int = 1
    """Trainings that run side by side; they share the threads. Steps are timed alone, with all threads."""
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    """The deep autoencoder of Martens & Grosse (2015)."""

    def __post_init__(self) -> None:
        check_count("processes", self.processes)
        check_names("arms", self.arms)
        check_names("poolings", self.poolings)
        for arm in self.arms:
            if arm not in ARMS:
                raise unknown("arm", arm, ARMS)
        super().__post_init__()
        if "sgd" not in self.arms:
            raise InputError(f"--arms {' '.join(self.arms)}: sgd must be among them, everything is compared with it")
        for name in ("dampings", "damping_rates"):
            if any(not value > 0 for value in getattr(self, name)):
                raise InputError(f"--{name.replace('_', '-')}: every value must be above 0")


PRESETS = {
    "smoke": Settings(
        arms=("sgd", "adamw", "kfac"),
        poolings=("gap",),
        train_limit=192,
        epochs=1,
        trials=2,
        trial_epochs=1,
        dampings=(0.1, 1.0),
        damping_rates=(1.0,),
        timing_steps=4,
        autoencoder=AutoencoderSettings(
            images=128, widths=(12, 4), batch_size=64, updates=20, trials=1, evaluations=4, timing_steps=4
        ),
    ),
    "quick": Settings(processes=2),
    "cifar10": Settings(
        backbone="cifar_resnet8",
        dataset="cifar10",
        train_limit=10_000,
        batch_size=128,
        epochs=4,
        trials=5,
        trial_epochs=2,
        channels_last=True,
        autoencoder=AutoencoderSettings(
            dataset="cifar10",
            images=5_000,
            image_size=28,
            widths=(400, 200, 100, 30),
            batch_size=500,
            trials=4,
            updates=1200,
        ),
    ),
    "paper": Settings(
        backbone="resnet18",
        dataset="imagefolder",
        batch_size=256,
        epochs=30,
        trials=16,
        trial_epochs=10,
        timing_steps=200,
        channels_last=True,
        autoencoder=AutoencoderSettings(
            dataset="fashion_mnist",
            image_size=28,
            widths=(1000, 500, 250, 30),
            batch_size=1000,
            updates=50_000,
            trials=16,
            evaluations=100,
        ),
    ),
}

"""Settings of the optimiser study and its presets."""

from dataclasses import dataclass, field
from typing import Literal

from secondorder.errors import InputError, check_known
from secondorder.networks.autoencoder import ACTIVATIONS, INITIALISATIONS
from studies.checks import check_count, check_names
from studies.optimisers.tuning import DEEP_LATTICES, LATTICES
from studies.training import Training, TrainingFlags

TUNING_SEED = 1000
"""Trials use this seed and those that follow; the reported seeds 0, 1, 2, ... are below it."""


@dataclass(frozen=True)
class AutoencoderSettings:
    """The deep autoencoder of Martens & Grosse (2015)."""

    arms: tuple[str, ...] = (*DEEP_LATTICES,)
    """Optimisers (sgd, kfac, kfac_quadratic); without any the autoencoder is left out."""
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
    updates: int = 300
    """Updates of SGD; the other arms have a tenth of them, their schedule included."""
    tuning_seeds: int = 2
    """Seeds of every trial, none of them reported."""
    evaluations: int = 20
    """Times that the loss of all training images is computed in a run, equally spaced; not timed."""

    def __post_init__(self) -> None:
        check_known("activation", self.activation, ACTIVATIONS)
        check_known("initialisation", self.initialisation, INITIALISATIONS)
        for arm in self.arms:
            check_known("optimizer of --autoencoder.arms", arm, DEEP_LATTICES)
        if self.arms and "sgd" not in self.arms:
            raise InputError(f"--autoencoder.arms {' '.join(self.arms)}: sgd must be among them")
        for name in ("image_size", "batch_size", "updates", "tuning_seeds", "evaluations"):
            check_count(f"autoencoder.{name}", getattr(self, name))
        if self.images is not None:
            check_count("autoencoder.images", self.images)


@dataclass(frozen=True)
class Settings:
    """Settings of the optimiser study."""

    heads: tuple[str, ...] = ("gap", "gap_lifted", "covariance", "gcp")
    """Pooling heads of the factorial: gap and gcp, and the controls."""
    optimizers: tuple[str, ...] = ("sgd", "kfac")
    """Optimisers of the factorial: sgd, kfac and perhaps gauss_newton, K-FAC's exact counterpart (some 20 times as slow)."""
    others: tuple[str, ...] = ("kfac_adam", "adamw", "ekfac", "soap", "shampoo", "muon", "singd")
    """Optimisers that are compared besides, under gap and gcp."""
    training: TrainingFlags = field(
        default_factory=lambda: Training("digits_tiny", train_limit=512, epochs=4, batch_size=32, schedule="cosine")
    )
    """How networks are trained; learning rate and momentum are tuned."""
    targets: tuple[float, ...] = (2.0, 1.8, 1.6)
    """Training losses, fixed before the reported seeds were trained; to them the steps are counted."""
    control_seeds: int = 5
    """Seeds of the controls; at most those of gap and gcp."""
    other_seeds: int = 3
    """Seeds of the other optimisers and of the autoencoder."""
    start: Literal["cross", "square"] = "cross"
    """Trials that every tuning begins with: 5 or 9 settings."""
    extensions: int = 12
    """How often the tuning may go beyond what was tried when its best setting lies at an edge; then such a winner is refused.
    0: never, and it is taken."""
    tuning_seeds: int = 1
    """Seeds of every trial, none of them reported."""
    trial_epochs: int | None = None
    """Passes over the training images in a trial; as many as in the training when not given."""
    timing_steps: int = 40
    """Steps of each optimiser that are timed, from the first on; later ones count like the last 20 of them."""
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    """The deep autoencoder."""

    def __post_init__(self) -> None:
        check_names("heads", self.heads)
        check_names("optimizers", self.optimizers)
        check_names("targets", [f"{target:g}" for target in self.targets])
        for name in ("optimizers", "others"):
            for optimizer in getattr(self, name):
                check_known(f"optimizer of --{name}", optimizer, LATTICES)
        for optimizer in (o for o in self.others if self.others.count(o) > 1 or o in self.optimizers):
            raise InputError(f"--others {' '.join(self.others)}: {optimizer} is there already")
        for needed, name in (("gap", "heads"), ("gcp", "heads"), ("sgd", "optimizers"), ("kfac", "optimizers")):
            if needed not in getattr(self, name):
                raise InputError(f"--{name} {' '.join(getattr(self, name))}: {needed} must be among them")
        if not min(self.targets) > 0:
            raise InputError(f"--targets {min(self.targets):g}: a training loss is above 0")
        for name in ("control_seeds", "other_seeds", "tuning_seeds", "timing_steps"):
            check_count(name, getattr(self, name))
        check_count("extensions", self.extensions, 0)
        if self.trial_epochs is not None:
            check_count("trial_epochs", self.trial_epochs)


PRESETS = {
    "smoke": Settings(
        heads=("gap", "gcp"),
        others=("adamw",),
        training=Training("digits_tiny", train_limit=128, epochs=1, batch_size=32, schedule="cosine"),
        targets=(2.25,),
        extensions=0,
        timing_steps=2,
        autoencoder=AutoencoderSettings(
            ("sgd", "kfac"), images=128, widths=(12, 4), batch_size=64, updates=20, tuning_seeds=1, evaluations=4
        ),
    ),
    "quick": Settings(
        others=("kfac_adam", "adamw", "ekfac", "soap", "muon"), autoencoder=AutoencoderSettings(tuning_seeds=1)
    ),
    "cifar10": Settings(
        others=("kfac_adam", "adamw", "soap", "muon"),
        training=Training(
            "cifar_resnet8", "cifar10", None, 10_000, epochs=4, batch_size=128, schedule="cosine", channels_last=True
        ),
        targets=(1.8, 1.7, 1.6),
        control_seeds=5,
        tuning_seeds=2,
        trial_epochs=2,
        timing_steps=60,
        autoencoder=AutoencoderSettings(
            dataset="cifar10", images=5_000, image_size=28, widths=(400, 200, 100, 30), batch_size=500, updates=1200
        ),
    ),
    "paper": Settings(
        training=Training("resnet18", "imagefolder", epochs=50, batch_size=256, schedule="cosine", channels_last=True),
        targets=(4.0, 3.0, 2.5),
        start="square",
        tuning_seeds=2,
        trial_epochs=10,
        timing_steps=200,
        autoencoder=AutoencoderSettings(
            dataset="fashion_mnist",
            image_size=28,
            widths=(1000, 500, 250, 30),
            batch_size=1000,
            updates=50_000,
            evaluations=100,
        ),
    ),
}
SEEDS = {"smoke": 2, "quick": 30, "cifar10": 9, "paper": 3}

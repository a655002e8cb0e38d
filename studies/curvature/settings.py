"""Settings of the curvature study: which networks, at which scale, measured how far."""

from dataclasses import dataclass, field
from typing import Literal

import torchvision

from secondorder.errors import unknown
from secondorder.pooling import POOLINGS
from studies.checks import check_count, check_names
from studies.curvature.measures import Limits


@dataclass(frozen=True)
class Scale:
    """How one kind of network is trained and measured."""

    images: int = 64
    """Training images whose mean loss is measured: evenly spaced ones, not augmented."""
    image_size: int | None = None
    """Resize images to this height and width in pixels; the data set's own when not given."""
    train_limit: int | None = None
    """Train on only this many images; all when not given."""
    epochs: int = 10
    """Passes over the training images."""
    measurements: int = 3
    """Equally spaced moments of training at which is measured; the first and the last step are among them."""
    reduced_channels: int = 0
    """Channels after a 1x1 reduction under every head, GAP too; 0: no reduction."""
    precision: Literal["float32", "float64"] = "float64"
    """Number format of the measurements."""
    share: tuple[str, ...] = ("gap", "gcp")
    """Heads, of those compared, whose trained backbone and reduction are measured under every head, classifiers fitted anew."""

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("epochs", 1), ("measurements", 2)):
            check_count(name, getattr(self, name), least)


@dataclass(frozen=True)
class Settings:
    """Settings of the curvature study."""

    poolings: tuple[str, ...] = ("gap", "covariance", "gcp", "gcp_exact")
    """Pooling heads to compare; gap is the reference of every comparison."""
    backbones: tuple[str, ...] = ("digits_tiny",)
    """Networks below the head; those of torchvision are measured at the large scale, the others at the small one."""
    dataset: str = "digits"
    """Images to train on."""
    small: Scale = field(default_factory=lambda: Scale(images=32))
    """The networks for small images."""
    large: Scale = field(default_factory=lambda: Scale(image_size=64, reduced_channels=64, precision="float32"))
    """The networks of torchvision."""
    batch_size: int = 64
    """Images a training step."""
    learning_rate: float = 0.1
    """Initial learning rate of SGD."""
    schedule: str = "resnet_norm"
    """Learning-rate schedule, stretched to the number of epochs."""
    weight_decay: float = 1e-4
    """L2 penalty on the weights."""
    momentum: float = 0.9
    """Momentum of SGD."""
    processes: int = 1
    """Networks that are trained and measured side by side; they share the threads."""
    limits: Limits = field(default_factory=Limits)
    """Up to which size what is exact, and how far it is estimated beyond."""

    def __post_init__(self) -> None:
        for name in ("poolings", "backbones"):
            check_names(name, getattr(self, name))
        check_count("processes", self.processes)
        for pooling in (*self.small.share, *self.large.share):
            if pooling not in POOLINGS:
                raise unknown("pooling to share", pooling, POOLINGS)

    def scale(self, backbone: str) -> Scale:
        """The scale of a backbone."""
        return self.large if hasattr(torchvision.models, backbone) else self.small


PRESETS = {
    "smoke": Settings(
        poolings=("gap", "gcp"),
        small=Scale(images=8, train_limit=192, epochs=1, measurements=2, share=("gap",)),
        limits=Limits(probes=2, steps=4),
    ),
    "quick": Settings(processes=2),
    "cifar10": Settings(
        backbones=("cifar_resnet8", "shufflenet_v2_x0_5"),
        dataset="cifar10",
        small=Scale(images=32, train_limit=6_400, epochs=3, precision="float32"),
        large=Scale(
            images=24,
            image_size=64,
            train_limit=1_280,
            epochs=1,
            measurements=2,
            reduced_channels=64,
            precision="float32",
            share=(),
        ),
    ),
    "paper": Settings(
        poolings=("gap", "covariance", "gcp"),
        backbones=("resnet18", "mobilenet_v2"),
        dataset="imagefolder",
        large=Scale(images=256, epochs=100, measurements=5, reduced_channels=256, precision="float32", share=()),
        batch_size=256,
    ),
}

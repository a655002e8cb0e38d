"""The settings of a training that all studies share: one description of a network, its data and its optimiser."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from secondorder.data import ImageDataset, load_dataset
from secondorder.networks import NETWORKS
from secondorder.training import Run
from studies.engine.fake_data import fake_data, images_of
from studies.engine.records import Origins
from studies.engine.store import Subject
from studies.settings import Common


@dataclass(frozen=True)
class Training:
    """How a study trains its networks; heads and seeds are its own."""

    network: str = "digits_net"
    """Network below the head."""
    dataset: str = "digits"
    """Images to train on."""
    image_size: int | None = None
    """Resize images to this height and width in pixels; the data set's own when not given."""
    train_limit: int | None = None
    """Use only this many training images; all when not given."""
    reduced_channels: int | None = None
    """Channels after the 1x1 reduction before the pooling; the network's default when not given, 0: no reduction."""
    stride: Literal["published", "same"] = "same"
    """Stride of a ResNet's last stage: that of the published GCP network under every head (same), so that networks differ in
    nothing but the head, or as published (GAP 2, others 1)."""
    dropout: float | None = None
    """Dropout before the classifier; as published (0.2 for MobileNetV2, else 0) when not given."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step."""
    learning_rate: float = 0.1
    """Initial learning rate."""
    schedule: str = "resnet_norm"
    """Learning-rate schedule, stretched to the number of epochs."""
    weight_decay: float = 1e-4
    """L2 penalty on the weights."""
    momentum: float = 0.9
    """Momentum of SGD."""
    amp: Literal["off", "float16", "bfloat16"] = "off"
    """Mixed precision in training: off, float16 (on accelerators) or bfloat16; measurements are always in float32."""
    channels_last: bool = False
    """Memory layout of the convolutions; faster on most devices."""

    def run(self, common: Common, head: str, seed: int, **changes: Any) -> Run:
        """The training of a network with this head and seed; `changes` are fields of `Run`."""
        device = common.torch_device
        settings = {
            "backbone": self.network,
            "pooling": head,
            "dataset": self.dataset,
            "image_size": self.image_size,
            "train_limit": self.train_limit,
            "reduced_channels": self.reduced_channels,
            "last_stride": self.last_stride,
            "dropout": self.dropout,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "schedule": self.schedule,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "amp": "off" if self.amp == "float16" and device.type == "cpu" else self.amp,
            "channels_last": self.channels_last,
            "seed": seed,
            "device": device.type if common.device == "auto" else common.device,
            "threads": common.threads,
        }
        return Run(**settings | changes)

    @property
    def last_stride(self) -> int | None:
        """The last stride of the published GCP network, for every head; None: as published, or the network has no choice."""
        strides = NETWORKS[self.network].last_stride if self.network in NETWORKS else None
        return None if strides is None or self.stride == "published" else strides[1]

    def data(self, common: Common) -> ImageDataset:
        """The images; each data set of a command is loaded once. InputError when there are none. Fake ones in a dry run."""
        self.run(common, "gap", 0)  # names bad values as those of a run
        if common.dry_run:
            return fake_data(self.dataset, self.batch_size, self.image_size)
        key = (self.dataset, common.data_root, self.train_limit, self.image_size)
        if key not in _loaded:
            _loaded[key] = load_dataset(
                self.dataset,
                common.data_root,
                download=common.download,
                limit=self.train_limit,
                image_size=self.image_size,
            )
        return _loaded[key]

    def subject(self, common: Common, head: str, seed: int, **changes: Any) -> Subject:
        """The network of `run`, for the store."""
        return Subject(self.run(common, head, seed, **changes), self.data(common))

    def steps(self, common: Common) -> int:
        """Steps of the whole training."""
        images = images_of(self.dataset, self.train_limit) if common.dry_run else len(self.data(common).train)
        return images // self.batch_size * self.epochs


def trained_so(origins: Origins, networks: str = "") -> str:
    """How the networks of a table were trained, for a reader: ``digits_net on Digits (8x8), SGD, 10 epochs, batch 64, ...``."""
    training = origins.settings["training"]
    data = origins.data.get("label", training["dataset"])
    return (
        f"{networks or training['network']} on {data}, SGD, {training['epochs']} epochs, batch {training['batch_size']}, "
        f"learning rate {training['learning_rate']:g} ({training['schedule']})"
    )


PRESETS = {
    "smoke": Training("digits_tiny", epochs=1, train_limit=192),
    "quick": Training(),
    "cifar10": Training(
        "cifar_resnet8",
        "cifar10",
        train_limit=20_000,
        stride="published",
        epochs=16,
        batch_size=128,
        channels_last=True,
    ),
    "paper": Training("resnet18", "imagefolder", epochs=100, batch_size=256, channels_last=True, amp="float16"),
}
"""Trainings that studies share, by the name of a preset."""
TrainingFlags = Annotated[Training, tyro.conf.arg(name="")]
"""A training whose fields are flags of their own: ``--epochs 5``."""
_loaded: dict[tuple[Any, ...], ImageDataset] = {}

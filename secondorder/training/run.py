"""The settings that determine one training run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from secondorder.data import DATASETS
from secondorder.errors import InputError, unknown
from secondorder.networks import NETWORKS
from secondorder.pooling import POOLINGS
from secondorder.training.device import check_device
from secondorder.training.optimizers import OPTIMIZERS
from secondorder.training.schedules import SCHEDULES

Option = bool | int | float | str | None

# The smallest value allowed for each whole number, and the interval [low, high) for each real one.
WHOLE = {"epochs": 1, "batch_size": 1, "seed": 0}
WHOLE |= {"threads": 1, "reduced_channels": 0, "last_stride": 1, "image_size": 1, "train_limit": 1, "test_limit": 1}
FLOAT32 = 3.4e38  # larger steps cannot be taken in single precision
REAL = {"learning_rate": (0.0, FLOAT32), "momentum": (0.0, 1.0), "weight_decay": (0.0, FLOAT32), "dropout": (0.0, 1)}
OPTIONAL = {"threads", "reduced_channels", "last_stride", "dropout", "image_size", "train_limit", "test_limit"}


@dataclass(frozen=True)
class Run:
    """Everything that determines one training run; two equal runs on the same machine give the same bits on CPU.

    Raises:
        InputError: for an unknown name or a value out of range, in one line.
    """

    backbone: str
    """A key of NETWORKS."""
    pooling: str
    """A key of POOLINGS."""
    dataset: str
    """A key of DATASETS."""
    epochs: int
    """Number of passes over the training set; the schedule is stretched to it."""
    batch_size: int
    """Images per step, over all processes together; the last partial batch of an epoch is dropped."""
    learning_rate: float
    """Base learning rate; the schedule multiplies it."""
    schedule: str = "resnet_norm"
    """A key of SCHEDULES."""
    momentum: float = 0.9
    """Heavy-ball momentum, in [0, 1); of adaptive optimisers the decay of the first moment."""
    weight_decay: float = 1e-4
    """L2 penalty added to the gradient (SGD), or decoupled: 1e-4 for ResNets and 4e-5 for MobileNetV2 as published."""
    optimizer: str = "sgd"
    """A key of OPTIMIZERS."""
    optimizer_options: tuple[tuple[str, Option], ...] = ()
    """The optimiser's own options, such as damping, as sorted (name, value) pairs; a mapping is accepted too."""
    seed: int = 0
    """Determines initial weights, data order, augmentation and dropout masks."""
    device: str = "cpu"
    """auto (the accelerator where there is one), cpu, cuda, mps or xpu; one of several as cuda:N."""
    amp: Literal["off", "float16", "bfloat16"] = "off"
    """Automatic mixed precision; float16 (with loss scaling) on accelerators only."""
    threads: int | None = None
    """CPU threads of this training; None leaves torch's setting. The order of sums, so the last bits, depends on it."""
    reduced_channels: int | None = None
    """Channels after the head's 1x1 reduction; None is the network's default, 0 no reduction."""
    last_stride: int | None = None
    """Stride of the last stage; None is the network's default."""
    dropout: float | None = None
    """Dropout before the classifier; None is the network's default."""
    image_size: int | None = None
    """Side of the images in pixels; None is the data set's own."""
    train_limit: int | None = None
    """Train on the first so many images; None is all."""
    test_limit: int | None = None
    """Test on the first so many images; None is all."""
    channels_last: bool = False
    """Memory format NHWC for model and images: faster convolutions on CPU and under AMP."""
    pooling_options: tuple[tuple[str, Option], ...] = ()
    """Options of the pooling head, as sorted (name, value) pairs; a mapping is accepted too."""

    def __post_init__(self) -> None:
        tables: dict[str, Iterable[str]] = {"backbone": NETWORKS, "pooling": POOLINGS, "dataset": DATASETS}
        tables |= {"schedule": SCHEDULES, "optimizer": OPTIMIZERS, "amp": ("off", "float16", "bfloat16")}
        for field, table in tables.items():
            if getattr(self, field) not in tuple(table):
                raise unknown(field, getattr(self, field), table)
        for field, low in WHOLE.items():
            self._check_whole(field, low)
        for field, (bottom, top) in REAL.items():
            self._check_real(field, bottom, top)
        if not isinstance(self.channels_last, bool):
            raise InputError(f"channels_last is {self.channels_last!r}; it must be True or False")
        check_device(self.device, self.amp)
        for field in ("pooling_options", "optimizer_options"):
            object.__setattr__(self, field, _pairs(field, getattr(self, field)))

    def _check_whole(self, field: str, low: int) -> None:
        value = getattr(self, field)
        if value is None and field in OPTIONAL:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"{field} is {value!r}; it must be a whole number, at least {low}")

    def _check_real(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        if value is None and field in OPTIONAL:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
            raise InputError(f"{field} is {value!r}; it must be a number in [{low:g}, {high:g})")
        object.__setattr__(self, field, float(value))  # 1 and 1.0 are the same run

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON and ``torch.load(weights_only=True)`` can hold."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "pooling_options": dict(self.pooling_options),
            "optimizer_options": dict(self.optimizer_options),
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Run:
        """The run of ``to_dict``; raises InputError for a missing or unknown field."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown("setting of a run", name, known)
        try:
            return cls(**settings)
        except TypeError as error:
            raise InputError(f"incomplete run: {error}; give every field without a default") from error

    @property
    def name(self) -> str:
        """A readable identifier, different for different runs: it ends in a hash of every field but device and threads.

        Those two decide about rounding alone: a run continued on other ones is refused by name, not silently begun anew.
        """
        settings = {key: value for key, value in self.to_dict().items() if key not in ("device", "threads")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.dataset}-{self.backbone}-{self.pooling}-{self.schedule}-e{self.epochs}-s{self.seed}-{digest}"


def _pairs(field: str, options: object) -> tuple[tuple[str, Option], ...]:
    """Options as sorted pairs of a name and a plain value."""
    try:
        pairs = sorted(options.items() if isinstance(options, Mapping) else ((k, v) for k, v in options))  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InputError(f"{field} is {options!r}; it must map names to values") from error
    for name, value in pairs:
        if not isinstance(name, str) or not isinstance(value, (bool, int, float, str, type(None))):
            raise InputError(f"{field}: {name!r} is {value!r}; it must be a number, a word, True, False or None")
    return tuple(pairs)

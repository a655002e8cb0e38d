"""The settings that determine one training run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from secondorder.data import DATASETS
from secondorder.data.files import shown
from secondorder.data.images import MAX_IMAGE_SIZE
from secondorder.data.own import is_own
from secondorder.errors import InputError, check_flag, check_number, check_whole, unknown
from secondorder.networks import NETWORKS
from secondorder.pooling import POOLINGS
from secondorder.training.device import check_device
from secondorder.training.optimizers import OPTIMIZERS
from secondorder.training.schedules import SCHEDULES

Option = bool | int | float | str | None

# The smallest and largest value allowed for each whole number, and the interval [low, high) for each real one.
WHOLE = {"epochs": (1, 10**9), "batch_size": (1, 10**9), "seed": (0, 2**63 - 1), "threads": (1, 4096)}
WHOLE |= {"reduced_channels": (0, 10**6), "last_stride": (1, 10**6), "image_size": (1, MAX_IMAGE_SIZE)}
WHOLE |= {"train_limit": (1, 10**12), "test_limit": (1, 10**12)}
FLOAT32 = 3.4e38  # larger steps cannot be taken in single precision
REAL = {"learning_rate": (0.0, FLOAT32), "momentum": (0.0, 1.0), "weight_decay": (0.0, FLOAT32), "dropout": (0.0, 1)}
LATER = {"initial": "", "frozen": (), "learning_rates": ()}  # left out of a run's description where they are so
OWN_FIELDS = ("backbone", "pooling", "dataset")
LONGEST_NAME = 60  # of the user's own network, pooling and data: a run's name must be one of a folder
OPTIONAL = {"threads", "reduced_channels", "last_stride", "dropout", "image_size", "train_limit", "test_limit"}


@dataclass(frozen=True)
class Run:
    """Everything that determines one training run; two equal runs on the same machine give the same bits on CPU.

    Raises:
        InputError: for an unknown name or a value out of range, in one line.
    """

    backbone: str
    """A key of NETWORKS, or own or own-NAME for a network of the user's, which `train` is given."""
    pooling: str
    """A key of POOLINGS; own or own-NAME with a network of the user's, which has a pooling already."""
    dataset: str
    """A key of DATASETS, or own or own-NAME for data of the user's."""
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
    initial: str = ""
    """A name for the initial weights that `train` is given; empty: they are drawn from the seed."""
    frozen: tuple[str, ...] = ()
    """Modules or parameters of the network (``features``, ``stem.0``) that stay bit for bit as they are: no gradient, and
    in eval mode throughout, so that batch norm keeps its statistics and dropout does nothing there."""
    learning_rates: tuple[tuple[str, float], ...] = ()
    """Factors of the learning rate, as sorted (module or parameter, factor) pairs; a mapping is accepted too. The longest
    name that fits a parameter counts; all others have factor 1."""

    def __post_init__(self) -> None:
        tables: dict[str, Iterable[str]] = {"backbone": NETWORKS, "pooling": POOLINGS, "dataset": DATASETS}
        tables |= {"schedule": SCHEDULES, "optimizer": OPTIMIZERS, "amp": ("off", "float16", "bfloat16")}
        for field, table in tables.items():
            value = getattr(self, field)
            own = field in OWN_FIELDS and is_own(value)
            if not isinstance(value, str) or not (own or value in tuple(table)):
                raise unknown(field, named(value), table)
            if own and len(value) > LONGEST_NAME:
                raise InputError(f"{field} is {shown(value)!r}; names of your own have at most {LONGEST_NAME} letters")
        for field, (least, most) in WHOLE.items():
            self._check_whole(field, least, most)
        for field, (bottom, top) in REAL.items():
            self._check_real(field, bottom, top)
        check_flag("channels_last", self.channels_last)
        check_device(self.device, self.amp)
        for field in ("pooling_options", "optimizer_options"):
            object.__setattr__(self, field, _pairs(field, getattr(self, field)))
        self._check_own_network()
        self._check_parts()

    def _check_own_network(self) -> None:
        """InputError for settings that only a network of the tables follows."""
        if is_own(self.backbone) != is_own(self.pooling):
            raise InputError(
                f"backbone {self.backbone!r} with pooling {self.pooling!r}: a network of your own comes with its pooling; "
                "call both own or own-NAME"
            )
        defaults = {"reduced_channels": None, "last_stride": None, "dropout": None, "pooling_options": ()}
        for field, default in defaults.items() if is_own(self.backbone) else ():
            if getattr(self, field) != default:
                raise InputError(
                    f"{field} is {getattr(self, field)!r}: a network of your own is used as it is; leave it out"
                )

    def _check_parts(self) -> None:
        """InputError for names and factors of parts of the network that cannot be."""
        if not isinstance(self.initial, str) or not self.initial.isprintable() or len(self.initial) > 80:
            raise InputError(f"initial is {shown(repr(self.initial))}; it must be a name, of at most 80 letters")
        frozen = (self.frozen,) if isinstance(self.frozen, str) else self.frozen
        if not isinstance(frozen, list | tuple | set | frozenset) or not all(
            isinstance(name, str) and name for name in frozen
        ):
            raise InputError(f"frozen is {shown(repr(self.frozen))}; it must be names of modules or parameters")
        object.__setattr__(self, "frozen", tuple(sorted(set(frozen))))
        factors = _pairs("learning_rates", self.learning_rates)
        for name, factor in factors:
            if not name:
                raise InputError(f"learning_rates: a factor of {factor!r} is without a name; use names of modules")
            check_number(f"learning_rates: the factor of {shown(name)!r}", factor, 0, 1e6)
        object.__setattr__(self, "learning_rates", tuple((name, float(factor)) for name, factor in factors))  # type: ignore[arg-type]

    def _check_whole(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        if value is None and field in OPTIONAL:
            return
        check_whole(field, value, low, high)

    def _check_real(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        if value is None and field in OPTIONAL:
            return
        check_number(field, value, low, high)
        object.__setattr__(self, field, float(value))  # 1 and 1.0 are the same run

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON and ``torch.load(weights_only=True)`` can hold."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)} | {
            "pooling_options": dict(self.pooling_options),
            "optimizer_options": dict(self.optimizer_options),
            "frozen": list(self.frozen),
            "learning_rates": dict(self.learning_rates),
        }
        for name, default in LATER.items():  # so that runs from before these fields keep their names
            if getattr(self, name) == default:
                del settings[name]
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Run:
        """The run of ``to_dict``; raises InputError for a missing or unknown field."""
        if not isinstance(settings, Mapping):
            raise InputError(f"the settings of a run are {shown(repr(settings))}; they must map fields to values")
        known = {field.name: field.default is MISSING for field in fields(cls)}
        for name in settings:
            if not isinstance(name, str) or name not in known:
                raise InputError(f"unknown setting of a run {shown(repr(name))}; its settings are the fields of Run")
        missing = [name for name, needed in known.items() if needed and name not in settings]
        if missing:
            raise InputError(f"incomplete run: without {', '.join(missing)}; give every field without a default")
        return cls(**settings)

    @property
    def name(self) -> str:
        """A readable identifier, different for different runs: it ends in a hash of every field but device and threads.

        Those two decide about rounding alone: a run continued on other ones is refused by name, not silently begun anew.
        """
        settings = {key: value for key, value in self.to_dict().items() if key not in ("device", "threads")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.dataset}-{self.backbone}-{self.pooling}-{self.schedule}-e{self.epochs}-s{self.seed}-{digest}"


def named(value: object) -> object:
    """A value for a message: a long word shortened, anything else as the beginning of what Python prints for it."""
    return shown(value) if isinstance(value, str) else shown(repr(value))


def _pairs(field: str, options: object) -> tuple[tuple[str, Option], ...]:
    """Options as sorted pairs of a name and a plain value, one pair a name."""
    try:
        pairs = list(options.items() if isinstance(options, Mapping) else ((k, v) for k, v in options))  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InputError(f"{field} is {shown(repr(options))}; it must map names to values") from error
    plain: dict[str, Option] = {}
    for name, value in pairs:
        kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
        if not isinstance(name, str) or (kind is None and value is not None):
            raise InputError(
                f"{field}: {shown(repr(name))} is {shown(repr(value))}; it must be a number, a word, True, False or None"
            )
        if value != value:  # not the same run as its copy
            raise InputError(f"{field}: {shown(repr(name))} has nan; use a number")
        if name in plain:
            raise InputError(f"{field} has {shown(repr(name))} twice; give each option once")
        plain[str(name)] = value if kind is None else kind(value)  # numpy's kinds of numbers and words as Python's
    return tuple(sorted(plain.items()))

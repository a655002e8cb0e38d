"""What a row of `secondorder.data.DATASETS` holds, and what its reader hands back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from secondorder.data.augmentation import PaddedCrop, ResizedCrop
from secondorder.data.files import exists
from secondorder.data.images import Normalisation

# One split as read: pixels [N, C, H, W] uint8 or N file names, and labels [N] int64.
Split = tuple[Tensor | list[str], Tensor]


@dataclass(frozen=True)
class Source:
    """A data set as read from its source, before limits, normalisation and augmentation."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    provenance: dict[str, object]


@dataclass(frozen=True)
class Row:
    """One data set: how it is read, and the one statement of its normalisation and augmentation.

    ``markers`` are the paths under the data root of which one must exist (none: nothing is read from the root);
    ``substitute`` is the row to use when only that one's markers exist; ``expected`` the numbers of train and test
    images (None: not known beforehand). ``mean`` and ``std`` are those of the training pixels on [0, 1].
    """

    label: str
    read: Callable[["Row", Path, bool], Source] = field(repr=False)
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: PaddedCrop | ResizedCrop | None
    expected: tuple[int, int] | None = None
    maximum: int = 255
    markers: tuple[str, ...] = ()
    downloadable: bool = False
    substitute: str | None = None
    classes: tuple[str, ...] | None = None  # None: as the source names them
    allow_empty: bool = False  # whether a class folder may hold no image

    def normalisation(self) -> Normalisation:
        """Normalisation of this data set's pixels by its mean, standard deviation and value of white."""
        return Normalisation(self.mean, self.std, self.maximum)

    def found(self, root: Path) -> bool:
        """Whether one of the markers exists under ``root``; raises `InputError` for a dangling link in its place."""
        return any(exists(root / marker) for marker in self.markers)

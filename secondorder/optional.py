"""Libraries that come with an extra: imported where they are used, and named in one line when they are missing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from secondorder.errors import InputError

OPTIONAL: dict[str, tuple[str, str]] = {
    "PIL": ("pillow", "studies"),
    "faster_coco_eval": ("faster-coco-eval", "studies"),
    "pandas": ("pandas", "studies"),
    "pytorch_optimizer": ("pytorch_optimizer", "studies"),
    "singd": ("singd", "studies"),
    "sklearn": ("scikit-learn", "studies"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "torchvision": ("torchvision", "studies"),
}
"""Module -> the package that has it, and the extra of secondorder that installs it."""


class MissingLibraryError(InputError, ImportError):
    """An optional library that is asked for is not installed."""


@contextmanager
def needed_by(purpose: str) -> Iterator[None]:
    """Import optional libraries inside: ``with needed_by("the data set digits"): import sklearn``.

    Raises MissingLibraryError, one line with the command that installs it, for a library of OPTIONAL that is not there. Every
    other error goes through as it is: a library that is there and broken says itself what it lacks.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package, extra = OPTIONAL.get(str(error.name).partition(".")[0], ("", ""))
        if not package:
            raise
        raise MissingLibraryError(f"{purpose} needs {package}: pip install 'secondorder[{extra}]'") from error


def is_instance(value: object, module: str, name: str) -> bool:
    """Whether `value` is an instance of the class `name` of an optional `module`, which is not imported for it.

    Where nothing has imported the module there are no instances.
    """
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)

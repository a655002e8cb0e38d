"""Which approximation each layer has, by patterns of names."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from secondorder.errors import InputError, check_known

APPROXIMATIONS = ("kfac", "ekfac", "fallback", "diagonal")


class Policy:
    """The word of APPROXIMATIONS for each layer: that of the first pattern that fits one of its names, "kfac" without one."""

    def __init__(self, approximation: str | Mapping[str, str]) -> None:
        self._words = dict(approximation) if isinstance(approximation, Mapping) else {"*": approximation}
        self._used: set[str] = set()
        for pattern, word in self._words.items():
            if not isinstance(pattern, str):
                raise InputError(
                    f"approximation {pattern!r}: a pattern of names of layers is a text, for example 'features.*'"
                )
            check_known("approximation", word, APPROXIMATIONS)

    def word(self, names: Sequence[str]) -> tuple[str, str]:
        """The word for a layer with these names, and the pattern that says so."""
        return next(((self._words[pattern], pattern) for pattern in self._fitting(names)), ("kfac", "*"))

    def use(self, names: Sequence[str]) -> None:
        """Note that there is a layer with these names."""
        self._used.update(self._fitting(names))

    def check_used(self) -> None:
        """InputError for a pattern that fits no layer."""
        for pattern in self._words:
            if pattern not in self._used and pattern != "*":
                raise InputError(
                    f"approximation {pattern!r} matches no linear layer or convolution with a trainable weight; "
                    "names are those of model.named_modules(), without what wrappers add"
                )

    def _fitting(self, names: Sequence[str]) -> list[str]:
        return [pattern for pattern in self._words if any(fnmatchcase(name, pattern) for name in names)]

"""The state that random numbers are drawn from, to be drawn from again."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from secondorder.accelerator import random_states, seed_random_numbers, set_random_states, with_random_numbers
from secondorder.untouched import same_randomness


class RandomState:
    """The state of Python's, NumPy's and torch's random numbers, to be drawn from again and again."""

    def __init__(self) -> None:
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        self.devices = with_random_numbers()
        self.of_devices = random_states(self.devices)
        self.drawn = False
        """Whether anything has been drawn."""

    @contextmanager
    def replayed(self, part: int = 0) -> Iterator[None]:
        """Draws inside start from this state (for part 0) or from seeds made from it; the present state comes back on exit."""
        with same_randomness():
            random.setstate(self.python)
            np.random.set_state(self.numpy)  # noqa: NPY002
            torch.set_rng_state(self.torch)
            set_random_states(self.devices, self.of_devices)
            if part > 0:
                seed = (int(torch.randint(2**31, ())) + part) % 2**31
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                seed_random_numbers(seed)
            before = self._torch_states()
            yield
            numpy_same = all(np.array_equal(a, b) for a, b in zip(self.numpy, np.random.get_state(), strict=True))  # noqa: NPY002
            self.drawn |= part == 0 and not (
                random.getstate() == self.python
                and numpy_same
                and all(torch.equal(a, b) for a, b in zip(before, self._torch_states(), strict=True))
            )

    def numbers(self) -> list[object]:
        """The state as plain values and tensors."""
        return [repr(self.python), repr(self.numpy), self.torch, *self.of_devices]

    def _torch_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *random_states(self.devices)]

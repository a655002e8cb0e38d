"""What the tests of `studies.jobs` compute in other processes; light, because each process imports this module."""

import os
import signal
import time
from pathlib import Path


def product(a: int, b: int) -> tuple[int, int]:
    return a * b, os.getpid()


def most_threads(number: int) -> tuple[int, int, int] | None:
    """Of any library that is loaded here, how many there are, and torch's own; in one process, as the imports take seconds."""
    if number > 0:
        return None
    import sklearn.linear_model  # noqa: F401 - it comes with an OpenMP and a BLAS of its own, after the beginning
    import torch
    from threadpoolctl import threadpool_info

    threads = [library["num_threads"] for library in threadpool_info()]
    return max(threads), len(threads), torch.get_num_threads()


def fails(a: int) -> int:
    if a == 2:
        raise ValueError(f"argument {a}")
    return a


def fails_at_once_or_leaves_a_sign(a: int, folder: Path) -> None:
    if a == 0:
        raise ValueError("argument 0")
    if a > 3:
        (folder / str(a)).touch()


def dies(what: str, how: int = signal.SIGKILL) -> str:
    if what == "dies":
        os.kill(os.getpid(), how)
    return what


def dies_once(number: int, folder: Path) -> int:
    sign = folder / str(number)
    if number == 1 and not sign.exists():
        sign.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def large(number: int, values: bytes) -> bytes:
    return values + bytes([number])


class UnreadableError(Exception):
    """Can be pickled but not read again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fails_unreadably(number: int) -> None:
    raise UnreadableError(number, 7)


def naps(number: int, folder: Path) -> int:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(0.02)
    return number


def has_a_bar(number: int) -> tuple[str, str]:
    """Where the lock of progress bars comes from, and how this process starts others."""
    import multiprocessing

    from tqdm import tqdm

    with Path(os.devnull).open("w") as nowhere:
        list(tqdm(range(number), file=nowhere))
    return type(tqdm.get_lock()).__module__, multiprocessing.get_start_method()

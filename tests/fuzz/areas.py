"""The areas of the package, and their shares of the calls."""

from dataclasses import dataclass

from .backpack import backpack
from .call import Generator
from .command_line import command_line
from .curvature import curvature
from .data import data
from .kept_files import kept_files
from .kfac import gauss_newton, kfac
from .landscape import landscape
from .matrix_functions import matrix_functions
from .networks import networks
from .pooling import pooling
from .preconditioning import preconditioning
from .runs import runs
from .spectra import spectra
from .statistics import statistics
from .training import training


@dataclass(frozen=True)
class Area:
    """share: of the calls, relative to the others; calls: in the tests."""

    generate: Generator
    share: float
    calls: int


AREAS: dict[str, Area] = {
    "pooling": Area(pooling, 20, 500),
    "matrix_functions": Area(matrix_functions, 20, 500),
    "networks": Area(networks, 6, 100),
    "runs": Area(runs, 10, 300),
    "training": Area(training, 3, 40),
    "data": Area(data, 4, 60),
    "kfac": Area(kfac, 8, 150),
    "gauss_newton": Area(gauss_newton, 4, 80),
    "curvature": Area(curvature, 8, 150),
    "spectra": Area(spectra, 8, 200),
    "backpack": Area(backpack, 4, 60),
    "preconditioning": Area(preconditioning, 10, 200),
    "landscape": Area(landscape, 4, 80),
    "statistics": Area(statistics, 10, 300),
    "command_line": Area(command_line, 4, 50),
    "kept_files": Area(kept_files, 4, 80),
}
"""Name -> how its calls are made."""

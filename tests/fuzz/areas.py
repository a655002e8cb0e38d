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
from .transfer import transfer


@dataclass(frozen=True)
class Area:
    """share: of the calls, relative to the others; calls: in the tests."""

    generate: Generator
    share: float
    calls: int


AREAS: dict[str, Area] = {
    "pooling": Area(pooling, 20, 250),
    "matrix_functions": Area(matrix_functions, 20, 200),
    "networks": Area(networks, 6, 60),
    "runs": Area(runs, 10, 200),
    "training": Area(training, 3, 40),
    "data": Area(data, 4, 60),
    "kfac": Area(kfac, 8, 80),
    "gauss_newton": Area(gauss_newton, 4, 50),
    "curvature": Area(curvature, 8, 80),
    "spectra": Area(spectra, 8, 100),
    "backpack": Area(backpack, 4, 40),
    "preconditioning": Area(preconditioning, 10, 120),
    "landscape": Area(landscape, 4, 80),
    "statistics": Area(statistics, 10, 150),
    "transfer": Area(transfer, 8, 60),
    "command_line": Area(command_line, 4, 50),
    "kept_files": Area(kept_files, 4, 40),
}
"""Name -> how its calls are made."""

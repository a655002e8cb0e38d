"""`python -m tests.backpack_support`: what stands between the markers in `tables.DOCUMENT`."""

import warnings

import torch

from .tables import section

warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
torch.set_num_threads(1)
print(section(), end="")

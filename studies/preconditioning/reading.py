"""What several parts read from ``preconditioning.csv`` in the same way."""

import pandas as pd

from studies.preconditioning.situation import UNTRAINED
from studies.report.style import label


def short(head: str) -> str:
    """The name of a head for a reader, without what is in brackets."""
    return label(head).partition(" (")[0]


def backbone_name(backbone: str) -> str:
    """How a backbone is called: ``untrained``, ``trained under GCP``."""
    return UNTRAINED if backbone == UNTRAINED else f"trained under {short(backbone)}"


def at_the_end(table: pd.DataFrame) -> pd.DataFrame:
    """The last moment of each backbone and seed: after training, or the only one of the untrained backbone."""
    return table[table.step == table.groupby(["backbone", "seed"]).step.transform("max")]

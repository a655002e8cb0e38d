"""
A study of your own
===================

A study says which networks it wants, what is measured of them, and which claim decides; the rest is the engine's.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from secondorder.training import Snapshot
from studies.engine.command import measure
from studies.engine.plan import Measurement, Trained
from studies.engine.records import Row, read_records
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.judge import Claim, Ratio, judge
from studies.settings import Common
from studies.training import Training


def length(at: Snapshot, settings: None) -> Iterator[Row]:
    """The length of all weights, of a snapshot of a training."""
    yield {"quantity": "length", "value": sum(w.detach().square().sum().item() for w in at.model.parameters()) ** 0.5}


def plan(context: Context) -> Plan:
    """Both heads with every seed, measured after 16 steps, the last."""
    training, at = context.settings, ((16, Measurement("weights", length)),)
    yield [Trained(training.subject(context.common, h, seed), at) for seed in context.seeds for h in ("gap", "gcp")]


ratio, of_length = Ratio({"head": "gcp"}, {"head": "gap"}), lambda table: table[table.quantity == "length"]
claim = Claim("shorter weights", "Weights stay shorter.", "weights", "length, GCP / GAP", ratio, of_length)
training = Training("digits_tiny", epochs=2, train_limit=512)
study = Study("weights", "do weights stay shorter below GCP", {"smoke": training}, {"smoke": 3}, plan, [claim])
common = Common(preset="smoke", out=Path(tempfile.mkdtemp()), processes=1, progress=False)
measure(common, {"weights": (study, training)})
print(judge([claim], read_records(common.folder, "weights")[0])[0].sentence)

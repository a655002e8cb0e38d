"""Training: one `Run` (all settings) and `train`, from data and network to weights, history and measurements."""

from secondorder.training.checkpoint import load as load_checkpoint
from secondorder.training.device import resolve_device
from secondorder.training.divergence import NonFiniteLossError
from secondorder.training.evaluation import Evaluation, evaluate
from secondorder.training.loop import train
from secondorder.training.observers import Moment, Observer
from secondorder.training.optimizers import OPTIMIZERS
from secondorder.training.processes import distributed, is_main_process, on_main
from secondorder.training.run import Run
from secondorder.training.schedules import SCHEDULES, Schedule
from secondorder.training.setup import check_run, initial_network
from secondorder.training.snapshot import Snapshot, snapshot
from secondorder.training.state import Trained
from secondorder.training.tensorboard import TensorBoard, Tracker

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Evaluation",
    "Moment",
    "NonFiniteLossError",
    "Observer",
    "Run",
    "Schedule",
    "Snapshot",
    "TensorBoard",
    "Tracker",
    "Trained",
    "check_run",
    "distributed",
    "evaluate",
    "initial_network",
    "is_main_process",
    "load_checkpoint",
    "on_main",
    "resolve_device",
    "snapshot",
    "train",
]

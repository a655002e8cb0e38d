"""Two processes under torchrun (gloo, loopback) train as one process does; errors end both."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from undrawn_figures import undrawn_figures

from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.networks import network
from secondorder.training import Moment, Run, Trained, distributed, is_main_process, load_checkpoint, on_main, train
from secondorder.training.batch_norm import synchronise
from studies.__main__ import main
from studies.engine.records import read_records

RUN = Run("digits_net", "gcp", "digits", epochs=2, batch_size=16, learning_rate=0.05, schedule="cosine", threads=1)
SMOKE = ["--preset", "smoke", "--no-progress", "--threads", "1"]
STUDY = ["landscape", *SMOKE, "--seeds", "1", "--heads", "gcp", "--out"]


class Statistics:
    """The loss of the batch to come, and whether the layers are those of a single process."""

    every = 3

    def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
        before = {name: value.clone() for name, value in moment.model.state_dict().items()}
        loss = nn.functional.cross_entropy(moment.model(moment.images), moment.labels).item()
        moment.model.load_state_dict(before)
        kinds = {type(layer).__name__ for layer in moment.model.modules() if "Norm" in type(layer).__name__}
        return [{"step": moment.step, "images": len(moment.images), "loss": loss, "kinds": " ".join(sorted(kinds))}]


class Broken:
    """Fails before the last step."""

    every = 7

    def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
        if moment.step == 7:
            raise RuntimeError("broken observer")
        return []


def own_training(data: ImageDataset, folder: Path) -> Trained:
    """A network and data of the user's, with a frozen part and learning rates by group."""
    run = replace(RUN, backbone="own", pooling="own", dataset="own", frozen=("stem",), learning_rates={"features": 0.5})  # type: ignore[arg-type]
    pairs = TensorDataset(*data.train.plain(range(70))), TensorDataset(*data.test.plain(range(31)))
    return train(run, pairs, folder, network=lambda: network("digits_net", "gcp", 10, 1), progress=False)


# What each of the two processes does; it writes what it has seen to OUT/<rank>.json, and at last the main one fails.
SCRIPT = """
import dataclasses, json, os, sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, TESTS)
from test_distributed import RUN, STUDY, Broken, Statistics, compare_batch_norm, own_training
from undrawn_figures import undrawn_figures

from secondorder.data import load_dataset
from secondorder.errors import InputError
from secondorder.training import distributed, is_main_process, on_main, train
from studies.__main__ import main
from studies.engine.records import read_records

out, data = Path(OUT), load_dataset("digits", limit=70, test_limit=31)
with distributed():
    with undrawn_figures():
        report = {"exit_code": main([*STUDY, str(out / "study")])}
    trained = train(RUN, data, out / "run", observers={"s": Statistics()}, progress=is_main_process())
    again = train(RUN, data, out / "run", observers={"s": Statistics()}, progress=False, resume=True)
    continued = train(RUN, data, out / "one", observers={"s": Statistics()}, progress=False, resume=True)
    assert again.history == [row | {"seconds": h["seconds"]} for row, h in zip(trained.history, again.history)]
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), trained.model.parameters()))
    report |= {"losses": trained.step_losses, "history": trained.history, "records": trained.records}
    report |= {"main": is_main_process(), "continued": continued.step_losses}
    report["own"] = own_training(data, out / "own").step_losses
    report["kinds"] = sorted({type(layer).__name__ for layer in trained.model.modules()})
    report["sum"] = sum(w.double().sum().item() for w in trained.model.parameters())
    report["batch_norm"] = compare_batch_norm()
    report["errors"] = []
    for change, folder in (({"batch_size": 15}, "odd"), ({"seed": 1}, "run"), ({}, "run/checkpoint.pt")):
        try:
            train(dataclasses.replace(RUN, **change), data, out / folder, progress=False, resume=True)
        except InputError as error:
            report["errors"].append(str(error))
    report["on_main"] = on_main(lambda: os.getpid())
    (out / (os.environ["RANK"] + ".json")).write_text(json.dumps(report))
    train(RUN, data, out / "broken", observers={"broken": Broken()}, progress=False, checkpoint_every=0)
"""


def compare_batch_norm() -> dict[str, float]:
    """Largest differences, in float64, between a synchronised layer on halves and a plain one on the whole batch."""
    differences: dict[str, float] = {}
    for momentum in (0.1, None):
        generator = torch.Generator().manual_seed(0)
        x, target = torch.randn(2, 6, 3, 2, 4, generator=generator, dtype=torch.float64)
        x = x * torch.tensor([1.0, 50.0, 0.02]).view(3, 1, 1) + 2
        whole, part = (nn.Sequential(nn.BatchNorm2d(3, momentum=momentum)).double() for _ in range(2))
        synchronise(part, torch.device("cpu"))
        for layer in (whole, part):
            nn.init.constant_(layer[0].weight, 1.5)
        half = slice(3 * int(os.environ["RANK"]), 3 * int(os.environ["RANK"]) + 3)
        for _ in range(3):
            full, mine = x.clone().requires_grad_(), x[half].clone().requires_grad_()
            expected, y = whole(full), part(mine)
            # the gradient of a mean over the batch, which DistributedDataParallel takes as the mean of the halves'
            (expected - target).square().mean().backward()
            (y - target[half]).square().mean().backward()
        pairs = {
            "output": (y, expected[half]),
            "input gradient": (mine.grad / 2, full.grad[half]),
            "running mean": (part[0].running_mean, whole[0].running_mean),
            "running variance": (part[0].running_var, whole[0].running_var),
            "batches": (part[0].num_batches_tracked, whole[0].num_batches_tracked),
        }
        part.eval(), whole.eval()
        pairs["eval mode"] = (part(x), whole(x))
        assert part.state_dict().keys() == whole.state_dict().keys()
        differences |= {f"{name}, momentum {momentum}": (a - b).abs().max().item() for name, (a, b) in pairs.items()}
    return differences


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> dict[str, Any]:
    """Both processes' reports, the run in one process, and what torchrun printed."""
    torch.set_num_threads(1)
    folder, data = tmp_path_factory.mktemp("distributed"), load_dataset("digits", limit=70, test_limit=31)

    class Interrupted(Statistics):
        def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
            if moment.step == 6:
                raise KeyboardInterrupt
            return super().__call__(moment)

    with pytest.raises(KeyboardInterrupt):  # a checkpoint of one process, to be continued by two
        train(RUN, data, folder / "one", observers={"s": Interrupted()}, progress=False, checkpoint_every=0)
    alone = train(RUN, data, folder / "alone", observers={"s": Statistics()}, progress=False)
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))).replace("OUT", repr(str(folder))))
    process = torchrun(str(script))
    assert (folder / "0.json").exists(), process.stderr[-3000:]
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return {"alone": alone, "reports": reports, "folder": folder, "process": process}


def test_same_loss_curve_as_one_process(outcome: dict[str, Any]) -> None:
    alone = outcome["alone"]
    for report in outcome["reports"]:
        assert len(report["losses"]) == 8
        assert report["losses"] == pytest.approx(alone.step_losses, rel=0, abs=1e-5)
        for row, expected in zip(report["history"], alone.history, strict=True):
            assert row.keys() == expected.keys()
            for name in expected.keys() - {"seconds"}:
                assert row[name] == pytest.approx(expected[name], rel=0, abs=1e-5), name
    first, second = outcome["reports"]
    assert first["losses"] == second["losses"]
    assert first["sum"] == second["sum"]


def test_final_weights_are_close_and_serve_one_process(outcome: dict[str, Any]) -> None:
    alone = outcome["alone"].model.state_dict()
    data = load_dataset("digits", limit=70, test_limit=31)
    observers = {"s": Statistics()}
    loaded = train(RUN, data, outcome["folder"] / "run", observers=observers, progress=False, resume=True)
    shared = loaded.model.state_dict()
    assert shared.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-4)
    assert {type(layer) for layer in loaded.model.modules()} == {type(x) for x in outcome["alone"].model.modules()}


def test_two_processes_continue_what_one_began(outcome: dict[str, Any]) -> None:
    for report in outcome["reports"]:
        assert report["continued"][:6] == outcome["alone"].step_losses[:6]
        assert report["continued"] == pytest.approx(outcome["alone"].step_losses, rel=0, abs=1e-5)


def test_own_network_and_data_as_in_one_process(outcome: dict[str, Any], tmp_path: Path) -> None:
    alone = own_training(load_dataset("digits", limit=70, test_limit=31), tmp_path)
    for report in outcome["reports"]:
        assert report["own"] == pytest.approx(alone.step_losses, rel=0, abs=1e-5)


def test_observers_run_in_one_process_on_the_whole_batch(outcome: dict[str, Any]) -> None:
    first, second = (report["records"]["s"] for report in outcome["reports"])
    assert first == second
    assert [(row["step"], row["images"], row["kinds"]) for row in first] == [(s, 16, "BatchNorm2d") for s in (0, 3, 6)]
    expected = [outcome["alone"].step_losses[step] for step in (0, 3, 6)]
    assert [row["loss"] for row in first] == pytest.approx(expected, rel=0, abs=1e-5)


def test_synchronised_batch_norm_is_that_of_the_whole_batch(outcome: dict[str, Any]) -> None:
    for report in outcome["reports"]:
        assert len(report["batch_norm"]) == 12
        for name, difference in report["batch_norm"].items():
            assert difference < 1e-12, name
        assert "SynchronisedBatchNorm" not in report["kinds"]


def test_one_process_writes_and_prints(outcome: dict[str, Any]) -> None:
    first, second = outcome["reports"]
    assert (first["main"], second["main"]) == (True, False)
    assert first["on_main"] == second["on_main"]
    assert "8/8" in outcome["process"].stderr.replace(" ", "")
    assert sorted(path.name for path in (outcome["folder"] / "run").iterdir()) == [".lock", "checkpoint.pt"]


@undrawn_figures()
def test_a_study_gives_the_same_table(outcome: dict[str, Any], tmp_path: Path) -> None:
    assert [report["exit_code"] for report in outcome["reports"]] == [0, 0]
    assert main([*STUDY, str(tmp_path)]) == 0
    one, two = (read_records(folder, "landscape")[0] for folder in (tmp_path, outcome["folder"] / "study"))
    one, two = (records[records.quantity != "seconds"].drop(columns="key") for records in (one, two))
    # float32 sums in another order; a gradient distance is a difference of nearly equal gradients at eta = 0.1
    pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-6)
    assert outcome["process"].stdout.count("report: ") == 1


def test_errors_reach_both_processes(outcome: dict[str, Any]) -> None:
    first, second = (report["errors"] for report in outcome["reports"])
    assert first == second
    assert "batch_size is 15; it must be divisible by 2" in first[0]
    assert "has run seed = 0, not 1" in first[1]
    assert "cannot save a checkpoint in" in first[2]
    assert len(first) == 3


def test_failure_of_the_main_process_ends_both(outcome: dict[str, Any]) -> None:
    assert outcome["process"].returncode != 0
    assert "broken observer" in outcome["process"].stderr
    state = load_checkpoint(outcome["folder"] / "broken")
    assert state is not None
    assert state["progress"]["step"] == 7


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with distributed():
        assert not torch.distributed.is_initialized()
        assert is_main_process()
        assert on_main(lambda: 7) == 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start with torchrun"), distributed():
        pass
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()


def test_layers_that_cannot_be_synchronised_are_named() -> None:
    with pytest.raises(InputError, match="layer '1' is a BatchNorm1d"):
        synchronise(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3)), torch.device("cpu"))

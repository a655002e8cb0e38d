"""The engine: networks that several studies want are trained once, measurements are made once, their records are the cache."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from secondorder.training import NonFiniteLossError, Run, Snapshot
from studies.engine.plan import Computed, Measurement, Trained, every, spaced
from studies.engine.records import COLUMNS, read_records, write_records
from studies.engine.run import Plan, Table, carry_out
from studies.engine.store import Store, Subject
from studies.jobs import workers

RUN = Run("digits_tiny", "gap", "digits", 2, 32, 0.05, train_limit=96, threads=1)
calls: list[str] = []


def weight(at: Snapshot, factor: float) -> Iterator[Mapping[str, Any]]:
    calls.append(f"weight {at.run.pooling} {at.run.seed} {at.step}")
    for index, parameter in enumerate(at.model.parameters()):
        yield {
            "layer": "all",
            "quantity": "norm",
            "index": index,
            "setting": factor,
            "value": factor * parameter.norm(),
        }


def constant(settings: Mapping[str, float]) -> list[Mapping[str, Any]]:
    calls.append("constant")
    return [{"quantity": "constant", "value": settings["x"], "error": 0.0}]


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=96)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def tasks(data: ImageDataset, seeds: int = 2, factor: float = 2.0, version: int = 1) -> list[Any]:
    norms = Measurement("weight", weight, factor, version)
    networks = [
        Trained(Subject(replace(RUN, pooling=head, seed=seed), data), tuple((step, norms) for step in (0, 4, 6)))
        for seed in range(seeds)
        for head in ("gap", "gcp")
    ]
    return [*networks, Computed(Measurement("constant", constant, {"x": 3.0}), {"network": "none"})]


def staged(*stages: list[Any], sent: list[pd.DataFrame] | None = None) -> Plan:
    for stage in stages:
        records = yield stage
        if sent is not None:
            sent.append(records)


def opened(folder: Path, study: str = "a", **settings: Any) -> Table:
    fresh = settings.pop("fresh", False)
    return Table.opened(folder, study, {"epochs": 2, "heads": ["gap"]} | settings, ("heads",), fresh)


def go(
    folder: Path, plan: Plan, store: Path | None = None, processes: int = 1, fresh: bool = False, **s: Any
) -> pd.DataFrame:
    folder.mkdir(parents=True, exist_ok=True)
    with workers(processes) as executor:
        tables = {"a": opened(folder, fresh=fresh, **s)}
        carry_out({"a": plan}, tables, Store(store or folder / "store"), executor, fresh=fresh)
    return read_records(folder, "a")[0]


@pytest.fixture(scope="module")
def finished(data: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the table and the store of all tasks, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    go(folder, staged(tasks(data)))
    return folder


def copied(finished: Path, folder: Path) -> pd.DataFrame:
    """Copy what is finished into a folder; its records."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return read_records(folder, "a")[0]


def test_records_have_one_schema_and_their_origins(data: ImageDataset, tmp_path: Path) -> None:
    sent: list[pd.DataFrame] = []
    records = go(tmp_path, staged(tasks(data), sent=sent))
    assert tuple(records.columns) == COLUMNS
    assert len(sent[0]) == len(records)
    norms = records[records.quantity == "norm"]
    assert set(norms.step) == {0, 4, 6}
    assert set(norms[norms.step == 0].trained_under) == {""}
    assert set(norms[norms.step == 4].trained_under) == {"gap", "gcp"}
    assert (norms.setting == 2.0).all()
    assert list(
        records[(records.quantity == "train_loss") & (records.seed == 1) & (records["head"] == "gcp")]["index"]
    ) == [1, 2]
    assert records[records.quantity == "constant"][["network", "value", "error"]].to_numpy().tolist() == [
        ["none", 3.0, 0.0]
    ]
    origins = read_records(tmp_path, "a")[1]
    assert origins.measurements.keys() == set(records.key)
    assert len(origins.trainings) == 4
    assert origins.seconds > 0
    assert origins.machines[0]["versions"]["torch"]
    assert origins.data["label"] == "Digits (8x8)"


def test_what_stands_in_the_table_is_not_computed_again(data: ImageDataset, finished: Path, tmp_path: Path) -> None:
    before = copied(finished, tmp_path)
    after = go(tmp_path, staged(tasks(data)), store=tmp_path / "another")
    assert calls == []
    assert not (tmp_path / "another").exists()
    pd.testing.assert_frame_equal(before, after)
    three = go(tmp_path, staged(tasks(data, seeds=3)), store=tmp_path / "another")
    assert {call.split()[2] for call in calls} == {"2"}  # the new seed alone
    calls.clear()
    newer = go(tmp_path, staged(tasks(data, version=2)), store=tmp_path / "store")
    assert len(calls) == 12  # the networks are in the store
    assert len(newer) == len(three)  # those of an older version are gone


def test_the_store_serves_what_the_table_lacks(data: ImageDataset, finished: Path, tmp_path: Path) -> None:
    copied(finished, tmp_path)
    go(tmp_path / "b", staged(tasks(data)), store=tmp_path / "store")
    assert calls == []
    go(tmp_path / "b", staged(tasks(data)), store=tmp_path / "store", fresh=True)
    assert len(calls) == 13


def test_processes_side_by_side_write_the_same_table(data: ImageDataset, finished: Path, tmp_path: Path) -> None:
    one, _ = read_records(finished, "a")
    two = go(tmp_path, staged(tasks(data)), processes=2)
    quick = one.quantity != "seconds"
    pd.testing.assert_frame_equal(one[quick], two[quick])


def test_studies_share_networks_and_measurements(data: ImageDataset, tmp_path: Path) -> None:
    norms = Measurement("weight", weight, 2.0)
    plans = {
        "a": staged([Trained(Subject(RUN, data), ((0, norms), (4, norms)))]),
        "b": staged([Trained(Subject(RUN, data), ((4, norms), (5, norms)))]),
    }
    tables = {name: opened(tmp_path, name) for name in plans}
    with workers(1) as executor:
        carry_out(plans, tables, Store(tmp_path / "store"), executor)
    assert sorted(calls) == ["weight gap 0 0", "weight gap 0 4", "weight gap 0 5"]
    assert len(list((tmp_path / "store").iterdir())) == 1
    a, b = (read_records(tmp_path, name)[0] for name in "ab")
    assert set(a.step[a.quantity == "norm"]) == {0, 4}
    assert set(b.step[b.quantity == "norm"]) == {4, 5}


@pytest.mark.parametrize("chosen", ["b", "ab"])
def test_what_another_study_has_in_its_table_is_not_measured_again(
    chosen: str, data: ImageDataset, tmp_path: Path
) -> None:
    """Whether that study is a part of the same command or not; the numbers are those of the table, whatever the machine."""
    norms, further = Measurement("weight", weight, 2.0), Measurement("weight", weight, 3.0)
    wanted = {
        name: Trained(Subject(RUN, data), ((4, norms), *last)) for name, last in {"a": (), "b": ((4, further),)}.items()
    }
    go(tmp_path, staged([wanted["a"]]))
    calls.clear()
    records, origins = read_records(tmp_path, "a")
    write_records(tmp_path, "a", records.assign(value=records.value + 9), origins)  # as no machine would measure them
    before = (tmp_path / "a.csv").read_bytes()
    others = [] if "a" in chosen else [Table.read(tmp_path, "a")]
    tables = {name: opened(tmp_path, name) for name in chosen}
    plans = {name: staged([wanted[name]]) for name in chosen}
    with workers(1) as executor:
        carry_out(plans, tables, Store(tmp_path / "other"), executor, others=lambda: others)
    assert calls == ["weight gap 0 4"]  # the further one alone
    assert (tmp_path / "a.csv").read_bytes() == before
    a, b = (read_records(tmp_path, name) for name in "ab")
    shared = b[0][b[0].key.isin(a[0].key)].reset_index(drop=True)
    pd.testing.assert_frame_equal(shared.drop(columns="study"), a[0].drop(columns="study"))
    assert set(b[0].study) == {"b"}
    assert b[1].trainings.keys() == a[1].trainings.keys()
    assert {key: b[1].measurements[key] for key in a[1].measurements} == a[1].measurements
    assert b[1].data == a[1].data


def test_a_stage_may_depend_on_the_records_of_the_one_before(data: ImageDataset, tmp_path: Path) -> None:
    def tuned() -> Plan:
        rates = (0.01, 0.1)
        trials = yield [Trained(Subject(replace(RUN, learning_rate=rate), data)) for rate in rates]
        losses = trials[(trials.quantity == "train_loss") & (trials["index"] == 2)].value.tolist()
        best = rates[losses.index(min(losses))]
        yield [Trained(Subject(replace(RUN, learning_rate=best, seed=1), data))]

    records = go(tmp_path, tuned())
    assert sorted(records[(records.quantity == "test_top1") & (records["index"] == 2)].seed) == [0, 0, 1]


def test_what_is_chosen_by_numbers_of_a_stage_is_chosen_again_from_the_table(
    data: ImageDataset, tmp_path: Path
) -> None:
    def chosen() -> Plan:
        trials = yield [Trained(Subject(RUN, data))]
        loss = trials[trials.quantity == "train_loss"].value.min()
        yield [Computed(Measurement("constant", constant, {"x": loss}), {})]

    before = go(tmp_path, chosen())
    pd.testing.assert_frame_equal(before, go(tmp_path, chosen(), store=tmp_path / "another"))
    assert calls == ["constant"]


def test_divergence_is_a_record_where_it_may_be_and_else_an_error(data: ImageDataset, tmp_path: Path) -> None:
    wild = replace(RUN, learning_rate=1e20)
    records = go(tmp_path, staged([Trained(Subject(wild, data), may_diverge=True)]))
    assert list(records.quantity) == ["diverged"]
    assert list(records.value) == [1.0]
    with pytest.raises(NonFiniteLossError):
        go(tmp_path / "b", staged([Trained(Subject(wild, data))]))


def test_what_is_finished_is_in_the_table_when_the_rest_fails(data: ImageDataset, tmp_path: Path) -> None:
    wild = Trained(Subject(replace(RUN, learning_rate=1e20), data))
    with pytest.raises(NonFiniteLossError):
        go(tmp_path, staged([*tasks(data, seeds=1), wild]))
    records, _ = read_records(tmp_path, "a")
    assert set(records.quantity) >= {"norm", "train_loss", "constant"}


def test_a_table_of_other_settings_is_not_mixed(data: ImageDataset, finished: Path, tmp_path: Path) -> None:
    copied(finished, tmp_path)
    go(tmp_path, staged(tasks(data)), heads=["gap", "gcp"])  # may grow
    with pytest.raises(
        InputError, match=r"a.csv has epochs = 2, not 3; repeat the flags .* or replace it with --fresh"
    ):
        go(tmp_path, staged(tasks(data)), epochs=3)
    assert len(go(tmp_path, staged(tasks(data, seeds=1)), epochs=3, fresh=True)) > 0
    assert set(read_records(tmp_path, "a")[0].seed) == {0}


def test_records_of_seeds_that_are_not_asked_for_stay(data: ImageDataset, finished: Path, tmp_path: Path) -> None:
    before = copied(finished, tmp_path)
    pd.testing.assert_frame_equal(before, go(tmp_path, staged(tasks(data, seeds=1))))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("a.csv", lambda text: text.replace("0.", "1.", 1)),
        ("a.csv", lambda text: "\n".join(text.splitlines()[:-1]) + "\n"),
        ("a.json", lambda text: text.replace('"sha256": "', '"sha256": "0')),
        ("a.json", lambda text: text[:-30]),
        ("a.json", lambda text: "[]"),
        ("a.json", lambda text: json.dumps(json.loads(text) | {"measurements": {"k": 1}})),
        ("a.csv", lambda text: "study,key\na,b\n"),
    ],
)
def test_a_table_in_which_anything_changed_is_refused(
    data: ImageDataset, finished: Path, tmp_path: Path, file: str, change: Callable[[str], str]
) -> None:
    copied(finished, tmp_path)
    path = tmp_path / file
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=r"a\.(csv|json)"):
        go(tmp_path, staged(tasks(data, seeds=1)))


def test_a_measurement_without_records_is_a_fault(data: ImageDataset, tmp_path: Path) -> None:
    nothing = Computed(Measurement("nothing", lambda settings: []), {})
    with pytest.raises(ValueError, match="gave no records"):
        go(tmp_path, staged([nothing]))


def test_moments() -> None:
    assert every(40, 100) == [0, 40, 80]
    assert spaced(3, 10) == [0, 5, 10]
    assert spaced(4, 10) == [0, 4, 8, 10]
    with pytest.raises(InputError, match="at least 2"):
        spaced(1, 10)

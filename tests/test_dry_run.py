"""What a dry run states: operations and memory that are counted, networks that several studies want, and scaling to the whole."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from secondorder.networks import network
from secondorder.training import Run, snapshot, train
from secondorder.training.checkpoint import CHECKPOINT
from studies.backbones import evenly_spaced
from studies.curvature.measures import Limits, dry_parts, measure_dry
from studies.curvature.study import STUDY as CURVATURE
from studies.engine import dry_run, step_costs
from studies.engine.fake_data import fake_data
from studies.engine.plan import Computed, Measurement, Trained
from studies.engine.store import Subject
from studies.engine.study import Context, Study
from studies.landscape import STUDY as LANDSCAPE
from studies.robustness.study import STUDY as ROBUSTNESS
from studies.settings import Common

RUN = Run("digits_tiny", "gap", "digits", epochs=3, batch_size=32, learning_rate=0.05, threads=1)


def multiplications(model: nn.Module, images: torch.Tensor) -> list[int]:
    """Of each convolution and linear layer, for all images, from the shapes that go through it."""
    found: list[int] = []

    def look(layer: Any, _: Any, output: torch.Tensor) -> None:
        found.append(output.numel() * layer.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(look)
    model(images)
    return found


@pytest.mark.parametrize(
    ("backbone", "dataset", "size"),
    [("digits_tiny", "digits", (1, 8)), ("mobilenet_v2_small_images", "cifar10", (3, 32))],
)
def test_operations_of_a_step_are_those_of_its_layers(backbone: str, dataset: str, size: tuple[int, int]) -> None:
    channels, side = size
    model = network(backbone, "gap", 10, channels)
    first, *others = multiplications(model, torch.randn(4, channels, side, side))
    # forward, gradient of the weights and, but for the first layer, of the inputs; 2 for a multiplication with an addition
    run = replace(RUN, backbone=backbone, dataset=dataset, batch_size=4)
    assert step_costs.step_cost(run, "off").flops == 2 * (2 * first + 3 * sum(others))


def test_saved_bytes_are_those_of_the_activations() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Tanh(), nn.Linear(8, 1))
    with step_costs._bytes_saved(model) as saved:
        model(torch.randn(16, 4)).sum().backward()
    assert sum(saved.values()) == 4 * 16 * (4 + 8 + 8)  # inputs, and each tanh once though two layers keep it


def test_a_step_on_a_cpu_has_the_pixels_of_eight_images() -> None:
    run, data = step_costs.small(replace(RUN, dataset="imagefolder", batch_size=256, image_size=112))
    assert (run.batch_size, len(data.train), data.image_size) == (32, 32, 112)
    assert step_costs.small(RUN)[0].batch_size == 32


def test_what_is_alike_is_measured_once_and_half_precision_keeps_half() -> None:
    cost = step_costs.step_cost(RUN, "off")
    assert step_costs.step_cost(replace(RUN, seed=3, learning_rate=0.2, epochs=7, schedule="cosine"), "off") is cost
    half = step_costs.step_cost(RUN, "float16")  # which the CPU that this is measured on does not have
    kept = 4 * cost.parameters + cost.state
    assert half.memory - kept == pytest.approx((cost.memory - kept) / 2, rel=0.05)
    assert cost.gpu_seconds == pytest.approx(4 * (cost.memory - kept) / step_costs.BANDWIDTH)  # small layers


def test_what_the_optimiser_takes_is_not_scaled_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(run: Run, data: Any, folder: str, progress: bool) -> Any:
        (Path(folder) / CHECKPOINT).touch()
        return SimpleNamespace(history=[{"seconds": 5.0}, {"seconds": 8.0}], model=nn.Linear(2, 2))

    monkeypatch.setattr(step_costs, "CPU_PIXELS", 8 * 64)
    monkeypatch.setattr(step_costs, "train", trained)
    monkeypatch.setattr(step_costs, "_counted", lambda *_: (1.0, 1.0))
    for updates, seconds in (([9.0, 1.0], 1 + 2 * 4), ([9.0, 0.0], 3 * 4), ([0.0, 9.0], 3)):
        monkeypatch.setattr(step_costs, "_optimizer_seconds", lambda updates=updates: nullcontext(updates))
        step_costs._step_cost.cache_clear()
        assert step_costs.step_cost(RUN, "off").seconds == seconds
    step_costs._step_cost.cache_clear()


def test_seconds_of_an_optimisers_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those of one within another, and none of one that evaluates the network."""
    model = nn.Linear(2, 2)

    class Around(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            inner.step()
            if evaluates:
                model(torch.ones(1, 2))

    inner, outer = (kind(model.parameters(), lr=0.1) for kind in (torch.optim.SGD, Around))
    clock = iter((0.0, 1.0, 7.0, 10.0, 11.0, 12.0, 20.0, 25.0, 26.0))
    monkeypatch.setattr(step_costs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with step_costs._optimizer_seconds() as seconds:
        evaluates = False
        outer.step()  # begins at 0, the inner one at 1, ends at 7
        evaluates = True
        outer.step()
        evaluates = False
        model(torch.ones(1, 2))
        inner.step()
    inner.step()
    assert seconds == [7.0, 0.0, 8.0]


def test_large_layers_are_bound_by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_costs, "_counted", lambda *_: (1e12, 1e6))
    for amp, rate in (("off", 0.15 * 156e12), ("bfloat16", 0.2 * 312e12)):
        assert step_costs.step_cost(replace(RUN, batch_size=16), amp).gpu_seconds == 16 * 1e12 / rate


STEP = step_costs.StepCost(
    seconds=2.0, images=8, parameters=10, flops=1.0, gpu_seconds=7200.0, memory=2.0**31, state=10**9
)  # two hours on the GPU


def study_of(name: str, *tasks: Any) -> tuple[Study, Context]:
    """A study that wants these."""
    study = Study(name, name, presets={"smoke": None}, seeds={"smoke": 1}, plan=lambda _: iter([tasks]))  # type: ignore[arg-type,return-value]
    return study, study.context(Common(preset="smoke", dry_run=True), None)


def test_networks_that_studies_share_count_once_and_trials_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "cost_of", lambda *_: dry_run.Cost(10.0, 0.0, STEP, "a network"))
    data, measurement = fake_data("digits", 32), Measurement("m", list)
    networks = [Subject(replace(RUN, seed=seed), data) for seed in range(3)]
    at = [tuple((step, measurement) for step in steps) for steps in ((0, 1), (1, 2))]
    alone = Computed(measurement, {})
    one = study_of("one", Trained(networks[0], at[0]), Trained(networks[1]), Trained(networks[1]), alone)
    two = study_of("two", Trained(networks[0], at[1]), Trained(networks[2]))
    lines = [*dry_run.dry_run({"one": one, "two": two})]
    none = " and 1 measurements without a training, which are not counted"
    assert lines[3:] == [
        f"one: 3 jobs{none}: 30.0 GPU hours, the longest job 10.0 h, steps of up to 2.0 GiB; store 5.0 GB; on 64 GPUs 10.0 h",
        "two: 1 times a network",
        "two: 1 times a network",
        "two: 1 seeds of 2 networks: about 0.0 h of one job, 0.0 h with 2 side by side",
        "two: 2 jobs: 20.0 GPU hours, the longest job 10.0 h, steps of up to 2.0 GiB; store 4.0 GB; on 64 GPUs 10.0 h",
        f"all: each network once: 4 jobs{none}: 40.0 GPU hours, the longest job 10.0 h, steps of up to 2.0 GiB; store 7.0 GB; "
        "on 64 GPUs 10.0 h",
        dry_run.ASSUMED,
    ]
    many = dry_run.Totals()
    for seed in range(640):
        many.add(Trained(Subject(replace(RUN, seed=seed), data)), dry_run.Cost(2.0, 0.0, STEP, ""))
    assert many.words().endswith("on 64 GPUs 20.0 h")  # 640 jobs of two hours


def test_the_gpu_has_the_precision_that_the_study_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(dry_run, "cost_of", lambda _, amp: asked.append(amp) or dry_run.Cost(1.0, 0.0, STEP, ""))
    for preset in ("quick", "paper"):
        context = LANDSCAPE.context(Common(preset=preset, dry_run=True), LANDSCAPE.presets[preset])  # type: ignore[arg-type]
        list(dry_run.dry_run({"landscape": (LANDSCAPE, context)}))
    assert {*asked[:1]} | {*asked[-1:]} == {"off", "float16"}


def test_measuring_takes_as_many_steps_on_a_gpu_as_here() -> None:
    assert dry_run.Cost(6.0, 2.0, STEP, "").gpu == 8.0 / 2.0 * 7200


def seconds_of(task: Trained, monkeypatch: pytest.MonkeyPatch) -> float:
    """What a dry run makes of measurements that take a second each."""
    monkeypatch.setattr("studies.engine.dry_run.time.perf_counter", iter(range(100)).__next__)
    return dry_run._measuring(task)


@pytest.mark.parametrize("of_batch", [False, True])
def test_measurements_are_scaled_by_parts_and_batch(of_batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_costs, "CPU_PIXELS", 8 * 64)
    monkeypatch.setattr("studies.engine.dry_run.train", lambda *_, **__: None)
    monkeypatch.setattr("studies.engine.dry_run.snapshot", lambda run, *_: _Opened(run))
    parts = Measurement("a", lambda *_: 1 / 0, dry=(lambda *_: [], 5.0), of_batch=of_batch)
    whole, curve = Measurement("b", lambda *_: []), Measurement("c", lambda *_: 1 / 0, of_training=True)
    task = Trained(Subject(RUN, fake_data("digits", 32)), ((0, parts), (1, parts), (1, whole), (0, curve)))
    assert seconds_of(task, monkeypatch) == 2 * 5.0 * (4 if of_batch else 1) + 1


class _Opened:
    """A snapshot that nothing is asked of."""

    def __init__(self, run: Run) -> None:
        assert run.batch_size == 8

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def wanted(study: Study, preset: str, **settings: Any) -> list[Measurement]:
    """The measurements of the first network in a dry run of a study."""
    context = study.context(Common(preset=preset, dry_run=True), replace(study.presets[preset], **settings))  # type: ignore[arg-type]
    return [measurement for _, measurement in next(study.plan(context))[0].at]  # type: ignore[union-attr]


def test_a_dry_run_makes_parts_of_what_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {m.name: m for study in (LANDSCAPE, ROBUSTNESS, CURVATURE) for m in wanted(study, "paper") if m.dry}
    parts = {name: (m.dry[1], m.of_batch) for name, m in found.items() if m.dry}
    assert parts == {
        "published lines": (25.5, True),
        "descent": (2.5, True),
        "clean images": (25_000.0, False),
        "corruption": (25_000.0, False),
        "perturbation": (5_000.0, False),
        "GGN blocks": (16 * 125.0, False),
    }
    images: list[tuple[int, int]] = []
    spaced = lambda *of: images.append(of) or evenly_spaced(*of)  # type: ignore[func-returns-value]  # noqa: E731
    monkeypatch.setattr("studies.robustness.measures.evenly_spaced", spaced)
    data = fake_data("digits", 8)
    run = replace(RUN, batch_size=8, epochs=1)
    train(run, data, tmp_path, snapshots=(0,), until=0, progress=False)
    with snapshot(run, data, tmp_path / "step-0.pt") as at:
        rows = {name: list(m.dry[0](at, m.settings)) for name, m in found.items() if m.dry}
    assert {count for _, count in images} == {2}
    assert all(rows.values())
    assert len({row["setting"] for row in rows["descent"]}) == 1


def test_blocks_of_a_dry_run_have_few_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert dry_parts(Limits(images=8), 1000) == 2000
    assert [m.dry for m in wanted(CURVATURE, "smoke")] == [None] * 5  # of ten classes all are measured
    data, run = fake_data("digits", 8), replace(RUN, batch_size=8, epochs=1)
    train(run, data, tmp_path, snapshots=(0,), until=0, progress=False)
    shapes = []
    monkeypatch.setattr("studies.curvature.measures._of_blocks", lambda *of: shapes.append((of[1], of[2])) or iter(()))
    with snapshot(run, data, tmp_path / "step-0.pt") as at:
        list(measure_dry(at, Limits()))
        assert at.model.classifier.out_features == 10
    ((small, (images, labels)),) = shapes
    assert (small(images).shape, labels.tolist()) == ((2, 8), [0, 1])

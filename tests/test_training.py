"""Training against a plain loop written out here, its determinism, observers, evaluation and bad input."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.data import ImageDataset, epoch_order, load_dataset
from secondorder.data.files import shown
from secondorder.errors import InputError
from secondorder.networks import network
from secondorder.pooling import POOLINGS
from secondorder.training import (
    Evaluation,
    Moment,
    NonFiniteLossError,
    Run,
    Trained,
    evaluate,
    initial_network,
    load_checkpoint,
    resolve_device,
    train,
)

RUN = Run("digits_net", "gcp", "digits", epochs=2, batch_size=16, learning_rate=0.05, schedule="cosine", threads=1)


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=70, test_limit=30)  # 4 steps an epoch, 6 images left over


def fit(run: Run, data: ImageDataset, folder: Path, **options: Any) -> Trained:
    return train(run, data, folder, progress=False, **options)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_equals_a_plain_loop(data: ImageDataset, tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, weight_decay=0.01)
    trained = fit(run, data, tmp_path)

    torch.manual_seed(run.seed)
    model = network("digits_net", "gcp", 10, 1)
    velocity = [torch.zeros_like(w) for w in model.parameters()]
    losses, right = [], []
    for step in range(8):
        data.train.set_epoch(0, step // 4)
        chosen = epoch_order(70, 0, step // 4)[step % 4 * 16 :][:16]
        images, labels = data.train.batch(chosen)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rate = 0.05 * (1 + np.cos(np.pi * step / 8)) / 2
        with torch.no_grad():
            for w, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + 0.01 * w)
                w.sub_(rate * v)
        losses.append(loss.item())
        right.append((logits.argmax(1) == labels).float().mean().item())
    assert trained.step_losses == pytest.approx(losses, rel=1e-5)

    model.eval()
    images, labels = data.test.batch(range(30))
    logits = model(images).detach()
    last = trained.history[-1]
    assert (last["epoch"], last["step"]) == (2, 8)
    assert last["learning_rate"] == pytest.approx(0.05 * (1 + np.cos(np.pi * 7 / 8)) / 2)
    assert last["train_loss"] == pytest.approx(np.mean(losses[4:]), rel=1e-5)
    assert last["train_top1"] == pytest.approx(np.mean(right[4:]))
    assert last["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert last["test_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    order = logits.argsort(1, descending=True)
    assert last["test_top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert [row["epoch"] for row in trained.history] == [1, 2]
    assert not trained.model.training


@pytest.mark.parametrize("pooling", POOLINGS)
def test_same_seed_same_bits_and_the_caller_undisturbed(data: ImageDataset, tmp_path: Path, pooling: str) -> None:
    run = dataclasses.replace(RUN, pooling=pooling, dropout=0.3, epochs=1)
    first = fit(run, data, tmp_path / "a")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    second = fit(run, data, tmp_path / "b", workers=2, checkpoint_every=0)
    assert torch.equal(torch.rand(3), expected)
    assert first.step_losses == second.step_losses
    assert same_weights(first.model, second.model)
    other = fit(dataclasses.replace(run, seed=1), data, tmp_path / "c")
    assert other.step_losses != first.step_losses


def test_threads_are_given_back(data: ImageDataset, tmp_path: Path) -> None:
    class Threads:
        every = 1

        def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
            return [{"threads": torch.get_num_threads()}]

    run = dataclasses.replace(RUN, threads=2, epochs=1, batch_size=64)  # one step
    trained = fit(run, data, tmp_path, observers={"threads": Threads()})
    assert trained.records["threads"] == [{"threads": 2}]
    assert torch.get_num_threads() == 1


class Meddler:
    """Records what it is given and leaves random numbers, gradients and modes in disorder."""

    every = 3

    def __init__(self) -> None:
        self.moments: list[tuple[Moment, float]] = []

    def __call__(self, moment: Moment) -> list[dict[str, Any]]:
        assert moment.model.training
        assert all(w.grad is None for w in moment.model.parameters())
        statistics = {k: v.clone() for k, v in moment.model.state_dict().items()}
        loss = F.cross_entropy(moment.model(moment.images), moment.labels)
        loss.backward()
        moment.model.load_state_dict(statistics)
        moment.model.eval()
        torch.manual_seed(99)
        self.moments.append((moment, loss.item()))
        return [{"step": moment.step, "loss": np.float64(loss.item()), "tensor": loss.detach(), "word": "x"}]


def test_observers_see_each_due_step_and_change_nothing(data: ImageDataset, tmp_path: Path) -> None:
    alone = fit(RUN, data, tmp_path / "alone")
    observer = Meddler()
    observed = fit(RUN, data, tmp_path / "observed", observers={"meddler": observer})
    assert observed.step_losses == alone.step_losses
    assert same_weights(observed.model, alone.model)
    rows = observed.records["meddler"]
    assert [row["step"] for row in rows] == [0, 3, 6]
    # the loss that the observer finds is the loss of that very step: same weights, same batch
    assert [row["loss"] for row in rows] == [alone.step_losses[step] for step in (0, 3, 6)]
    assert [type(row["loss"]) for row in rows] == [float] * 3
    assert [moment.epoch for moment, _ in observer.moments] == [1, 1, 2]
    assert [m.learning_rate for m, _ in observer.moments] == pytest.approx(
        [0.05 * (1 + np.cos(np.pi * step / 8)) / 2 for step in (0, 3, 6)]
    )
    assert all(len(m.images) == len(m.labels) == 16 for m, _ in observer.moments)


def test_observer_with_a_bad_interval(data: ImageDataset, tmp_path: Path) -> None:
    observer = Meddler()
    observer.every = 0
    with pytest.raises(InputError, match="'meddler': every must be a whole number of at least 1, got 0"):
        fit(RUN, data, tmp_path, observers={"meddler": observer})


@pytest.mark.parametrize("pooling", POOLINGS)
def test_divergence_keeps_the_last_good_checkpoint(data: ImageDataset, tmp_path: Path, pooling: str) -> None:
    run = dataclasses.replace(RUN, pooling=pooling, learning_rate=1e30, schedule="constant")
    with pytest.raises(NonFiniteLossError) as caught:
        fit(run, data, tmp_path, checkpoint_every=0)
    state = load_checkpoint(tmp_path)
    assert state is not None
    step = state["progress"]["step"]
    message = str(caught.value)
    assert "\n" not in message
    for part in (run.name, "epoch 1", f"after {step} of 8 steps", "1e+30", "lower learning_rate", shown(tmp_path)):
        assert part in message
    assert 1 <= step < 8
    assert len(state["progress"]["step_losses"]) == step
    for value in state["model"].values():
        assert torch.isfinite(value).all()


def test_non_finite_test_loss_stops(data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secondorder.training.steps.evaluate", lambda *_, **__: Evaluation(float("nan"), 0.1, 0.5))
    with pytest.raises(NonFiniteLossError, match="the test loss is nan at epoch 1, after 4 of 8 steps"):
        fit(RUN, data, tmp_path)
    assert load_checkpoint(tmp_path) is None


def test_dropout_masks_differ_between_steps(data: ImageDataset, tmp_path: Path) -> None:
    masks = []

    def keep(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        masks.append((output == 0).detach().clone())

    class Watcher:
        every = 100

        def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
            dropout = next(m for m in moment.model.modules() if isinstance(m, nn.Dropout))
            dropout.register_forward_hook(keep)
            return []

    fit(dataclasses.replace(RUN, dropout=0.5), data, tmp_path, observers={"watcher": Watcher()})
    training = masks[:4]  # the steps of the first epoch
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(training))


def test_non_finite_state_is_not_saved(data: ImageDataset, tmp_path: Path) -> None:
    class Spoiler:
        every = 2

        def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
            if moment.step == 2:  # batch statistics replace the running ones in training, so the losses stay finite
                moment.model.get_buffer("stem.1.running_mean").fill_(torch.nan)
            return []

    with pytest.raises(NonFiniteLossError, match="a weight, statistic or momentum is not finite at epoch 1, after 3 "):
        fit(RUN, data, tmp_path, observers={"spoiler": Spoiler()}, checkpoint_every=0)
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["progress"]["step"] == 2


def test_other_errors_of_a_head_are_not_taken_for_divergence(
    data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: nn.Module, x: Tensor) -> Tensor:
        raise InputError("no")

    monkeypatch.setattr(type(initial_network(RUN, data).get_submodule("head")), "forward", refuse)
    with pytest.raises(InputError, match="no") as caught:
        fit(RUN, data, tmp_path)
    assert not isinstance(caught.value, NonFiniteLossError)


def test_bfloat16_on_the_cpu(data: ImageDataset, tmp_path: Path) -> None:
    full = fit(RUN, data, tmp_path / "full")
    half = fit(dataclasses.replace(RUN, amp="bfloat16"), data, tmp_path / "half")
    assert half.step_losses != full.step_losses
    assert half.step_losses == pytest.approx(full.step_losses, rel=0.1)  # 8 bits of mantissa, 8 steps apart
    assert {w.dtype for w in half.model.parameters()} == {torch.float32}


def test_channels_last_is_another_order_of_memory_only(data: ImageDataset, tmp_path: Path) -> None:
    seen = []

    class Formats:
        every = 1

        def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
            x = moment.model.get_submodule("stem")(moment.images)  # one image channel has no order, so look after it
            weights = [w for w in moment.model.get_submodule("features").parameters() if w.dim() == 4]
            for tensor in (x, *weights):
                seen.append(tensor.is_contiguous(memory_format=torch.channels_last))
            return []

    plain = fit(RUN, data, tmp_path / "plain")
    run = dataclasses.replace(RUN, channels_last=True, epochs=1)
    fit(run, data, tmp_path / "seen", observers={"formats": Formats()})
    assert seen
    assert all(seen)
    other = fit(dataclasses.replace(RUN, channels_last=True), data, tmp_path / "last")
    assert other.step_losses == pytest.approx(plain.step_losses, rel=1e-3)  # float32 sums in another order, 8 steps


def test_progress_bar_is_shown_and_silenced(
    data: ImageDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dataclasses.replace(RUN, epochs=1)
    fit(run, data, tmp_path / "silent")
    assert capsys.readouterr() == ("", "")
    train(run, data, tmp_path / "shown")
    assert run.name in capsys.readouterr().err


class Split:
    """Images whose logits are the images themselves, under a model that flattens them."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.logits, self.labels = logits, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits[indices][:, None, None], self.labels[indices]


@pytest.mark.parametrize("classes", [3, 12])
def test_evaluation_and_modes(classes: int) -> None:
    logits, labels = torch.randn(23, classes), torch.randint(classes, (23,))
    frozen = nn.BatchNorm1d(classes).eval()
    model = nn.Sequential(nn.Flatten(), nn.Linear(classes, classes), nn.Dropout(0.5), nn.Sequential(frozen)).train()
    frozen.eval()
    nn.init.eye_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    frozen.eps = 1e-12
    result = evaluate(model, Split(logits, labels), batch_size=7)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-5)
    assert result.top1 == (ranks < 1).sum().item() / 23
    assert result.top5 == (ranks < 5).sum().item() / 23
    assert model.training
    assert model[2].training
    assert not frozen.training


# ---------------------------------------------------------------------------------------------------- the settings


def test_run_survives_json_and_tells_every_field_apart() -> None:
    run = dataclasses.replace(RUN, pooling_options={"b": 1, "a": "x"})
    assert run.pooling_options == (("a", "x"), ("b", 1))
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert hash(run) == hash(Run.from_dict(run.to_dict()))
    changes = {
        "backbone": "cifar_resnet8", "pooling": "gap", "dataset": "cifar10", "epochs": 3, "batch_size": 8,
        "learning_rate": 0.1, "schedule": "constant", "momentum": 0.8, "weight_decay": 0.0, "seed": 1,
        "device": "cuda", "amp": "bfloat16", "threads": 2, "reduced_channels": 8, "last_stride": 1, "dropout": 0.1,
        "image_size": 16, "train_limit": 50, "test_limit": 20, "channels_last": True, "pooling_options": (),
        "optimizer_options": {"nesterov": True}, "initial": "x", "frozen": ("stem",), "learning_rates": {"stem": 0.1},
    }  # fmt: skip
    assert {*changes, "optimizer"} == {field.name for field in dataclasses.fields(Run)}
    names = [run.name, *(dataclasses.replace(run, **{field: value}).name for field, value in changes.items())]
    assert len(set(names)) == len(changes) - 1  # device and threads decide about rounding alone
    assert dataclasses.replace(run, learning_rate=1).name == dataclasses.replace(run, learning_rate=1.0).name


def bad_settings() -> Iterator[tuple[str, object]]:
    for name in ("backbone", "pooling", "dataset", "schedule", "optimizer", "amp", "device"):
        yield name, "no-such"
    yield "reduced_channels", -1
    for name in ("epochs", "batch_size", "threads", "last_stride", "image_size", "train_limit"):
        yield from ((name, value) for value in (0, -1, 1.5, True, "1"))
    for name in ("learning_rate", "momentum", "weight_decay", "dropout"):
        yield from ((name, value) for value in (-0.1, float("nan"), float("inf"), "1", True))
    yield from (("learning_rate", 1e39), ("weight_decay", 1e300))  # more than float32 holds
    yield from (("momentum", 1.0), ("dropout", 1.0), ("seed", -1), ("epochs", None), ("learning_rate", None))
    for name in ("backbone", "pooling", "dataset", "schedule", "optimizer", "amp"):
        yield name, np.zeros(2)
    yield from (("frozen", torch.tensor(2)), ("frozen", 3), ("dataset", "own-" + "x" * 60))
    yield from (("channels_last", 1), ("amp", "float16"), ("amp", None), ("device", "cuda:x"), ("backbone", []))
    for name in ("pooling_options", "optimizer_options"):
        yield from ((name, value) for value in (3, {"a": [1]}, ((1, 2),), {"a": math.nan}, [("a", 1), ("a", 2)]))


@pytest.mark.parametrize(("field", "value"), list(bad_settings()))
def test_run_refuses(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(RUN, **{field: value})
    assert "\n" not in str(caught.value)
    named = str(value)[:20] in str(caught.value) or repr(value) in str(caught.value)
    assert named or field.endswith("_options")


def test_options_of_numpy_are_kept_as_plain_values() -> None:
    """A checkpoint is read with weights_only=True, which knows Python's own kinds only."""
    run = dataclasses.replace(RUN, optimizer_options={"eps": np.float64(0.5), "name": np.str_("x")})
    assert [type(value) for _, value in run.optimizer_options] == [float, str]


REFUSED_ARGUMENTS = {
    "run": (3, np.zeros(2), {}),
    "data": (3, (1,), "digits"),
    "network": (3, "x"),
    "observers": (3, torch.tensor(2), {"a": 1}, {1: print}),
    "resume": (1, None, torch.zeros(2), NotImplemented),
    "progress": (0, "no"),
    "checkpoint_every": (None, "1", -1, math.nan, True, 1j, np.zeros(2)),
    "workers": (-1, 1.0, None, True, 10**6, torch.tensor(0.5)),
}


@pytest.mark.parametrize("argument", REFUSED_ARGUMENTS)
def test_train_refuses(data: ImageDataset, tmp_path: Path, argument: str) -> None:
    """In one line that names the argument, before anything is written."""
    for value in REFUSED_ARGUMENTS[argument]:
        run = dataclasses.replace(RUN, backbone="own", pooling="own") if argument == "network" else RUN
        given: dict[str, Any] = {"run": run, "data": data, "folder": tmp_path / "run"} | {argument: value}
        with pytest.raises(InputError, match=f"^{argument} ?") as caught:
            train(**given)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["soap", "muon"])
def test_a_step_beyond_single_precision_is_divergence(data: ImageDataset, tmp_path: Path, optimizer: str) -> None:
    run = dataclasses.replace(RUN, optimizer=optimizer, learning_rate=3e38, weight_decay=0.0, schedule="constant")
    with pytest.raises(
        NonFiniteLossError, match=rf"(the step cannot be taken \({optimizer}|not finite|loss is).*after"
    ):
        fit(run, data, tmp_path)


def test_run_from_a_bad_dictionary() -> None:
    with pytest.raises(InputError, match="settings of a run are 3; they must map"):
        Run.from_dict(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown setting of a run 'colour'"):
        Run.from_dict(RUN.to_dict() | {"colour": 1})
    with pytest.raises(InputError, match="incomplete run: without pooling, dataset, epochs"):
        Run.from_dict({"backbone": "digits_net"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "fashion_mnist"}, "the run is on 'fashion_mnist', the data is 'digits'"),
        ({"train_limit": 60}, "train_limit is 60 but the data has 70"),
        ({"test_limit": 31}, "test_limit is 31 but the data has 30"),
        ({"image_size": 9}, "image_size is 9 but the data has 8"),
        ({"batch_size": 71}, "batch_size is 71 but there are 70 training images"),
    ],
)
def test_data_that_do_not_fit_the_run(data: ImageDataset, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(dataclasses.replace(RUN, **change), data, tmp_path)


def test_device_that_is_not_there(data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(InputError, match=r"device 'cuda' .* not available; available: cpu"):
        fit(dataclasses.replace(RUN, device="cuda"), data, tmp_path)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="amp float16 needs an accelerator"):
        fit(dataclasses.replace(RUN, device="auto", amp="float16"), data, tmp_path)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda:0")
    with pytest.raises(InputError, match="available: cpu, cuda:0, cuda:1"):
        resolve_device("cuda:2")
    with pytest.raises(InputError, match=r"device 'mps' .* available: cpu, cuda:0, cuda:1"):
        resolve_device("mps")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("cuda") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="'cuda:0' is one device but torchrun started 2 processes; choose cuda"):
        resolve_device("cuda:0")


@pytest.mark.parametrize(
    "name", ["foo", "", "cuda:", "cuda:x", "cuda:-1", "cuda:٣", "cpu:0", "CUDA", "auto:1", "x" * 999, 0]
)
def test_names_that_are_no_device(name: Any) -> None:
    """One line of bounded length that says what there is."""
    with pytest.raises(
        InputError, match=r"^device is .*; choose one of: auto, cpu, cuda, mps, xpu.*; available: cpu"
    ) as caught:
        resolve_device(name)
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cuda:99999999999999999999", "xpu:123", "mps:7"])
def test_devices_of_large_numbers(name: str) -> None:
    with pytest.raises(InputError, match=r"^device '.*' .* is not available; available: cpu"):
        resolve_device(name)

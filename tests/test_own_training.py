"""Networks, data and weights of the user's: any map-style data set or loader, any module, frozen parts, rates by group."""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from secondorder.data import ImageDataset, ImageSplit, load_dataset, own_dataset
from secondorder.errors import InputError
from secondorder.networks import network
from secondorder.training import OPTIMIZERS, Moment, Run, Trained, evaluate, initial_network, load_checkpoint, train
from secondorder.training.launch import launch_number
from secondorder.training.parts import DIVISIBLE
from secondorder.training.processes import distributed, is_main_process

RUN = Run("digits_net", "gcp", "digits", epochs=2, batch_size=16, learning_rate=0.05, schedule="constant", threads=1)
OWN = dataclasses.replace(RUN, backbone="own-digits", pooling="own", dataset="own-digits")


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=70, test_limit=30)


class Pairs(Dataset[tuple[Tensor, int]]):
    """A split as somebody else would write it, with noise from all three global generators when asked for."""

    def __init__(self, split: ImageSplit, noise: float = 0.0) -> None:
        self.images, self.targets = split.batch(range(len(split)))
        self.noise = noise
        self.classes = [str(n) for n in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index], int(self.targets[index])
        if self.noise:
            factor = 1 + self.noise * (np.random.rand() + torch.rand(()).item() + torch.randn(1).item())  # noqa: NPY002
            image = image * factor
        return image, label


def build() -> nn.Module:
    return network("digits_net", "gcp", 10, 1)


def pairs(data: ImageDataset, noise: float = 0.0) -> tuple[Pairs, Pairs]:
    return Pairs(data.train, noise), Pairs(data.test)


def fit(run: Run, data: Any, folder: Path, **options: Any) -> Trained:
    if run.backbone.startswith("own"):
        options = {"network": build} | options
    return train(run, data, folder, progress=False, **options)


def same(a: Trained, b: Trained) -> bool:
    first, second = a.model.state_dict(), b.model.state_dict()
    return a.step_losses == b.step_losses and all(torch.equal(first[key], second[key]) for key in first)


def line(call: Callable[[], object]) -> str:
    """The one line of the InputError."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 300
    return message


class Stop:
    """Interrupts before a step."""

    every = 1

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
        if moment.step == self.step:
            raise KeyboardInterrupt
        return []


def resumed(run: Run, data: Any, folder: Path, at: int, **options: Any) -> Trained:
    """The run interrupted before a step and continued."""
    with pytest.raises(KeyboardInterrupt):
        fit(run, data, folder, observers={"stop": Stop(at)}, checkpoint_every=0, **options)
    return fit(run, data, folder, observers={"stop": Stop(10**9)}, resume=True, **options)


# --------------------------------------------------------------------------------------------- data and networks


def loader(dataset: Dataset[Any], size: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=size, **options)


def test_own_data_and_network_give_the_bits_of_the_tables(data: ImageDataset, tmp_path: Path) -> None:
    expected = fit(RUN, data, tmp_path / "table")
    train_set, test_set = pairs(data)
    torch.manual_seed(0)
    instance, generator = build(), torch.Generator().manual_seed(7)
    forms: dict[str, tuple[Any, Any]] = {
        "data sets": ((train_set, test_set), build),
        "tensors": (tuple(TensorDataset(s.images, s.targets) for s in (train_set, test_set)), instance),
        "loaders": ((loader(train_set, shuffle=True, generator=generator), loader(test_set, 7)), build),
        "named": (own_dataset("own-digits", train_set, loader(test_set, shuffle=True)), instance),
        "subsets": ((Subset(train_set, range(70)), Subset(test_set, range(30))), lambda: copy.deepcopy(instance)),
    }
    for name, (given, model) in forms.items():
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        trained = fit(OWN, given, tmp_path / name, network=model)
        assert same(trained, expected), name
        assert [row["test_loss"] for row in trained.history] == [row["test_loss"] for row in expected.history], name
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert all(
        torch.equal(a, b) for a, b in zip(instance.parameters(), initial_network(RUN, data).parameters(), strict=True)
    )
    assert all(parameter.grad is None for parameter in instance.parameters())


@pytest.mark.parametrize("head", ["table", "own"])
def test_own_data_with_a_network_of_the_tables_and_the_reverse(data: ImageDataset, tmp_path: Path, head: str) -> None:
    if head == "table":
        trained = fit(dataclasses.replace(RUN, dataset="own"), pairs(data), tmp_path)
    else:
        trained = fit(dataclasses.replace(RUN, backbone="own-x", pooling="own-gcp"), data, tmp_path, network=build)
    assert trained.step_losses == fit(RUN, data, tmp_path / "expected").step_losses


def test_random_transforms_resume_bit_for_bit_with_any_workers(data: ImageDataset, tmp_path: Path) -> None:
    noisy = pairs(data, 0.1)
    whole = fit(OWN, noisy, tmp_path / "whole")
    assert whole.step_losses != fit(OWN, pairs(data), tmp_path / "quiet").step_losses
    assert same(resumed(OWN, noisy, tmp_path / "resumed", 6), whole)
    assert same(fit(OWN, noisy, tmp_path / "workers", workers=2), whole)
    loaders = loader(noisy[0], shuffle=True, num_workers=1), loader(noisy[1])
    assert same(fit(OWN, loaders, tmp_path / "loader"), whole)
    assert not same(fit(dataclasses.replace(OWN, seed=1), noisy, tmp_path / "seed"), whole)


class Numbered(Dataset[tuple[Tensor, int]]):
    """Images that are their own number."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), float(index)), index % 2


def test_samplers_of_a_loader_decide() -> None:
    data = Numbered()
    generator = torch.Generator().manual_seed(3)
    weights = [0.0] * 6 + [1.0] * 6

    def epochs(source: Any) -> list[list[int]]:
        split = own_dataset("own", source, data).train
        result = []
        for epoch in (0, 1, 0):
            split.set_epoch(5, epoch)
            images, labels = split.batch(split.order(5, epoch))
            result.append([int(x) for x in images[:, 0, 0, 0]])
            assert labels.tolist() == [n % 2 for n in result[-1]]
        assert result[0] == result[2]
        return result

    assert epochs(loader(data, 4))[0] == epochs(loader(data, 4))[1] == list(range(12))
    for shuffled in (
        epochs(data),
        epochs(loader(data, 4, shuffle=True)),
        epochs(loader(data, 4, shuffle=True, generator=generator)),
    ):
        assert sorted(shuffled[0]) == list(range(12))
        assert shuffled[0] != shuffled[1]
    for given in (None, generator):
        sampler = WeightedRandomSampler(weights, 30, generator=given)
        drawn = epochs(loader(data, 4, sampler=sampler))
        assert len(drawn[0]) == 30
        assert min(drawn[0]) >= 6
        assert drawn[0] != drawn[1]
        assert drawn == epochs(loader(data, 4, sampler=sampler))  # whatever was drawn from it before
    chosen = own_dataset("own", data, loader(data, 4, sampler=SubsetRandomSampler([2, 5, 7]))).test
    assert sorted(int(x) for x in chosen.plain(range(3))[0][:, 0, 0, 0]) == [2, 5, 7]


def test_evaluation_takes_splits_data_sets_and_loaders(data: ImageDataset) -> None:
    model, (_, test_set) = build(), pairs(data)
    expected = evaluate(model, data.test, batch_size=7)
    for source in (
        test_set,
        TensorDataset(test_set.images, test_set.targets),
        loader(test_set, 7),
        loader(test_set, 7, num_workers=1),
    ):
        assert evaluate(model, source, batch_size=7) == expected
    assert evaluate(model, loader(test_set, 30, shuffle=True)).loss == pytest.approx(expected.loss)
    tokens = TensorDataset(torch.randint(5, (9, 4)), torch.arange(9) % 3)
    assert evaluate(nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(8, 3)), tokens).top5 == 1


def no_images(*shape: int) -> TensorDataset:
    return TensorDataset(torch.zeros(0, *shape), torch.zeros(0, dtype=torch.int64))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


def samples(image: Any, label: Any, count: int = 20) -> list[Any]:
    return [(image, label)] * count


IMAGE = torch.zeros(1, 8, 8)
LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
BAD_EVALUATIONS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no images": (LINEAR, no_images(1, 8, 8), {}, "has no images"),
    "no batches": (LINEAR, DataLoader(no_images(1, 8, 8), 4), {}, "has no images"),
    "endless": (LINEAR, Endless(), {}, "Endless has no length or indices"),
    "number": (LINEAR, 3, {}, "dataset 3 has no length"),
    "word": (LINEAR, "1", {}, "dataset '1' has no length"),
    "tensor": (LINEAR, torch.tensor(1.0), {}, "dataset tensor.1.. has no length"),
    "mapping": (LINEAR, {"a": 1}, {}, "dataset {'a': 1} has no length"),
    "no model": (3, samples(IMAGE, 1), {}, "model is 3; it must be"),
    "precision": (LINEAR, samples(IMAGE, 1), {"amp": {}}, "unknown amp {}; choose one of: off"),
    "format": (LINEAR, samples(IMAGE, 1), {"channels_last": torch.zeros(2)}, "channels_last must be True or False, got tensor"),
    "batch size": (LINEAR, samples(IMAGE, 1), {"batch_size": 0}, "batch_size must be .*, got 0"),
    "label above": (LINEAR, samples(IMAGE, 10), {}, "labels from 10 to 10 for a network of 10 classes"),
    "label below": (LINEAR, samples(IMAGE, -1), {}, "labels from -1"),
    "real labels": (LINEAR, samples(IMAGE, 0.5), {}, "labels of list are torch.float64"),
    "soft labels": (LINEAR, samples(IMAGE, torch.zeros(10, dtype=torch.int64)), {}, r"labels of list are torch.int64 \[20, 10\]"),
    "bytes": (LINEAR, samples(IMAGE.to(torch.uint8), 1), {}, "images of list are torch.uint8; make them"),
    "no tensor": (LINEAR, samples("x", 1), {}, "images of list are tuple"),
    "object": (LINEAR, samples(object(), 1), {}, "samples of list make no batch"),
    "single": (LINEAR, [IMAGE] * 3, {}, "not .images, labels."),
    "triple": (LINEAR, DataLoader([(IMAGE, 1, 2)] * 3, 2), {}, "a batch of the dataset list is list, not .images, labels."),
    "shapes": (LINEAR, [(torch.zeros(1, n, 8), 0) for n in (8, 9)], {}, "make no batch"),
    "tuple": (type("Two", (nn.Module,), {"forward": lambda self, x: (x, x)})(), samples(IMAGE, 1), {}, "returns tuple"),
    "maps": (nn.Identity(), samples(IMAGE, 1), {}, r"returns torch.float32 of shape \[20, 1, 8, 8\] for 20 images"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EVALUATIONS)
def test_evaluation_refuses(case: str) -> None:
    model, source, options, words = BAD_EVALUATIONS[case]
    with pytest.raises(InputError, match=words):
        evaluate(model, source, **options)
    line(lambda: evaluate(model, source, **options))


class Detached(nn.Linear):
    """Logits without a way back to the weights."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)).detach()


def refused_trainings() -> dict[str, tuple[dict[str, Any], dict[str, Any], str]]:
    """Changes of OWN, options of `train` (data among them), what the line must say."""
    good = samples(IMAGE, 1)
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    uncopied = nn.Linear(64, 10)
    uncopied.extra = torch.zeros(2, requires_grad=True) * 2  # type: ignore[assignment]
    still = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
    return {
        "no network": ({}, {"network": None}, "which is yours: give it with network="),
        "two networks": ({"backbone": "digits_net", "pooling": "gap"}, {}, "use Run.backbone='own-NAME'"),
        "no module": ({}, {"network": lambda: 3}, "network is int; it must be"),
        "lazy": ({}, {"network": lazy}, "parameter 1.weight of the network has no shape yet"),
        "uncopied": ({}, {"network": uncopied}, "cannot be copied .*; pass a function"),
        "nothing to train": ({}, {"network": still}, "no trainable parameter"),
        "no gradient": ({}, {"network": Detached}, "logits depend on no trainable parameter"),
        "no pair": ({}, {"data": good}, "data is list; use load_dataset"),
        "table data": ({"dataset": "digits"}, {}, "the data is a pair of your own; use Run.dataset='own-NAME'"),
        "empty train": ({}, {"data": (no_images(1, 8, 8), good)}, "the train data set TensorDataset has no samples"),
        "empty test": ({}, {"data": (good, no_images(1, 8, 8))}, "the test data set TensorDataset has no samples"),
        "few": ({"batch_size": 21}, {}, "batch_size is 21 but there are 20 training images"),
        "loader": ({}, {"data": (loader(good, 5), good)}, "batch_size is 16 but the training loader has 5"),
        "sampler": (
            {},
            {"data": (loader(good, sampler=DistributedSampler(good, 2, 0)), good)},  # type: ignore[arg-type]
            "has a DistributedSampler; leave it out",
        ),
        "batches": ({}, {"data": (DataLoader(good, batch_size=None), good)}, "has a batch_sampler, or no batches"),  # type: ignore[arg-type]
        "labels": ({}, {"data": (samples(IMAGE, 10), good)}, "labels from 10 to 10 for a network of 10 classes"),
        "no classes": ({"backbone": "digits_net", "pooling": "gap"}, {"network": None}, "use own_dataset.*num_classes"),
        "no initial": ({"initial": "x"}, {}, "begins with the weights 'x': give them with initial="),
        "other initial": ({}, {"initial": {}}, "which the run does not name; use Run.initial=NAME"),
        "absent initial": ({"initial": "x"}, {"initial": "/no/such"}, "no initial weights in /no/such/checkpoint.pt"),
        "few weights": ({"initial": "x"}, {"initial": {"1.weight": torch.zeros(10, 64)}}, "lack 1 of the network's 2"),
        "more weights": ({"initial": "x"}, {"initial": LINEAR.state_dict() | {"a": torch.zeros(1)}}, "have 1 others, such as"),
        "other weights": (
            {"initial": "x"},
            {"initial": nn.Sequential(nn.Flatten(), nn.Linear(64, 9)).state_dict()},
            r"'1.weight' has shape \[9, 64\], the network's \[10, 64\]",
        ),
        "frozen": ({"frozen": ("x",)}, {}, "frozen: the network has no part 'x'; it consists of 0, 1"),
        "rates": ({"learning_rates": {"x": 2}}, {}, "learning_rates: the network has no part 'x'"),
        "one rate": ({"learning_rates": {"1": 2}, "optimizer": "gauss_newton"}, {}, "'gauss_newton' has one learning rate"),
        "folder": ({}, {"folder": "~nosuchuser/x"}, "names a user without a home"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused_trainings())
def test_training_refuses(tmp_path: Path, case: str) -> None:
    change, given, words = refused_trainings()[case]
    good = samples(IMAGE, 1)
    options = {"data": (good, good), "folder": tmp_path, "network": LINEAR, "progress": False} | given
    call = lambda: train(dataclasses.replace(OWN, **change), **options)  # noqa: E731
    with pytest.raises(InputError, match=words):
        call()
    line(call)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pooling": "gcp"}, "backbone 'own-digits' with pooling 'gcp'"),
        ({"backbone": "digits_net"}, "backbone 'digits_net' with pooling 'own'"),
        ({"backbone": "own digits"}, "unknown backbone"),
        ({"dataset": "own-"}, "unknown dataset"),
        ({"dataset": "own-a/b"}, "unknown dataset"),
        ({"dropout": 0.5}, "dropout is 0.5: a network of your own is used as it is"),
        ({"initial": 3}, "initial is 3"),
        ({"initial": "a" * 81}, "initial is"),
        ({"frozen": (1,)}, "frozen is"),
        ({"frozen": 3}, "frozen is 3"),
        ({"learning_rates": {"stem": -1}}, "'stem' .*, got -1"),
        ({"learning_rates": {"stem": "x"}}, "'stem' .*, got 'x'"),
        ({"learning_rates": {"stem": float("nan")}}, "'stem' has nan"),
        ({"learning_rates": {"": 1.0}}, "a factor of 1.0 is without a name"),
        ({"image_size": 99999999999999999999}, "image_size must be .* to 4096, got 99999999999999999999"),
        ({"epochs": 10**400}, "epochs must be a whole number from 1 to 1000000000, got 1000"),
        ({"seed": 2**63}, "seed must be .*, got 9223372036854775808"),
        ({"schedule": "x" * 900}, "unknown schedule 'xxx"),
        ({"dataset": ["x" * 900]}, "unknown dataset"),
        ({"momentum": "x" * 900}, "momentum must be .*, got 'xxx"),
        ({"optimizer_options": {"x" * 900: ["y" * 900]}}, "optimizer_options: 'xxx"),
        ({"optimizer_options": "x" * 900}, "optimizer_options is 'xxx"),
    ],
)
def test_run_refuses_what_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        dataclasses.replace(OWN, **change)
    line(lambda: dataclasses.replace(OWN, **change))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("flowers", {}, "own data is called 'flowers'; call it own"),
        ("own", {"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ("own", {"num_classes": True}, "num_classes must be a whole number of at least 1, got True"),
    ],
)
def test_own_dataset_refuses(name: str, options: dict[str, Any], words: str) -> None:
    assert words in line(lambda: own_dataset(name, samples(IMAGE, 1), samples(IMAGE, 1), **options))  # type: ignore[arg-type]


def test_names_of_runs_are_those_of_kept_results() -> None:
    """Frozen: another name would lose the results and checkpoints that are kept under it."""
    small = dataclasses.replace(RUN, schedule="cosine")
    assert small.name == "digits-digits_net-gcp-cosine-e2-s0-b9a80aa7"
    assert dataclasses.replace(small, pooling_options={"num_iter": 3}).name.endswith("-12539203")
    options = {"optimizer": "kfac", "optimizer_options": {"damping": 0.1}, "dropout": 0.0, "train_limit": 50}
    assert dataclasses.replace(small, **options).name.endswith("-2f60b37e")  # type: ignore[arg-type]
    own = dataclasses.replace(OWN, frozen=["b", "a", "a"], learning_rates={"x": 2}, initial="y")  # type: ignore[arg-type]
    assert own.name.startswith("own-digits-own-digits-own-constant-e2-s0-")
    assert own.frozen == ("a", "b")
    assert Run.from_dict(own.to_dict()) == own


@pytest.mark.parametrize("study", ["landscape", "curvature", "optimisers", "preconditioning", "convergence"])
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_studies_know_no_data_of_the_users(study: str, flags: list[str], refused: Callable[..., None]) -> None:
    refused("unknown data set 'own'", study, "--preset", "smoke", "--dataset", "own", *flags)


# --------------------------------------------------------------------------------------- frozen parts and rates


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_parts_stay_bit_for_bit(data: ImageDataset, tmp_path: Path, optimizer: str) -> None:
    run = dataclasses.replace(RUN, epochs=1, optimizer=optimizer, frozen=("stem", "features.0"), learning_rate=1e-3)
    before = initial_network(run, data).state_dict()
    kept, rest = 0, 0
    for name, value in fit(run, data, tmp_path).model.state_dict().items():
        if name.startswith(("stem.", "features.0.")):
            assert torch.equal(value, before[name]), name
            kept += 1
        else:
            rest += not torch.equal(value, before[name])
    assert kept > 6  # running statistics of batch norm among them
    assert rest > 2


def test_frozen_by_the_user_and_seen_by_observers(data: ImageDataset, tmp_path: Path) -> None:
    model = build()
    model.get_submodule("stem").requires_grad_(False)
    modes: list[tuple[bool, bool]] = []

    class Modes:
        every = 1

        def __call__(self, moment: Moment) -> list[dict[str, float | int | str]]:
            modes.append((moment.model.get_submodule("stem").training, moment.model.get_submodule("features").training))
            return []

    trained = fit(OWN, pairs(data), tmp_path / "a", network=model, observers={"modes": Modes()})
    for before, after in zip(model.stem.parameters(), trained.model.stem.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(before, after)
    assert set(modes) == {(True, True)}
    modes.clear()
    run = dataclasses.replace(OWN, frozen=("stem",))
    whole = fit(run, pairs(data), tmp_path / "b", network=model, observers={"modes": Modes()})
    assert set(modes) == {(False, True)}
    assert same(resumed(run, pairs(data), tmp_path / "c", 5, network=model), whole)


def test_learning_rates_are_those_of_torch_groups(data: ImageDataset, tmp_path: Path) -> None:
    factors = {"classifier": 0.3, "features": 2.0, "features.0.weight": 0.5}
    run = dataclasses.replace(RUN, learning_rates=factors, schedule="cosine")  # type: ignore[arg-type]
    trained = fit(run, data, tmp_path / "a")

    model = initial_network(run, data)
    assert "features.0.weight" in dict(model.named_parameters())
    groups = []
    for name, parameter in model.named_parameters():
        fitting = [part for part in factors if name == part or name.startswith(part + ".")]
        groups.append({"params": [parameter], "factor": factors[max(fitting, key=len)] if fitting else 1.0})
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(8):
        data.train.set_epoch(0, step // 4)
        images, labels = data.train.batch(data.train.order(0, step // 4)[step % 4 * 16 :][:16])
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + np.cos(np.pi * step / 8)) / 2 * group["factor"]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trained.step_losses == pytest.approx(losses, rel=1e-4)  # float32 sums of groups in another order, 8 steps
    assert trained.history[0]["learning_rate"] == pytest.approx(0.05 * (1 + np.cos(np.pi * 3 / 8)) / 2)
    assert same(resumed(run, data, tmp_path / "b", 5), trained)


@pytest.mark.parametrize("optimizer", DIVISIBLE)
def test_every_optimiser_with_groups_keeps_to_their_rates(data: ImageDataset, tmp_path: Path, optimizer: str) -> None:
    run = dataclasses.replace(
        RUN,
        epochs=1,
        optimizer=optimizer,
        learning_rate=1e-3,
        learning_rates={"classifier": 0.0, "stem": 3.0},  # type: ignore[arg-type]
    )
    before = initial_network(run, data).state_dict()
    trained = fit(run, data, tmp_path / "a")
    for name, value in trained.model.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("classifier"), name
    assert same(resumed(run, data, tmp_path / "b", 2), trained)


# ------------------------------------------------------------------------------------- more epochs, initial weights


@pytest.mark.parametrize("optimizer", ["sgd", "kfac"])
def test_a_longer_run_is_continued_bit_for_bit(data: ImageDataset, tmp_path: Path, optimizer: str) -> None:
    run = dataclasses.replace(RUN, optimizer=optimizer, epochs=1, learning_rate=0.01)
    longer = dataclasses.replace(run, epochs=3)
    fit(run, data, tmp_path / "a")
    assert same(fit(longer, data, tmp_path / "a", resume=True), fit(longer, data, tmp_path / "b"))
    message = line(lambda: fit(dataclasses.replace(run, epochs=2), data, tmp_path / "a", resume=True))
    assert "has run epochs = 3, not 2: the 12 steps done would be others" in message


def test_a_stretched_schedule_is_continued_only_where_it_is_the_same(data: ImageDataset, tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, schedule="resnet_norm", epochs=4)  # four epochs at factors 1, 1, 0.1, 0.01
    with pytest.raises(KeyboardInterrupt):
        fit(run, data, tmp_path / "a", observers={"stop": Stop(8)}, checkpoint_every=0)
    never = {"stop": Stop(10**9)}
    for epochs in (2, 3):
        message = line(
            lambda n=epochs: fit(dataclasses.replace(run, epochs=n), data, tmp_path / "a", observers=never, resume=True)
        )  # type: ignore[misc]
        assert "would be others under 'resnet_norm'; use another folder, and initial=" in message
    longer = dataclasses.replace(run, epochs=8)
    continued = fit(longer, data, tmp_path / "a", observers=never, resume=True)
    assert same(continued, fit(longer, data, tmp_path / "b", observers=never))


def test_a_new_run_begins_with_the_weights_of_another(data: ImageDataset, tmp_path: Path) -> None:
    first = fit(RUN, data, tmp_path / "first")
    weights = first.model.state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    run = dataclasses.replace(RUN, initial="first", seed=1, schedule="cosine")
    files = [
        tmp_path / "first",
        tmp_path / "first" / "checkpoint.pt",
        tmp_path / "weights.pth",
        tmp_path / "legacy.pth",
    ]
    expected = fit(run, data, tmp_path / "expected", initial=weights)
    model = initial_network(run, data)
    model.load_state_dict(weights)
    data.train.set_epoch(1, 0)
    images, labels = data.train.batch(data.train.order(1, 0)[:16])
    assert expected.step_losses[0] == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-6)
    for number, file in enumerate(files):
        assert same(fit(run, data, tmp_path / str(number), initial=str(file)), expected)
    state = load_checkpoint(str(tmp_path / "0"))
    assert state is not None
    assert (state["network"]["initial_run"], state["network"]["initial_step"]) == (RUN.name, 8)
    own = dataclasses.replace(OWN, initial="first")
    assert same(
        resumed(own, pairs(data), tmp_path / "own", 5, initial=files[0]),
        fit(own, pairs(data), tmp_path / "o", initial=weights),
    )


def test_checkpoint_of_other_data_networks_and_weights_is_refused(data: ImageDataset, tmp_path: Path) -> None:
    train_set, test_set = pairs(data)
    run = dataclasses.replace(OWN, initial="zero")
    weights = build().state_dict()
    options: dict[str, Any] = {"initial": weights, "resume": True}
    fit(run, (train_set, test_set), tmp_path, **options)
    fit(run, (train_set, test_set), tmp_path, **options)  # the same again is no other
    other_data = Pairs(data.train)
    other_data.images = other_data.images + 1e-3
    relabelled = Pairs(data.test)
    relabelled.targets = (relabelled.targets + 1) % 10
    for given in ((other_data, test_set), (train_set, relabelled)):
        assert "has data samples = " in line(lambda given=given: fit(run, given, tmp_path, **options))  # type: ignore[misc]
    fewer = train_set, Subset(test_set, range(20))
    assert "has data test = 30, not 20" in line(lambda: fit(run, fewer, tmp_path, **options))

    def with_dropout() -> nn.Module:
        model = build()
        model.get_submodule("features").add_module("nothing", nn.Dropout(0.1))
        return model

    networks: list[Callable[[], nn.Module]] = [with_dropout, lambda: build().requires_grad_(True).apply(half_frozen)]
    for other in networks:
        assert "has network structure = " in line(
            lambda other=other: fit(run, (train_set, test_set), tmp_path, network=other, **options)  # type: ignore[misc]
        )
    changed = weights | {"stem.0.weight": weights["stem.0.weight"] + 1}
    assert "has network initial_weights = " in line(
        lambda: fit(run, (train_set, test_set), tmp_path, initial=changed, resume=True)
    )


def half_frozen(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.requires_grad_(False)


# ----------------------------------------------------------------------------------------------- checkpoints by path


def test_checkpoint_is_loaded_by_folder_or_file(
    data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(RUN, data, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for path in (
        tmp_path / "run",
        str(tmp_path / "run"),
        "run",
        "run/checkpoint.pt",
        tmp_path / "run" / "checkpoint.pt",
    ):
        state = load_checkpoint(path)
        assert state is not None
        assert state["progress"]["step"] == 8
    (tmp_path / "run" / "checkpoint.pt").rename(tmp_path / "mine.pt")
    assert load_checkpoint("mine.pt") is not None
    assert load_checkpoint("run") is None
    assert load_checkpoint("absent") is None
    os.mkfifo(tmp_path / "run" / "checkpoint.pt")
    assert "is a FIFO" in line(lambda: load_checkpoint("run"))
    assert "is a FIFO" in line(lambda: fit(RUN, data, tmp_path / "run", resume=True))
    assert "names a user" in line(lambda: load_checkpoint("~nosuchuser"))
    assert "it must be a path" in line(lambda: load_checkpoint(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_weights_are_no_checkpoint(data: ImageDataset, tmp_path: Path, zipped: bool) -> None:
    torch.save(build().state_dict(), tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=zipped)
    for call in (lambda: load_checkpoint(tmp_path), lambda: fit(RUN, data, tmp_path, resume=True)):
        assert "holds weights alone (a state_dict), no training to continue" in line(call)


# --------------------------------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "9" * 5000, "²"])
def test_environment_that_says_no_number(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    for name, text in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv(variable, value)
    if variable.startswith("LOCAL"):
        assert f"{variable} is" in line(lambda: launch_number(variable, 0))
        return
    with pytest.raises(InputError, match=f"{variable} is .*; it must be a whole number"), distributed():
        pass
    if variable != "MASTER_PORT":
        assert f"{variable} is" in line(is_main_process)

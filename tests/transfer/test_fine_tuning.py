"""Training of a detector: the steps of SGD by hand, what stays as it was, and detections in the order of the images."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_scenes import SIDE, write_scenes
from torch import Tensor, nn

from secondorder.data import epoch_order
from secondorder.errors import InputError, NonFiniteError
from secondorder.networks import network
from secondorder.transfer import (
    CocoDataset,
    detection_metrics,
    detections,
    detector,
    find_splits,
    fine_tune,
    read_coco,
    training_transform,
)
from secondorder.transfer.fine_tuning import rate_share


@pytest.fixture(name="data")
def _data(tmp_path: Path) -> CocoDataset:
    return CocoDataset(read_coco(*find_splits(write_scenes(tmp_path / "scenes"))["train"], masks=True), masks=True)


def small_detector(frozen: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    trained = network("cifar_resnet8", "gap", num_classes=10)
    return detector(trained, 2, width=16, hidden=16, roi_size=3, frozen=frozen, anchors=(6, 10, 14), **options)


class MeanLevel(nn.Module):
    """Losses of a detector that can be worked by hand: (w mean level - objects)^2 of each image, in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(5.0))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        each = [(self.w * i.mean() - len(t["boxes"])) ** 2 for i, t in zip(images, targets, strict=True)]
        return {"first": torch.stack(each).mean() * 0.25, "second": torch.stack(each).mean() * 0.75}


def test_the_steps_are_those_of_sgd_with_warm_up_cosine_and_cut_gradients(data: CocoDataset) -> None:
    model = MeanLevel()
    losses = fine_tune(model, data, epochs=3, batch_size=4, learning_rate=0.5, momentum=0.8, weight_decay=0.01, seed=7)
    w, velocity, step, total = 5.0, 0.0, 0, 6
    wanted = []
    levels = [float((image / 255).mean()) for image, _ in (data[n] for n in range(6))]
    for epoch in range(3):
        order, summed = epoch_order(6, 7, epoch).tolist(), 0.0
        for rows in (order[:4], order[4:]):
            summed += sum((w * levels[row] - 2) ** 2 for row in rows)
            gradient = sum(2 * levels[row] * (w * levels[row] - 2) for row in rows) / len(rows)
            gradient *= min(1.0, 10 / abs(gradient))
            rate = 0.5 * min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / total))
            velocity = 0.8 * velocity + gradient + 0.01 * w
            w -= rate * velocity
            step += 1
        wanted.append(summed / 6)
    assert model.w.item() == pytest.approx(w, rel=1e-5)
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_a_long_gradient_is_cut_to_10(data: CocoDataset) -> None:
    model = MeanLevel()
    model.w.data.fill_(1e4)
    before = model.w.item()
    fine_tune(model, data, epochs=1, batch_size=6, learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    assert before - model.w.item() == pytest.approx(10, rel=1e-3)


def test_the_rate_warms_up_in_50_steps_and_ends_at_zero() -> None:
    assert rate_share(0, 1000) == pytest.approx(1 / 50)
    assert rate_share(49, 1000) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.049)))
    assert rate_share(1000, 1000) == pytest.approx(0, abs=1e-15)
    assert rate_share(0, 1) == 1.0


def test_training_lowers_the_loss_and_draws_nothing_from_the_global_generator(data: CocoDataset) -> None:
    data.transform = training_transform(crop=24)
    model = small_detector(task="masks")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    losses = fine_tune(model, data, epochs=6, learning_rate=0.02)
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[-1] < 0.8 * losses[0]
    left = data[0][0]
    data.set_epoch(0, 5)  # the last one
    assert torch.equal(data[0][0], left)
    data.set_epoch(0, 4)
    assert not torch.equal(data[0][0], left)
    again = small_detector(task="masks")
    assert fine_tune(again, data, epochs=6, learning_rate=0.02) == losses
    other = small_detector(task="masks")
    assert fine_tune(other, data, epochs=6, learning_rate=0.02, seed=1) != losses


def test_a_frozen_network_stays_as_it_is(data: CocoDataset) -> None:
    model = small_detector(frozen=True)
    backbone: Any = model.backbone
    parts = nn.ModuleList([backbone.stem, backbone.features])
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    lateral = backbone.fpn.inner_blocks[0][0].weight.clone()
    fine_tune(model, data, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())
    assert not torch.equal(lateral, backbone.fpn.inner_blocks[0][0].weight)


def test_detections_come_in_the_order_of_the_images_and_leave_the_mode(data: CocoDataset) -> None:
    model = small_detector()
    assert model.training
    found = detections(model, data)
    first = next(found)
    assert not model.training
    rest = [*found]
    assert model.training
    model.eval()
    for n, one in enumerate([first, *rest]):
        image = data[n][0].as_subclass(Tensor) / 255
        (wanted,) = model([image])
        assert all(torch.equal(one[key], wanted[key]) for key in wanted)
        assert not any(value.requires_grad for value in one.values())
    assert detection_metrics(data, detections(model, data), masks=False)["boxes"].numbers["AP"] >= 0
    model.train()
    for _ in itertools.islice(half := detections(model, data), 2):
        pass
    half.close()  # type: ignore[attr-defined]
    assert model.training


def test_a_loss_that_is_not_finite_is_named_with_its_step(data: CocoDataset) -> None:
    model = MeanLevel()
    model.w.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"nan in step 1 of epoch 1; use a learning rate below 0\.01"):
        fine_tune(model, data, epochs=1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1, "batch_size": True}, "batch_size"),
        ({"epochs": 1, "learning_rate": 0}, "learning_rate"),
        ({"epochs": 1, "momentum": 1.0}, "momentum"),
        ({"epochs": 1, "weight_decay": -1}, "weight_decay"),
        ({"epochs": 1, "seed": -1}, "seed"),
    ],
)
def test_values_that_cannot_be(given: dict[str, Any], words: str, data: CocoDataset) -> None:
    with pytest.raises(InputError, match=words):
        fine_tune(MeanLevel(), data, **given)


def test_models_and_data_that_cannot_be(data: CocoDataset) -> None:
    model = MeanLevel()
    with pytest.raises(InputError, match="must be a CocoDataset"):
        fine_tune(model, [data[0]], epochs=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be a CocoDataset"):
        next(detections(model, [data[0]]))  # type: ignore[arg-type]
    model.w.requires_grad_(False)
    with pytest.raises(InputError, match="MeanLevel has no parameter to train"):
        fine_tune(model, data, epochs=1)


# What the data set has for it


def test_contrast_is_stretched_between_two_percentiles(data: CocoDataset) -> None:
    annotations = data.annotations
    plain, stretched = CocoDataset(annotations), CocoDataset(annotations, contrast=(10, 99))
    levels = plain[0][0].as_subclass(Tensor).double()
    low, high = torch.quantile(levels.flatten(), torch.tensor([0.1, 0.99], dtype=torch.float64)).tolist()
    wanted = ((levels - low) / (high - low) * 255).clamp(0, 255)
    image = stretched[0][0]
    assert image.dtype == torch.uint8
    assert (image.as_subclass(Tensor).double() - wanted).abs().max() <= 0.5 + 1e-9
    assert type(image) is type(plain[0][0])
    small = CocoDataset(annotations, size=(SIDE // 2, SIDE // 2), contrast=(0, 100))[0][0]
    assert (small.min(), small.max()) == (0, 255)


@pytest.mark.parametrize("contrast", [(1,), 5, (-1, 99), (99, 1), (5, 5), (1, 101), (1, math.nan), ("1", "2")])
def test_percentiles_that_cannot_be(contrast: Any, data: CocoDataset) -> None:
    with pytest.raises(InputError, match="contrast"):
        CocoDataset(data.annotations, contrast=contrast)


def test_a_subset_has_the_images_asked_for(data: CocoDataset) -> None:
    part = data.annotations.subset([4, 1])
    assert [image.id for image in part.images] == [4, 1]
    assert part.objects == (data.annotations.objects[4], data.annotations.objects[1])
    assert part.classes == data.classes
    for indices, words in (([6], "from 0 to 5, got 6"), ([-1], "got -1"), ([], "at least 1 image"), ([1.0], "got 1.0")):
        with pytest.raises(InputError, match=words):
            data.annotations.subset(indices)  # type: ignore[arg-type]

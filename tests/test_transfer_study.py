"""The transfer study: other tasks and probes against the functions called by hand, claims with arithmetic by hand, its page."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, logit
from small_scenes import SIDE, SIZES, write_scenes
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from secondorder.data import ImageDataset, epoch_order, load_dataset, own_dataset
from secondorder.errors import InputError
from secondorder.training import Run, snapshot, train
from secondorder.transfer import (
    CocoDataset,
    FeaturePyramid,
    dense_probe,
    detection_metrics,
    detections,
    few_shot,
    fine_tune,
    linear_probe,
    pooled_features,
    read_coco,
)
from studies.__main__ import main
from studies.engine import dry_run
from studies.engine.plan import Trained
from studies.engine.records import Origins, frame, read_records
from studies.engine.step_costs import StepCost
from studies.engine.study import Results
from studies.judge import judge
from studies.settings import Common
from studies.transfer import claims, detectors, page, probes, targets
from studies.transfer.checks import check_linear, check_scenes
from studies.transfer.study import STUDY, Settings, look_at_data, measurements, plan

RUN = Run("digits_tiny", "gcp", "digits_0_to_4", 1, 32, 0.05, train_limit=96, seed=2, threads=1)
COLOR = Run("cifar_resnet8", "gcp", "own", 1, 4, 0.05, seed=1, threads=1)
SMALL = detectors.Model(16, 16, 3, 40, 16, images=4, test_images=3)


@pytest.fixture(scope="module", name="scenes_root")
def _scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_scenes(root / "scenes")
    return root


@pytest.fixture(scope="module", name="color")
def _color() -> ImageDataset:
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 2
    samples = [(image.float() / 255, int(label)) for image, label in zip(pixels, labels, strict=True)]
    return own_dataset("own", samples, samples, num_classes=2)  # type: ignore[arg-type]


@pytest.fixture(scope="module", name="trained")
def _trained(color: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(COLOR, color, folder, snapshots=(0, 2), progress=False)
    return folder


# Other tasks


def test_windows_are_squares_around_objects_black_beyond_the_edge(scenes_root: Path) -> None:
    (file, images), _ = targets.files_of("scenes", scenes_root)
    annotations = read_coco(file, images)
    data = CocoDataset(annotations)
    pictures, labels = targets.windows(annotations, 20, 20)
    assert labels.tolist() == [0, 1] * 6  # image after image
    for n, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        one = annotations.objects[n // 2][label]
        x, y, w, h = one.box
        assert (w, h) == SIZES[label + 1]
        image = data[n // 2][0].as_subclass(Tensor)
        for i in range(20):
            for j in range(0, 20, 7):
                row, column = round(y + h / 2 - 10) + i, round(x + w / 2 - 10) + j
                inside = 0 <= row < SIDE and 0 <= column < SIDE
                wanted = image[:, row, column] if inside else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(picture[:, i, j], wanted)
    resized, _ = targets.windows(annotations, 20, 5)
    wanted = F.interpolate(pictures.float(), (5, 5), mode="bilinear", antialias=True)
    assert (resized.float() - wanted).abs().max() <= 0.5


def test_windows_are_at_most_so_many_of_a_class(scenes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "OF_A_CLASS", 3)
    (file, images), _ = targets.files_of("scenes", scenes_root)
    _, labels = targets.windows(read_coco(file, images), 8, 8)
    assert labels.bincount().tolist() == [3, 3]


def test_images_of_another_data_set_have_the_shape_of_the_networks_own(color: ImageDataset) -> None:
    task = targets.labelled("digits_5_to_9", None, color)
    own = load_dataset("digits_5_to_9", image_size=16)
    images, labels = own.train.plain(range(len(own.train)))
    assert task.images.shape == (716, 3, 16, 16)
    assert torch.equal(task.images, images.expand(-1, 3, -1, -1))
    assert torch.equal(task.labels, labels)
    assert len(task.test_images) == len(task.test_labels) == 180


@pytest.mark.parametrize("grey", [False, True])
def test_windows_are_normalised_as_the_networks_own_images(grey: bool, color: ImageDataset, scenes_root: Path) -> None:
    like = load_dataset("digits") if grey else color
    task = targets.labelled("scenes", scenes_root, like)
    (file, images), (test_file, test_images) = targets.files_of("scenes", scenes_root)
    for found, given in ((task.images, (file, images)), (task.test_images, (test_file, test_images))):
        pictures, _ = targets.windows(read_coco(*given), targets.Scenes().window, like.image_size)
        unit = pictures.double() / 255
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (like.mean, like.std))
        wanted = ((unit.mean(1, keepdim=True) if grey else unit) - mean) / std
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
        assert grey is (mean[0].item() > 0.3)


def test_training_images_are_drawn_by_the_seed_and_augmented_test_images_are_not(scenes_root: Path) -> None:
    data, test = targets.scenes("scenes", scenes_root, 4, 3, seed=5)
    assert [image.id for image in data.annotations.images] == epoch_order(6, 5, 0)[:4].tolist()
    assert [image.id for image in test.annotations.images] == [0, 2, 5]
    assert data.transform is not None
    assert test.transform is None
    assert len(targets.scenes("scenes", scenes_root, 100, 100, seed=5)[0]) == 6


def test_the_digest_is_of_both_annotation_files(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes").parent
    before = targets.digest_of("scenes", root)
    assert len(before) == 12
    assert targets.digest_of("digits", root) == ""
    file = root / "scenes" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] += 1
    file.write_text(json.dumps(content))
    assert targets.digest_of("scenes", root) != before


def test_splits_that_are_missing_or_do_not_belong_together(tmp_path: Path) -> None:
    alone = write_scenes(tmp_path / "alone", splits=("train2017",)).parent
    with pytest.raises(InputError, match="alone has the splits train2017: one called val or test is needed"):
        targets.files_of("alone", alone)
    split = write_scenes(tmp_path / "split", splits=("train2017", "test", "val2017")).parent
    (_, first), (_, second) = targets.files_of("split", split)
    assert (first.name, second.name) == ("train2017", "val2017")
    file = tmp_path / "split" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "flat"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="split: training and test data have different categories"):
        targets.annotations_of("split", split, masks=False)
    with pytest.raises(InputError, match="--data-root"):
        targets.files_of("scenes", None)
    with pytest.raises(
        InputError, match=r"alon is neither a folder in .* nor a data set of images: digits, .*--data-root"
    ):
        targets.files_of("alon", alone)


def test_a_folder_of_the_users_lies_in_the_data_root_of_the_variable(
    scenes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDORDER_DATA", str(scenes_root))
    assert targets.files_of("scenes", None) == targets.files_of("scenes", scenes_root)


# Probes and detectors, against the functions of the library


def test_a_linear_probe_by_hand(tmp_path: Path) -> None:
    data = load_dataset("digits_0_to_4", limit=96)
    train(RUN, data, tmp_path, snapshots=(3,), progress=False)
    task = targets.labelled("digits_5_to_9", None, data)
    with snapshot(RUN, data, tmp_path / "step-3.pt") as at:
        before = {name: value.clone() for name, value in at.model.state_dict().items()}
        rows = [*probes.measure_linear(at, probes.Linear("digits_5_to_9", "", (2, 5), 3), None)]
        assert all(torch.equal(value, before[name]) for name, value in at.model.state_dict().items())
        body = torch.nn.Sequential(at.model.stem, at.model.features)  # type: ignore[arg-type]
        update_bn([*task.images[targets.evenly_spaced(716, 512)].split(256)], body)
        body.eval()
        with torch.no_grad():
            maps, test_maps = body(task.images), body(task.test_images)
    assert [(row["quantity"], row["setting"]) for row in rows] == [
        (quantity, shots) for quantity in probes.PROBE.values() for shots in (2.0, 5.0)
    ]
    for row, kind, shots in zip(rows, ("mean",) * 2 + ("mean_and_covariance",) * 2, (2, 5) * 2, strict=True):
        features, test = pooled_features(maps, kind), pooled_features(test_maps, kind)
        found = []
        for draw in range(3):
            chosen = few_shot(task.labels, shots, 3 * RUN.seed + draw)
            found.append(linear_probe(features[chosen], task.labels[chosen], test, task.test_labels))
        assert row["value"] == pytest.approx(np.mean(found), abs=0.02)
        assert row["error"] == pytest.approx(np.std(found, ddof=1) / 3**0.5, abs=0.02)
        assert row["value"] > 0.3


def test_a_dense_probe_by_hand(
    color: ImageDataset, trained: Path, scenes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.SCENES, "scenes", targets.Scenes(masks=True))
    with snapshot(COLOR, color, trained / "step-2.pt") as at:
        (row,) = probes.measure_dense(at, probes.Dense("scenes", "", 4, 3), scenes_root)
        data, test = targets.scenes("scenes", scenes_root, 4, 3, COLOR.seed)
        data.transform = None
        pixels, masks = targets.pixels_with_foreground(data)
        test_pixels, test_masks = targets.pixels_with_foreground(test)
        assert masks.sum().item() == 4 * sum(w * h for w, h in SIZES.values())
        seen = [targets.normalised(images, color) for images in (pixels, test_pixels)]
        maps = probes.Maps(at, seen[0])
        train, other = (torch.cat([maps(one[None]) for one in images]) for images in seen)
        found = dense_probe(train, masks, other, test_masks, seed=COLOR.seed)
    assert (row["quantity"], row["setting"]) == (probes.FOREGROUND, 4.0)
    assert row["value"] == pytest.approx(found.intersection_over_union[1], abs=1e-6)
    assert row["value"] > 0.3


@pytest.mark.parametrize("frozen", [False, True])
def test_a_detector_by_hand(
    frozen: bool, color: ImageDataset, trained: Path, scenes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.SCENES, "scenes", targets.Scenes(masks=True, crop=28))
    of = detectors.Detection("scenes", "", 2, frozen, False, not frozen, SMALL)
    fitted: dict[str, Tensor] = {}

    def half_found(model: torch.nn.Module, data: CocoDataset) -> Iterator[dict[str, Tensor]]:
        """All objects of the first image, one of the second, none of others; the weights of the detector are kept."""
        fitted.update(model.state_dict())
        for n, (target, found) in enumerate(zip(data.truth(), detections(model, data), strict=True)):
            assert {*found} == {"boxes", "labels", "masks", "scores"}
            few = {key: target[key].as_subclass(Tensor)[: 2 - n] for key in ("boxes", "labels", "masks")}
            yield few | {"masks": few["masks"][:, None].float(), "scores": torch.ones(len(few["boxes"]))}

    monkeypatch.setattr(detectors, "detections", half_found)
    with snapshot(COLOR, color, trained / "step-2.pt") as at:
        torch.manual_seed(9)
        before = torch.get_rng_state()
        rows = [*detectors.measure_detector(at, of, scenes_root)]
        assert torch.equal(torch.get_rng_state(), before)
        data, test = targets.scenes("scenes", scenes_root, 4, 3, COLOR.seed)
        torch.rand(5)
        made = detectors.build(at, of, data)
        assert made.backbone.frozen is frozen
        torch.manual_seed(COLOR.seed)
        drawn = FeaturePyramid(at.model, SMALL.width).fpn.inner_blocks[0][0].weight
        assert torch.equal(made.backbone.fpn.inner_blocks[0][0].weight, drawn)
        stem, own = made.backbone.stem.state_dict(), at.model.stem.state_dict()  # type: ignore[union-attr, operator]
        same = [torch.equal(value, own[name]) for name, value in stem.items()]
        assert all(same) is not frozen  # batch-norm statistics are renewed
        weights = [name for name, _ in made.backbone.stem.named_parameters()]
        assert all(torch.equal(stem[name], own[name]) for name in weights)
        fine_tune(made, data, epochs=2, learning_rate=SMALL.learning_rate, seed=COLOR.seed)
        wanted = made.state_dict()
        assert [*fitted] == [*wanted]
        assert all(torch.equal(fitted[name], value) for name, value in wanted.items())
        found = detection_metrics(test, half_found(made, test))
    assert 0 < found["boxes"].numbers["AP"] < 1
    arm = ", frozen" if frozen else ""
    by_name = {row["quantity"]: row["value"] for row in rows}
    for task, word in (("boxes", "box"), ("masks", "mask")):
        for name in ("AP", "AP50", "AP75"):
            assert by_name[f"{word} {name}{arm}"] == pytest.approx(found[task].numbers[name], abs=1e-6)
        thirds = [by_name[f"{word} AP, {name} third{arm}"] for name in ("smallest", "middle", "largest")]
        assert thirds == pytest.approx(found[task].size_terciles, abs=1e-6, nan_ok=True)
    assert {row["setting"] for row in rows if "AP" in row["quantity"]} == {2.0}
    pictures = [row for row in rows if row["quantity"] == "picture, scenes"]
    assert len(pictures) == (0 if frozen else 2)


def test_precisions_by_threshold_and_third(
    color: ImageDataset, trained: Path, scenes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide boxes are found as they are, high ones 1.4 of 6 pixels too far to the right: overlap 4.6 / 7.4 = 0.62."""
    _, test = targets.scenes("scenes", scenes_root, 4, 3, seed=0)
    found = []
    for target in test.truth():
        boxes, labels = target["boxes"].as_subclass(Tensor).float(), target["labels"]
        boxes[labels == 2] += torch.tensor([1.4, 0.0, 1.4, 0.0])
        found.append({"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes))})
    monkeypatch.setattr(detectors, "fine_tune", lambda *_, **__: None)
    monkeypatch.setattr(detectors, "detections", lambda *_: iter(found))
    of = detectors.Detection("scenes", "", 2, False, False, False, SMALL)
    with snapshot(COLOR, color, trained / "step-2.pt") as at:
        rows = [*detectors.measure_detector(at, of, scenes_root)]
    values = {row["quantity"]: row["value"] for row in rows}
    assert values["box AP50"] == pytest.approx(1)
    assert values["box AP75"] == pytest.approx(0.5)
    assert values["box AP"] == pytest.approx((1 + 0.3) / 2)  # high ones pass 0.5, 0.55 and 0.6
    assert [*values] == ["box AP", "box AP50", "box AP75", *(f"box AP, {n} third" for n in detectors.THIRDS)]


def test_the_worst_and_the_best_image_are_drawn(scenes_root: Path) -> None:
    """Found are all boxes of image 1, half of those of image 0 and none of image 2."""
    _, test = targets.scenes("scenes", scenes_root, 1, 3, seed=0)
    truth = [*test.truth()]
    found = [
        {"boxes": t["boxes"].float()[:n], "labels": t["labels"][:n], "scores": torch.ones(n)}
        for t, n in zip(truth, (1, 2, 0), strict=True)
    ]
    extremes = detectors.Extremes(test)
    assert [*extremes.watched(found)] == found
    (worst, first), (best, second) = extremes.pictures()
    assert worst == 0
    assert best == pytest.approx(1)
    for uri, n in ((first, 2), (second, 1)):
        picture = page.decoded(uri)
        factor = detectors.TALLEST // SIDE
        assert picture.shape == (SIDE * factor, 2 * SIDE * factor, 3)
        plain = test[n][0].as_subclass(Tensor).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        left, right = (picture[:, half].astype(float) for half in (slice(0, 256), slice(256, 512)))
        changed = [np.abs(half - plain.permute(1, 2, 0).numpy()).max(-1) > 90 for half in (left, right)]
        assert changed[0].sum() > 100  # the boxes of the truth
        assert (changed[1].sum() > 100) == (n == 1)


def test_images_of_several_sizes_have_no_dense_probe(scenes_root: Path) -> None:
    _, test = targets.scenes("scenes", scenes_root, 1, 3, seed=0)
    test.masks = True

    class Sizes(CocoDataset):
        def __getitem__(self, index: int) -> Any:
            image, target = super().__getitem__(index)
            return image[:, : SIDE - index], target

    sizes = Sizes(read_coco(*targets.files_of("scenes", scenes_root)[0], masks=True), masks=True)
    with pytest.raises(InputError, match="needs images of one size"):
        targets.pixels_with_foreground(sizes)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_dry_run_needs_no_data(
    frozen: bool, color: ImageDataset, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.SCENES, "scenes", targets.Scenes(masks=True, size=(20, 40)))
    of = detectors.Detection("scenes", "", 3, frozen, False, False, replace(SMALL, images=10, test_images=6))
    assert detectors.dry_steps(of) == 32
    with snapshot(COLOR, color, trained / "step-2.pt") as at:
        (row,) = detectors.measure_dry(at, of)
    assert 0 < row["value"] < 100


# Claims


def records(scores: dict[str, dict[tuple[str, str, float], float]], accuracy: dict[str, float], seeds: int = 4) -> Any:
    """FAKE records: pretraining ("" for none) -> (quantity, data, setting) -> value, with a little scatter between seeds."""
    rows = []
    for head, values in scores.items():
        for seed in range(seeds):
            labels = {"network": "n", "dataset": "d", "head": head or "gap", "trained_under": head, "seed": seed}
            if head in accuracy:
                last = {"quantity": "test_top1", "index": 2, "value": accuracy[head] + 0.01 * seed}
                rows += [labels | last, labels | last | {"index": 1, "value": 0.1}]
            shift = 0.002 * (seed - (seeds - 1) / 2)
            rows += [
                labels | {"quantity": quantity, "layer": data, "setting": setting, "value": value + shift}
                for (quantity, data, setting), value in values.items()
            ]
    return frame("transfer", rows, {}, "fake")


def boxes(*values: float) -> dict[tuple[str, str, float], float]:
    """Box AP on two data sets with two budgets each."""
    cells = [("box AP", data, setting) for data in ("a", "b") for setting in (2.0, 4.0)]
    return dict(zip(cells, values, strict=True))


@pytest.mark.parametrize(("gain", "outcome"), [(0.02, "supported"), (0.0, "no effect"), (-0.02, "contradicted")])
def test_the_claim_is_about_the_mean_precision_of_boxes(gain: float, outcome: str) -> None:
    gap = (0.1, 0.2, 0.3, 0.4)
    fake = records({"gap": boxes(*gap), "gcp": boxes(*(value + gain for value in gap))}, {})
    assert claims.score(fake, "box AP").groupby("trained_under").value.mean().tolist() == pytest.approx(
        [0.25, 0.25 + gain]
    )
    judged = judge([STUDY.claims[0]], fake)[0]
    assert judged.outcome == outcome
    assert judged.estimate is not None
    assert judged.estimate.value == pytest.approx(gain, abs=1e-6)


def test_a_network_without_a_budget_has_no_score() -> None:
    fake = records({"gap": boxes(0.1, 0.2, 0.3, 0.4), "gcp": boxes(0.1, 0.2, 0.3, 0.4)}, {})
    lacks = (fake.trained_under == "gcp") & (fake.seed == 1) & (fake.layer == "b") & (fake.setting == 4)
    found = claims.score(fake[~lacks], "box AP")
    assert len(found) == 7
    assert found[found.trained_under == "gcp"].seed.tolist() == [0, 2, 3]
    assert claims.score(fake, "box AP", "a").value.mean() == pytest.approx(0.15)
    assert claims.score(fake, "mask AP").empty


def test_two_values_of_one_network_are_refused() -> None:
    """As of annotations that changed between two commands: the table keeps what it has."""
    fake = records({"gap": boxes(0.1, 0.2, 0.3, 0.4)}, {})
    again = fake[(fake.layer == "b") & (fake.setting == 4)]
    with pytest.raises(InputError, match=r"b has two values of box AP for one network, .*--fresh"):
        claims.score(pd.concat([fake, again]), "box AP")


def test_at_matched_accuracy_only_what_it_does_not_explain_is_left() -> None:
    """logit(AP) = 0.5 logit(accuracy) - 2 for every head, and one more for the covariance; random networks have no accuracy."""
    rows = []
    for head, accuracies in {"gap": (0.6, 0.65, 0.7), "gcp": (0.7, 0.72, 0.77), "covariance": (0.66, 0.6, 0.7)}.items():
        for seed, accuracy in enumerate(accuracies):
            labels = {"network": "n", "dataset": "d", "head": head, "trained_under": head, "seed": seed}
            value = expit(0.5 * logit(accuracy) - 2 + (head == "covariance"))
            rows.append(labels | {"quantity": "test_top1", "index": 1, "value": accuracy})
            rows.append(labels | {"quantity": "box AP", "layer": "a", "setting": 2.0, "value": value})
    rows.append(rows[1] | {"trained_under": "", "value": 0.2})
    found = claims.at_matched_accuracy(frame("transfer", rows, {}, "fake"), "box AP")
    values = found.set_index(["trained_under", "seed"]).value.map(logit)
    assert "" not in values
    assert values["gcp"].to_numpy() == pytest.approx(np.full(3, values["gap", 0]))
    assert values["covariance"].to_numpy() == pytest.approx(np.full(3, 1 + values["gap", 0]))


# The page


def all_parts(accuracy: float = 0.7) -> Any:
    """Precisions of GCP are 0.04 higher; between seeds 0.01 of accuracy goes with 0.002 of precision."""
    scores = {}
    for place, head in enumerate(("gap", "gap_lifted", "gcp", "")):
        scores[head] = boxes(*(0.1 + 0.02 * place + 0.05 * n for n in range(4)))
        for arm in ("mask AP", "box AP, frozen", "mask AP, frozen", "box AP50", "box AP, smallest third"):
            scores[head] |= {(arm, data, s): 0.2 + 0.01 * place for _, data, s in boxes(0, 0, 0, 0)}
        scores[head] |= {("probe accuracy", "digits", s): 0.5 + 0.02 * place for s in (2.0, 5.0)}
        scores[head] |= {("foreground IoU", "a", 10.0): 0.7 + 0.01 * place}
    fake = records(scores, {"gap": 0.6, "gap_lifted": 0.65, "gcp": accuracy})
    uri = detectors.data_uri(torch.full((3, 20, 50), 128, dtype=torch.uint8))
    row = fake.iloc[[0]]
    shown = [
        row.assign(quantity="picture, a", layer=uri, value=0.5, head=h, trained_under=h, index=i)
        for h in ("gap", "gcp")
        for i in (0, 1)
    ]
    return pd.concat([fake, *shown], ignore_index=True)


def test_the_page_of_all_parts() -> None:
    fake = all_parts()
    origins = Origins("transfer", asdict(replace(STUDY.presets["cifar10"], control_seeds=2)))
    folds = page.folds(Results(fake, origins, judge(STUDY.claims, fake)))
    assert [fold.heading for fold in folds] == ["transfers", "Probes of frozen features"]
    detection, probe = folds
    assert detection.judged[0].outcome == "supported"
    assert detection.sentences[0] == (
        "Box AP of fine-tuned detectors in percent, mean over data sets and budgets: 17.5 (GAP), 21.5 (GCP), 23.5 (random)."
    )
    assert detection.sentences[1].startswith("What pretraining adds to initial weights, as a fraction: GAP −0.0600 [")
    assert ", GCP −0.02000 [" in detection.sentences[1]
    assert detection.sentences[2].startswith("Better classification alone does not explain it")
    fake = all_parts(0.9)
    first, _ = page.folds(Results(fake, origins, judge(STUDY.claims, fake)))
    assert first.judged[0].outcome == "supported"
    assert first.sentences[2].startswith("It cannot be told apart from an effect of classification accuracy")
    assert [picture.name for picture in detection.pictures] == ["transfer_budgets", "transfer_pictures"]
    assert [picture.name for picture in probe.pictures] == ["transfer_probes", "transfer_accuracy"]
    table = detection.tables[0].data
    assert table.columns.tolist()[:3] == ["data", "quantity", "epochs"]
    of_ap50 = table[table.quantity == "box AP50"]
    assert of_ap50.epochs.tolist() == [4.0, 4.0]  # the largest budget alone
    assert len(table[table.quantity == "box AP"]) == 4
    assert "8 epochs" not in detection.method[0]
    assert "random flips, random crops of 96 pixels (nuclei)." in detection.method[1]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("ability", "words"), [(0.0, "of the same sign is left"), (0.5, "has zero in it"), (1.0, "explains it, and more")]
)
def test_what_is_said_of_classification(ability: float, words: str, sign: int) -> None:
    """logit(AP) is 0.1 apart and rises by 0.2 logit(accuracy), which is `ability` apart: 0.1 - 0.2 ability is left."""
    rows = []
    for head, place in (("gap", 0), ("gcp", sign)):
        for seed in range(8):
            x = 0.1 * (seed % 4)
            values = {"test_top1": x + ability * place, "box AP": -1 + 0.1 * place + 0.2 * x + 0.002 * (-1) ** seed}
            labels = {"network": "n", "dataset": "d", "head": head, "trained_under": head, "seed": seed}
            rows += [
                labels | {"quantity": name, "index": 1, "setting": 2.0, "value": expit(y)} for name, y in values.items()
            ]
    fake = frame("transfer", rows, {}, "fake")
    results = Results(fake, Origins("transfer", asdict(STUDY.presets["cifar10"])), judge(STUDY.claims, fake))
    assert words in page.folds(results)[0].sentences[1]


def test_the_page_without_detectors_says_so() -> None:
    fake = all_parts()
    fake = fake[~fake.quantity.str.contains("AP|picture")]
    folds = page.folds(Results(fake, Origins("transfer", asdict(Settings())), judge(STUDY.claims, fake)))
    assert folds[0].judged[0].outcome == "not measured"
    assert "no detector was trained" in folds[0].judged[0].sentence
    assert folds[0].sentences == []
    assert [table.name for table in folds[0].tables] == ["transfer_published"]
    few = fake[~fake.quantity.isin(claims.PROBES)]
    assert len(page.folds(Results(few, Origins("transfer", asdict(Settings())), judge(STUDY.claims, few)))) == 1


# Settings and the command


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"linear": ()}, "no other task: give --linear, --dense or --detection"),
        ({"linear": ("digits", "digits")}, "--linear digits digits"),
        ({"shots": (0,)}, "--shots 0"),
        ({"shots": ()}, "--shots"),
        ({"budgets": (2, 2)}, "--budgets 2 2"),
        ({"draws": 0}, "--draws 0"),
        ({"dense_images": 1}, "--dense-images 1: at least 2"),
        ({"detector": replace(SMALL, images=1)}, "--detector.images 1: at least 2"),
        ({"heads": ()}, "--heads"),
        ({"detector": replace(SMALL, adaptation="gcp")}, "adaptation"),
        ({"detector": replace(SMALL, images=0)}, "--detector.images 0"),
        ({"detector": replace(SMALL, learning_rate=float("nan"))}, "--detector.learning-rate nan"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Settings(**settings)


def test_what_a_network_cannot_do() -> None:
    def first(**changes: Any) -> Any:
        return next(plan(STUDY.context(Common(preset="smoke"), replace(STUDY.presets["smoke"], **changes))))

    with pytest.raises(InputError, match="--dense bccd: a dense probe needs masks"):
        first(dense=("bccd",))
    with pytest.raises(
        InputError, match="--dataset digits_0_to_4: detectors and dense probes need a network for images of"
    ):
        first(detection=("nuclei",))


def changed(root: Path, name: str, split: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """The data root with a folder whose annotations are changed."""
    file = write_scenes(root / name) / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return root


def crowds(content: dict[str, Any]) -> None:
    content["annotations"] = [one | {"iscrowd": 1} for one in content["annotations"]]


def low_alone(content: dict[str, Any]) -> None:
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 1]


def one_class(content: dict[str, Any]) -> None:
    low_alone(content)
    del content["categories"][1]


def outside(content: dict[str, Any]) -> None:
    content["annotations"][0]["bbox"] = [30, 30, 9, 9]


@pytest.mark.parametrize(
    ("split", "change", "shots", "words"),
    [
        ("train", crowds, 1, "class 'low' has 0 training samples .*, fewer than --shots 1"),
        ("train", low_alone, 1, "class 'high' has 0 training samples"),
        ("train", low_alone, 7, "class 'high' has 0"),
        ("val", low_alone, 7, "class 'low' has 6 training samples .*, fewer than --shots 7"),
        ("val", crowds, 1, r"instances_val\.json has no object but crowds to test on"),
        ("val", outside, 1, r"annotation 0 has the bbox .* outside of image 0"),
    ],
)
def test_a_folder_that_a_linear_probe_cannot_use(
    split: str, change: Callable[[dict[str, Any]], None], shots: int, words: str, tmp_path: Path
) -> None:
    root = changed(tmp_path, "own", split, change)
    with pytest.raises(InputError, match=words):
        check_linear("own", root, shots)


def test_classes_that_a_linear_probe_cannot_use(tmp_path: Path) -> None:
    check_linear("digits_5_to_9", None, 100)
    with pytest.raises(InputError, match="--linear digits_5_to_9: class '3' has 139 training samples"):
        check_linear("digits_5_to_9", None, 140)
    for split in ("train", "val"):
        root = changed(tmp_path / split, "own", split, one_class)
    file = tmp_path / "train" / "own" / "annotations" / "instances_train.json"
    (tmp_path / "val" / "own" / "annotations" / "instances_train.json").write_text(file.read_text())
    with pytest.raises(InputError, match="--linear own: its only class is low; a linear probe needs two"):
        check_linear("own", root, 1)
    with pytest.raises(InputError, match="data root"):
        check_linear("cifar10", tmp_path / "nowhere", 1)


def test_scenes_that_no_detector_can_use(scenes_root: Path, tmp_path: Path) -> None:
    check_scenes("detection", "scenes", scenes_root, False, 1)
    with pytest.raises(InputError, match="--detection digits: images with a class each; a folder in COCO format"):
        check_scenes("detection", "digits", scenes_root, False, 1)
    write_scenes(tmp_path / "few", images=1)
    with pytest.raises(InputError, match=r"--dense few: instances_train\.json has 1 image; 2 to train on"):
        check_scenes("dense", "few", tmp_path, True, 1)
    for split, words in (("train", "none of the 6 training images"), ("val", "none of the 3 test images")):
        root = changed(tmp_path / split, "own", split, crowds)
        with pytest.raises(InputError, match=f"--detection own: {words} has an object that is no crowd"):
            check_scenes("detection", "own", root, False, 3)


def test_data_are_looked_at_before_a_network_is_trained(tmp_path: Path) -> None:
    root = changed(tmp_path, "own", "train", low_alone)
    for name, words in (
        ("linear", "--linear own: class 'high'"),
        ("dense", "--dense digits"),
        ("detection", "--detection d"),
    ):
        given = {"linear": (), name: ("own" if name == "linear" else "digits",)}
        with pytest.raises(InputError, match=words):
            look_at_data(Settings(**given), root)  # type: ignore[arg-type]


def test_what_may_grow_leaves_the_keys_of_the_rest() -> None:
    """Else a table would keep two values of one thing."""
    given = {"linear": ("a",), "dense": ("b",), "detection": ("c",)}
    settings = Settings(**given)  # type: ignore[arg-type]

    def described(of: Settings) -> list[Any]:
        return [one.described for one in measurements(of, None, dict.fromkeys("abcd", ""), pictures=True)]

    for name in STUDY.may_grow:
        value = getattr(settings, name)
        changes: dict[str, Any] = {name: value + 1 if isinstance(value, int) else (*value, "d")}
        larger = replace(settings, **changes)
        assert all(one in described(larger) for one in described(settings))
    assert {"linear", "dense", "detection"} < {*STUDY.may_grow}


def test_initial_weights_are_adapted_as_the_network_that_began_from_them() -> None:
    paper = STUDY.presets["paper"]
    for stride, heads in (("same", {"gap": True, "gcp": True}), ("published", {"gap": False, "gcp": True})):
        settings = replace(paper, training=replace(paper.training, stride=stride))
        tasks = next(plan(STUDY.context(Common(preset="paper", dry_run=True), settings)))
        for task in tasks:
            assert isinstance(task, Trained)
            wanted = [m.settings.adapted for _, m in task.at if m.name == "detector"]
            head = task.subject.run.pooling
            assert wanted == [heads[head]] * (4 if head == "gap" else 2)


def test_a_dry_run_counts_networks_once_whatever_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    step = StepCost(1.0, 8, 1, 1.0, 1.0, 1.0, 1)
    monkeypatch.setattr(dry_run, "cost_of", lambda task, amp: dry_run.Cost(30.0, 6.0, step, task.subject.run.pooling))
    context = STUDY.context(Common(preset="cifar10", dry_run=True), STUDY.presets["cifar10"])
    assert [*dry_run.dry_run({"transfer": (STUDY, context)})][:5] == [
        "transfer: 5 times gap",
        "transfer: 2 times gap_lifted",
        "transfer: 2 times covariance",
        "transfer: 5 times gcp",
        "transfer: 5 seeds of 4 networks: about 0.1 h of one job, 0.1 h with 2 side by side",
    ]


@pytest.mark.parametrize(("preset", "names"), [("quick", {"linear probe"}), ("cifar10", {"linear probe", "detector"}),
                                               ("paper", {"detector"})])  # fmt: skip
def test_a_dry_run_has_no_probe_where_the_study_has_none(preset: str, names: set[str]) -> None:
    tasks = next(plan(STUDY.context(Common(preset=preset, dry_run=True), STUDY.presets[preset])))  # type: ignore[arg-type]
    assert {measurement.name for task in tasks for _, measurement in task.at} == names  # type: ignore[union-attr]


def test_initial_weights_are_measured_once_and_the_key_knows_no_place(scenes_root: Path) -> None:
    settings = replace(STUDY.presets["smoke"], linear=("digits_5_to_9", "scenes"))
    keys = []
    for root in (scenes_root, scenes_root / "." / ".." / scenes_root.name):
        tasks = next(plan(STUDY.context(Common(preset="smoke", data_root=root), settings)))
        wanted = [{step for step, _ in task.at} for task in tasks]
        total = settings.training.steps(Common(preset="smoke"))
        assert wanted == [{0, total}, {total}] * 2
        keys.append([key for task in tasks for key, *_ in task.wanted()])
    assert keys[0] == keys[1]


def test_the_command_with_a_folder_of_the_users(
    scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["transfer", "--preset", "smoke", "--seeds", "1", "--linear", "scenes", "--shots", "2", "--processes", "1"]
    flags += ["--no-progress", "--data-root", str(scenes_root), "--out", str(tmp_path / "out")]
    assert main(flags) == 0
    table, origins = read_records(tmp_path / "out", "transfer")
    probed = table[table.layer == "scenes"]
    assert {*probed.trained_under} == {"gap", "gcp", ""}
    assert probed.value.between(0, 1).all()
    assert len(origins.measurements) == 5  # two histories, probes of three networks
    capsys.readouterr()
    assert main([*flags, "--linear", "cells"]) == 2
    assert "cells" in capsys.readouterr().err

"""Mistakes and classes of networks on streams of images: those of the whole set at once, and no trace in the network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from secondorder.data import ImageArray, ImageFiles, Normalisation, PaddedCrop, load_dataset, own_dataset
from secondorder.errors import InputError, NonFiniteError
from secondorder.robustness import (
    array_batches,
    corrupt,
    corruption_error_rates,
    corruption_mistakes,
    error_rate,
    evaluation,
    flip_probability,
    frame_classes,
    mistakes,
    perturb,
    sequence_classes,
    sequence_stability,
    split_batches,
    stability_of,
    top5_distance,
    tracking,
)

N, CLASSES = 22, 10
NORMALISATION = Normalisation(mean=(0.3, 0.4, 0.5), std=(0.2, 0.25, 0.3))
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 3, 12, 12), dtype=np.uint8))
LABELS = torch.arange(N) % CLASSES


class Network(nn.Module):
    """A layer with batch statistics, which are wrong in training mode, and random weights."""

    def __init__(self, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.normalise = nn.BatchNorm2d(3, dtype=dtype)
        self.weight = nn.Parameter(
            torch.randn(3 * 12 * 12, classes, generator=generator, dtype=torch.float64).to(dtype)
        )
        self.dropout = nn.Dropout(0.5).eval()
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen.append(len(images))
        return self.normalise(images).flatten(1) @ self.weight


def by_hand(images: Tensor, classes: int = CLASSES) -> Tensor:
    """Logits of images uint8 [N, 3, 12, 12] of the network above, float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (NORMALISATION.mean, NORMALISATION.std))
    standardised = (images.double() / 255 - mean) / std / (1 + 1e-5) ** 0.5
    return standardised.flatten(1) @ Network(classes, torch.float64).weight.detach()


def test_corrupted_batches_give_the_mistakes_of_the_whole_set() -> None:
    network = Network(dtype=torch.float64)
    wrong = corruption_mistakes(network, array_batches(IMAGES, LABELS, 8), "gaussian_noise", NORMALISATION, seed=2)
    assert network.seen == [8] * 5 + [8] * 5 + [6] * 5
    for severity, row in enumerate(wrong, 1):
        noisy = corrupt(IMAGES, "gaussian_noise", severity, seed=2)
        assert torch.equal(row, by_hand(noisy).argmax(1) != LABELS)
    rates = corruption_error_rates(network, array_batches(IMAGES, LABELS), "gaussian_noise", NORMALISATION, seed=2)
    assert rates == pytest.approx(wrong.double().mean(1).tolist())
    assert 0 < min(rates) <= max(rates) < 1
    assert network.training
    assert not network.dropout.training


def test_clean_images_and_severity_zero() -> None:
    network = Network(dtype=torch.float64)
    wrong = mistakes(network, array_batches(IMAGES, LABELS, 5), NORMALISATION)
    assert torch.equal(wrong, by_hand(IMAGES).argmax(1) != LABELS)
    assert error_rate(network, [(IMAGES, LABELS)], NORMALISATION) == pytest.approx(float(wrong.double().mean()))
    clean = corruption_mistakes(network, [(IMAGES, LABELS)], "fog", NORMALISATION, severities=[0, 3])
    assert torch.equal(clean[0], wrong)
    assert not torch.equal(clean[1], wrong)


def test_a_subset_has_the_pixels_of_the_whole() -> None:
    network, chosen = Network(), torch.tensor([17, 3, 8, 20])
    whole = corruption_mistakes(network, array_batches(IMAGES, LABELS), "impulse_noise", NORMALISATION)
    batches = array_batches(IMAGES[chosen], LABELS[chosen], 3)
    assert torch.equal(
        corruption_mistakes(network, batches, "impulse_noise", NORMALISATION, indices=chosen), whole[:, chosen]
    )
    classes = sequence_classes(network, array_batches(IMAGES, LABELS), "gaussian_noise", NORMALISATION)
    batches = array_batches(IMAGES[chosen], LABELS[chosen], 3)
    some = sequence_classes(network, batches, "gaussian_noise", NORMALISATION, indices=chosen.tolist())
    assert torch.equal(some, classes[chosen])


def test_classes_along_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def recorded(images: Tensor, *arguments: Any, **options: Any) -> Tensor:
        made.append(len(images))
        return perturb(images, *arguments, **options)

    monkeypatch.setattr(tracking, "perturb", recorded)
    monkeypatch.setattr(tracking, "FRAME_VALUES", 3 * 40 * IMAGES[0].numel())
    network = Network(dtype=torch.float64)
    classes = sequence_classes(network, array_batches(IMAGES, LABELS, 8), "rotate", NORMALISATION, batch_size=50)
    assert made == [3, 3, 2, 3, 3, 2, 3, 3]
    assert max(network.seen) == 50
    logits = by_hand(perturb(IMAGES, "rotate").flatten(0, 1)).unflatten(0, (N, 31))
    assert torch.equal(classes, logits.topk(5).indices.int())
    for difficulty in (1, 3):
        stability = stability_of(classes, "rotate", difficulty)
        assert stability.flip_probability == pytest.approx(flip_probability(logits.argmax(2), distance=difficulty))
        assert stability.top5_distance == pytest.approx(top5_distance(logits, distance=difficulty))
    assert len(stability.flips) == N
    assert torch.equal(frame_classes(network, [perturb(IMAGES, "rotate")], NORMALISATION), classes)


def test_noises_are_compared_with_the_clean_frame() -> None:
    stability = sequence_stability(Network(), [(IMAGES, LABELS)], "shot_noise", NORMALISATION, difficulty=3)
    logits = by_hand(perturb(IMAGES, "shot_noise", 3).flatten(0, 1)).unflatten(0, (N, 31))
    assert 0 < stability.flip_probability < 1
    assert stability.flip_probability == pytest.approx(flip_probability(logits.argmax(2), "first"))
    assert stability.top5_distance == pytest.approx(top5_distance(logits, "first"))


def test_few_classes_have_no_top5_distance() -> None:
    stability = sequence_stability(Network(5), [(IMAGES, LABELS % 5)], "translate", NORMALISATION, difficulty=2)
    logits = by_hand(perturb(IMAGES, "translate").flatten(0, 1), 5).unflatten(0, (N, 16))
    assert stability.flip_probability == pytest.approx(flip_probability(logits.argmax(2), distance=2))
    assert stability.top5_distance is None


def test_digits_have_their_white_at_255() -> None:
    digits = load_dataset("digits", test_limit=20).test
    assert isinstance(digits, ImageArray)
    images, labels = (torch.cat(t) for t in zip(*split_batches(digits, 7), strict=True))
    levels = (digits.images.int() * 255 + 8) // 16  # 16 is white
    assert torch.equal(images, levels.to(torch.uint8))
    assert torch.equal(labels, digits.labels)
    few, _ = next(split_batches(digits, indices=[4, 2]))
    assert torch.equal(few, images[[4, 2]])


def test_arrays_are_resized_and_never_augmented() -> None:
    plain = ImageArray(IMAGES, LABELS, NORMALISATION, PaddedCrop())
    assert torch.equal(next(split_batches(plain))[0], IMAGES)
    large = ImageArray(IMAGES, LABELS, NORMALISATION, image_size=20)
    wanted = F.interpolate(IMAGES.double(), size=(20, 20), mode="bilinear", antialias=True)
    found = next(split_batches(large))[0]
    assert found.dtype == torch.uint8
    assert (found.double() - wanted).abs().max() < 0.502


def test_files_are_decoded_and_cropped(tmp_path: Path) -> None:
    files = []
    for n in range(3):
        files.append(tmp_path / f"{n}.png")
        pixels = np.random.default_rng(n).integers(0, 256, (16 + n, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(files[-1])
    split = ImageFiles(files, torch.tensor([2, 0, 1]), NORMALISATION, image_size=14)
    (images, labels), (rest, _) = split_batches(split, 2)
    assert labels.tolist() == [2, 0]
    assert (len(images), len(rest)) == (2, 1)
    standardised = split.batch([0, 1])[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (NORMALISATION.mean, NORMALISATION.std))
    assert ((standardised * std + mean) * 255 - images).abs().max() < 1e-3


def test_a_network_is_left_in_its_modes_when_it_fails() -> None:
    network = Network()
    with pytest.raises(InputError, match=r"Network on images \[22, 3, 10, 10\] fails"):
        mistakes(network, [(IMAGES[..., :10, :10], LABELS)], NORMALISATION)
    network.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="logits of Network are not finite"):
        mistakes(network, [(IMAGES, LABELS)], NORMALISATION)
    assert network.training
    assert not network.dropout.training


def batches(images: Any = IMAGES, labels: Any = LABELS) -> Iterator[Any]:
    yield images, labels


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "network"}, "must be a torch.nn.Module"),
        ({"batches": []}, "no images; at least 1"),
        ({"batches": IMAGES}, "array_batches"),
        ({"batches": [IMAGES]}, "a batch is 'Tensor'"),
        ({"batches": batches(IMAGES / 255)}, "images are torch.float32 .*uint8"),
        ({"batches": batches(IMAGES[0])}, r"shape \[3, 12, 12\]"),
        ({"batches": batches(labels=LABELS[1:])}, r"labels are torch.int64 \[21\]"),
        ({"batches": batches(labels=LABELS / 1)}, "labels are torch.float32"),
        ({"batches": batches(labels=LABELS + 1)}, "labels from 1 to 10 for a network of 10 classes"),
        ({"batches": batches(IMAGES[:, :1])}, "1 channels, the normalisation 3"),
        ({"corruption": "tilt"}, "unknown corruption 'tilt'"),
        ({"severities": []}, r"severities are \[\]"),
        ({"severities": 3}, "severities are 3"),
        ({"severities": [6]}, "severity must be"),
        ({"indices": range(21)}, "21 indices for more images"),
        ({"indices": range(23)}, "23 indices for 22 images"),
        ({"indices": 3}, "indices are 3"),
        ({"indices": torch.tensor(3)}, r"indices are tensor\(3\)"),
        ({"normalisation": None}, "normalisation is None"),
        ({"indices": [0.5] * N}, "whole numbers"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    good = {"model": Network(), "batches": batches(), "corruption": "contrast", "normalisation": NORMALISATION}
    with pytest.raises(InputError, match=words):
        corruption_mistakes(**(good | arguments))


@pytest.mark.parametrize(
    "frames", [[], None, [IMAGES], [IMAGES[None] / 255], [IMAGES[None, :2], IMAGES[None, :3]], IMAGES]
)
def test_bad_frames_are_refused(frames: Any) -> None:
    with pytest.raises(InputError, match="sequences"):
        frame_classes(Network(), frames, NORMALISATION)


def test_bad_classes_are_refused() -> None:
    with pytest.raises(InputError, match="classes are"):
        stability_of(torch.zeros(2, 31, 4), "tilt")
    with pytest.raises(InputError, match="unknown perturbation"):
        stability_of(torch.zeros(2, 31, 5), "fog")


def test_own_data_have_no_8_bit_images() -> None:
    samples = [(torch.zeros(3, 12, 12), 0), (torch.zeros(3, 12, 12), 1)]
    with pytest.raises(InputError, match="OwnSplit has no 8-bit images"):
        split_batches(own_dataset("own", samples, samples).test)


def test_one_batch_is_corrupted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is read as the batches are used up, and only once."""
    read: list[int] = []
    corrupted: list[int] = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, N, 8):
            read.append(i)
            yield IMAGES[i : i + 8], LABELS[i : i + 8]

    def recorded(images: Tensor, *arguments: Any, **options: Any) -> Tensor:
        corrupted.append(read[-1])
        return corrupt(images, *arguments, **options)

    monkeypatch.setattr(evaluation, "corrupt", recorded)
    corruption_mistakes(Network(), stream(), "contrast", NORMALISATION, severities=[1, 2])
    assert corrupted == [0, 0, 8, 8, 16, 16]

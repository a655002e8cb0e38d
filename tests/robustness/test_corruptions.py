"""The public face of the corruptions: which there are, reproducible pixels, images of any kind, and bad input."""

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.robustness import CORRUPTIONS, PARAMETERS, corrupt, corruptions
from secondorder.robustness.draws import generators, normals, uniforms
from secondorder.robustness.parameters import nearest_set
from secondorder.robustness.pixels import LUMA, cut_to_levels, round_to_levels, to_levels, to_unit

NOISES = {name for name, corruption in CORRUPTIONS.items() if corruption.group == "noise"}
RANDOM = {name for name, corruption in CORRUPTIONS.items() if corruption.random}
TINTED = {"frost", "spatter", "saturate"}
"""Corruptions that colour a grey picture."""


def pictures(count: int, channels: int, H: int, W: int) -> Tensor:
    """Smooth shapes of all brightnesses: a picture to which every corruption does something."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(H * W))
    fine = torch.nn.functional.interpolate(coarse, (H, W), mode="bicubic").clamp(0, 1)
    return (255 * fine).round().byte()


def test_the_table() -> None:
    scored = {name: c.group for name, c in CORRUPTIONS.items() if not c.extra}
    assert [len([g for g in scored.values() if g == group]) for group in ("noise", "blur", "weather", "digital")] == [
        3,
        4,
        4,
        4,
    ]
    assert CORRUPTIONS.keys() - scored.keys() == {"speckle_noise", "gaussian_blur", "spatter", "saturate"}
    for published in PARAMETERS.values():
        assert published.settings.keys() == CORRUPTIONS.keys()
        assert all(len(settings) == 5 for settings in published.settings.values())


PUBLISHED = {
    ("cifar", "gaussian_noise", 3): 0.08,
    ("cifar", "shot_noise", 4): 75,
    ("cifar", "impulse_noise", 4): 0.05,
    ("cifar", "defocus_blur", 5): (1.5, 0.1),
    ("cifar", "glass_blur", 4): (0.25, 1, 2),
    ("cifar", "motion_blur", 4): (8, 2),
    ("cifar", "zoom_blur", 3): (16, 0.01),
    ("cifar", "snow", 4): (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    ("cifar", "frost", 5): (0.75, 0.45, 0.2),
    ("cifar", "fog", 5): (1.5, 1.75),
    ("cifar", "brightness", 5): 0.3,
    ("cifar", "contrast", 2): 0.5,
    ("cifar", "elastic_transform", 3): (2.56, 1.92, 1.92),
    ("cifar", "pixelate", 3): 0.85,
    ("cifar", "jpeg_compression", 3): 58,
    ("cifar", "spatter", 3): (0.65, 0.3, 1, 0.69, 0.5, 0),
    ("tiny_imagenet", "gaussian_noise", 5): 0.18,
    ("tiny_imagenet", "shot_noise", 1): 250,
    ("tiny_imagenet", "defocus_blur", 4): (2.5, 0.01),
    ("tiny_imagenet", "glass_blur", 5): (0.9, 2, 2),
    ("tiny_imagenet", "motion_blur", 5): (12, 3),
    ("tiny_imagenet", "snow", 3): (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
    ("tiny_imagenet", "fog", 2): (0.7, 3),
    ("tiny_imagenet", "elastic_transform", 2): (3.2, 19.2, 3.84),
    ("tiny_imagenet", "saturate", 5): (30, 0.2),
    ("imagenet", "gaussian_noise", 5): 0.38,
    ("imagenet", "shot_noise", 5): 3,
    ("imagenet", "impulse_noise", 4): 0.17,
    ("imagenet", "defocus_blur", 1): (3, 0.1),
    ("imagenet", "glass_blur", 3): (1, 2, 3),
    ("imagenet", "motion_blur", 5): (20, 15),
    ("imagenet", "zoom_blur", 5): (11, 0.03),
    ("imagenet", "snow", 5): (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ("imagenet", "frost", 2): (0.8, 0.6, 1),
    ("imagenet", "fog", 3): (2.5, 1.7),
    ("imagenet", "elastic_transform", 1): (488, 170.8, 24.4),
    ("imagenet", "pixelate", 1): 0.6,
    ("imagenet", "jpeg_compression", 2): 18,
    ("imagenet", "speckle_noise", 3): 0.35,
    ("imagenet", "gaussian_blur", 5): 6,
    ("imagenet", "spatter", 5): (0.67, 0.4, 1, 0.65, 1.5, 1),
    ("imagenet", "saturate", 5): (20, 0.2),
}
"""Typed from the published code a second time."""


def test_published_parameters() -> None:
    for (name, corruption, severity), value in PUBLISHED.items():
        assert PARAMETERS[name].settings[corruption][severity - 1] == pytest.approx(value), (name, corruption, severity)


def test_the_parameters_of_the_nearest_side() -> None:
    sides = {8: "cifar", 32: "cifar", 48: "cifar", 49: "tiny_imagenet", 144: "tiny_imagenet", 145: "imagenet"}
    assert {side: nearest_set(side, 500) for side in sides} == sides
    assert {side: nearest_set(500, side) for side in sides} == sides
    images = pictures(1, 3, 50, 60)
    default = corrupt(images, "contrast", 3)
    assert torch.equal(default, corrupt(images, "contrast", 3, parameters="tiny_imagenet"))
    assert not torch.equal(default, corrupt(images, "contrast", 3, parameters="cifar"))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_subset_order_and_batch_gives_the_same_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, indices = pictures(5, 3, 32, 32), [4, 0, 900, 2, 7]
    for severity in (1, 5):
        whole = corrupt(images, name, severity, seed=3, indices=indices)
        for i in (3, 0):
            alone = corrupt(images[i : i + 1], name, severity, seed=3, indices=torch.tensor(indices[i : i + 1]))
            assert torch.equal(alone[0], whole[i])
        monkeypatch.setattr(corruptions, "CHUNK", 2 * images[0].numel())  # chunks of 2, 2 and 1 images
        assert torch.equal(corrupt(images.flip(0), name, severity, seed=3, indices=indices[::-1]), whole.flip(0))
        monkeypatch.undo()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_seeds_severities_draw_for_themselves(name: str) -> None:
    images = pictures(1, 3, 32, 32).expand(2, -1, -1, -1)
    first, second = corrupt(images, name, 3)
    assert torch.equal(first, second) == (name not in RANDOM)
    assert torch.equal(first, corrupt(images, name, 3)[0])
    assert torch.equal(first, corrupt(images, name, 3, seed=1)[0]) == (name not in RANDOM)
    assert torch.equal(first, corrupt(images, name, 3, indices=[5, 0])[1])


def test_generators_are_independent() -> None:
    streams = [("a", 1, 0, 0), ("b", 1, 0, 0), ("a", 2, 0, 0), ("a", 1, 1, 0), ("a", 1, 0, 2**63 - 1)]
    draws = [normals(generators(seed, name, severity, [index]), (1000,))[0] for name, severity, index, seed in streams]
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 4 / 1000**0.5  # four standard errors
    assert len({zlib.crc32(name.encode()) for name in CORRUPTIONS}) == len(CORRUPTIONS)


def test_generators_are_philox_by_its_definition() -> None:
    """Key (seed, index), counter (0, 0, severity, CRC-32), and rows of a batch from their own generators, in order."""
    raw = np.random.Philox(key=[7, 12], counter=[0, 0, 4, zlib.crc32(b"fog")]).random_raw(3)
    assert (generators(7, "fog", 4, [12])[0].bit_generator.random_raw(3) == raw).all()
    batch, alone = generators(7, "fog", 4, [3, 12]), generators(7, "fog", 4, [12])[0]
    assert (uniforms(batch, (2, 3))[1] == alone.random((2, 3), dtype=np.float32)).all()
    assert (normals(batch, (4,))[1] == alone.standard_normal(4, dtype=np.float32)).all()


@pytest.mark.parametrize("shape", [(12, 1, 8, 8), (6, 3, 8, 8), (2, 3, 9, 41), (2, 1, 28, 28), (1, 3, 70, 66)])
def test_images_of_any_side(shape: tuple[int, int, int, int]) -> None:
    """Every severity changes the image, at 8 pixels too, where lengths are a quarter of CIFAR's; without a warning."""
    images = pictures(*shape)
    for name in CORRUPTIONS:
        for severity in range(1, 6):
            corrupted = corrupt(images, name, severity, indices=range(10, 10 + shape[0]))
            assert corrupted.shape == shape
            assert corrupted.dtype == torch.uint8
            assert torch.equal(corrupted, images) == (name == "saturate" and shape[1] == 1), (name, severity)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_images(level: int) -> None:
    """Black, grey and white stay what they are where there is nothing to mix; nothing is divided by zero."""
    images = torch.full((1, 3, 32, 32), level, dtype=torch.uint8)
    for name in CORRUPTIONS:
        for severity in (1, 3, 5):
            corrupted = corrupt(images, name, severity)
            if CORRUPTIONS[name].group == "blur" or name in ("contrast", "elastic_transform", "pixelate"):
                assert torch.equal(corrupted, images), (name, severity)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS.keys() - NOISES))
def test_a_grey_image_is_a_colour_image_of_equal_channels(name: str) -> None:
    grey = pictures(3, 1, 32, 32)
    for severity in (1, 3, 5):
        alone = corrupt(grey, name, severity)
        color = corrupt(grey.expand(-1, 3, -1, -1), name, severity)
        if name == "saturate":
            assert torch.equal(alone, grey)  # no colour, nothing to saturate
        elif name in TINTED:
            weights = torch.tensor([float(weight) for weight in LUMA])[:, None, None]
            brightness = (weights * (color.float() + 0.5)).sum(1, keepdim=True)
            unclipped = (color > 0).all(1, keepdim=True) & (color < 255).all(1, keepdim=True)
            assert (alone.float() + 0.5 - brightness)[unclipped].abs().max() < 1.01  # each is cut off to a whole level
        else:
            assert (alone.short() - color.short()).abs().max() <= (2 if name == "jpeg_compression" else 0)


def test_severity_0_is_a_copy() -> None:
    images = pictures(2, 3, 32, 32)
    for name in CORRUPTIONS:
        copy = corrupt(images, name, 0)
        assert torch.equal(copy, images)
        assert copy.data_ptr() != images.data_ptr()


def test_an_empty_batch_is_empty() -> None:
    for severity in (0, 4):
        assert corrupt(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "fog", severity, indices=[]).shape == (
            0,
            3,
            32,
            32,
        )


def test_nothing_else_changes() -> None:
    images = pictures(3, 3, 32, 32)
    before, torch_state, numpy_state = images.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for name in CORRUPTIONS:
        corrupt(images, name, 4)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@pytest.mark.parametrize("name", ["glass_blur", "jpeg_compression"])
def test_memory_formats(name: str) -> None:
    images = pictures(4, 3, 32, 40)
    expected = corrupt(images, name, 3)
    last = corrupt(images.to(memory_format=torch.channels_last), name, 3)
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(corrupt(images.mT.contiguous().mT, name, 3), expected)
    assert torch.equal(
        corrupt(images[::2, :, :, :32], name, 3, indices=[0, 2]), corrupt(images[..., :32], name, 3)[::2]
    )


def test_levels_are_cut_off_and_whole_ones_kept() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert (to_levels(to_unit(levels)) == levels).all()
    numbers = np.array([-0.5, 0.0039, 0.9999, 1.0, 7.0, (100 - 2e-5) / 255, (100 - 2e-2) / 255], dtype=np.float32)
    assert to_levels(numbers).tolist() == [0, 0, 254, 255, 255, 100, 99]
    assert (cut_to_levels(numbers) == to_unit(to_levels(numbers))).all()
    assert (255 * round_to_levels(np.array([0.9999, 0.0019, -1], dtype=np.float32))).tolist() == [255, 0, 0]


IMAGES = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("corruption", {"name": "gausian_noise"}, "unknown corruption 'gausian_noise'; choose one of: gaussian_noise, "),
    ("no name", {"name": None}, "unknown corruption None; choose one of: "),
    ("severity", {"severity": 6}, "severity must be a whole number from 0 to 5, got 6"),
    ("negative", {"severity": -1}, "severity must be a whole number from 0 to 5, got -1"),
    ("fraction", {"severity": 2.5}, "severity must be a whole number from 0 to 5, got 2.5"),
    ("bool", {"severity": True}, "severity must be a whole number from 0 to 5, got True"),
    ("seed", {"seed": -1}, "seed must be a whole number from 0 to 2^63 - 1, got -1"),
    (
        "set",
        {"parameters": "cifar100"},
        "unknown parameter set 'cifar100'; choose one of: cifar, tiny_imagenet, imagenet",
    ),
    (
        "array",
        {"images": np.zeros((2, 3, 32, 32), np.uint8)},
        "images must be a torch Tensor [N, C, H, W] of uint8, got ndarray",
    ),
    (
        "float",
        {"images": torch.full((2, 3, 32, 32), torch.nan)},
        "of dtype uint8, got torch.float32; numbers x in [0, 1] ",
    ),
    ("int", {"images": IMAGES.int()}, "images must be grey levels 0 to 255 of dtype uint8, got torch.int32"),
    ("one image", {"images": IMAGES[0]}, "images must have the shape [N, C, H, W], got (3, 32, 32)"),
    (
        "channels",
        {"images": IMAGES[:, :2]},
        "images must have 1 or 3 channels in the shape [N, C, H, W], got (2, 2, 32, 32)",
    ),
    (
        "last",
        {"images": IMAGES.permute(0, 2, 3, 1)},
        "(2, 32, 32, 3); move the channels with images.permute(0, 3, 1, 2)",
    ),
    ("small", {"images": IMAGES[..., :7]}, "images must have sides of at least 8 pixels, got 32 x 7"),
    ("count", {"indices": [1]}, "indices must be one number for each of the 2 images, got 1 of them"),
    ("below", {"indices": [1, -1]}, "indices must be whole numbers in [0, 2^63), got -1 to 1"),
    ("float index", {"indices": [0.5, 1]}, "indices must be one row of whole numbers, one an image, got [0.5, 1]"),
    ("ragged", {"indices": [[1], [1, 2]]}, "indices must be whole numbers, one an image, got [[1], [1, 2]]"),
    ("scalar", {"indices": 1}, "indices must be one row of whole numbers, one an image, got 1"),
    ("huge", {"indices": [2**64, 1]}, "indices must be"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
@pytest.mark.parametrize("severity", [0, 2])
def test_bad_input(change: dict[str, Any], message: str, severity: int) -> None:
    arguments: dict[str, Any] = {"images": IMAGES, "name": "fog", "severity": severity} | change
    images, name, level = (arguments.pop(key) for key in ("images", "name", "severity"))
    with pytest.raises(InputError) as caught:
        corrupt(images, name, level, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

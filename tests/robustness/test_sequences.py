"""Perturbation sequences: frames against literal formulas, and the same pixels in any subset, order and chunk."""

import colorsys
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from sequence_pictures import PICTURES, levels_apart, pictures

from secondorder.errors import InputError
from secondorder.robustness import PARAMETERS, SEQUENCES, comparison, frames, perturb, sequences
from secondorder.robustness.blur import motion_blur
from secondorder.robustness.draws import generators
from secondorder.robustness.pixels import to_levels
from secondorder.robustness.spatter import add_water, liquid_layer
from secondorder.robustness.weather import snow_layer

NOISES = ("gaussian_noise", "shot_noise", "speckle_noise")
FRAMES = {"cifar": {"motion_blur": 21, "translate": 16}, "tiny_imagenet": {}, "imagenet": {"translate": 41}}  # else 31
GREY = torch.full((1, 1, 64, 64), 128, dtype=torch.uint8)


@pytest.mark.parametrize("name", SEQUENCES)
def test_frames_of_every_set(name: str) -> None:
    for parameters, counts in FRAMES.items():
        made = perturb(pictures(1, 10), name, parameters=parameters)
        assert made.shape == (1, counts.get(name, 31), 3, 10, 10)
        assert made.dtype == torch.uint8
        assert (made[:, 0] != made[:, -1]).any()


@pytest.mark.parametrize("name", SEQUENCES)
def test_an_image_has_the_same_frames_anywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another order, with other images, in chunks of one, and alone."""
    images = pictures(3, 16)
    whole = perturb(images, name, seed=5)
    monkeypatch.setattr(sequences, "CHUNK", 1)
    assert torch.equal(perturb(images[[2, 0]], name, seed=5, indices=[2, 0]), whole[[2, 0]])


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_the_draws_depend_on(name: str) -> None:
    images = pictures(1, 12).repeat(2, 1, 1, 1)
    first = perturb(images, name)
    drawn = name in NOISES or name in ("snow", "spatter")
    assert torch.equal(first[0], first[1]) != drawn  # the index
    assert torch.equal(first, perturb(images, name, seed=1)) != drawn
    assert torch.equal(first, perturb(images, name, difficulty=3)) == (name not in NOISES)
    assert comparison(name, difficulty=3) == (("first", 1) if name in NOISES else ("previous", 3))


@pytest.mark.parametrize("name", [*NOISES, "zoom_blur"])
def test_the_first_frame_is_the_picture(name: str) -> None:
    assert torch.equal(perturb(PICTURES, name)[:, 0], PICTURES)


@pytest.mark.parametrize("parameters", FRAMES)
def test_the_picture_is_one_of_the_frames(parameters: str) -> None:
    """In the middle (of translate, which has an even number of frames in CIFAR-10-P, the eighth; of scale where it is 1)."""
    where = {"brightness": 15, "rotate": 15, "shear": 15}
    where["translate"] = {"cifar": 7, "tiny_imagenet": 15, "imagenet": 20}[parameters]
    where["scale"] = 15 if parameters == "cifar" else 24
    for name, frame in where.items():
        assert torch.equal(perturb(PICTURES, name, parameters=parameters)[:, frame], PICTURES), name


@pytest.mark.parametrize(
    ("name", "difficulty", "sd"),
    # of the grey level 128/255: sd, sqrt(x / photons), sd x
    [
        ("gaussian_noise", 1, 0.025),
        ("gaussian_noise", 3, 0.075),
        ("shot_noise", 1, (128 / 255 / 500) ** 0.5),
        ("shot_noise", 2, (128 / 255 / 250) ** 0.5),
        ("speckle_noise", 2, 0.1 * 128 / 255),
    ],
)
def test_noise_is_new_in_every_frame(name: str, difficulty: int, sd: float) -> None:
    noise = perturb(GREY, name, difficulty)[0, 1:].double() / 255
    assert noise.std() == pytest.approx(
        sd, rel=0.02
    )  # of 120,000 numbers: a relative error of 0.2 %, and rounding to levels
    assert noise.mean() == pytest.approx(
        127.5 / 255, abs=3 * sd / 120_000**0.5 + 1e-4
    )  # cut off, half a level on average
    assert np.abs(np.corrcoef(noise.flatten(1))[np.triu_indices(30, 1)]).max() < 0.08  # 5 standard deviations of 1/64


def test_motion_blur_turns_by_half_a_circle() -> None:
    """In the last frame pixels i = 0 to 12 to the right have weights exp(-i^2 / (2 1.8^2)); in the first those to the left."""
    made = perturb(PICTURES, "motion_blur")
    weights = np.exp(-(np.arange(13) ** 2) / (2 * 1.8**2))
    padded = np.pad(PICTURES.double().numpy(), ((0, 0), (0, 0), (0, 0), (0, 12)), mode="edge")
    expected = sum(w * padded[..., i : i + 32] for i, w in enumerate(weights / weights.sum()))
    assert levels_apart(made[:, -1], np.rint(expected)) <= 1
    assert torch.equal(perturb(PICTURES.flip(3), "motion_blur")[:, 0].flip(3), made[:, -1])
    upwards = perturb(PICTURES.transpose(2, 3).flip(2), "motion_blur")[:, 10].flip(2).transpose(2, 3)
    assert levels_apart(upwards, made[:, -1]) <= 1  # -90 degrees


def test_motion_blur_of_64_pixels_was_made_before_the_reduction() -> None:
    """From 224 pixels: the mean of an edge's profile moves by as many pixels as the mean of the weights, times 64/224."""
    edge = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    edge[..., 32:] = 255
    last = perturb(edge, "motion_blur")[0, -1, 0, 5].double() / 255
    weights = np.exp(-(np.arange(29) ** 2) / (2 * 3**2))
    mean = (np.arange(29) * weights).sum() / weights.sum()
    assert float((last - edge[0, 0, 5].double() / 255).sum()) == pytest.approx(mean * 64 / 224, abs=0.02)


def test_snow_falls_from_the_same_flakes() -> None:
    """On black, 0.15 times 0.5 is left of the whitening, and the layer is laid twice, once turned by 180 degrees."""
    made = perturb(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "snow", seed=3)
    draws = generators(3, "sequence of snow", 0, [0, 1])
    flakes = snow_layer(draws, 32, 32, 0.05, 0.3, zoom=2, threshold=0.5)
    assert flakes.any()
    for j in (0, 11, 30):
        layer = motion_blur(flakes, 10, 2, [4 * j - 150] * 2)
        expected = np.clip(0.075 + layer + np.rot90(layer, 2, (1, 2)), 0, 1) * 255
        assert levels_apart(made[:, j], (expected + 1e-3).astype(np.uint8).transpose(0, 3, 1, 2)) == 0


def test_brightness_is_that_of_hsv() -> None:
    made = perturb(PICTURES[:1], "brightness")[0]
    for j in (0, 12, 30):
        for row in range(0, 32, 5):
            red, green, blue = (PICTURES[0, :, row, 7].double() / 255).tolist()
            hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
            value = min(max(value + 0.015 * (j - 15), 0), 1)
            expected = [int(255 * x + 1e-3) for x in colorsys.hsv_to_rgb(hue, saturation, value)]
            assert levels_apart(made[j, :, row, 7], expected) <= 1


def test_gaussian_blur_is_scipys_filter() -> None:
    for parameters, side, first, step, truncate in (
        ("cifar", 32, 0.3, 0.015, 7),
        ("tiny_imagenet", 64, 0.35, 0.014, 7),
    ):
        image = pictures(1, side)
        made = perturb(image, "gaussian_blur", parameters=parameters)
        for j in (0, 17, 30):
            sigma = first + step * j
            expected = ndimage.gaussian_filter(
                image.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=truncate
            )
            assert levels_apart(made[:, j], np.floor(expected + 1e-3)) <= 1


@pytest.mark.parametrize(
    ("parameters", "side", "shares"),
    [
        ("cifar", 32, [0.2, 0.8]),
        ("imagenet", 224, [0.05, 0.1, 0.15, 0.7]),
        ("cifar", 16, [0.6, 0.4]),  # half of the 0.8 moves by half a row
        ("cifar", 48, [0.2, 0.4, 0.4]),  # by one row and a half
    ],
)
def test_spatter_runs_down(parameters: str, side: int, shares: list[float]) -> None:
    ratio = side / PARAMETERS[parameters].side
    first = 1 if parameters == "imagenet" else 0  # as of np.convolve(mode="same")
    picture = np.full((1, side, side, 3), 0.4, dtype=np.float32)
    arguments = SEQUENCES["spatter"].parameters[parameters]
    scene = frames.Scene(picture, side, side, 31, generators(2, "spatter", 0, [0]), ratio)
    layer = liquid_layer(generators(2, "spatter", 0, [0]), side, side, *arguments[:4], ratio=ratio)
    for frame in itertools.islice(frames.spatter(scene, *arguments), 3):
        assert levels_apart(torch.from_numpy(to_levels(frame)), to_levels(add_water(picture, layer, 0.6))) <= 1
        assert frame.max() > 0.5
        layer = np.apply_along_axis(lambda column: np.convolve(column, shares)[first : first + side], 1, layer)


def test_nothing_else_changes() -> None:
    images, before = PICTURES.clone(), np.random.get_state()[1].copy()  # noqa: NPY002
    perturb(images, "snow")
    assert torch.equal(images, PICTURES)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    channels_last = PICTURES.contiguous(memory_format=torch.channels_last)
    assert torch.equal(perturb(channels_last, "tilt"), perturb(PICTURES, "tilt"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "fog"}, "unknown perturbation 'fog'; choose one of: gaussian_noise, shot_noise"),
        ({"difficulty": 4}, "difficulty must be a whole number from 1 to 3, got 4"),
        ({"difficulty": 0}, "difficulty must be"),
        ({"seed": -1}, "seed must be"),
        ({"images": PICTURES / 255}, "uint8, got torch.float32"),
        ({"images": PICTURES[:, :, :, :7]}, "at least 8 pixels, got 32 x 7"),
        ({"images": PICTURES[:, :2]}, "1 or 3 channels"),
        ({"indices": [1, 2]}, "each of the 3 images, got 2"),
        ({"parameters": "cifar10"}, "unknown parameter set 'cifar10'; choose one of: cifar"),
        ({"crop": 33}, "crop must be a whole number from 8 to 32, got 33; the images have 32 x 32"),
        ({"crop": 7}, "crop must be"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        perturb(**({"images": PICTURES, "name": "tilt"} | arguments))


def test_no_image_has_no_sequence() -> None:
    assert perturb(PICTURES[:0], "snow").shape == (0, 31, 3, 32, 32)

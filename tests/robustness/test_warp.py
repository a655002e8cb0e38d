"""Moved, turned, tilted, scaled and zoomed frames against literal formulas, scipy and torchvision."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as transforms
from PIL import Image
from scipy import ndimage
from sequence_pictures import PICTURES, levels_apart, pictures
from torch import Tensor
from torchvision.transforms import InterpolationMode

from secondorder.robustness import perturb


def test_translate_shifts_whole_pixels() -> None:
    made = perturb(PICTURES, "translate")
    for j in range(16):
        expected = torch.zeros_like(PICTURES)
        if j < 7:
            expected[..., : 32 - (7 - j)] = PICTURES[..., 7 - j :]
        else:
            expected[..., j - 7 :] = PICTURES[..., : 32 - (j - 7)]
        assert torch.equal(made[:, j], expected)


def test_lengths_are_in_proportion_to_the_side() -> None:
    """Digits of 8 pixels move by a quarter pixel a frame: frame 11 by one."""
    digits = pictures(2, 8, 1)
    made = perturb(digits, "translate")
    assert torch.equal(made[:, 11, :, :, 1:], digits[..., :-1])
    halves = (digits[..., 1:].double() + digits[..., :-1]) / 2
    assert levels_apart(made[:, 9, :, :, 1:], halves.floor()) == 0
    wide = perturb(pictures(1, 48), "translate", parameters="cifar")
    assert torch.equal(wide[:, 9, ..., 3:], pictures(1, 48)[..., :-3])


AFFINE: dict[str, Callable[[int], dict[str, float]]] = {
    "rotate": lambda j: {"angle": j - 15, "scale": 1.0, "shear": 0.0},
    "scale": lambda j: {"angle": 0, "scale": (70 + 2 * j) / 100, "shear": 0.0},
    "shear": lambda j: {"angle": 0, "scale": 1.0, "shear": j - 15.0},
}


def torchvision_affine(image: Tensor, **arguments: Any) -> Tensor:
    """Pillow's bilinear transform with torchvision's matrix."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    moved = transforms.affine(picture, translate=[0, 0], interpolation=InterpolationMode.BILINEAR, **arguments)
    return torch.from_numpy(np.array(moved)).permute(2, 0, 1)


@pytest.mark.parametrize("name", AFFINE)
def test_affine_maps_are_torchvisions(name: str) -> None:
    made = perturb(PICTURES, name)
    for j in (0, 4, 14, 22, 30):
        for found, image in zip(made[:, j], PICTURES, strict=True):
            assert levels_apart(found, torchvision_affine(image, **AFFINE[name](j))) <= 1  # Pillow cuts 99.99... to 99


def test_rotate_is_scipys_affine_transform() -> None:
    angle = np.deg2rad(25 - 15)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # of (row, column), clockwise
    centre = np.array([15.5, 15.5])
    found = perturb(PICTURES, "rotate")[0, 25]
    for channel, image in zip(found, PICTURES[0].double().numpy(), strict=True):
        expected = ndimage.affine_transform(image, matrix, centre - matrix @ centre, order=1)
        inside = ndimage.affine_transform(np.ones((32, 32)), matrix, centre - matrix @ centre, order=0, cval=0) == 1
        inside = ndimage.binary_erosion(inside)
        assert np.abs(channel.numpy() - np.floor(expected + 1e-6))[inside].max() <= 1
        assert channel[0, 0] == channel[31, 31] == 0


def literal_tilt(image: np.ndarray, degrees: float, depth: float) -> np.ndarray:
    """The homography as a product of 4x4 matrices, its inverse at every pixel, bilinear with black outside."""
    H, W = image.shape
    a, f = np.deg2rad(degrees), np.hypot(W, H)
    lift = np.array([[1, 0, -W / 2], [0, 1, -H / 2], [0, 0, depth], [0, 0, 1]])
    about_x, about_y, away = np.eye(4), np.eye(4), np.eye(4)
    about_x[1:3, 1:3] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    about_y[0, [0, 2]], about_y[2, [0, 2]] = [np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]
    away[2, 3] = f
    project = np.array([[f, 0, W / 2, 0], [0, f, H / 2, 0], [0, 0, 1, 0]])
    inverse = np.linalg.inv(project @ away @ about_x @ about_y @ lift)
    black = np.pad(image, 40)
    result = np.zeros((H, W))
    for row in range(H):
        for column in range(W):
            x, y, z = inverse @ [column, row, 1]
            x, y = x / z + 40, y / z + 40
            i, j = int(np.floor(y)), int(np.floor(x))
            u, v = y - i, x - j
            result[row, column] = np.array([1 - u, u]) @ black[i : i + 2, j : j + 2] @ np.array([1 - v, v])
    return result


@pytest.mark.parametrize(
    ("parameters", "width", "degrees", "depth"),
    [("cifar", 32, 0.75, 1.0), ("cifar", 24, 0.75, 24 / 32), ("imagenet", 32, 1.0, 32 / 224)],
)
def test_tilt_is_the_homography(parameters: str, width: int, degrees: float, depth: float) -> None:
    """Published for depth 1, a pixel; on other sides in proportion. In the middle the picture is shrunk by f / (f + depth)."""
    image = PICTURES[:1, :1, :, :width]
    made = perturb(image, "tilt", parameters=parameters)
    for j in (0, 9, 15, 30):
        expected = torch.from_numpy(literal_tilt(image[0, 0].double().numpy(), degrees * (j - 15), depth)).round()
        assert levels_apart(made[0, j, 0], expected) <= 1
        assert (made[0, j, 0] != expected).double().mean() < 0.01  # rounded, not cut off


def test_zoom_blur_is_a_running_mean() -> None:
    made = perturb(PICTURES[:1], "zoom_blur")
    total = torch.zeros(3, 32, 32, dtype=torch.float64)
    for j in range(31):
        total += torchvision_affine(PICTURES[0], angle=0, scale=1 + 0.004 * j, shear=0.0)
        assert levels_apart(made[0, j], (total / (j + 1) + 1e-6).floor()) <= 1


def test_a_crop_shows_the_picture_beyond_the_frame() -> None:
    large = pictures(1, 44)
    middle = large[..., 6:38, 6:38]
    shifted = perturb(large, "translate", crop=32)
    for j in range(16):  # 7 to the left, 8 to the right; the border has 6
        padded = torch.nn.functional.pad(large[..., 6:38, :], (2, 2))  # black beyond the picture
        assert torch.equal(shifted[:, j], padded[..., 8 - (j - 7) : 40 - (j - 7)])
    turned = perturb(large, "rotate", parameters="cifar")[..., 6:38, 6:38]
    assert torch.equal(perturb(large, "rotate", crop=32), turned)
    for name in ("gaussian_noise", "brightness", "motion_blur", "snow"):
        assert torch.equal(perturb(large, name, crop=32), perturb(middle, name))

"""Blurs, zooms and elastic warps against scipy, closed forms and the published loops written out."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from secondorder.robustness.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from secondorder.robustness.draws import generators
from secondorder.robustness.geometry import (
    clipped_zoom,
    corner_points,
    elastic,
    filtered_noise,
    sample,
    smooth_displacements,
    zoomed_planes,
)
from secondorder.robustness.kernels import disk_kernel, gaussian_kernel, motion_kernel, shrunk
from secondorder.robustness.pixels import TOLERANCE

Array = NDArray[np.float32]
FLOAT32 = 2e-6
"""Rounding of numbers up to 1 through a few hundred operations."""


def batch(*shape: int) -> Array:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


@pytest.mark.parametrize(("sigma", "truncate"), [(0.05, 4), (0.4, 4), (1, 4), (0.75, 7), (6, 4)])
def test_gaussian_blur_is_scipys(sigma: float, truncate: float) -> None:
    images = batch(2, 13, 9, 3)
    expected = ndimage.gaussian_filter(images.astype(float), (0, sigma, sigma, 0), mode="nearest", truncate=truncate)
    assert np.abs(gaussian_blur(images, sigma, truncate) - expected).max() < FLOAT32


def test_disks() -> None:
    """Radius 1.5 holds 3 x 3 pixels, 3 holds 29; a softening of 0.1 pixels is none."""
    assert disk_kernel(1.5, 0.1) == pytest.approx(np.full((3, 3), 1 / 9))
    row = np.array([1, 5, 5, 7, 5, 5, 1])
    assert (disk_kernel(3, 0.1) > 1e-3).sum(0).tolist() == row.tolist()
    assert disk_kernel(3, 0.1).max() == pytest.approx(1 / 29)
    side = math.exp(-1 / (2 * 0.4**2)) / (1 + 2 * math.exp(-1 / (2 * 0.4**2)))
    taps = np.array([side, 1 - 2 * side, side])
    assert disk_kernel(0.3, 0.4) == pytest.approx(np.outer(taps, taps))


@pytest.mark.parametrize(("radius", "reach", "half"), [(4, 8, 1), (8, 8, 1), (10, 10, 2)])
def test_disks_are_softened_on_the_published_grid(radius: int, reach: int, half: int) -> None:
    i = np.arange(-reach, reach + 1)
    disk = np.array([[float(x * x + y * y <= radius * radius) for x in i] for y in i])
    expected = ndimage.gaussian_filter(disk / disk.sum(), 0.5, mode="mirror", radius=half)
    kernel = disk_kernel(radius, 0.5)
    margin = (len(expected) - len(kernel)) // 2
    assert np.pad(kernel, margin) == pytest.approx(expected, abs=1e-7)
    assert kernel.sum() == pytest.approx({4: 1, 8: 1.01298, 10: 1.01079}[radius], abs=1e-5)  # as OpenCV has it


def test_defocus_is_a_mean_over_the_disk() -> None:
    images = batch(1, 9, 8, 2)
    mirrored = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, (3, 3), (1, 2))
    assert np.abs(defocus_blur(images, 1.5, 0.1) - windows.mean((-1, -2))).max() < FLOAT32


@pytest.mark.parametrize("angle", [0, 30, -45, 45, -90, -120, 17.3])
@pytest.mark.parametrize(("radius", "sigma"), [(6, 1), (3.2, 2.5)])
def test_motion_blur_is_imagemagicks(angle: float, radius: float, sigma: float) -> None:
    images = batch(2, 10, 9, 3)
    expected = np.zeros(images.shape)
    weights = [math.exp(-i * i / (2 * sigma * sigma)) for i in range(2 * math.ceil(radius) + 1)]
    for i, weight in enumerate(weights):
        column = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        row = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        for h in range(10):
            for w in range(9):
                source = images[:, min(max(h + row, 0), 9), min(max(w + column, 0), 8)]
                expected[:, h, w] += weight / sum(weights) * source
    blurred = motion_blur(images, radius, sigma, [angle, angle])
    assert blurred * 255 == pytest.approx(np.rint(blurred * 255), abs=1e-4)  # 8 bits
    assert np.abs(blurred - expected).max() < 0.5 / 255 + FLOAT32


def test_motion_blur_has_an_angle_for_each_image() -> None:
    """A white pixel leaves a trail to the left at 0 degrees, and downwards at -90, the fall of snow."""
    images = np.zeros((2, 9, 9, 1), dtype=np.float32)
    images[:, 4, 4] = 1
    left, down = motion_blur(images, 3, 2, [0, -90])[..., 0]
    trail = motion_kernel(3, 2, 0)
    assert trail.sum() == pytest.approx(1)
    assert (trail[: len(trail) // 2] == 0).all()
    assert (np.diff(left[4, :5]) > 0).all()
    assert left[4, 5:].max() == 0 == np.delete(left, 4, 0).max()
    assert (down == left.T[::-1]).all()


@pytest.mark.parametrize("factor", [1, 1.01, 1.1, 1.25, 1.75, 3, 4.5])
def test_clipped_zoom_is_scipys(factor: float) -> None:
    images = batch(2, 32, 21, 2)
    expected = []
    for image in images.astype(float):
        crops = [slice((n - math.ceil(n / factor)) // 2, (n + math.ceil(n / factor)) // 2) for n in (32, 21)]
        crops = [slice(c.start, c.start + math.ceil(n / factor)) for c, n in zip(crops, (32, 21), strict=True)]
        zoomed = ndimage.zoom(image[tuple(crops)], (factor, factor, 1), order=1)
        top, left = (zoomed.shape[0] - 32) // 2, (zoomed.shape[1] - 21) // 2
        expected.append(zoomed[top : top + 32, left : left + 21])
    assert np.abs(clipped_zoom(images, factor) - np.stack(expected)).max() < FLOAT32
    blurred = zoom_blur(images, [1, factor])
    assert np.abs(blurred - (2 * images + np.stack(expected)) / 3).max() < FLOAT32


def test_a_centred_zoom_keeps_the_middle() -> None:
    """Of rows that are a ramp i: (i - M) / f + M."""
    ramp = np.tile(np.arange(8, dtype=np.float32)[:, None], (1, 9))
    zoomed = zoomed_planes(ramp[None, None], 1.6, centred=True)
    expected = (ramp - 3.5) / 1.6 + 3.5
    assert np.abs(zoomed - expected).max() < 8 * FLOAT32
    assert (
        np.abs(zoom_blur(ramp[None, ..., None], [1.6], centred=True)[..., 0] - (ramp + expected) / 2).max()
        < 8 * FLOAT32
    )


def literal_glass(levels: NDArray[np.uint8], moves: NDArray[np.int8], reach: int) -> NDArray[np.uint8]:
    """The published loop on one image of three channels, the swap of two views included."""
    x, side = levels.copy(), len(levels)
    for sweep in moves:
        for i, h in enumerate(range(side - reach, reach, -1)):
            for j, w in enumerate(range(side - reach, reach, -1)):
                dx, dy = sweep[i, j]
                x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
    return x


@pytest.mark.parametrize(("sigma", "reach", "times"), [(0, 1, 1), (0.45, 1, 2), (0.9, 2, 2), (0, 3, 3)])
def test_glass_blur_is_the_published_loop(sigma: float, reach: int, times: int) -> None:
    images = batch(2, 14, 14, 3)
    blurred = glass_blur(images, sigma, reach, times, generators(0, "glass", 1, [0, 1]))

    def smooth(image: Array) -> Array:
        return ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0), mode="nearest")

    for image, result, draws in zip(images, blurred, generators(0, "glass", 1, [0, 1]), strict=True):
        moves = draws.integers(-reach, reach, (times, 14 - 2 * reach, 14 - 2 * reach, 2), dtype=np.int8)
        scattered = literal_glass(np.uint8(smooth(image) * 255 + TOLERANCE), moves, reach)
        assert np.abs(result - smooth(scattered / 255)).max() < FLOAT32


def test_glass_blur_of_small_images_moves_in_proportion() -> None:
    """Published moves of -1 or 0 are -1 for a quarter of a half of the pixels at a quarter of the side: 4 standard errors."""
    columns = np.tile(np.arange(64, dtype=np.float32) / 255, (40, 64, 1))[..., None]
    moved = 255 * (columns - glass_blur(columns, 0, 1, 1, generators(0, "glass", 1, range(40)), ratio=0.25))
    chance, pixels = 0.125, 40 * 62 * 62
    # a pixel that took its neighbour's colour after that one's turn would have moved further: moves to the left have no chains
    assert (moved[:, 2:-1, 2:-1] != 0).mean() == pytest.approx(
        chance, abs=4 * math.sqrt(chance * (1 - chance) / pixels)
    )


@pytest.mark.parametrize("border", ["mirror", "reflect"])
def test_sample_is_scipys_interpolation(border: str) -> None:
    images = batch(2, 7, 11, 3)
    rows, columns = 60 * batch(2, 5, 4) - 30, 60 * batch(2, 4, 5).reshape(2, 5, 4) - 30
    read = sample(images, rows, columns, border)
    for n in range(2):
        for c in range(3):
            plane = images[n, ..., c].astype(float)
            expected = ndimage.map_coordinates(plane, [rows[n], columns[n]], order=1, mode=border)
            assert np.abs(read[n, ..., c] - expected).max() < 2e-5  # of positions in float32


def test_elastic_is_the_published_two_steps() -> None:
    """An affine map of three points, mirrored, then displacements, reflected, both by scipy."""
    images, draws = batch(2, 16, 18, 2), np.random.default_rng(1)
    corners, displacements = draws.uniform(-2, 2, (2, 3, 2)), draws.uniform(-3, 3, (2, 2, 16, 18)).astype(np.float32)
    warped = elastic(images, corners, displacements)
    rows, columns = np.mgrid[:16, :18]
    source = np.array([[9 + 5, 8 + 5], [9 + 5, 8 - 5], [9 - 5, 8 - 5]])  # (x, y) about the centre, a third of 16
    assert (corner_points(16, 18) == source).all()
    for image, corner, (dx, dy), result in zip(images, corners, displacements, warped, strict=True):
        back, _, _, _ = np.linalg.lstsq(np.column_stack([source + corner, np.ones(3)]), source, rcond=None)
        x, y = np.moveaxis(np.stack([columns, rows, np.ones((16, 18))], -1) @ back, -1, 0)
        for c in range(2):
            affine = ndimage.map_coordinates(image[..., c].astype(float), [y, x], order=1, mode="mirror")
            expected = ndimage.map_coordinates(affine, [rows + dy, columns + dx], order=1, mode="reflect")
            assert np.abs(result[..., c] - expected).max() < 2e-5


def test_displacements_are_filtered_noise() -> None:
    noise = 2 * generators(0, "elastic", 1, [5])[0].random((2, 9, 12), dtype=np.float32) - 1
    fields = smooth_displacements(generators(0, "elastic", 1, [5]), 9, 12, alpha=3.2, sigma=1.3)
    expected = 3.2 * ndimage.gaussian_filter(noise.astype(float), (0, 1.3, 1.3), mode="reflect", truncate=3)
    assert np.abs(fields[0] - expected).max() < 4 * FLOAT32
    whole, quarter = (
        smooth_displacements(generators(0, "elastic", 1, range(9)), 60, 60, 3.2, 1.3, ratio).std()
        for ratio in (1, 0.25)
    )
    assert quarter == pytest.approx(whole / 4, rel=0.05)


@pytest.mark.parametrize("ratio", [0.25, 0.9, 1, 2])
def test_filtered_noise_keeps_its_spread(ratio: float) -> None:
    """The variance of the published side: (sum of k^2)^2 of the kernel k of two axes, to 5 standard errors of 0.01."""
    noise = np.random.default_rng(0).standard_normal((1, 300, 300), dtype=np.float32)
    published = (gaussian_kernel(1) ** 2).sum()
    assert filtered_noise(noise, 1, ratio=ratio)[0, 9:-9, 9:-9].std() == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("kernel", [gaussian_kernel(1), motion_kernel(6, 2, 0)[6], gaussian_kernel(0.4)])
def test_a_shrunk_kernel_blurs_the_enlarged_image(kernel: NDArray[np.float64]) -> None:
    """Interpolated linearly to four times the side, blurred by the published kernel, read at every fourth pixel."""
    row = np.random.default_rng(0).random(15)
    fine = np.interp(np.arange(0, 14.1, 0.25), np.arange(15), row)
    blurred = ndimage.correlate1d(fine, kernel)[::4]
    assert ndimage.correlate1d(row, shrunk(kernel, 0.25))[4:-4] == pytest.approx(blurred[4:-4])


def test_kernels_of_other_sides() -> None:
    """Shrunk ones keep sum and mean; larger ones are those of larger parameters."""
    for kernel in (disk_kernel(1.5, 0.1, 0.25), motion_kernel(6, 2, 30, 0.3), disk_kernel(4, 0.5, 0.6)):
        assert kernel.sum() == pytest.approx(1)
        assert kernel.max() < 1
    rows = np.arange(25) - 12
    wide = motion_kernel(6, 2, 30)
    pad = (25 - len(wide)) // 2
    small = motion_kernel(6, 2, 30, 0.3)
    mean = (np.pad(wide, pad).sum(1) * rows).sum()
    assert (small.sum(1) * (np.arange(len(small)) - len(small) // 2)).sum() == pytest.approx(0.3 * mean)
    assert gaussian_kernel(0.7, ratio=2) == pytest.approx(gaussian_kernel(1.4))
    assert motion_kernel(3, 1, 20, 2) == pytest.approx(motion_kernel(6, 2, 20))
    assert disk_kernel(2, 0.25, 2) == pytest.approx(disk_kernel(4, 0.5))

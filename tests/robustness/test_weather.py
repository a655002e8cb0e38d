"""Snow, fog, frost and spatter against their formulas, loops over pixels, and OpenCV's numbers."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from secondorder.robustness.draws import generators
from secondorder.robustness.edges import ONE, canny, distances
from secondorder.robustness.frost import PANES, add_frost, frosted_panes
from secondorder.robustness.geometry import clipped_zoom
from secondorder.robustness.pixels import TOLERANCE
from secondorder.robustness.plasma import plasma
from secondorder.robustness.spatter import _rim_light, add_mud, add_water, liquid_layer
from secondorder.robustness.weather import add_fog, add_snow, snow_layer


def images(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


@pytest.mark.parametrize("decay", [3, 1.4])
def test_plasma_is_the_diamond_square_algorithm(decay: float) -> None:
    """Point by point on a torus of 16: centres from corners, then sides from corners and centres."""
    draws = iter((2 * generators(0, "fog", 1, [3])[0].random(255, dtype=np.float32) - 1).astype(float))
    points, step, size = {(0, 0): 0.0}, 16, 1.0
    while step > 1:
        half, grid = step // 2, range(0, 16, step)
        for near, cells in (
            (
                ((-half, -half), (-half, half), (half, -half), (half, half)),
                [(r + half, c + half) for r in grid for c in grid],
            ),
            (((-half, 0), (half, 0), (0, -half), (0, half)), [(r, c + half) for r in grid for c in grid]),
            (((-half, 0), (half, 0), (0, -half), (0, half)), [(r + half, c) for r in grid for c in grid]),
        ):
            for r, c in cells:
                mean = sum(points[(r + dr) % 16, (c + dc) % 16] for dr, dc in near) / 4
                points[r, c] = mean + size * next(draws)
        step, size = half, size / decay**2
    assert next(draws, None) is None
    heights = np.array([[points[r, c] for c in range(16)] for r in range(16)])
    expected = (heights - heights.min()) / np.ptp(heights)
    assert plasma(generators(0, "fog", 1, [3]), 9, 16, decay)[0] == pytest.approx(expected[:9], abs=1e-5)


def test_fog() -> None:
    x = images(2, 9, 8, 3)
    maps = plasma(generators(0, "fog", 1, [0, 1]), 9, 8, 2)
    for image, heights, foggy in zip(x, maps, add_fog(x, maps, 1.5), strict=True):
        assert foggy == pytest.approx((image + 1.5 * heights[..., None]) * image.max() / (image.max() + 1.5), abs=1e-6)
    assert (add_fog(0 * x, maps, 1.5) == 0).all()


def test_snow() -> None:
    layer = snow_layer(generators(0, "snow", 1, [4]), 16, 12, mean=0.2, sd=0.3, zoom=2, threshold=0.5)
    noise = generators(0, "snow", 1, [4])[0].standard_normal((16, 12, 1), dtype=np.float32) * 0.3 + 0.2
    flakes = clipped_zoom(noise[None].astype(np.float32), 2)
    expected = np.where(flakes < 0.5, 0, np.floor(np.minimum(flakes, 1) * 255 + TOLERANCE) / 255)
    assert 0.05 < (layer > 0).mean() < 0.5
    assert layer == pytest.approx(expected, abs=1e-6)

    x = images(1, 16, 12, 3)
    grey = x @ np.array([0.299, 0.587, 0.114])
    whitened = np.maximum(x, 1.5 * grey[..., None] + 0.5)
    turned = layer[:, ::-1, ::-1]
    assert add_snow(x, layer, 0.7) == pytest.approx(0.7 * x + 0.3 * whitened + layer + turned, abs=1e-6)


def test_frost_has_the_colours_and_contrasts_of_the_photographs() -> None:
    """Over 200 panes of 32 pixels: means to four standard errors of the drift, contrasts to 10 %, needles lighter or darker.

    The drift of 0.04 itself to four standard errors of 5 % each.
    """
    draws = generators(0, "frost", 1, range(200))
    kinds = np.array([g.integers(len(PANES)) for g in generators(0, "frost", 1, range(200))])
    panes = frosted_panes(draws, 32, 32, 0.2)
    assert 0 <= panes.min() < panes.max() <= 1
    drifts = []
    for kind, pane in enumerate(PANES):
        mine = panes[kinds == kind]
        assert len(mine) > 20
        error = 4 * 0.04 / math.sqrt(len(mine)) + 0.01  # and what is clipped
        assert mine.mean((0, 1, 2)) == pytest.approx(np.array(pane.color), abs=error)
        relief = mine.mean(-1) - mine.mean((1, 2, 3))[:, None, None]
        assert relief.std() == pytest.approx(pane.contrast, rel=0.1)
        assert np.sign((relief**3).mean()) == pane.needles
        drifts.append(mine.mean((1, 2, 3)) - mine.mean())
    assert np.concatenate(drifts).std() == pytest.approx(0.04, rel=0.2)


def test_frost_is_a_weighted_sum() -> None:
    x, panes = images(2, 8, 9, 3), images(2, 8, 9, 3)[::-1]
    assert add_frost(x, panes, 0.8, 0.6) == pytest.approx(0.8 * x + 0.6 * panes, abs=1e-6)
    grey = add_frost(x[..., :1], panes, 1, 0.4)[..., 0]
    assert grey == pytest.approx(x[..., 0] + 0.4 * (panes @ np.array([0.299, 0.587, 0.114])), abs=1e-6)


def test_liquid_is_filtered_noise_above_a_threshold() -> None:
    """On a share of the pixels that depends on the noise alone, at any side: N(0.65, 0.3 sum k^2) above 0.68."""
    noise = generators(0, "spatter", 1, [0])[0].standard_normal((20, 12), dtype=np.float32).astype(float)
    smooth = 0.65 + 0.3 * ndimage.gaussian_filter(noise, 0.8, mode="nearest")
    layer = liquid_layer(generators(0, "spatter", 1, [0]), 20, 12, 0.65, 0.3, 0.8, 0.68)[0, ..., 0]
    assert layer == pytest.approx(np.where(smooth < 0.68, 0, smooth), abs=1e-6)
    shares = [
        (liquid_layer(generators(0, "s", 1, range(9)), 80, 80, 0.65, 0.3, 0.8, 0.7, ratio) > 0).mean()
        for ratio in (1, 0.25, 2)
    ]
    assert shares == pytest.approx([shares[0]] * 3, rel=0.1)


def layers() -> NDArray[np.uint8]:
    """Two layers of 12 x 14 with flat drops of several brightnesses on black, by whole numbers."""
    r, c = np.mgrid[:12, :14]
    drops = ((3 * r * r + 5 * c * r + 2 * c) // 9 % 7 < 3) * (150 + (11 * r * c) % 106)
    large = ((r - 5) ** 2 + 2 * (c - 6) ** 2 < 40) * (120 + 5 * r + 4 * c)
    return np.stack([drops, large]).astype(np.uint8)


RIMS = (
    (
        "1c1c000000000000000000000000",
        "1c393955391c0000000000000000",
        "39558eaa713900000000001c3955",
        "718ec6c67139000000001c558eaa",
        "71718e7139393955391c398ec6e3",
        "3939393939718eaa713939718e8e",
        "1c1c003971c6c6c671391c393939",
        "3939003971aaaa8e551c00000000",
        "5555001c39718e713900001c3955",
        "55550000001c555539001c558eaa",
        "55550000001c39391c00398ee3ff",
        "5555000000000000000055aaffff",
    ),
    (
        "2e2e55aafffca7520055aafffcfc",
        "2e2e55aafffca7520055aafffcfc",
        "2e2e55aafffda8530055aafffcfc",
        "2e2e55aafffea9540055aafffcfc",
        "2e2e55aaffffaa550055aafffcfc",
        "2e2e55aafffea95400398ee3fcfc",
        "2e2e55aafffca752002c81d6fcfc",
        "2e2e489df1de8935002c81d6fcfc",
        "3a3a2c81cbba651a00489df2fdfd",
        "66561f64afaf5a0f1c71c6fffefe",
        "72620f55a1c06b1f398ee3ffffff",
        "92731f55aad8832e55aaffffffff",
    ),
)
"""`_rim_light` of `layers` by OpenCV 5.0: Canny, distanceTransform, blur, equalizeHist, filter2D, blur; hexadecimal."""


def test_rims_are_opencvs() -> None:
    expected = np.array([[[int(row[i : i + 2], 16) for i in range(0, 28, 2)] for row in layer] for layer in RIMS])
    assert (_rim_light(layers()) == expected).all()


def test_distances_are_the_shortest_paths() -> None:
    """To the nearest edge in steps of 1, 1.4 on the diagonal and 2.1969 as a knight, or at most 6."""
    edges = np.random.default_rng(0).random((3, 15, 11)) < 0.03
    edges[2] = False
    side, diagonal, knight = ONE, int(1.4 * ONE), int(2.1969 * ONE)
    for edge, found in zip(edges, distances(edges, 6), strict=True):
        for r in range(15):
            for c in range(11):
                lengths = [6 * ONE]
                for er, ec in np.argwhere(edge):
                    far, near = sorted((abs(r - er), abs(c - ec)), reverse=True)
                    straight = (far - 2 * near) * side + near * knight
                    steep = (far - near) * knight + (2 * near - far) * diagonal
                    lengths.append(int(straight if far >= 2 * near else steep))
                assert found[r, c] == min(lengths)


def test_edges_of_one_layer_do_not_join_those_of_the_next() -> None:
    """A weak step stays an edge only where it meets a strong one."""
    weak = np.zeros((12, 12), dtype=np.uint8)
    weak[:, 6:] = 30  # gradient 4 * 30, between the thresholds
    strong = weak.copy()
    strong[:4, 6:] = 60
    edges = canny(np.stack([weak, strong, weak]), 50, 150)
    assert not edges[0].any()
    assert not edges[2].any()
    assert edges[1, :, 5:7].any(1).all()


def test_water_adds_turquoise_by_the_light_on_its_rims() -> None:
    x = images(2, 12, 14, 3)
    thickness = layers() / np.float32(255)
    thickness[1, 0, 0] = 1.3  # above 8 bits
    light = layers().astype(float)
    light[1, 0, 0] = 255
    mask = light * _rim_light(np.stack([light[0], light[1]]).astype(np.uint8))
    mask *= 0.6 / mask.max((1, 2), keepdims=True)
    watered = add_water(x, thickness[..., None] + np.float32(1e-6), 0.6)
    assert watered == pytest.approx(x + mask[..., None] * np.array([175, 238, 238]) / 255, abs=1e-6)
    assert (add_water(x, np.zeros((2, 12, 14, 1), np.float32), 0.6) == x).all()
    grey = add_water(x[..., :1], thickness[..., None] + np.float32(1e-6), 0.6)[..., 0]
    assert grey == pytest.approx(x[..., 0] + mask * (0.299 * 175 + 0.701 * 238) / 255, abs=1e-6)


def test_mud_hides_the_image() -> None:
    x, layer = images(1, 20, 20, 3), np.zeros((1, 20, 20, 1), dtype=np.float32)
    layer[:, 4:13, 5:16] = 0.7
    opacity = ndimage.gaussian_filter((layer[0, ..., 0] > 0).astype(float), 1.2, mode="nearest")
    opacity = np.where(opacity < 0.8, 0, opacity)[..., None]
    muddy = add_mud(x, layer, 1.2)[0]
    assert muddy == pytest.approx((1 - opacity) * x[0] + opacity * np.array([63, 42, 20]) / 255, abs=1e-6)
    assert (muddy[8, 10] * 255).round().tolist() == [63, 42, 20]

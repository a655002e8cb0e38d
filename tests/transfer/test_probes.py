"""Probes on features that have the answer in them, and on features that do not."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secondorder.errors import InputError
from secondorder.transfer import dense_probe, few_shot, linear_probe, pooled_features


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_pooled_features_by_numpy() -> None:
    maps = torch.randn(2, 3, 4, 5, generator=generator(), dtype=torch.float64)
    assert torch.equal(pooled_features(maps), maps.mean((2, 3)))
    found = pooled_features(maps, "mean_and_covariance")
    for row, image in zip(found.numpy(), maps.numpy(), strict=True):
        S = np.cov(image.reshape(3, 20), bias=True)
        triangle = S[np.triu_indices(3)]
        expected = np.concatenate([image.mean((1, 2)), np.sign(triangle) * np.abs(triangle) ** 0.5])
        np.testing.assert_allclose(np.sort(row), np.sort(expected), rtol=1e-12)
        np.testing.assert_allclose(row[:4], expected[:4], rtol=1e-12)


def test_shots_of_each_class() -> None:
    labels = torch.tensor([2, 0, 2, 2, 0, 2, 0])
    drawn = few_shot(labels, 2, seed=1)
    assert labels[drawn].tolist() == [0, 0, 2, 2]
    assert len(drawn.unique()) == 4
    assert torch.equal(drawn, few_shot(labels, 2, seed=1))
    assert len({tuple(few_shot(labels, 2, seed).tolist()) for seed in range(20)}) > 5
    with pytest.raises(InputError, match="class 0 has 3 samples: fewer than 4 shots"):
        few_shot(labels, 4, 0)
    with pytest.raises(InputError, match="must be whole numbers, the class of each sample"):
        few_shot(labels.float(), 1, 0)


def test_a_linear_probe_is_the_regression_that_it_says() -> None:
    """A duplicate of every sample doubles the strength, units of a feature do not matter, and labels do."""
    x = torch.randn(60, 4, generator=generator(), dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.01, 3.0])
    y = (x[:, 0] + 0.01 * x[:, 1] > 0).long() * 3
    assert linear_probe(x[:40], y[:40], x[40:], y[40:], 10.0) >= 0.9
    shuffled = y[:40][torch.randperm(40, generator=generator())]
    assert linear_probe(x[:40], shuffled, x[40:], y[40:], 10.0) < 0.8
    scaled = x * torch.tensor([1e-3, 1.0, 1e6, 5.0])
    grid = torch.randn(200, 4, generator=generator(), dtype=torch.float64) * x.std(0)
    truth = (grid[:, 2] > 0).long() * 3  # of which nothing is learned: the share is that of the decisions alone
    plain, other = (
        linear_probe(part[:40], y[:40], test, truth)
        for part, test in ((x, grid), (scaled, grid * torch.tensor([1e-3, 1.0, 1e6, 5.0])))
    )
    assert plain == other
    twice = linear_probe(x[:40].repeat(2, 1), y[:40].repeat(2), grid, truth, 0.05)
    assert twice == plain  # C = 0.1 on each once


def example(shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Maps of half the pixels' resolution, of which the second channel is where the masks are, and noise."""
    masks = torch.zeros(6, 16, 16, dtype=torch.int64)
    for i, mask in enumerate(masks):
        mask[2 * i : 2 * i + 5, 3:12] = 1
    maps = torch.randn(6, 3, 8, 8, generator=generator())
    maps[:, 1] = 1000 * (torch.nn.functional.avg_pool2d(masks.float(), 2) + shift)
    return maps, masks


def test_a_dense_probe_finds_what_is_there() -> None:
    maps, masks = example()
    before = torch.get_rng_state()
    found = dense_probe(maps[:4], masks[:4], maps[4:], masks[4:], width=8, steps=60, learning_rate=0.02)
    assert torch.equal(torch.get_rng_state(), before)
    again = dense_probe(maps[:4], masks[:4], maps[4:], masks[4:], width=8, steps=60, learning_rate=0.02)
    other = dense_probe(maps[:4], masks[:4], maps[4:], masks[4:], width=8, steps=60, learning_rate=0.02, seed=1)
    assert found == again != other
    assert found.accuracy > 0.93
    assert min(found.intersection_over_union) > 0.75
    noise = maps.clone()
    noise[:, 1] = maps[:, 0]
    nothing = dense_probe(noise[:4], masks[:4], noise[4:], masks[4:], width=8, steps=60, learning_rate=0.02)
    assert nothing.intersection_over_union[1] < 0.5


def test_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 pixels, 3 are of class 1 and class 1 is found at 4, twice rightly; class 2 is nowhere."""
    truth = torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]]])
    answers = torch.tensor([[[1, 1, 0, 1], [1, 0, 0, 0]]])
    logits = torch.nn.functional.one_hot(answers, 3).permute(0, 3, 1, 2).float()
    train = torch.tensor([[[0, 1, 2, 0], [0, 0, 0, 0]]])
    monkeypatch.setattr("secondorder.transfer.probes._logits", lambda probe, x, masks: logits + 0 * probe(x).sum())
    found = dense_probe(torch.randn(1, 2, 2, 4), train, torch.randn(1, 2, 2, 4), truth, steps=1)
    assert found.accuracy == 5 / 8
    assert found.intersection_over_union[:2] == (3 / 6, 2 / 5)
    assert math.isnan(found.intersection_over_union[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.zeros(6, 3, 8)}, r"maps of shape \[6, 3, 8\]"),
        ({"maps": torch.full((6, 3, 8, 8), math.nan)}, "maps: not all are finite"),
        ({"masks": torch.zeros(6, 16, 16)}, "torch.float32: must be"),
        ({"masks": torch.zeros(5, 16, 16, dtype=torch.int64)}, r"masks \[5, 16, 16\]"),
        ({"masks": torch.zeros(6, 16, 16, dtype=torch.int64)}, r"classes \[0\]"),
        ({"masks": example()[1] - 1}, r"classes \[-1, 0\]"),
        ({"test_maps": torch.zeros(6, 2, 8, 8)}, r"test_maps \[6, 2, 8, 8\]"),
        ({"steps": 0}, "steps must be"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_a_dense_probe_refuses(change: dict[str, Any], message: str) -> None:
    maps, masks = example()
    arguments = {"maps": maps, "masks": masks, "test_maps": maps, "test_masks": masks} | change
    with pytest.raises(InputError, match=message):
        dense_probe(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4)}, r"features of shape \[4\]"),
        ({"labels": torch.tensor([0, 1])}, r"labels \[2\]"),
        ({"labels": torch.tensor([1, 1, 1, 1])}, "labels are all 1"),
        ({"test_features": torch.zeros(4, 3)}, "test_features of shape"),
        ({"features": torch.full((4, 2), math.inf)}, "features: not all are finite"),
        ({"strength": 0.0}, "strength"),
    ],
)
def test_what_a_linear_probe_refuses(change: dict[str, Any], message: str) -> None:
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    arguments = {"features": x, "labels": y, "test_features": x, "test_labels": y} | change
    with pytest.raises(InputError, match=message):
        linear_probe(**arguments)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(InputError, match="kind of pooled features 'max'"):
        pooled_features(torch.zeros(1, 2, 3, 3), "max")
    with pytest.raises(InputError, match="floating-point"):
        pooled_features(torch.zeros(1, 2, 3, 3, dtype=torch.int64))

"""Corruption errors and stability of small tables, worked by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from secondorder.errors import InputError, NonFiniteError
from secondorder.robustness.alexnet import ALEXNET_ERRORS
from secondorder.robustness.metrics import (
    corruption_errors,
    mean_corruption_error,
    relative_corruption_errors,
    relative_mean_corruption_error,
)
from secondorder.robustness.stability import (
    best_classes,
    flip_probabilities,
    flip_probability,
    flips,
    mean_flip_rate,
    mean_top5_distance,
    top5_distance,
    top5_distances,
)

# Sums over the severities: 1.5 and 2.5; of the reference 3 and 2.
ERRORS = {"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": [0.5, 0.5, 0.5, 0.5, 0.5]}
REFERENCE = {"fog": [0.2, 0.4, 0.6, 0.8, 1.0], "snow": [0.4, 0.4, 0.4, 0.4, 0.4]}
ROW = [0.1] * 5


def test_errors_divided_by_those_of_a_reference() -> None:
    assert corruption_errors(ERRORS, REFERENCE) == pytest.approx({"fog": 1.5 / 3, "snow": 2.5 / 2})
    assert mean_corruption_error(ERRORS, REFERENCE) == pytest.approx((0.5 + 1.25) / 2)
    assert corruption_errors({"fog": ERRORS["fog"]}, REFERENCE) == pytest.approx({"fog": 0.5})


def test_errors_above_the_clean_error() -> None:
    # network: 1.5 - 5 x 0.1 = 1 and 2.5 - 0.5 = 2; reference: 3 - 5 x 0.2 = 2 and 2 - 1 = 1
    found = relative_corruption_errors(ERRORS, 0.1, REFERENCE, 0.2)
    assert found == pytest.approx({"fog": 1 / 2, "snow": 2 / 1})
    assert relative_mean_corruption_error(ERRORS, 0.1, REFERENCE, 0.2) == pytest.approx(1.25)


def test_without_a_reference_they_are_plain_means() -> None:
    assert corruption_errors(ERRORS, None) == pytest.approx({"fog": 0.3, "snow": 0.5})
    assert mean_corruption_error(ERRORS, None) == pytest.approx(0.4)
    assert relative_corruption_errors(ERRORS, 0.1, None) == pytest.approx({"fog": 0.2, "snow": 0.4})
    assert relative_mean_corruption_error(ERRORS, 0.1, None) == pytest.approx(0.3)


def test_the_published_table_has_the_published_means() -> None:
    """Means over the severities as google-research/augmix lists them, in the order of the benchmark's paper."""
    published = {
        "gaussian_noise": 0.886428,
        "shot_noise": 0.894468,
        "impulse_noise": 0.922640,
        "defocus_blur": 0.819880,
        "glass_blur": 0.826268,
        "motion_blur": 0.785948,
        "zoom_blur": 0.798360,
        "snow": 0.866816,
        "frost": 0.826572,
        "fog": 0.819324,
        "brightness": 0.564592,
        "contrast": 0.853204,
        "elastic_transform": 0.646056,
        "pixelate": 0.717840,
        "jpeg_compression": 0.606500,
    }
    assert corruption_errors(ALEXNET_ERRORS, None) == pytest.approx(published, abs=1e-12)
    assert list(ALEXNET_ERRORS) == list(published)


def test_alexnet_against_itself() -> None:
    halved = {name: [e / 2 for e in row] for name, row in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(halved, "alexnet") == pytest.approx(0.5)
    assert relative_mean_corruption_error(ALEXNET_ERRORS, 0.43478, "alexnet") == pytest.approx(1.0)
    # fog alone: its errors add up to 4.09662, less 5 x 0.43478; half of both is half of it
    assert relative_corruption_errors({"fog": halved["fog"]}, 0.21739, "alexnet") == pytest.approx({"fog": 0.5})
    assert relative_corruption_errors({"fog": ROW}, 0.1, "alexnet")["fog"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("errors", "normaliser", "words"),
    [
        ({}, None, "mapping: corruption"),
        ([ROW], None, "mapping: corruption"),
        ({"fog": ROW[:4]}, None, "'fog'; give 5 errors"),
        ({"fog": 0.1}, None, "'fog'; give 5 errors"),
        ({"fog": [*ROW[:4], math.nan]}, None, "fog at severity 5: error nan"),
        ({"fog": [0.1, 10.0, 0.1, 0.1, 0.1]}, None, "fog at severity 2: error 10.0"),
        ({"fog": [0.1, 0.1, -0.1, 0.1, 0.1]}, None, "fog at severity 3: error -0.1"),
        ({"fog": [True, 0.1, 0.1, 0.1, 0.1]}, None, "fog at severity 1: error True"),
        ({"fog": ROW}, {"snow": ROW}, "lacks snow"),
        ({"fog": ROW, "snow": ROW}, {"snow": ROW}, "no errors of 'fog'"),
        ({"fog": ROW}, {"fog": ROW[:2]}, "the normaliser has"),
        ({"fog": ROW}, {"fog": [0.0] * 5}, "loses nothing by fog"),
        (None, "alexnet", "the error table is None"),
        ({"fog": ROW}, {1: ROW}, "lacks 1"),
        ({"fog": ROW}, "alexnet", "lacks gaussian_noise, shot_noise"),
        ({**ALEXNET_ERRORS, "spatter": ROW}, "alexnet", "no errors of 'spatter'"),
        ({"fog": ROW}, "vgg", "unknown normaliser.*'vgg'; choose one of: alexnet"),
    ],
)
def test_bad_tables_are_refused(errors: Any, normaliser: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        mean_corruption_error(errors, normaliser)


@pytest.mark.parametrize(
    ("clean", "normaliser", "normaliser_clean", "words"),
    [
        (None, None, None, "clean error: error None"),
        (0.1, REFERENCE, None, "needs the reference network's clean error"),
        (0.1, REFERENCE, 0.4, "loses nothing by snow"),
        (0.1, REFERENCE, 40.0, "normaliser_clean: error 40.0"),
        (0.1, None, 0.1, "goes with a table"),
    ],
)
def test_bad_clean_errors_are_refused(clean: Any, normaliser: Any, normaliser_clean: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        relative_mean_corruption_error(ERRORS, clean, normaliser, normaliser_clean)


CLASSES = torch.tensor([[0, 0, 1, 0], [2, 2, 2, 2]])


def test_flips_between_neighbours_and_against_the_first() -> None:
    assert flips(CLASSES).tolist() == [2 / 3, 0]  # 0 = 0, 0 != 1, 1 != 0
    assert flips(CLASSES, "first").tolist() == [1 / 3, 0]  # only the third is not 0
    assert flips(CLASSES, distance=2).tolist() == [1 / 2, 0]  # 0 and 1 differ, 0 and 0 do not
    assert flip_probability(CLASSES.numpy().astype(np.uint16)) == pytest.approx(1 / 3)
    assert flip_probability(CLASSES.numpy()[:, ::-1]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("best", "distance"),
    [
        ([0, 1, 2, 3, 4], 0),
        ([1, 0, 2, 3, 4], 2),  # both have moved by one
        ([5, 6, 7, 8, 9], 15),  # all have gone to rank 5 or worse: 5 + 4 + 3 + 2 + 1
        ([1, 2, 3, 4, 5], 9),  # the first has left, 5; the others have moved up by one each
        ([5, 0, 1, 2, 3], 5),  # four have moved down by one, the fifth has left from rank 4: 1
        ([4, 3, 2, 1, 0], 12),  # 4 + 2 + 0 + 2 + 4
    ],
)
def test_top5_distance_by_hand(best: list[int], distance: int) -> None:
    pair = torch.tensor([[[0, 1, 2, 3, 4], best]])
    assert top5_distance(pair) == distance
    logits = torch.full((1, 2, 10), -9.0)  # the same as logits, 5 for the best class to 1 for the fifth
    logits.scatter_(2, pair, torch.arange(5.0, 0.0, -1.0).expand(1, 2, 5))
    assert top5_distance(logits.numpy()) == distance


def test_top5_distance_is_that_of_the_published_script() -> None:
    """Ranks of all classes: d = sum over the five best of one frame of |c(k) - c(rank in the other)|, c = 0 1 2 3 4 5 5 ..."""
    logits = torch.randn(2, 6, 9, dtype=torch.float64)
    capped = np.minimum(np.arange(9), 5)
    for against, before in (("previous", lambda j: j - 1), ("first", lambda j: 0)):
        expected = []
        for sequence in logits.numpy():
            ranks = [np.argsort(np.argsort(-frame)) for frame in sequence]  # rank of each class
            orders = [np.argsort(-frame) for frame in sequence]  # class of each rank
            pairs = [np.abs(capped[:5] - capped[ranks[j][orders[before(j)]]][:5]).sum() for j in range(1, 6)]
            expected.append(np.mean(pairs))
        assert top5_distances(logits, against).tolist() == pytest.approx(expected)


def test_equal_logits_are_in_the_order_of_the_classes() -> None:
    assert best_classes(torch.zeros(7)).tolist() == [0, 1, 2, 3, 4]


def test_mean_flip_rate_and_top5_distance() -> None:
    assert mean_flip_rate({"tilt": 0.1, "snow": 0.3}, {"tilt": 0.2, "snow": 0.2}) == pytest.approx((0.5 + 1.5) / 2)
    assert mean_flip_rate({"tilt": 0.1, "snow": 0.3}, None) == pytest.approx(0.2)
    assert mean_top5_distance({"tilt": 3.0}, {"tilt": 4.0}) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("values", "normaliser", "words"),
    [
        ({"tilt": 0.1}, "alexnet", "no published values of alexnet.*issue 49 of hendrycks/robustness.*or None"),
        ({"tilt": 0.1}, "vgg", "unknown normaliser 'vgg'"),
        ({}, None, "mapping: perturbation"),
        ({"tilt": math.nan}, None, "flip probability of 'tilt' is nan"),
        ({"tilt": 1.5}, None, "from 0 to 1"),
        ({"tilt": 0.1}, {"tilt": 0.1, "snow": 0.1}, "snow: in one"),
        ({"tilt": 0.1}, {"tilt": 0.0}, "of tilt is 0"),
    ],
)
def test_bad_flip_probabilities_are_refused(values: Any, normaliser: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        mean_flip_rate(values, normaliser)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flips(torch.zeros(2, 3)), "whole numbers"),
        (lambda: flips(torch.zeros(3, dtype=torch.int64)), "whole numbers"),
        (lambda: flips([[1, 2], [3]]), "array of numbers"),
        (lambda: flips(torch.zeros(0, 3, dtype=torch.int64)), "no sequence"),
        (lambda: flips(CLASSES[:, :1]), "1 frames have no two"),
        (lambda: flips(CLASSES, distance=4), "no two that are 4 apart"),
        (lambda: flips(CLASSES, distance=0), "distance must be"),
        (lambda: flips(CLASSES, "next"), "unknown against 'next'"),
        (lambda: flips(CLASSES, "first", 2), "it is 1 there"),
        (lambda: top5_distance(torch.zeros(1, 2, 5)), "at least 6 classes, got 5"),
        (lambda: top5_distance(torch.zeros(1, 2, 6, dtype=torch.int64)), "not the best five"),
        (lambda: top5_distance(torch.zeros(1, 2, 5, dtype=torch.int64)), "not the best five"),
        (lambda: top5_distance(torch.zeros(2, 6)), "shape"),
        (lambda: top5_distance(torch.zeros(0, 2, 6)), "at least 1 sequence"),
        (lambda: flip_probabilities([1]), "mapping: perturbation"),
        (lambda: flip_probabilities({}), "mapping: perturbation"),
    ],
)
def test_bad_predictions_are_refused(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_logits_without_an_order_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        best_classes(torch.tensor([0.0, 1.0, math.nan, 0.0, 0.0, 0.0]))

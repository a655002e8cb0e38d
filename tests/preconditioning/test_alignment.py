"""Angles between directions against NumPy, partial correlation against regression, bootstrap intervals against coverage."""

import numpy as np
import pytest
import torch
from torch import Tensor

from secondorder.errors import InputError, NonFiniteError
from secondorder.preconditioning import alignment, bootstrap_interval, partial_correlation

Direction = dict[str, Tensor]


def direction(seed: int, dtype: torch.dtype = torch.float64) -> Direction:
    """Tensors of two layers, the first with a bias; all directions have something in common."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first.weight": (4, 3, 2), "first.bias": (4,), "second.weight": (5, 4)}
    return {name: (torch.randn(*s, generator=generator).double() + 0.7).to(dtype) for name, s in shapes.items()}


def vectors(d: Direction) -> dict[str, np.ndarray]:
    parts = {name: tensor.double().numpy().ravel() for name, tensor in d.items()}
    first = np.concatenate([parts["first.weight"], parts["first.bias"]])
    return {"first": first, "second": parts["second.weight"], "whole": np.concatenate([first, parts["second.weight"]])}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_cosines_of_layers_and_whole() -> None:
    a, b = direction(1), direction(2)
    found, u, v = alignment(a, b), vectors(a), vectors(b)
    assert list(found.layers) == ["first", "second"]
    for layer, value in found.layers.items():
        assert value == pytest.approx(cosine(u[layer], v[layer]), abs=1e-12)
    assert found.whole == pytest.approx(cosine(u["whole"], v["whole"]), abs=1e-12)
    assert alignment(a, a).whole == 1.0
    assert alignment(a, {name: -3 * t for name, t in a.items()}).whole == pytest.approx(-1.0, abs=1e-12)


def test_order_of_names_does_not_matter() -> None:
    a, b = direction(1), direction(2)
    assert alignment(a, dict(reversed(b.items()))) == alignment(a, b)


@pytest.mark.parametrize("sizes", [(1e-40, 1e40), (1e-200, 1.0)])
def test_size_does_not_matter(sizes: tuple[float, float]) -> None:
    a, b, c = direction(1), direction(2), direction(3)
    p, q = ({name: t * size for name, t in d.items()} for d, size in zip((a, b), sizes, strict=True))
    assert alignment(p, q).whole == pytest.approx(alignment(a, b).whole, abs=1e-12)
    assert partial_correlation(p, q, c).whole == pytest.approx(partial_correlation(a, b, c).whole, abs=1e-12)


def test_partial_correlation_is_the_formula_and_that_of_residuals() -> None:
    a, b, c = direction(1), direction(2), direction(3)
    found = partial_correlation(a, b, c)
    for layer, value in [*found.layers.items(), ("whole", found.whole)]:
        u, v, w = (vectors(d)[layer] for d in (a, b, c))
        ab, ac, bc = cosine(u, v), cosine(u, w), cosine(v, w)
        assert value == pytest.approx((ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2)), abs=1e-12)
        left = [x - w * np.linalg.lstsq(w[:, None], x, rcond=None)[0] for x in (u, v)]
        assert value == pytest.approx(cosine(*left), abs=1e-12)


def test_partial_correlation_near_the_given_direction_does_not_cancel() -> None:
    a, c, small = direction(1), direction(3), direction(4)
    b = {name: c[name] + 1e-9 * small[name] for name in c}  # 1 - r^2 is about 1e-18
    assert partial_correlation(a, b, c).whole == pytest.approx(partial_correlation(a, small, c).whole, abs=1e-5)


def test_what_is_given_explains_all_or_nothing() -> None:
    a, b, c = direction(1), direction(2), direction(3)
    sum_of_both = {name: 0.3 * a[name] + 2 * c[name] for name in a}
    assert partial_correlation(a, sum_of_both, c).whole == pytest.approx(1.0, abs=1e-12)
    zero = {name: torch.zeros_like(t) for name, t in c.items()}
    assert partial_correlation(a, b, zero).whole == pytest.approx(alignment(a, b).whole, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_an_angle_it_is_zero(dtype: torch.dtype) -> None:
    a, c = direction(1, dtype), direction(3, dtype)
    zero = {name: torch.zeros_like(t) for name, t in c.items()}
    multiple = {name: t * 0.1 * 3 for name, t in c.items()}  # equal up to rounding
    assert alignment(a, zero).whole == 0
    assert alignment(zero, zero).layers == {"first": 0, "second": 0}
    assert partial_correlation(a, multiple, c).whole == 0
    assert partial_correlation(multiple, a, c).layers == {"first": 0, "second": 0}
    assert partial_correlation(zero, a, c).whole == 0


def test_different_parameters_are_refused() -> None:
    a = direction(1)
    with pytest.raises(InputError, match=r"second\.weight is \[5, 4\] in one and missing in another"):
        alignment(a, {name: t for name, t in a.items() if name != "second.weight"})
    with pytest.raises(InputError, match=r"first\.bias is \[4\] in one and \[5\]"):
        partial_correlation(a, a, {**a, "first.bias": torch.zeros(5)})
    with pytest.raises(InputError, match="without a tensor"):
        alignment({}, {})
    with pytest.raises(NonFiniteError, match=r"the direction of (all|first) contains NaN"):
        alignment(a, {**a, "first.bias": torch.full((4,), float("nan"))})


# ------------------------------------------------------------------------------------------------------------- bootstrap


def test_interval_of_the_mean_is_about_that_of_students_t() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap_interval(x)
    half = 1.96 * x.std(ddof=1) / 20
    assert found.estimate == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - half, abs=0.05)
    assert found.high == pytest.approx(x.mean() + half, abs=0.05)
    assert (found.n, found.confidence) == (400, 0.95)
    assert bootstrap_interval(x) == found
    assert bootstrap_interval(x, seed=1) != found
    wide = bootstrap_interval(x, confidence=0.99)
    assert wide.low < found.low < found.high < wide.high


def test_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    intervals = [bootstrap_interval(random.exponential(1.0, 60), confidence=0.8, resamples=300) for _ in range(200)]
    assert 0.7 < np.mean([one.low <= 1.0 <= one.high for one in intervals]) < 0.87


def test_other_statistics() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    found = bootstrap_interval(x, np.median)
    assert found.estimate == 3.0
    assert 1.0 <= found.low <= 3.0 <= found.high <= 100.0


def test_equal_values() -> None:
    found = bootstrap_interval([0.25] * 8)
    assert (found.low, found.estimate, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0], {}, "at least 2 numbers"),
        ([[1.0, 2.0]], {}, r"values of shape \[1, 2\]"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence must be .*, got 1.0"),
        ([1.0, 2.0], {"resamples": 10}, "resamples must be .*, got 10"),
        ([1.0, float("nan")], {}, "NaN"),
    ],
)
def test_bad_values(values: list, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bootstrap_interval(values, **options)

"""Lines through a loss: closed form on quadratics, and nothing left behind on real networks."""

import copy
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.landscape import (
    LandscapeLine,
    equally_spaced,
    feature_landscape,
    optimiser_step,
    weight_landscape,
)
from secondorder.networks import network
from secondorder.pooling import POOLINGS
from secondorder.untouched import same_randomness, untouched


class Quadratic(nn.Module):
    """L = 1/2 v^T A v of the activation (or the weights) v: gradient A v, Hessian A."""

    def __init__(self, size: int = 5) -> None:
        super().__init__()
        root = torch.randn(size, size, dtype=torch.float64)
        self.matrix = root @ root.T + torch.eye(size, dtype=torch.float64)
        self.weight = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def stem(self, images: Tensor) -> Tensor:
        return 2.0 * images

    def rest(self, activation: Tensor) -> Tensor:
        return 0.5 * (activation[0] @ self.matrix @ activation[0])

    def forward(self, images: Tensor) -> Tensor:
        return 0.5 * (self.weight @ self.matrix @ self.weight)


def as_loss(output: Tensor, labels: Tensor) -> Tensor:
    return output


def check_quadratic(line: LandscapeLine, start: Tensor, step: Tensor, matrix: Tensor) -> None:
    """Closed forms: L(v + eta d), ||A d|| eta, beta = ||A d|| / ||d||."""
    points = [start + eta * step for eta in line.etas]
    torch.testing.assert_close(line.loss, torch.stack([0.5 * v @ matrix @ v for v in points]))
    torch.testing.assert_close(line.gradient_distance, line.etas.abs() * (matrix @ step).norm())
    gradient = matrix @ start
    cosines = torch.stack([F.cosine_similarity(matrix @ v, gradient, dim=0) for v in points])
    torch.testing.assert_close(line.cosine, cosines)
    assert line.beta == pytest.approx(float((matrix @ step).norm() / step.norm()), rel=1e-12)
    assert line.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert line.direction_norm == pytest.approx(float(step.norm()), rel=1e-12)
    assert line.loss_at_origin == pytest.approx(float(0.5 * start @ matrix @ start), rel=1e-12)
    losses = [float(0.5 * v @ matrix @ v) for v in points]
    assert line.loss_variation == pytest.approx(max(losses) - min(losses), rel=1e-12)
    largest = float(line.etas.abs().max() * (matrix @ step).norm() / gradient.norm())
    assert line.relative_gradient_distance == pytest.approx(largest, rel=1e-12)


@pytest.mark.parametrize(("direction", "sign"), [("ascent", 1.0), ("descent", -1.0)])
def test_feature_landscape_of_a_quadratic_is_its_closed_form(direction: str, sign: float) -> None:
    model = Quadratic()
    images = torch.randn(1, 5, dtype=torch.float64)
    line = feature_landscape(model, as_loss, images, torch.zeros(1), equally_spaced(0.1, 2.0, 7), direction)
    start = 2.0 * images[0]
    check_quadratic(line, start, sign * model.matrix @ start, model.matrix)


def test_equal_predicted_improvements_of_a_quadratic() -> None:
    model, shares = Quadratic(), torch.tensor([0.1, 0.5], dtype=torch.float64)
    images = torch.randn(1, 5, dtype=torch.float64)
    line = feature_landscape(model, as_loss, images, torch.zeros(1), shares, "descent", predicted=True)
    torch.testing.assert_close(line.etas * line.gradient_norm**2, shares * line.loss_at_origin, rtol=1e-12, atol=0)
    check_quadratic(line, 2.0 * images[0], -model.matrix @ (2.0 * images[0]), model.matrix)
    same = feature_landscape(model, as_loss, images, torch.zeros(1), line.etas, "descent")
    assert torch.equal(line.loss, same.loss)
    with pytest.raises(InputError, match=r"etas .*: must be finite and other than zero"):  # no gradient, no walk
        feature_landscape(model, as_loss, 0 * images, torch.zeros(1), shares, predicted=True)
    with pytest.raises(InputError, match="predicted must be True or False"):
        feature_landscape(model, as_loss, images, torch.zeros(1), shares, predicted="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [True, False])
def test_weight_landscape_of_a_quadratic_is_its_closed_form(given: bool) -> None:
    model = Quadratic()
    start = model.weight.detach().clone()
    step = torch.randn(5, dtype=torch.float64) if given else -model.matrix @ start
    batch = torch.zeros(1, 5), torch.zeros(1)
    line = weight_landscape(model, as_loss, *batch, equally_spaced(0.5, 4.0, 6), [step] if given else None)
    check_quadratic(line, start, step, model.matrix)
    assert torch.equal(model.weight, start)


def trained_a_little(pooling: str) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    """A real network with momentum, gradients and batch-norm statistics, in training mode, and a batch."""
    model = network("digits_net", pooling, 10, 1, dropout=0.3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return model, optimiser, images, labels


def trace(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, object]:
    """Everything that measuring must not change."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "identity": [id(p.grad) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "optimiser": copy.deepcopy(optimiser.state_dict()),
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_measuring_leaves_no_trace(pooling: str) -> None:
    model, optimiser, *batch = trained_a_little(pooling)
    next(iter(model.children())).eval()  # a mixture of modes must come back too
    before = trace(model, optimiser)
    etas = equally_spaced(0.1, 5.0, 3)
    feature_landscape(model, F.cross_entropy, *batch, etas, "ascent")
    step = optimiser_step(model, optimiser, F.cross_entropy, *batch)
    weight_landscape(model, F.cross_entropy, *batch, etas, step)
    after = trace(model, optimiser)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_measuring_in_between_does_not_change_training() -> None:
    results = []
    for measure in (False, True):
        torch.manual_seed(3)
        model, optimiser, *batch = trained_a_little("gcp")
        for _ in range(3):
            if measure:
                step = optimiser_step(model, optimiser, F.cross_entropy, *batch)
                weight_landscape(model, F.cross_entropy, *batch, equally_spaced(0.5, 4, 3), step)
                feature_landscape(model, F.cross_entropy, *batch, equally_spaced(0.1, 75, 3), "descent")
            optimiser.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimiser.step()
        results.append(model.state_dict())
    assert same(*results)


def test_the_optimiser_takes_the_step_that_was_foretold() -> None:
    model, optimiser, *batch = trained_a_little("gcp")
    with same_randomness():
        foretold = optimiser_step(model, optimiser, F.cross_entropy, *batch)
    before = [p.detach().clone() for p in model.parameters()]
    optimiser.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimiser.step()
    for step, old, new in zip(foretold, before, model.parameters(), strict=True):
        assert torch.equal(step, new.detach() - old)
        assert step.abs().max() > 0


def test_measuring_sees_the_same_dropout_mask_at_every_eta() -> None:
    model, _, *batch = trained_a_little("gap")
    line = feature_landscape(model, F.cross_entropy, *batch, torch.full((4,), 1e-9, dtype=torch.float64))
    torch.testing.assert_close(line.loss, torch.full((4,), line.loss_at_origin, dtype=torch.float64), rtol=0, atol=1e-6)


def test_untouched_restores_the_sign_of_zero() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.zero_().neg_()
    with untouched(model), torch.no_grad():
        model.weight.zero_()
    assert model.weight.signbit().all()


def test_untouched_restores_after_an_exception() -> None:
    model, optimiser, *_ = trained_a_little("gcp")
    before = trace(model, optimiser)

    def vandalise() -> None:
        with untouched(model):
            model.eval()
            torch.rand(3)
            random.random()
            np.random.rand()  # noqa: NPY002
            for parameter in model.parameters():
                parameter.data.zero_()
                parameter.grad = None
                parameter.requires_grad_(False)
            for buffer in model.buffers():
                buffer.zero_()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        vandalise()
    assert same(before, trace(model, optimiser))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "sideways"}, "unknown direction 'sideways'; choose one of: ascent, descent"),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0)}, "0 images and 0 labels"),
        ({"labels": torch.zeros(3)}, "4 images and 3 labels"),
        ({"model": nn.Linear(2, 2)}, "Linear has no stem and rest"),
        ({"direction": []}, r"unknown direction \[\]; choose one of"),
        ({"model": "resnet18"}, "model str: must be a torch.nn.Module"),
        ({"loss": 0.5}, "loss 0.5: must be a function of outputs and labels"),
        ({"loss": nn.CrossEntropyLoss}, "must be a function of outputs and labels"),
        (
            {"loss": nn.CrossEntropyLoss(reduction="none")},
            "the loss must return one number that depends on the outputs",
        ),
        ({"loss": lambda z, y: 1.0}, "the loss must return one number"),
        ({"loss": lambda z, y: z.detach().sum()}, "the loss must return one number that depends on the outputs"),
        ({"images": "x"}, "images are str: must be a tensor"),
        ({"images": torch.zeros(4, 1, 8, 8, device="meta")}, "images are on the device 'meta': must be a tensor"),
        ({"labels": torch.tensor(3)}, "labels are a single number: must be a tensor"),
        ({"labels": torch.full((4,), 10)}, r"the loss on labels \[4\] fails: Target 10 is out of bounds"),
        ({"images": torch.zeros(4, 1, 8, 8).to(torch.complex64)}, r"Network on torch.complex64 \[4, 1, 8, 8\] fails: "),
        ({"etas": None}, "etas are NoneType: must be a tensor"),
        ({"etas": [0.1, 0.2]}, "etas are list: must be a tensor"),
        ({"etas": torch.zeros(0)}, r"etas are torch.float32 \[0\] on cpu: must be a tensor"),
        ({"etas": torch.tensor([1.0, 0.0])}, "must be finite and other than zero"),
        ({"etas": torch.tensor([float("nan")])}, "must be finite and other than zero"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    good = {
        "model": network("digits_net", "gap", 10, 1),
        "loss": F.cross_entropy,
        "images": torch.zeros(4, 1, 8, 8),
        "labels": torch.zeros(4, dtype=torch.long),
        "etas": equally_spaced(1, 2, 2),
    }
    with pytest.raises(InputError, match=message):
        feature_landscape(**(good | change))  # type: ignore[arg-type]


def test_ends_of_a_range_are_numbers_of_any_kind() -> None:
    for ends in ((1, 10**30), (Fraction(1, 4), np.float32(0.5)), (1e-300, 1e299)):
        assert torch.equal(equally_spaced(*ends, 3), torch.linspace(*map(float, ends), 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "numbers",
    [
        (1, 10**400, 5),
        *(
            (0.0, 1.0, 5),
            (2.0, 1.0, 5),
            (1.0, float("inf"), 5),
            (1.0, 2.0, 0),
            ("0", 1.0, 5),
            (1.0, [], 5),
            (True, 1.0, 5),
        ),
        *((1.0, torch.ones(2), 5), (1.0, 2.0, True), (1.0, 2.0, 2.5), (1.0, 2.0, 10**30), (float("nan"), 1.0, 5)),
    ],
)
def test_bad_range(numbers: tuple[float, float, int]) -> None:
    with pytest.raises(InputError, match=r"^(the eta range|points) .*\d"):
        equally_spaced(*numbers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": "sgd"}, "optimiser str: must be a torch.optim.Optimizer"),
        ({"model": nn.Sequential()}, "Sequential has no parameter that requires gradients"),
        ({"images": torch.zeros(4, 3)}, "Linear on torch.float32 .* fails: mat1 and mat2"),
        ({"labels": [0, 1, 2, 0]}, "labels are list: must be a tensor"),
    ],
)
def test_bad_input_of_an_optimisers_step(change: dict[str, object], message: str) -> None:
    model = nn.Linear(2, 3)
    good = {"model": model, "loss": F.cross_entropy, "images": torch.zeros(4, 2), "labels": torch.zeros(4).long()}
    good["optimiser"] = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        optimiser_step(**(good | change))  # type: ignore[arg-type]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("step", [3, "x", [1.0], None])
def test_a_step_that_is_none_is_refused(step: object) -> None:
    model = Quadratic()
    given = (model, as_loss, torch.zeros(1, 5), torch.zeros(1), equally_spaced(1, 2, 2))
    if step is None:
        with pytest.raises(InputError, match="has no parameter that requires gradients"):
            weight_landscape(model.requires_grad_(False), *given[1:])
        return
    with pytest.raises(InputError, match="must be a list of tensors, one for each trainable parameter"):
        weight_landscape(*given, step)  # type: ignore[arg-type]


def test_a_step_of_the_wrong_shape_is_refused() -> None:
    model = Quadratic()
    with pytest.raises(InputError, match="do not match"):
        weight_landscape(model, as_loss, torch.zeros(1, 5), torch.zeros(1), equally_spaced(1, 2, 2), [torch.zeros(4)])


def test_a_zero_step_has_no_beta() -> None:
    model = Quadratic()
    step = [torch.zeros(5, dtype=torch.float64)]
    line = weight_landscape(model, as_loss, torch.zeros(1, 5), torch.zeros(1), equally_spaced(1, 2, 2), step)
    assert np.isnan(line.beta)
    assert line.loss_variation == 0.0

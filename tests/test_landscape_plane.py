"""Planes through a loss and directions for them: closed forms, eigenvalues, scale invariance, and nothing left behind."""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from test_landscape import Quadratic, as_loss, same, trace, trained_a_little
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks, top_eigenvalues
from secondorder.errors import InputError
from secondorder.landscape import (
    NORMALISATIONS,
    LandscapePlane,
    equally_spaced,
    filter_normalised_direction,
    landscape_plane,
    optimiser_step,
    parameter_directions,
    weight_landscape,
)

GRID = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.tensor([-0.5, 0.0, 2.0], dtype=torch.float64)
NOTHING = torch.zeros(1, 5), torch.zeros(1)


def small_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """conv - ReLU - conv - ReLU - linear for images [N, 2, 4, 4]."""
    convolutions = nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).to(dtype)


def images_and_labels(n: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 4, 4, dtype=dtype), torch.randint(3, (n,))


def random_directions(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return filter_normalised_direction(model, 1, vectors=True), filter_normalised_direction(model, 2, vectors=True)


def moved_loss(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    shifts: dict[str, Tensor],
) -> float:
    """L(w + shifts) of a copy of the model."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, shift in shifts.items():
            model.get_parameter(name).add_(shift)
        return float(loss(model(batch[0]), batch[1]))


class Bowl(Quadratic):
    """The same with an output for each image, of one image."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).reshape(1)


def summed(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.sum()


def test_a_quadratic_is_its_closed_form() -> None:
    model = Quadratic()
    w, A = model.weight.detach().clone(), model.matrix
    d, e = torch.randn(2, 5, dtype=torch.float64)
    plane = landscape_plane(model, as_loss, NOTHING, {"weight": d}, [e], *GRID)
    for (i, x), (j, y) in ((a, b) for a in enumerate(GRID[0]) for b in enumerate(GRID[1])):
        v = w + x * d + y * e
        torch.testing.assert_close(plane.loss[i, j], v @ A @ v / 2, rtol=1e-13, atol=1e-13)
    assert plane.loss_at_origin == float(w @ A @ w / 2) == plane.loss[2, 1]
    assert plane.lengths == pytest.approx((float(d.norm()), float(e.norm())), rel=1e-14)
    assert plane.cosine == pytest.approx(float(F.cosine_similarity(d, e, dim=0)), rel=1e-13)
    assert torch.equal(plane.x, GRID[0])
    assert torch.equal(plane.y, GRID[1])
    assert torch.equal(model.weight, w)


def test_an_eigenvector_of_the_hessian_has_its_eigenvalue_as_second_difference() -> None:
    model = Bowl()
    batch = NOTHING[0].double(), NOTHING[1]
    found = top_eigenvalues(curvature_blocks(model, summed, batch, "hessian").whole, 2)
    first, second = parameter_directions(found.vectors, model)
    plane = landscape_plane(model, summed, batch, first, second, torch.tensor([-1.0, 0.0, 1.0]))
    differences = (
        plane.loss[0] - 2 * plane.loss[1] + plane.loss[2],
        plane.loss.T[0] - 2 * plane.loss.T[1] + plane.loss.T[2],
    )
    for difference, value in zip(differences, found.values, strict=True):  # at every place of the plane
        torch.testing.assert_close(difference, value.expand(3), rtol=1e-10, atol=0)
    assert plane.lengths == pytest.approx((1, 1), rel=1e-12)
    assert plane.cosine == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("params", [None, ["2.weight"], ["6.bias", "0.weight"]])
def test_vectors_have_the_shapes_and_the_order_of_a_block(params: list[str] | None) -> None:
    model, batch = small_net(), images_and_labels()
    model[0].bias.requires_grad_(False)
    blocks = curvature_blocks(model, nn.CrossEntropyLoss(), batch, "hessian", params)
    found = top_eigenvalues(blocks.whole, 2, "magnitude")
    directions = parameter_directions(found.vectors, model, params)
    assert [list(d) for d in directions] == [list(blocks)] * 2
    parameters = [model.get_parameter(name) for name in blocks]
    for value, direction in zip(found.values, directions, strict=True):
        assert [d.shape for d in direction.values()] == [p.shape for p in parameters]
        gradient = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), parameters, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(gradient, direction.values(), strict=True))
        product = torch.autograd.grad(slope, parameters, materialize_grads=True)  # H d = lambda d
        for Hd, d in zip(product, direction.values(), strict=True):
            torch.testing.assert_close(Hd, value * d, rtol=0, atol=1e-7 * float(found.values.abs().max()))
    assert [*parameter_directions(found.vectors[:, 0], model, params)[0]] == list(blocks)


def test_a_block_of_one_parameter_needs_no_list() -> None:
    model = small_net()
    (direction,) = parameter_directions(torch.arange(12.0), model, "6.weight")
    assert torch.equal(direction["6.weight"], torch.arange(12.0).view(3, 4))


def filters(w: Tensor) -> Tensor:
    return torch.stack([row.norm() for row in w.detach()])


def test_filters_are_as_long_as_the_networks() -> None:
    model = small_net()
    direction = filter_normalised_direction(model, 3)
    assert list(direction) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            torch.testing.assert_close(filters(direction[name]), filters(p), rtol=1e-14, atol=0)
            assert float(F.cosine_similarity(direction[name].flatten(), p.detach().flatten(), dim=0).abs()) < 0.9
        else:
            assert not direction[name].any()
    moved = filter_normalised_direction(model, 3, vectors=True)
    assert all(torch.equal(moved[name], d) for name, d in direction.items() if name.endswith("weight"))
    biases = [name for name in moved if name.endswith("bias")]
    torch.testing.assert_close(
        [moved[n].norm() for n in biases], [model.get_parameter(n).detach().norm() for n in biases]
    )


def test_layers_are_as_long_as_the_networks() -> None:
    model = small_net()
    direction = filter_normalised_direction(model, 3, normalisation="layer")
    weights = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    torch.testing.assert_close([direction[name].norm() for name in weights], [w.norm() for w in weights.values()])
    assert not torch.allclose(filters(direction["0.weight"]), filters(weights["0.weight"]))


def test_random_directions_are_seeded_and_leave_random_numbers_and_filters_of_zeros_alone() -> None:
    model = small_net(torch.float32)
    with torch.no_grad():
        model[0].weight[1] = 0
    model[2].weight.requires_grad_(False)
    state = torch.get_rng_state()
    first, again, other = (filter_normalised_direction(model, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert same(first, again)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not first["0.weight"][1].any()
    assert first["0.weight"].isfinite().all()
    assert "2.weight" not in first
    assert first["6.weight"].dtype == torch.float32


def rescaled(model: nn.Sequential, c: float) -> nn.Sequential:
    """The same function: one layer times c, the next over c."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.mul_(c)
        model[0].bias.mul_(c)
        model[2].weight.div_(c)
    return model


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_normalised_planes_are_those_of_the_rescaled_network(normalisation: str) -> None:
    """The point of Li et al.: networks that compute the same have the same picture; a power of two changes no digit."""
    model, batch = small_net(), images_and_labels()
    other = rescaled(model, 16.0)
    assert torch.equal(model(batch[0]), other(batch[0]))

    def plane(net: nn.Module, *directions: dict[str, Tensor]) -> Tensor:
        return landscape_plane(net, F.cross_entropy, batch, *directions, *GRID).loss

    normalised = [
        [filter_normalised_direction(net, seed, normalisation=normalisation) for seed in (1, 2)]
        for net in (model, other)
    ]
    ours = plane(model, *normalised[0])
    assert torch.equal(plane(other, *normalised[1]), ours)
    assert float((plane(other, *normalised[0]) - ours).abs().max()) > 0.01  # the same steps in both networks


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_batches_are_one_loss(reduction: str) -> None:
    model, (images, labels) = small_net(), images_and_labels(7)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    d, e = random_directions(model)
    whole = landscape_plane(model, loss, (images, labels), d, e, *GRID, reduction=reduction)
    parts = [(images[:4], labels[:4]), (images[4:6], labels[4:6]), (images[6:], labels[6:])]
    for batches in (parts, iter(parts), torch.utils.data.DataLoader([*zip(images, labels, strict=True)], 3)):
        plane = landscape_plane(model, loss, batches, d, e, *GRID, reduction=reduction)
        torch.testing.assert_close(plane.loss, whole.loss, rtol=1e-13, atol=0)
        assert plane.loss_at_origin == pytest.approx(whole.loss_at_origin, rel=1e-13)
    corner = {name: d[name] * GRID[0][0] + e[name] * GRID[1][2] for name in d}
    assert float(whole.loss[0, 2]) == pytest.approx(moved_loss(model, loss, (images, labels), corner), rel=1e-12)


def test_each_batch_is_asked_for_once() -> None:
    model, batch = small_net(), images_and_labels()
    asked = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(2):
            asked.append(number)
            yield batch

    plane = landscape_plane(model, F.cross_entropy, batches(), *random_directions(model), *GRID)
    assert asked == [0, 1]
    assert plane.loss.shape == (5, 3)


def normed() -> nn.Sequential:
    """A network with batch norm, whose stored statistics are not those of a batch, and its loss by either."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    model[1].running_mean.normal_()
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_norm", ["present", "stored", "batch"])
def test_statistics_of_batch_norm(batch_norm: str, training: bool) -> None:
    model, batch = normed().train(training), images_and_labels()
    d, e = random_directions(model)
    plane = landscape_plane(model, F.cross_entropy, [batch], d, e, *GRID, batch_norm=batch_norm)
    expected = copy.deepcopy(model)
    expected[1].train({"present": training, "stored": False, "batch": True}[batch_norm])
    for i, j in ((0, 0), (4, 2)):
        shifts = {name: d[name] * GRID[0][i] + e[name] * GRID[1][j] for name in d}
        assert float(plane.loss[i, j]) == pytest.approx(moved_loss(expected, F.cross_entropy, batch, shifts), rel=1e-12)


class Counting(nn.Module):
    """A layer whose output depends on how often it was called, and that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        self.calls: Tensor
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x.add_(1) * self.weight * self.calls).sum(1)


def test_points_do_not_depend_on_one_another() -> None:
    model, images = Counting(), torch.zeros(3, 5)
    zero = {"weight": torch.zeros(5)}
    plane = landscape_plane(model, lambda z, y: z.sum(), (images, torch.zeros(3)), zero, zero, *GRID)
    assert (plane.loss == 2 * 15).all()
    assert plane.loss_at_origin == 30
    assert math.isnan(plane.cosine)
    assert not images.any()
    assert model.calls == 1


def test_a_coordinate_of_zero_moves_nothing_and_no_graph_is_kept() -> None:
    model, batch, graphs = small_net(), images_and_labels(), []
    d = {"6.bias": torch.full((3,), math.inf)}

    def loss(z: Tensor, y: Tensor) -> Tensor:
        graphs.append(z.requires_grad)
        return F.cross_entropy(z, y)

    plane = landscape_plane(model, loss, batch, d, d, torch.tensor([0.0, 1.0]))
    assert plane.loss[0, 0] == plane.loss_at_origin
    assert plane.loss_at_origin == pytest.approx(float(F.cross_entropy(model(batch[0]), batch[1]).detach()), rel=1e-15)
    assert plane.loss.isnan().tolist() == [[False, True], [True, True]]
    assert graphs == [False] * 5


def test_every_point_has_the_same_dropout_masks_and_every_batch_its_own() -> None:
    model, (images, labels) = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1)), (torch.ones(4, 5), torch.zeros(4))
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    measure = lambda batches: landscape_plane(model, lambda z, y: z.sum(), batches, zero, zero, *GRID)  # noqa: E731
    one, two = measure([(images, labels)]), measure([(images, labels)] * 2)
    assert (one.loss == one.loss_at_origin).all()
    assert (two.loss == two.loss_at_origin).all()
    assert one.loss_at_origin != two.loss_at_origin


@pytest.mark.parametrize("pooling", ["gap", "gcp", "dropcov"])
@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_no_trace(pooling: str, fails: bool) -> None:
    model, optimiser, *batch = trained_a_little(pooling)
    next(iter(model.children())).eval()  # a mixture of modes must come back too
    next(iter(model.parameters())).requires_grad_(False)
    batch[0].neg_()
    step = optimiser_step(model, optimiser, F.cross_entropy, *batch)
    d = filter_normalised_direction(model, 1)
    before, pair = trace(model, optimiser), copy.deepcopy(batch)
    asked = iter([tuple(batch)])
    loss = (lambda z, y: F.cross_entropy(z, y + 100)) if fails else F.cross_entropy
    try:
        for batch_norm in ("stored", "batch"):
            landscape_plane(model, loss, [batch, batch], d, step, *GRID, batch_norm=batch_norm)
        landscape_plane(model, loss, asked, step, d, torch.tensor([0.5]))
    except InputError:
        assert fails
    after = trace(model, optimiser)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert same(batch, pair)


def test_the_line_along_a_direction_is_the_middle_of_its_plane() -> None:
    model, batch = small_net(), images_and_labels()
    d, e = random_directions(model)
    etas = equally_spaced(0.1, 1.0, 4)
    by_name = weight_landscape(model, F.cross_entropy, *batch, etas, {"0.weight": d["0.weight"]})
    listed = weight_landscape(
        model, F.cross_entropy, *batch, etas, [v if name == "0.weight" else 0 * v for name, v in d.items()]
    )
    assert torch.equal(by_name.loss, listed.loss)
    assert by_name.direction_norm == pytest.approx(float(d["0.weight"].norm()), rel=1e-14)
    plane = landscape_plane(model, F.cross_entropy, batch, {"0.weight": d["0.weight"]}, e, etas, torch.zeros(1))
    torch.testing.assert_close(plane.loss[:, 0], by_name.loss, rtol=1e-12, atol=0)
    assert plane.loss_at_origin == pytest.approx(by_name.loss_at_origin, rel=1e-15)


def test_parameters_that_need_no_gradient_can_be_moved() -> None:
    model, batch = small_net().requires_grad_(False), images_and_labels()
    d, e = {"0.weight": torch.ones(3, 2, 3, 3)}, {"6.bias": torch.tensor([1.0, 0, 0])}
    plane = landscape_plane(model, F.cross_entropy, batch, d, e, *GRID)
    shifts = {"0.weight": d["0.weight"] * GRID[0][1], "6.bias": e["6.bias"] * GRID[1][2]}
    assert float(plane.loss[1, 2]) == pytest.approx(moved_loss(model, F.cross_entropy, batch, shifts), rel=1e-12)
    assert plane.cosine == 0  # of directions that share no parameter
    assert plane.lengths == pytest.approx((54**0.5, 1))


class Slope(nn.Module):
    """The derivative of a network with respect to its input, as physics-informed networks have one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)[0]


def test_networks_that_differentiate_within() -> None:
    model, x = Slope(), torch.randn(6, 1, dtype=torch.float64)
    d, e = random_directions(model)
    plane = landscape_plane(model, F.mse_loss, (x, torch.zeros_like(x)), d, e, *GRID)
    line = weight_landscape(model, F.mse_loss, x.clone(), torch.zeros_like(x), GRID[0][3:], d)
    torch.testing.assert_close(plane.loss[3:, 1], line.loss, rtol=1e-12, atol=0)
    assert not x.requires_grad


def test_losses_that_are_not_finite_are_values() -> None:
    model = Quadratic()
    far = torch.tensor([0.0, 1e200], dtype=torch.float64)
    plane = landscape_plane(model, as_loss, NOTHING, [torch.ones(5)], [torch.ones(5)], far)
    assert plane.loss.isinf().tolist() == [[False, True], [True, True]]


def test_the_table_has_a_row_for_each_point() -> None:
    loss = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    plane = LandscapePlane(GRID[0][:2], GRID[1], loss, 0.0, (1.0, 1.0), 0.0)
    table = plane.table()
    assert list(table) == ["x", "y", "loss"]
    np.testing.assert_array_equal(table.pivot(index="x", columns="y", values="loss").to_numpy(), loss)


D = {"weight": torch.ones(5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "model int: must be a torch.nn.Module"),
        ({"loss": None}, "loss None: must be a function"),
        ({"batches": 3}, "batches int: must be a pair"),
        ({"batches": torch.zeros(2, 1, 5)}, "batches Tensor: must be a pair"),
        ({"batches": []}, "there is no batch"),
        ({"batches": [torch.zeros(1, 5)]}, "a batch is a pair .* got Tensor"),
        ({"batches": [{"x": 1, "y": 2}]}, "a batch is a pair .* got dict"),
        ({"batches": [(torch.zeros(2, 5), torch.zeros(1))]}, "2 images and 1 labels"),
        ({"first": 3}, "first direction int: must be a list of tensors"),
        ({"second": {"bias": torch.ones(5)}}, "unknown parameter 'bias'; choose one of: weight"),
        ({"second": {"weight": torch.ones(4)}}, r"the second direction has 1 tensors .*; weight: \[4\] for \[5\]"),
        ({"second": {"weight": [1.0] * 5}}, "the second direction of weight must be a tensor of real numbers"),
        ({"second": {"weight": torch.ones(5, dtype=torch.complex64)}}, "must be a tensor of real numbers"),
        ({"first": {}}, "the first direction names no parameter"),
        (
            {"first": [torch.ones(5)] * 2},
            "the first direction has 2 tensors that do not match the model's 1 parameters",
        ),
        ({"x": [0.0, 1.0]}, r"x are list: must be a tensor \[K\] of real numbers, K >= 1; see torch.linspace"),
        ({"x": torch.zeros(0)}, r"x are torch.float32 \[0\]"),
        ({"y": torch.tensor([0.0, torch.nan])}, r"y \[0.0, nan\]: must be finite"),
        ({"batch_norm": "eval"}, "unknown batch_norm 'eval'; choose one of: present, stored, batch"),
        ({"reduction": "none"}, "unknown reduction 'none'"),
        ({"loss": lambda z, y: z.expand(2)}, "the loss must return one number"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    good = {"model": Quadratic(), "loss": as_loss, "batches": NOTHING, "first": D, "second": D}
    with pytest.raises(InputError, match=message):
        landscape_plane(**(good | change))  # type: ignore[arg-type]


def test_batch_norm_without_statistics_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(InputError, match=r"0 \(BatchNorm1d\) stores no statistics; use batch_norm='batch'"):
        landscape_plane(model, as_loss, NOTHING, *[{"0.weight": torch.ones(5)}] * 2, batch_norm="stored")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "Linear has no parameter that requires gradients"),
        ({"model": nn.LazyLinear(2)}, "parameter weight has no numbers yet"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"normalisation": "weight"}, "unknown normalisation 'weight'; choose one of: filter, layer"),
        ({"vectors": 1}, "vectors must be True or False"),
    ],
)
def test_bad_input_of_random_directions(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        filter_normalised_direction(**({"model": nn.Linear(2, 2)} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": torch.ones(5)}, "vectors of 5 entries for 2 parameters of 6"),
        ({"vectors": torch.ones(6, 1, 1)}, r"vectors torch.float32 \[6, 1, 1\]: must be a tensor \[P\] or \[P, K\]"),
        ({"vectors": [1.0] * 6}, "vectors list: must be a tensor"),
        ({"vectors": torch.ones(6).long()}, "must be a tensor .* of floating-point numbers"),
        ({"params": ["weights"]}, "unknown parameter 'weights'"),
        ({"model": "net"}, "model str: must be a torch.nn.Module"),
    ],
)
def test_bad_input_of_directions(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parameter_directions(**({"vectors": torch.ones(6), "model": nn.Linear(2, 2)} | change))  # type: ignore[arg-type]

"""What the few images that formulas are tried on do not show: other experts, larger batches, sizes."""

from collections.abc import Callable

import pytest
import torch
from experts import clipped, experts, images
from own_functions import Clipped, NoTangent, Sine
from small_networks import CLASSES, By, around, relative, reverse_ggn, rows
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()


def held(x: Tensor) -> Tensor:
    return x / x.detach().norm(dim=1, keepdim=True)


@pytest.mark.parametrize("function", [NoTangent.apply, held])
def test_products_are_right_for_images_of_another_expert(function: Callable[[Tensor], Tensor]) -> None:
    model, data = experts(function).double(), images()
    G = reverse_ggn(model, CE, data)
    V = torch.randn(len(G), 2).double()
    for chunk in (None, 2):
        blocks = curvature_blocks(model, CE, data, "ggn", chunk=chunk)
        assert relative(blocks["small.0.weight"] @ V[28:52], G[28:52, 28:52] @ V[28:52]) <= 1e-12
        assert relative(blocks.whole @ V, G @ V) <= 1e-12


def test_what_another_expert_has_no_derivative_for_is_refused() -> None:
    data = images()
    for function, quantity in ((Sine.apply, "ggn"), (Sine.apply, "hessian"), (clipped, "ggn"), (clipped, "hessian")):
        whole = curvature_blocks(experts(function).double(), CE, data, quantity).whole
        with pytest.raises(InputError, match=r"Sine has a wrong or no jvp|differentiated once only|is not linear"):
            whole @ torch.ones(whole.size).double()
    model = experts(Sine.apply).double()
    dense = curvature_blocks(model, CE, data, "ggn").whole.dense()
    assert relative(dense, reverse_ggn(model, CE, data)) <= 1e-12
    with pytest.raises(InputError, match="is not linear"):
        curvature_blocks(experts(clipped).double(), CE, data, "diagonal")


def test_hooks_that_clip_large_or_drop_small_gradients_only_are_refused() -> None:
    model, data = around(lambda x: clipped(x, 50)), rows()
    whole = curvature_blocks(model, CE, data, "ggn").whole
    assert relative(whole @ torch.ones(63).double(), reverse_ggn(model, CE, data).sum(1)) <= 1e-12
    with pytest.raises(InputError, match="is not linear"):
        whole @ torch.full((63,), 1e6).double()

    def shortened(x: Tensor) -> Tensor:
        x = x.tanh()
        if x.requires_grad:
            x.register_hook(lambda g: g * torch.clamp(50 / g.norm(), max=1))
        return x

    whole = curvature_blocks(around(shortened), CE, data, "ggn").whole
    assert bool((whole @ torch.ones(63).double()).isfinite().all())
    with pytest.raises(InputError, match="is not linear"):
        whole @ torch.full((63,), 1e6).double()

    def dropped(x: Tensor) -> Tensor:
        x = x.tanh()
        if x.requires_grad:
            x.register_hook(lambda g: g * (g.abs() > 1e-7))
        return x

    for function in (lambda x: clipped(x, 50), dropped):
        for quantity in ("diagonal", "kfac_expand", "hessian"):
            with pytest.raises(InputError, match="is not linear"):
                curvature_blocks(around(function), CE, data, quantity).whole @ torch.ones(63).double()


def noisy(x: Tensor) -> Tensor:
    x = x.tanh()
    if x.requires_grad:
        x.register_hook(lambda g: g + torch.rand_like(g))
    return x


def test_random_numbers_of_another_expert_s_backward_pass_are_put_back() -> None:
    model, data, state = experts(noisy).double(), images(), torch.get_rng_state()
    for quantity in ("ggn", "hessian"):
        whole = curvature_blocks(model, CE, data, quantity).whole
        with pytest.raises(InputError, match="draws random numbers"):
            whole @ torch.ones(whole.size).double()
        assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(InputError, match="draws random numbers"):
        curvature_blocks(model, CE, data, "diagonal")
    assert torch.equal(state, torch.get_rng_state())


def drawing(x: Tensor) -> Tensor:
    x = x.tanh()
    if x.requires_grad:
        x.register_hook(lambda g: g + 0 * torch.rand_like(g))
    return x


def test_random_numbers_that_change_nothing_are_refused_too() -> None:
    model, data, state = experts(drawing).double(), images(), torch.get_rng_state()
    whole = curvature_blocks(model, CE, data, "ggn").whole
    with pytest.raises(InputError, match="draws random numbers"):
        whole @ torch.ones(whole.size).double()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("function", [clipped, Clipped.apply])
@pytest.mark.parametrize("quantity", ["diagonal", "kfac_expand", "hessian"])
def test_backward_passes_of_large_batches_that_are_not_linear(
    function: Callable[[Tensor], Tensor], quantity: str
) -> None:
    model = around(lambda x: function(x) if len(x) > 4 else x.tanh())
    for chunk in (None, 6):
        with pytest.raises(InputError, match=r"is not linear|not those of its gradient|not symmetric"):
            curvature_blocks(model, CE, rows(12), quantity, chunk=chunk).whole @ torch.ones(63).double()


def far_apart(x: Tensor) -> Tensor:
    return torch.cat([x[:5], x[5:] + x[:-5]]) if len(x) > 5 else 1 * x


def of_many(x: Tensor) -> Tensor:
    return x - x.mean(0) / 2 if len(x) > 4 else 1 * x


@pytest.mark.parametrize("coupling", [far_apart, of_many])
def test_images_that_act_on_one_another_in_large_batches_only(coupling: Callable[[Tensor], Tensor]) -> None:
    model, data = around(coupling), rows(12)
    G = reverse_ggn(model, CE, data)
    whole = curvature_blocks(model, CE, data, "ggn").whole
    assert relative(whole.dense(), G) <= 1e-12
    assert relative(curvature_blocks(model, CE, data, "diagonal").whole.diagonal(), G.diagonal()) <= 1e-12
    factors = curvature_blocks(model, CE, data, "kfac_expand")
    z, h = model(data[0]), model[0](data[0])
    gradients = [torch.autograd.grad(model[1:](h), h, u) for u in columns(z.detach())]
    B = sum(g.mT @ g for (g,) in gradients)
    assert relative(factors["0.bias"].dense(), B) <= 1e-12
    model = nn.Sequential(Unknown(6, 4), By(coupling), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    dense = curvature_blocks(model, CE, data, "ggn").whole.dense()
    assert relative(dense, reverse_ggn(model, CE, data)) <= 1e-12


def test_a_division_that_changes_the_result_is_noticed_late() -> None:
    for quantity in ("diagonal", "kfac_expand"):
        with pytest.raises(InputError, match="a division of the batch into parts of 8 would change the result"):
            curvature_blocks(around(far_apart), CE, rows(16), quantity, chunk=8)


class Unknown(nn.Module):
    """A layer of a kind without rules for rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def columns(z: Tensor) -> list[Tensor]:
    """Those of a factor of the Hessian of the mean cross-entropy at outputs z `[N, C]`, one after the other."""
    found = []
    for n, p in enumerate(z.softmax(1)):
        values, vectors = torch.linalg.eigh((p.diag() - p.outer(p)) / len(z))
        for value, vector in zip(values.clamp_min(0), vectors.mT, strict=True):
            found.append(torch.zeros_like(z))
            found[-1][n] = value.sqrt() * vector
    return found


def test_every_two_of_few_images_are_told_apart() -> None:
    """Where one image's outputs have no derivative: the others' activations are saturated by it."""
    model, (x, y) = around(lambda x: x.cumsum(0)), rows(3)
    x[1] *= 1e4
    with pytest.raises(InputError, match="chunk=2 would change the result"):
        curvature_blocks(model, CE, (x, y), "ggn", chunk=2)


def test_a_parameter_with_an_infinite_derivative_hides_no_other_one() -> None:
    class Infinite(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.a, self.first, self.last = nn.Parameter(torch.zeros(2)), nn.Linear(6, 4), nn.Linear(4, CLASSES)
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.function(self.first(x))) + self.a.sqrt().sum()  # type: ignore[no-any-return]

    model, data = Infinite(NoTangent.apply).double(), rows()
    G = reverse_ggn(model, CE, data)[2:26, 2:26]
    block = curvature_blocks(model, CE, data, "ggn")["first.weight"]
    v = torch.randn(24).double()
    assert relative(block @ v, G @ v) <= 1e-12
    with pytest.raises(InputError, match="is not linear"):
        curvature_blocks(Infinite(clipped).double(), CE, data, "ggn")["first.weight"].dense()


def test_what_is_changed_in_place_is_refused_in_a_line() -> None:
    def doubled(x: Tensor) -> Tensor:
        x = x.exp()
        return x.mul_(2)

    for quantity in ("ggn", "hessian"):
        whole = curvature_blocks(around(doubled), CE, rows(), quantity).whole
        with pytest.raises(InputError, match="modified by an inplace operation"):
            whole @ torch.ones(63).double()


def test_products_take_no_further_evaluations() -> None:
    evaluated: list[int] = []
    model, data = around(torch.tanh), rows(40)
    model[0].register_forward_hook(lambda layer, args, output: evaluated.append(len(output)))
    whole = curvature_blocks(model, CE, data, "ggn").whole
    for _ in range(2):
        whole @ torch.ones(63).double()
    # the probe, forward mode on it, the batch, and two products
    assert evaluated == [2, 2, 40, 40, 40]

"""Kronecker factors as BackPACK extensions against curvlinops, explicit groups, and the exact matrix; float64."""

from copy import deepcopy

import pytest
import torch
from backpack import backpack, extend, extensions
from curvlinops import FisherType, KFACLinearOperator
from curvlinops.kfac import KFACType
from small_networks import batch, chain, relative, straight, true_ggn
from torch import Tensor, nn

from secondorder.curvature.backpack import kronecker
from secondorder.curvature.backpack.kronecker import WeightSharingKFAC, WeightSharingKFLR
from secondorder.curvature.backpack.registration import register
from secondorder.curvature.operators.factored import FactoredOperator
from secondorder.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

EXACT = 1e-12
LOSSES = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss(), nn.MSELoss(reduction="sum")]
MODELS = {
    "gcp": lambda: chain("gcp"),
    "gap": lambda: chain("gap", nn.Tanh),
    "straight": straight,
    "strided": lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=2), *chain("gcp_exact", channels=3)[3:]).double(),
}


def factors(
    model: nn.Module,
    extension: extensions.KFAC | extensions.KFLR,
    loss: nn.Module,
    data: tuple[Tensor, Tensor],
    registered: bool = True,
) -> dict[str, list]:
    """The factors of every parameter."""
    twin = extend(deepcopy(model))
    with backpack(register(extension) if registered else extension):
        extend(type(loss)(reduction=loss.reduction))(twin(data[0]), data[1]).backward()
    return {n: getattr(p, extension.savefield) for n, p in twin.named_parameters() if hasattr(p, extension.savefield)}


def oracle(
    model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], sharing: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """curvlinops' B and A of every layer."""
    operator = KFACLinearOperator(
        model, loss, [p for p in model.parameters() if p.requires_grad], [data],
        fisher_type=FisherType.TYPE2, kfac_approx=KFACType(sharing), check_deterministic=False,
    )  # fmt: skip
    operator.compute_kronecker_factors()
    return operator._gradient_covariances, operator._input_covariances


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_curvlinops(name: str, sharing: str, loss: nn.Module):
    model, data = MODELS[name](), batch(loss)
    B, A = oracle(model, loss, data, sharing)
    ours = factors(model, WeightSharingKFLR(sharing), loss, data)
    for layer in B:
        weight, bias = ours[f"{layer}.weight"], ours[f"{layer}.bias"]
        assert relative(weight[1], A[layer]) <= EXACT
        if sharing == "reduce" and name == "straight" and layer == "0":
            assert B[layer].abs().max() < 1e-12  # zero: the head does not see a shift of all positions
            assert weight[0].abs().max() < 1e-12
        else:
            assert relative(weight[0], B[layer]) <= EXACT
            assert relative(bias[0], B[layer]) <= EXACT


def test_backpack_factor_below_a_covariance_is_zero_and_ours_is_not():
    loss, model = nn.CrossEntropyLoss(), straight()
    data = batch(loss)
    ours = factors(model, extensions.KFLR(), loss, data)["0.weight"]
    B, A = oracle(model, loss, data, "expand")
    assert relative(ours[0], B["0"]) <= EXACT
    assert relative(ours[1], A["0"]) <= EXACT
    extension = register(extensions.KFLR())
    extension.set_module_extension(nn.Conv2d, extensions.secondorder.hbp.conv2d.HBPConv2d(), overwrite=True)
    theirs = factors(model, extension, loss, data, registered=False)["0.weight"]
    assert theirs[0].trace() < 1e-20 * ours[0].trace()
    assert ours[0].trace() * ours[1].trace() > 0.1 * true_ggn(model, loss, data)[:72, :72].trace()


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution_is_a_convolution_of_each_group(groups: int):
    """The factors of group g are those of a network in which the other groups are constants."""
    loss = nn.CrossEntropyLoss()
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups, padding=1), *chain("gcp", channels=8)[3:]).double()
    data = batch(loss, channels=4)
    inside = factors(model, WeightSharingKFLR(), loss, data)["0.weight"]
    size, width = 8 // groups, 4 // groups
    assert inside[0].shape == (groups, size, size)
    assert inside[1].shape == (groups, 9 * width, 9 * width)
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), *model[1:]).double()
    with torch.no_grad():
        dense[0].weight.zero_()
        dense[0].bias.copy_(model[0].bias)
        for g in range(groups):
            outputs = slice(g * size, (g + 1) * size)
            dense[0].weight[outputs, g * width : (g + 1) * width] = model[0].weight[outputs]
    B, A = factors(dense, WeightSharingKFLR(), loss, data)["0.weight"]
    for g in range(groups):
        rows, columns = slice(g * size, (g + 1) * size), slice(9 * g * width, 9 * (g + 1) * width)
        assert relative(inside[0][g], B[rows, rows]) <= EXACT
        assert relative(inside[1][g], A[columns, columns]) <= EXACT


def test_batch_norm_has_no_factor():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), *chain()[4:]).double().eval()
    loss = nn.CrossEntropyLoss()
    found = factors(model, extensions.KFAC(), loss, batch(loss))
    assert set(found) == {"0.weight", "0.bias", "6.weight", "6.bias"}


def test_wide_input_stays_in_rows(monkeypatch: pytest.MonkeyPatch):
    loss, model = nn.MSELoss(), chain("gcp")
    data = batch(loss)
    dense = factors(model, extensions.KFLR(), loss, data)["7.weight"][1]
    assert kronecker.WIDE_INPUT == 4096
    monkeypatch.setattr(kronecker, "WIDE_INPUT", 9)
    wide = factors(model, extensions.KFLR(), loss, data)["7.weight"][1]
    assert isinstance(wide, FactoredOperator)
    assert wide.rows.shape == (3, 10)
    assert relative(wide.dense(), dense) <= EXACT


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sampled_factors_are_unbiased(sharing: str, loss: nn.Module):
    model, data = chain("gcp"), batch(loss)
    exact = factors(model, WeightSharingKFLR(sharing), loss, data)
    draws = [factors(model, WeightSharingKFAC(sharing, mc_samples=20), loss, data) for _ in range(20)]
    for name, (B, *_) in exact.items():
        samples = torch.stack([draw[name][0] for draw in draws])
        error = (samples.mean(0) - B).abs()
        assert (error <= 4 * samples.std(0) / len(draws) ** 0.5 + 1e-15).all(), name


def test_rank_one_batch_of_a_linear_layer_is_exact():
    """One sample: B kron A is the Gauss-Newton block of the classifier."""
    loss, model = nn.CrossEntropyLoss(), chain("gcp")
    data = batch(loss, n=1)
    B, A = factors(model, extensions.KFLR(), loss, data)["7.weight"]
    assert relative(torch.kron(B, A), true_ggn(model, loss, data)[-33:-3, -33:-3]) <= EXACT


def test_own_classes_are_right_without_registration():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    loss = nn.CrossEntropyLoss()
    data = batch(loss)
    B, A = oracle(model, loss, data, "expand")
    ours = factors(model, WeightSharingKFLR(), loss, data, registered=False)
    assert relative(ours["0.weight"][0], B["0"]) <= EXACT
    assert relative(ours["0.weight"][1], A["0"]) <= EXACT


def test_bias_below_a_frozen_weight():
    loss, model = nn.CrossEntropyLoss(), chain("gcp")
    data = batch(loss)
    free = factors(model, extensions.KFLR(), loss, data)
    model[2].weight.requires_grad_(False)
    frozen = factors(model, extensions.KFLR(), loss, data)
    assert "2.weight" not in frozen
    assert relative(frozen["2.bias"][0], free["2.bias"][0]) <= EXACT


def test_unknown_sharing():
    with pytest.raises(InputError, match="unknown weight sharing 'both'; choose one of: expand, reduce"):
        WeightSharingKFAC("both")

"""The support matrix is what running gives, and `supports` says the same without running."""

import pandas as pd
import pytest
import torch
from backpack import extensions
from backpack_support import reference, tables
from backpack_support.layers import LAYERS, layer_network
from backpack_support.networks import HEADS, NETWORKS, SPOT_CHECKS, network_case
from backpack_support.tables import DRAWS, markdown, support_matrix, support_of_layers, support_of_networks
from small_networks import batch, built, chain
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.backpack.kinds import KINDS
from secondorder.curvature.backpack.merging import MERGES
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.curvature.backpack.registration import CONVOLUTIONS, DERIVATIVES, ROWS
from secondorder.curvature.backpack.support import QUANTITIES, check_support, supports
from secondorder.curvature.kronecker import factors, layer_kinds
from secondorder.curvature.kronecker.patches import padded
from secondorder.errors import InputError

REFUSED_LAYERS = [
    "Conv2d, padding='same'",
    "Conv2d, circular padding",
    "BatchNorm2d, training",
    "AdaptiveChannelDropout, training",
]
BRANCHES = ["Sum", "Concatenate", "ResidualBlock", *(layer for layer in LAYERS if "Net" in layer)]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_entry_of_the_matrix(quantity: str) -> None:
    """What is exact is compared with torch.func by `support_matrix` itself; here stands what may be refused."""
    first_order = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]
    for layer, entry in support_of_layers(quantity).items():
        if (
            layer in REFUSED_LAYERS
            or quantity == "PCHMP"
            or (layer in BRANCHES and quantity == "KFRA")
            or (layer == "Dropout, training" and quantity not in first_order)
        ):
            expected = "refused"
        elif layer == "AdaptiveChannelDropout" or (layer == "BatchNorm2d" and "KF" in quantity):
            expected = "passed on"
        else:
            expected = "mc" if quantity in DRAWS else "exact"
        assert entry == expected, layer


def test_the_matrix_has_every_layer_and_quantity() -> None:
    table = support_matrix()
    assert list(table.index) == list(LAYERS)
    assert list(table.columns) == list(QUANTITIES)


def test_supports_says_what_running_finds() -> None:
    table = support_matrix()
    for layer in LAYERS:
        network, _, _ = layer_network(layer)
        for quantity in QUANTITIES:
            assert supports(network, quantity) == (table.loc[layer, quantity] != "refused"), (layer, quantity)


def expected_of_networks(quantity: str) -> str:
    """The entry of every network."""
    return "refused" if quantity in ("KFRA", "PCHMP") else "exact" if quantity in SPOT_CHECKS else "accepted"


@pytest.mark.slow
def test_networks() -> None:
    table = support_of_networks()
    assert list(table.index) == NETWORKS
    for name in NETWORKS:
        for quantity in QUANTITIES:
            assert table.loc[name, quantity] == expected_of_networks(quantity), (name, quantity)


@pytest.mark.parametrize("head", HEADS)
def test_the_smallest_networks(head: str) -> None:
    for quantity in QUANTITIES:
        assert tables.network_entry(f"cifar_resnet8, {head}", quantity) == expected_of_networks(quantity), quantity


@pytest.mark.parametrize("quantity", ["BatchL2Grad", "SqrtGGNExact", "DiagHessian", "KFAC", "GGNMP", "HMP"])
def test_an_accepted_network_runs(quantity: str) -> None:
    case = network_case("cifar_resnet8, gcp")
    batch = case.images, case.labels
    values = backpack_quantity(case.network, nn.CrossEntropyLoss(), batch, QUANTITIES[quantity]())
    weight = values["stem.0.weight"]
    tensors = [weight(torch.ones(1, 16, 3, 3, 3).double())] if callable(weight) else weight
    assert all(tensor.isfinite().all() and tensor.abs().sum() > 0 for tensor in tensors)


def test_the_document_shows_the_tables() -> None:
    """To bring it up to date: python -m tests.backpack_support, between the two markers.

    That the networks' entries are what is expected of them is tested above, of all networks by `pytest -m slow`.
    """
    networks = pd.DataFrame(
        {quantity: dict.fromkeys(NETWORKS, expected_of_networks(quantity)) for quantity in QUANTITIES}
    )
    assert tables.in_document().strip() == tables.section(networks).strip()


def test_equal_columns_share_one_in_markdown() -> None:
    table = pd.DataFrame({"a": {"x": "1", "y": "2"}, "b": {"x": "3", "y": "3"}, "c": {"x": "1", "y": "2"}})
    assert markdown(table) == "| | a<br>c | b |\n|---|---|---|\n| x | 1 | 3 |\n| y | 2 | 3 |"


@pytest.mark.parametrize("quantity", [*DRAWS, "BatchGrad", "DiagGGNExact", "DiagHessian", "KFLR", "HMP"])
def test_a_wrong_scale_is_called_wrong(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.25 times too large for any single parameter, where the noise of Monte-Carlo quantities is largest."""
    expected, layer = reference.EXPECTED[quantity], "MatrixLogarithm"
    network, *data = layer_network(layer)
    extension = QUANTITIES[quantity](**DRAWS.get(quantity, {}))
    found = backpack_quantity(network, nn.CrossEntropyLoss(), tuple(data), extension, seed=0)
    monkeypatch.setattr(tables, "backpack_quantity", lambda *arguments, **options: found)  # once for all comparisons
    assert tables.entry(layer, quantity) in ("exact", "mc")
    for wrong in tables.layer_truth(layer, 2).parts:
        scaled = lambda t, name, wrong=wrong: expected(t, name) / (1.25 if name == wrong else 1)  # noqa: E731
        monkeypatch.setitem(reference.EXPECTED, quantity, scaled)
        assert tables.entry(layer, quantity) == "wrong", wrong


def test_wrong_spots_of_a_network_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for quantity in SPOT_CHECKS:
        monkeypatch.setitem(tables.SPOT_CHECKS, quantity, lambda case, found: 1e-6)
        assert tables.network_entry("cifar_resnet8, gcp", quantity) == "wrong"


def transposed(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches with rows and columns of the kernel exchanged."""
    unfolded = F.unfold(padded(layer, x), layer.kernel_size, layer.dilation, stride=layer.stride)
    kernels = unfolded.unflatten(1, (-1, *layer.kernel_size)).transpose(2, 3).flatten(1, 3)
    return kernels.unflatten(1, (layer.groups, -1))


def test_wrong_kronecker_factors_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth does not come from the code under test: an error that every way to the factors shares is seen."""
    monkeypatch.setattr(factors, "autocorrelation_is_faster", lambda layer, x: False)
    exact = ["KFLR", "WeightSharingKFLR", "WeightSharingKFLR, reduce"]
    random = ["KFAC", "WeightSharingKFAC", "WeightSharingKFAC, reduce"]
    squeezed = factors._squeezed
    for module, name, mistake, quantities in (
        (factors, "patches", transposed, exact[:2]),
        (layer_kinds, "mean_patches", lambda layer, x: transposed(layer, x).mean(-1), exact[2:]),
        (factors, "_squeezed", lambda factor: 1.25 * squeezed(factor), [*exact, *random, "KFRA"]),
    ):
        tables.layer_truth.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, mistake)
            for quantity in quantities:
                assert tables.entry("Conv2d", quantity) == "wrong", (name, quantity)
            if "KFLR" in quantities:
                assert tables.network_entry("cifar_resnet8, gcp", "KFLR") == "wrong", name
    tables.layer_truth.cache_clear()
    assert tables.entry("Conv2d", "KFLR") == "exact"


def test_check_support_names_module_quantity_and_way_out() -> None:
    with pytest.raises(InputError, match=r"'3' \(Bilinear\) has no row for KFAC; .*use curvature_blocks"):
        check_support(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Bilinear(4, 4, 2)), "KFAC")
    with pytest.raises(InputError, match=r"KFRA at the branches of 'features\.stage1\.0'"):
        check_support(built("cifar_resnet8"), "KFRA")
    with pytest.raises(InputError, match="PCHMP is refused"):
        check_support(chain(), "PCHMP")
    check_support(chain(), "DiagHessian")


@pytest.mark.parametrize("ask", [supports, check_support])
def test_an_unknown_quantity(ask: object) -> None:
    with pytest.raises(InputError, match="unknown quantity 'kfac'; choose one of: BatchGrad, "):
        ask(chain(), "kfac")  # type: ignore[operator]


def test_the_tables_are_complete() -> None:
    """Every extension and every module with a row of ours stands in the support matrix."""
    made = {type(make()) for make in QUANTITIES.values()}
    assert set(MERGES) | {extensions.KFRA, extensions.PCHMP} == made
    assert {base for base in KINDS if base in made} == set(KINDS)
    shown = {type(part) for layer in LAYERS for part in layer_network(layer)[0].modules()}
    untested = {nn.Identity, nn.Hardswish, nn.Softplus}  # elementwise rows like those that are shown
    elsewhere = {kind for kind in CONVOLUTIONS if kind is not nn.Conv2d}  # test_curvature_backpack_convolutions
    assert set(DERIVATIVES) | set(ROWS) <= shown | untested | elsewhere


def test_measuring_support_changes_nothing() -> None:
    network, loss = built("cifar_resnet8"), nn.CrossEntropyLoss()
    before = [(module, dict(vars(module))) for module in network.modules()]
    state = torch.get_rng_state()
    assert supports(network, "DiagHessian")
    support_matrix()
    assert all(vars(module) == attributes for module, attributes in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert network(batch(loss, 2, 3, 8)[0]).shape == (2, 3)

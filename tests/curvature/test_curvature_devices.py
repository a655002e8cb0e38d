"""Every quantity on every device that is there, against the CPU in float64; random columns are the same everywhere."""

import copy
from functools import cache

import pytest
import torch
from small_networks import batch, chain, relative
from torch import Tensor, nn

from secondorder.curvature import QUANTITIES, CurvatureBlocks, curvature_blocks

CE = nn.CrossEntropyLoss()
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}


@pytest.fixture(autouse=True)
def full_precision_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def made() -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return chain("gcp", nn.Tanh, channels=2), batch(CE, 5)


def blocks(
    model: nn.Module, data: tuple[Tensor, Tensor], quantity: str, device: str, dtype: torch.dtype, **options: object
) -> CurvatureBlocks:
    there = copy.deepcopy(model).to(device, dtype)
    return curvature_blocks(there, CE, (data[0].to(device, dtype), data[1].to(device)), quantity, **options)  # type: ignore[arg-type]


def values(made: CurvatureBlocks) -> tuple[Tensor, Tensor, Tensor]:
    """A product with three columns, the first block and the diagonal of all parameters."""
    V = torch.randn(made.whole.size, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return made.whole @ V.to(made.whole.device), made["0.weight"].dense(), made.whole.diagonal()


@cache
def true_values(quantity: str, fisher: str = "exact") -> tuple[Tensor, Tensor, Tensor]:
    """Those of the CPU in float64."""
    return values(blocks(*made(), quantity, "cpu", torch.float64, samples=2, seed=3, fisher=fisher))


def check(found: CurvatureBlocks, truth: tuple[Tensor, Tensor, Tensor], device: str, dtype: torch.dtype) -> None:
    for tensor, expected in zip(values(found), truth, strict=True):
        assert (tensor.device.type, tensor.dtype) == (device, dtype)
        assert relative(tensor.cpu().double(), expected) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_quantities(quantity: str, device: str, dtype: torch.dtype) -> None:
    """In parts on the device, at once for the truth, so that the CPU has something to say, too."""
    model, data = made()
    truth = true_values(quantity)
    at_once = [] if (device, dtype) == ("cpu", torch.float64) else [None]  # there it would be the truth again
    for chunk in (2, *at_once):
        found = blocks(model, data, quantity, device, dtype, samples=2, seed=3, chunk=chunk)
        check(found, truth, device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantity", ["kfac_expand", "ekfac"])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_kronecker_factors_of_other_columns(fisher: str, quantity: str, device: str, dtype: torch.dtype) -> None:
    model, data = made()
    truth = true_values(quantity, fisher)
    check(blocks(model, data, quantity, device, dtype, samples=2, seed=3, fisher=fisher), truth, device, dtype)
    if fisher == "mc":
        other = blocks(model, data, quantity, device, dtype, samples=2, seed=4, fisher=fisher)
        assert relative(other.whole.diagonal().cpu().double(), truth[2]) > 1e-2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", [CE, nn.MSELoss()])
def test_draws_are_the_same(loss: nn.Module, device: str) -> None:
    model, (images, labels) = made()[0], batch(loss, 5)
    expected = curvature_blocks(model, loss, (images, labels), "mc_fisher", samples=3, seed=7).whole
    there = copy.deepcopy(model).to(device)
    found = curvature_blocks(there, loss, (images.to(device), labels.to(device)), "mc_fisher", samples=3, seed=7).whole
    noise = found.matrix.noise  # type: ignore[attr-defined]
    assert noise.device.type == device
    assert torch.equal(noise.cpu(), expected.matrix.noise)  # type: ignore[attr-defined]
    assert relative(found.rows().cpu(), expected.rows()) <= 1e-9  # type: ignore[attr-defined]

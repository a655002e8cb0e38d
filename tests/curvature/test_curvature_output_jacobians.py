"""Jacobians of outputs and the Gauss-Newton blocks made of them, against torch.func in float64."""

import copy
import math

import pytest
import torch
from small_networks import batch, built, relative, true_ggn
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from secondorder.curvature import half_rank_condition, output_jacobians
from secondorder.errors import InputError

LAST = "features.3.weight"


def network_and_batch(head: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return built("digits_tiny", head, in_channels=1), batch(nn.CrossEntropyLoss(), n=4, channels=1, size=8)


@pytest.mark.parametrize("head", ["gap", "gcp"])
@pytest.mark.parametrize("training", [False, True])
def test_jacobians_are_those_of_torch_func(head: str, training: bool) -> None:
    model, (images, _) = network_and_batch(head)
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    found = output_jacobians(model, images, [LAST, "stem.0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(found.jacobians) == ["stem.0.weight", LAST]
    twin = copy.deepcopy(model)
    for part in twin.modules() if training else ():
        if isinstance(part, nn.BatchNorm2d):  # the same function, without statistics to write to
            part.track_running_stats, part.running_mean, part.running_var, part.num_batches_tracked = (
                False,
                None,
                None,
                None,
            )
    for name, J in found.jacobians.items():
        weight = model.get_parameter(name).detach()
        true = jacrev(lambda w, name=name: functional_call(twin, {name: w}, (images,)))(weight).flatten(2)
        assert relative(J, true.detach()) < 1e-10
    torch.testing.assert_close(found.outputs, twin(images))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss()])
def test_blocks_are_those_of_the_loss(loss: nn.Module) -> None:
    model, _ = network_and_batch("gcp")
    images, labels = batch(loss, n=4, channels=1, size=8)
    found = output_jacobians(model, images, [LAST])
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    chosen = torch.tensor([name == LAST for name in names])
    truth = true_ggn(model, loss, (images, labels))[chosen][:, chosen]
    assert relative(found.gauss_newton(LAST, loss, labels).dense(), truth) < 1e-10
    J = found.jacobians[LAST].flatten(0, 1)
    assert relative(found.gauss_newton(LAST).dense(), J.mT @ J) < 1e-12


def test_the_possible_rank_is_that_of_the_softmax() -> None:
    model, (images, labels) = network_and_batch("gcp")
    found = output_jacobians(model, images, [LAST])
    assert (found.rank(LAST), found.rank(LAST, softmax=False)) == (4 * 2, 4 * 3)
    spectrum = found.gauss_newton(LAST, nn.CrossEntropyLoss(), labels).eigenvalues().flip(0)
    assert spectrum[7] > 1e-9 * spectrum[0] > spectrum[8].abs()
    assert output_jacobians(model, images, ["classifier.bias"]).rank("classifier.bias") == 3


def test_a_network_in_float32_has_spectra_of_float64() -> None:
    model, (images, labels) = network_and_batch("gcp")
    spectra = [
        output_jacobians(model.to(dtype), images.to(dtype), [LAST]).gauss_newton(LAST, nn.CrossEntropyLoss(), labels)
        for dtype in (torch.float64, torch.float32)
    ]
    double, single = (half_rank_condition(G.eigenvalues(), 8) for G in spectra)
    assert spectra[1].dtype == torch.float64
    assert single == pytest.approx(double, rel=1e-3)


def test_the_condition_at_half_of_a_rank() -> None:
    assert half_rank_condition(torch.tensor([4.0, 2.0, 1.0, 0.5]), 4) == 2.0
    assert half_rank_condition(torch.tensor([1.0, 4.0, 2.0]), 3) == 2.0  # in any order
    assert half_rank_condition(torch.tensor([1.0, 1e-13, 0.0, 0.0]), 4) == math.inf
    assert math.isnan(half_rank_condition(torch.zeros(3), 3))
    for rank in (0, 4, 2.0):
        with pytest.raises(InputError, match="rank"):
            half_rank_condition(torch.ones(3), rank)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    model, (images, labels) = network_and_batch("gap")
    with pytest.raises(InputError, match="unknown parameter 'stem'"):
        output_jacobians(model, images, ["stem"])
    with pytest.raises(InputError, match="convert one of them"):
        output_jacobians(model, images.float(), [LAST])
    with pytest.raises(InputError, match="a pair"):
        output_jacobians(model, images.tolist(), [LAST])
    found = output_jacobians(model, images, [LAST])
    with pytest.raises(InputError, match="unknown parameter with a Jacobian 'stem'"):
        found.gauss_newton("stem")
    with pytest.raises(InputError, match="go together"):
        found.gauss_newton(LAST, nn.CrossEntropyLoss())
    with pytest.raises(InputError, match="L1Loss has no H = F F\\^T"):
        found.gauss_newton(LAST, nn.L1Loss(), labels)

"""Published checkpoints, with made-up weights of their layouts: the network gives the outputs of the formula."""

from collections.abc import Callable, Mapping

import pytest
import torch
import torchvision
from torch import Tensor, nn

from secondorder.errors import InputError
from secondorder.networks import Network, load_published, network


class Reference(nn.Module):
    """A ResNet-18 whose last stage has stride 1, a reduction, iSQRT-COV of 5 steps in plain operations, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torchvision.models.resnet18(weights=None, num_classes=1)
        self.net.layer4[0].conv1.stride = self.net.layer4[0].downsample[0].stride = (1, 1)
        self.net.layer_reduce = nn.Conv2d(512, 16, 1, bias=False)
        self.net.layer_reduce_bn = nn.BatchNorm2d(16)
        self.net.fc = nn.Linear(16 * 17 // 2, 7)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        n = self.net
        x = n.maxpool(n.relu(n.bn1(n.conv1(x))))
        x = n.layer4(n.layer3(n.layer2(n.layer1(x))))
        x = n.layer_reduce_bn(n.layer_reduce(x)).relu().flatten(2)
        x = x - x.mean(2, keepdim=True)
        S = x @ x.mT / x.shape[2]
        trace = S.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        eye = torch.eye(16, dtype=x.dtype)
        Y, Z = S / trace, eye
        for _ in range(5):
            T = 0.5 * (3 * eye - Z @ Y)
            Y, Z = Y @ T, T @ Z
        row, column = torch.triu_indices(16, 16)
        return n.fc((Y * trace.sqrt())[:, row, column])


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return Reference().double().eval()


def ours(pooling: str = "gcp", classes: int = 7, **options: int) -> Network:
    torch.manual_seed(4)
    return network("resnet18", pooling, classes, reduced_channels=options.get("reduced", 16)).double().eval()


def fast_mpn_cov(reference: nn.Module) -> dict[str, Tensor]:
    return dict(reference.net.state_dict())  # type: ignore[union-attr]


def of_parts(reference: nn.Module) -> dict[str, Tensor]:
    """features.0 (convolution), .1 (batch norm), .4 to .7 (layers), representation, classifier."""
    places = {"conv1": "0", "bn1": "1", **{f"layer{n}": str(n + 3) for n in range(1, 5)}}
    found = {}
    for name, tensor in fast_mpn_cov(reference).items():
        first, _, rest = name.partition(".")
        block = {"layer_reduce": "representation.conv_dr_block.0", "layer_reduce_bn": "representation.conv_dr_block.1"}
        begin = block.get(first) or (
            "classifier" if first == "fc" else f"features.{places[first]}" if first in places else ""
        )
        found[f"module.{begin}.{rest}"] = tensor
    return found


def old(reference: nn.Module) -> dict[str, object]:
    """As a training script of an old PyTorch saved it."""
    state = {f"module.{name}": t for name, t in fast_mpn_cov(reference).items() if "num_batches" not in name}
    return {"epoch": 3, "arch": "mpncovresnet18", "state_dict": state, "best_prec1": 0.1}


def in_another_order(reference: nn.Module) -> dict[str, Tensor]:
    return dict(reversed(fast_mpn_cov(reference).items()))


@pytest.mark.parametrize("layout", [fast_mpn_cov, of_parts, old, in_another_order])
def test_outputs_are_those_of_the_formula(layout: Callable[[nn.Module], Mapping], reference: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = load_published(ours(), layout(reference))
    torch.testing.assert_close(model(x), reference(x), rtol=1e-9, atol=1e-11)


def test_torchvisions_weights_and_the_trunk_alone(reference: nn.Module) -> None:
    torch.manual_seed(5)
    plain = torchvision.models.resnet18(weights=None, num_classes=7).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gap = network("resnet18", "gap", 7).double().eval()
    torch.testing.assert_close(load_published(gap, plain.state_dict())(x), plain(x))
    model = ours()
    before = {name: t.clone() for name, t in model.state_dict().items() if name.startswith(("head.", "classifier."))}
    load_published(model, plain.state_dict(), parts="trunk")
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert torch.equal(after["features.layer4.1.conv2.weight"], plain.layer4[1].conv2.weight)


def test_what_does_not_fit_changes_nothing(reference: nn.Module) -> None:
    state, parts = fast_mpn_cov(reference), of_parts(reference)
    swapped = dict(parts)
    swapped["module.features.0.bias"] = swapped.pop("module.features.0.weight")
    cases = [
        (ours(classes=5), state, r"classifier.weight has the shape \[5, 136\], that of the checkpoint \[7, 136\]"),
        (ours(reduced=8), state, r"head.reduction.0.weight has the shape \[8, 512"),
        (
            ours(),
            {n: t for n, t in state.items() if "layer_reduce" not in n},
            "has nothing for head.reduction.0.weight",
        ),
        (
            ours(),
            {n: t for n, t in parts.items() if "features.7" not in n},
            "the checkpoint has .* the network 10[0-9]",
        ),
        (ours(), swapped, "the checkpoint has .* in the place of"),
        (ours(), {"epoch": 3}, "must be weights by name"),
        (ours(), [1], "must be weights by name"),
    ]
    for model, checkpoint, words in cases:
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(InputError, match=words):
            load_published(model, checkpoint)  # type: ignore[arg-type]
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(InputError, match="unknown parts 'head'"):
        load_published(ours(), state, parts="head")
    with pytest.raises(InputError, match=r"must be one of secondorder\.networks\.network"):
        load_published(nn.Linear(2, 2), state)  # type: ignore[arg-type]

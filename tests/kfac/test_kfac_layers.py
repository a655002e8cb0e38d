"""What every parameter is treated as: real networks, wrappers, shared, frozen, parametrised and unlike weights."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from secondorder.curvature.kronecker.layer_kinds import TransposedConvolution
from secondorder.errors import InputError
from secondorder.kfac.layers import find_layers
from secondorder.kfac.modules import clean_paths
from secondorder.kfac.options import WIDE_INPUT
from secondorder.networks import network


def treated(model: nn.Module, *args: Any, **options: Any) -> dict[str, tuple[str, str, str | None]]:
    _, treatments = find_layers(model, *args, **options)
    paths = clean_paths(model)
    names = [name.rpartition(".") for name, _ in model.named_parameters()]
    assert [t.name for t in treatments] == [f"{paths[path]}.{last}".lstrip(".") for path, _, last in names]  # in order
    assert all(t.parameter is p for t, p in zip(treatments, model.parameters(), strict=True))
    return {t.name: (t.how, t.why, t.layer) for t in treatments}


@pytest.mark.parametrize(
    ("model", "layers", "counts"),
    [
        # 20 convolutions without bias, 20 batch norms, a linear layer with bias
        (lambda: torchvision.models.resnet18(), 21, {"kfac": 22, "fallback": 40}),
        # 52 convolutions, of which 17 are depthwise
        (lambda: torchvision.models.mobilenet_v2(), 53, {"kfac": 54, "fallback": 104}),
        (lambda: network("cifar_resnet8", "gcp", 10), 10, {"kfac": 11, "fallback": 18}),
    ],
    ids=["resnet18", "mobilenet_v2", "cifar_resnet8 gcp"],
)
def test_real_networks(model: Any, layers: int, counts: dict[str, int]) -> None:
    made = model()
    found, _ = find_layers(made)
    table = treated(made)
    assert len(found) == layers
    assert Counter(how for how, _, _ in table.values()) == counts
    assert {why for how, why, _ in table.values() if how == "fallback"} == {"BatchNorm2d"}
    for layer in found:
        assert (layer.weight.numel(), layer.sharing) == (
            layer.groups * layer.outputs * (layer.inputs - _ones(layer)),
            "expand",
        )
    depthwise = [layer for layer in found if layer.groups > 1]
    assert all((layer.outputs, layer.inputs) == (1, 9) for layer in depthwise)
    assert len(depthwise) == (17 if layers == 53 else 0)


def _ones(layer: Any) -> int:
    return int(layer.bias is not None)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.embed.weight
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cube = nn.Conv3d(1, 1, 2)
        self.upwards = nn.ConvTranspose2d(1, 1, 2)
        self.table, self.bag = nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)
        self.sparse, self.bounded = nn.Embedding(5, 4, sparse=True), nn.Embedding(5, 4, max_norm=1.0)
        self.bilinear, self.lstm = nn.Bilinear(2, 2, 2), nn.LSTM(2, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.parametrised = parametrizations.weight_norm(nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.half_frozen = nn.Linear(4, 4)
        self.half_frozen.bias.requires_grad_(False)
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.two.weight, self.two.bias = self.one.weight, self.one.bias
        self.three.weight = self.one.weight
        self.pair, self.same = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.same.weight, self.same.bias = self.pair.weight, self.pair.bias
        self.left, self.right = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2)
        self.right.weight, self.right.bias = self.left.weight, self.left.bias
        self.words, self.decoder = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.decoder.weight = self.words.weight
        self.common, self.bias_only = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias_only.bias = self.common.bias


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_reasons() -> None:
    model = Mixed()
    model.own = OwnForward(4, 4)
    model.patched = nn.Linear(4, 4)
    model.patched.forward = lambda x: x  # type: ignore[method-assign]
    table = treated(model)
    expected = {
        "embed.weight": ("fallback", "shared by unlike modules: Embedding embed and Linear tied", None),
        "norm.bias": ("fallback", "LayerNorm", None),
        "attention.in_proj_weight": ("kfac", "MultiheadAttention", "attention.in_proj"),
        "attention.out_proj.weight": ("kfac", "NonDynamicallyQuantizableLinear", "attention.out_proj"),
        "cube.weight": ("kfac", "Conv3d", "cube"),
        "upwards.weight": ("kfac", "ConvTranspose2d", "upwards"),
        "table.weight": ("kfac", "Embedding", "table"),
        "sparse.weight": ("fallback", "Embedding with sparse", None),
        "bounded.weight": ("fallback", "Embedding with max_norm", None),
        "bag.weight": ("fallback", "EmbeddingBag", None),
        "bilinear.weight": ("fallback", "Bilinear", None),
        "lstm.weight_ih_l0": ("fallback", "LSTM", None),
        "scale": ("fallback", "Mixed", None),
        "parametrised.parametrizations.weight.original0": ("fallback", "parametrised", None),
        "parametrised.bias": ("fallback", "ParametrizedLinear, its weight is parametrised", None),
        "frozen.weight": ("frozen", "requires_grad is False", None),
        "frozen.bias": ("fallback", "the weight beside it is frozen", None),
        "decoder.bias": (
            "fallback",
            "the weight beside it is shared by unlike modules: Embedding words and Linear decoder",
            None,
        ),
        "half_frozen.weight": ("kfac", "Linear", "half_frozen"),
        "half_frozen.bias": ("frozen", "requires_grad is False", None),
        "one.weight": ("fallback", "shared by unlike modules: Linear one and Linear two and Linear three", None),
        "pair.weight": ("kfac", "Conv2d", "pair"),
        "pair.bias": ("kfac", "Conv2d", "pair"),
        "left.weight": ("fallback", "shared by unlike modules: Conv2d left and Conv2d right", None),
        "common.weight": ("kfac", "Linear", "common"),
        "common.bias": ("fallback", "shared by modules with different weights", None),
        "own.weight": ("fallback", "OwnForward, with a forward of its own", None),
        "patched.weight": ("fallback", "Linear, with a forward of its own", None),
    }
    assert {name: table[name] for name in expected} == expected
    layers = {layer.name: layer for layer in find_layers(model)[0]}
    assert layers["pair"].modules == (model.pair, model.same)
    assert layers["half_frozen"].bias is None
    assert layers["common"].bias is None


def test_policy() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    table = treated(model, {"0": "ekfac", "[01]": "fallback"})
    assert [table[f"{i}.weight"][0] for i in range(3)] == ["ekfac", "fallback", "kfac"]
    assert table["1.bias"] == ("fallback", "approximation '[01]': 'fallback'", None)
    assert treated(model, "ekfac")["2.bias"] == ("ekfac", "Linear", "2")


@pytest.mark.parametrize(
    ("approximation", "message"),
    [
        ("kfca", "unknown approximation 'kfca'; choose one of: kfac, ekfac, fallback"),
        ({"0": "no"}, "unknown approximation 'no'"),
        ({"head": "ekfac"}, "approximation 'head' matches no linear layer or convolution with a trainable weight"),
        ("fallback", "approximation leaves every layer to the fallback"),
    ],
)
def test_bad_policies(approximation: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        find_layers(nn.Sequential(nn.Linear(2, 2)), approximation)


def test_bad_models() -> None:
    with pytest.raises(InputError, match="the model has no layer that K-FAC can treat"):
        find_layers(nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(InputError, match=r"parameter 1\.weight is not initialised yet; run the model once"):
        find_layers(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)))
    with pytest.raises(InputError, match="unknown sharing 'kfc'"):
        find_layers(nn.Linear(2, 2), "kfac", "kfc")


class OwnParallel(nn.DataParallel):
    """A wrapper of the user's."""


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize(
    "wrapped",
    [
        nn.DataParallel,
        OwnParallel,
        compiled,
        lambda model: nn.DataParallel(compiled(model)),
        lambda model: compiled(nn.DataParallel(model)),
    ],
)
def test_wrapped_models_have_the_same_names(wrapped: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert treated(wrapped(model)) == treated(model)
    assert find_layers(wrapped(model))[0][0].name == "0"
    part = nn.ModuleDict({"head": wrapped(model)})
    assert list(treated(part)) == ["head.0.weight", "head.0.bias"]


class Adapter(nn.Module):
    """Not a wrapper, though it has an attribute `module`, and a parameter beside it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.scale = module, nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("wrapped", [lambda model: model, nn.DataParallel, compiled])
def test_an_attribute_called_module_is_part_of_the_name(wrapped: Any) -> None:
    model = wrapped(nn.Sequential(Adapter(nn.Linear(2, 2)), Adapter(nn.Linear(2, 2, bias=False))))
    table = treated(model, {"0.module": "ekfac"})
    assert list(table) == ["0.scale", "0.module.weight", "0.module.bias", "1.scale", "1.module.weight"]
    assert table["0.module.weight"] == ("ekfac", "Linear", "0.module")
    with pytest.raises(InputError, match="approximation '0' matches no linear layer"):
        find_layers(model, {"0": "ekfac"})


def test_two_parameters_of_one_name() -> None:
    model = OwnParallel(nn.ModuleDict({"head": nn.Linear(2, 2)}))
    model.head = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"2 parameters are called head\.weight without what wrappers"):
        find_layers(model)


def test_patterns_mind_upper_and_lower_case() -> None:
    table = treated(nn.ModuleDict({"Head": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), {"h*": "ekfac"})
    assert (table["Head.weight"][0], table["head.weight"][0]) == ("kfac", "ekfac")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        lambda bias: nn.Linear(3, 4, bias),
        lambda bias: nn.Conv2d(4, 6, (2, 3), groups=2, bias=bias),
        lambda bias: nn.Conv1d(2, 3, 2, bias=bias),
        lambda bias: nn.Conv3d(2, 4, (2, 1, 3), groups=2, bias=bias),
        lambda bias: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, bias=bias),
        lambda bias: nn.ConvTranspose1d(2, 3, 2, bias=bias),
    ],
)
def test_matrix_and_its_parts(module: Any, bias: bool) -> None:
    made = module(bias)
    layer = find_layers(made)[0][0]
    matrix = layer.matrix(made.weight, made.bias)
    assert matrix.shape == (layer.groups, layer.outputs, layer.inputs)
    weight, offset = layer.parts(matrix)
    assert torch.equal(weight, made.weight)
    assert offset is None if not bias else torch.equal(offset, made.bias)  # type: ignore[arg-type]
    if bias:
        assert torch.equal(matrix[..., -1].flatten(), made.bias)
    else:
        assert matrix.data_ptr() == made.weight.data_ptr() or isinstance(layer.kind, TransposedConvolution)


def test_wide_layers() -> None:
    layer = find_layers(nn.Linear(9, 1), "kfac", "expand", 10)[0][0]
    assert not layer.wide  # 10 inputs with the one of the bias
    assert find_layers(nn.Linear(10, 1), "kfac", "expand", 10)[0][0].wide
    assert find_layers(nn.Linear(10, 1))[0][0].wide_inputs == WIDE_INPUT


def test_finding_layers_draws_no_random_numbers() -> None:
    model, state = nn.Sequential(nn.Conv1d(2, 2, 2)), torch.get_rng_state()
    assert find_layers(model)[0][0].kind.inputs == 4
    assert torch.equal(torch.get_rng_state(), state)

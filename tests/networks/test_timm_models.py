"""timm's models in `replace_pooling`: convolutional ones in order, transformers by their `forward_features`."""

import pytest
import torch
from torch import nn

from secondorder.errors import InputError
from secondorder.networks import replace_pooling

timm = pytest.importorskip("timm")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
MODELS: dict[str, tuple[dict[str, object], str]] = {
    "resnet10t": ({}, "NCHW"),
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, "NCHW"),
    "efficientnet_b0": ({}, "NCHW"),
    "mobilenetv3_small_050": ({}, "NCHW"),
    "regnetx_002": ({}, "NCHW"),
    "vit_tiny_patch16_224": (VIT, "NLC"),
    "deit_tiny_distilled_patch16_224": (VIT, "NLC"),
    "mixer_s32_224": ({"img_size": 64}, "NLC"),
    "swin_tiny_patch4_window7_224": (SWIN, "NHWC"),
}


def model_and_images(name: str) -> tuple[nn.Module, torch.Tensor]:
    model = timm.create_model(name, num_classes=3, **MODELS[name][0]).eval()
    size = MODELS[name][0].get("img_size", 64)
    return model, torch.randn(2, 3, size, size)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_features_of_timm_models(name: str) -> None:
    """The head reads the model's own features, in the layout that the model has; every parameter is used."""
    model, x = model_and_images(name)
    net = replace_pooling(model, "gcp", reduced_channels=6)
    layout = MODELS[name][1]
    assert net.head.layout == layout
    assert net.num_classes == 3
    want = model.forward_features(x)
    want = want[:, getattr(model, "num_prefix_tokens", 0) :] if layout == "NLC" else want
    got = net.features(net.stem(x))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    channels, *positions = net.feature_shape(x.shape[-1])
    assert channels == model.num_features == net.head.in_channels
    assert torch.Size(positions).numel() == want[0].numel() // channels
    y = net.train()(x)
    y.square().sum().backward()
    assert y.shape == (2, 3)
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_hooks_of_timm_models(name: str) -> None:
    model, _ = model_and_images(name)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"hooks of the .* itself would not run"):
        replace_pooling(model, "gcp")


def test_a_head_of_ones_own_on_tokens_states_their_layout() -> None:
    model, x = model_and_images("vit_tiny_patch16_224")
    from secondorder.pooling import pooling_head

    assert replace_pooling(model, lambda channels: pooling_head("gcp", channels, layout="NLC"))(x).shape == (2, 3)
    with pytest.raises(InputError, match=r"layout 'NCHW', the features have 'NLC' \(tokens"):
        replace_pooling(model, lambda channels: pooling_head("gcp", channels))

"""Networks at frozen statistics, and one backbone under several heads."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from secondorder.data import load_dataset
from secondorder.errors import InputError
from secondorder.networks import Network, SharedBackbone, frozen_at, maps_below_pooling, network, shared_backbone
from secondorder.training import Run, train


@pytest.mark.parametrize("pooling", ["gap", "gcp"])
def test_frozen_network_computes_what_training_mode_computes(pooling: str) -> None:
    model = network("cifar_resnet8", pooling, 4).double().train()
    model.features[0][0].bn1.momentum = 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(5, 3, 16, 16)
    frozen = frozen_at(model, images, torch.float64)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part.training for part in frozen.modules())
    torch.testing.assert_close(frozen(images.double()), model(images.double()), rtol=1e-12, atol=1e-12)
    # each sample on its own: the others do not enter
    torch.testing.assert_close(frozen(images[:1].double()), frozen(images.double())[:1], rtol=1e-12, atol=1e-12)
    assert not any(part._forward_pre_hooks for part in frozen.modules())


def test_precision_of_the_copy() -> None:
    model, images = network("digits_tiny", "gcp", 10, 1), torch.randn(3, 1, 8, 8)
    assert next(frozen_at(model, images, torch.float64).parameters()).dtype == torch.float64
    assert next(frozen_at(model, images).parameters()).dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(InputError, match="model str: must be"):
        frozen_at("model", images)  # type: ignore[arg-type]


def digits(count: int = 200, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Images of the first classes among some images."""
    images, labels = load_dataset("digits", limit=count).train.plain(range(count))
    return images[labels < classes], labels[labels < classes]


def test_a_reduction_stays() -> None:
    model = network("digits_tiny", "gap", 10, 1, reduced_channels=4).eval()
    shared = SharedBackbone(model, [digits()], penalty=1e-2).under("gcp")
    assert shared.head.out_features == 10
    assert torch.equal(maps_below_pooling(shared, digits()[0]), maps_below_pooling(model, digits()[0]))
    for name, value in model.head.reduction.state_dict().items():
        assert torch.equal(value, shared.head.reduction.state_dict()[name])
    assert shared.head.reduction is not model.head.reduction


def test_features_are_computed_once_and_a_fit_that_ends_early_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (images, labels), model = digits(), network("digits_tiny", "gap", 10, 1).eval()
    passes = []
    model.features.register_forward_hook(lambda *_: passes.append(1))
    before = model.state_dict()
    backbone = SharedBackbone(model, zip(images.split(64), labels.split(64), strict=True), penalty=1e-2)
    first, others = backbone.under("gcp"), labels.roll(1)
    other = backbone.under("gcp", others)
    assert len(passes) == 4
    assert F.cross_entropy(first(images), labels) < F.cross_entropy(other(images), labels)
    assert F.cross_entropy(other(images), others) < F.cross_entropy(first(images), others)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(shared_backbone, "STEPS", 2)
    with pytest.warns(UserWarning, match="has not converged in 2 steps; raise its penalty 0.01"):
        backbone.under("gcp")


def test_two_classes() -> None:
    images, labels = digits(classes=2)
    backbone = SharedBackbone(network("digits_tiny", "gap", 2, 1).eval(), [(images, labels)], penalty=1e-3)
    assert float((backbone.under("gcp")(images).argmax(1) == labels).double().mean()) > 0.95


def test_what_cannot_be_shared_is_refused() -> None:
    batch, model = digits(), network("digits_tiny", "gap", 10, 1).eval()
    for other, words in (
        (model.features, "must be a Network"),
        (network("digits_tiny", "gap", 10, 1), "training mode"),
    ):
        with pytest.raises(InputError, match=words):
            SharedBackbone(other, [batch], 1e-2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="penalty must be a finite number above 0, got 0"):
        SharedBackbone(model, [batch], 0)
    with pytest.raises(InputError, match="got no batch"):
        SharedBackbone(model, [], 1e-2)
    backbone = SharedBackbone(model, [batch], 1e-2)
    with pytest.raises(InputError, match="unknown pooling 'gpc'"):
        backbone.under("gpc")
    with pytest.raises(InputError, match="of 1 classes, for 200 images and a network of 10"):
        backbone.under("gcp", torch.zeros(200))
    with pytest.raises(InputError, match=r"labels \[7\]"):
        backbone.under("gcp", batch[1][:7])


def test_another_head_on_a_trained_backbone(tmp_path: Path) -> None:
    data = load_dataset("digits", limit=400)
    run = Run("digits_tiny", "gap", "digits", epochs=4, batch_size=40, learning_rate=0.1, train_limit=400)
    trained = frozen_at(train(run, data, tmp_path, progress=False).model, data.train.plain(range(64))[0], torch.float32)
    images, labels = data.train.plain(range(400))
    shared = SharedBackbone(trained, [(images, labels)], penalty=1e-3).under("covariance")
    assert isinstance(shared, Network)
    assert shared.head.out_features == 21
    for name, value in trained.state_dict().items():
        if name.startswith(("stem.", "features.")):
            assert torch.equal(value, shared.state_dict()[name])
    classifier = shared.classifier.double()
    features = shared.head(shared.features(shared.stem(images))).double().detach()
    objective = F.cross_entropy(classifier(features), labels) + 0.5e-3 * classifier.weight.square().sum()
    slopes = torch.autograd.grad(objective, list(classifier.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-3  # the minimum of mean loss + decay / 2 |W|^2
    assert float((classifier(features).argmax(1) == labels).double().mean()) > 0.5

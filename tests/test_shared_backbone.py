"""Networks at frozen statistics, and one backbone under several heads."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from secondorder.data import load_dataset
from secondorder.errors import InputError
from secondorder.networks import Network, network
from secondorder.training import Run, train
from studies import shared_backbone
from studies.frozen_statistics import frozen_at
from studies.shared_backbone import SharedBackbone, check_sharing, evenly_spaced


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
    model = network("digits_tiny", "gcp", 10, 1)
    assert next(frozen_at(model, torch.randn(3, 1, 8, 8), torch.float64).parameters()).dtype == torch.float64
    assert next(model.parameters()).dtype == torch.float32


def test_a_reduction_stays() -> None:
    data = load_dataset("digits", limit=200)
    model = network("digits_tiny", "gap", 10, 1, reduced_channels=4).eval()
    shared = SharedBackbone(model, data, weight_decay=1e-2).with_head("gcp")
    assert shared.head.out_features == 10
    for name, value in model.head.reduction.state_dict().items():
        assert torch.equal(value, shared.head.reduction.state_dict()[name])
    assert shared.head.reduction is not model.head.reduction


def test_features_are_computed_once_and_a_fit_that_ends_early_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = load_dataset("digits", limit=200), network("digits_tiny", "gap", 10, 1).eval()
    passes = []
    model.features.register_forward_hook(lambda *_: passes.append(1))
    backbone = SharedBackbone(model, data, weight_decay=1e-2)
    before = model.state_dict()
    first, labels = backbone.with_head("gcp"), data.train.labels.roll(1)
    other = backbone.with_head("gcp", labels)
    assert len(passes) == 1
    images, _ = data.train.plain(range(200))
    assert F.cross_entropy(first(images), data.train.labels) < F.cross_entropy(other(images), data.train.labels)
    assert F.cross_entropy(other(images), labels) < F.cross_entropy(first(images), labels)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(shared_backbone, "STEPS", 2)
    with pytest.warns(UserWarning, match="has not converged in 2 steps; raise weight_decay 0.01"):
        backbone.with_head("gcp")


def test_two_classes() -> None:
    data = load_dataset("digits", limit=200)
    keep = data.train.labels < 2
    train_split = copy.copy(data.train)
    train_split.labels, train_split.images = data.train.labels[keep], data.train.images[keep]
    two = dataclasses.replace(data, train=train_split, num_classes=2)
    shared = SharedBackbone(network("digits_tiny", "gap", 2, 1).eval(), two, weight_decay=1e-3).with_head("gcp")
    images, labels = train_split.plain(range(len(train_split)))
    assert float((shared(images).argmax(1) == labels).double().mean()) > 0.95


@pytest.mark.parametrize(
    ("decay", "classes", "words"), [(0.0, 10, "weight_decay 0.0"), (0.1, 11, "only 10 of 11 classes")]
)
def test_a_classifier_that_cannot_be_fitted_is_refused(decay: float, classes: int, words: str) -> None:
    data = dataclasses.replace(load_dataset("digits", limit=200), num_classes=classes)
    with pytest.raises(InputError, match=words):
        check_sharing(data, decay)


def test_images_of_all_classes_when_they_are_in_order() -> None:
    labels = torch.arange(10).repeat_interleave(640)
    assert labels[evenly_spaced(6400, 20)].bincount().tolist() == [2] * 10
    assert evenly_spaced(5, 9).tolist() == [0, 1, 2, 3, 4]


def test_another_head_on_a_trained_backbone(tmp_path: Path) -> None:
    data = load_dataset("digits", limit=400)
    run = Run("digits_tiny", "gap", "digits", epochs=4, batch_size=40, learning_rate=0.1, train_limit=400)
    trained = frozen_at(train(run, data, tmp_path, progress=False).model, data.train.plain(range(64))[0], torch.float32)
    shared = SharedBackbone(trained, data, weight_decay=1e-3).with_head("covariance")
    assert isinstance(shared, Network)
    assert shared.head.out_features == 21
    for name, value in trained.state_dict().items():
        if name.startswith(("stem.", "features.")):
            assert torch.equal(value, shared.state_dict()[name])
    images, labels = data.train.plain(range(400))
    classifier = shared.classifier.double()
    features = shared.head(shared.features(shared.stem(images))).double().detach()
    objective = F.cross_entropy(classifier(features), labels) + 0.5e-3 * classifier.weight.square().sum()
    slopes = torch.autograd.grad(objective, list(classifier.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-3  # the minimum of mean loss + decay / 2 |W|^2
    assert float((classifier(features).argmax(1) == labels).double().mean()) > 0.5

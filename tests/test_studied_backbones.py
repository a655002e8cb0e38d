"""What studies share of a trained backbone: which convolutions are looked at, and whether classifiers can be fitted."""

import dataclasses

import pytest
import torch

from secondorder.data import load_dataset
from secondorder.errors import InputError
from secondorder.networks import network
from studies.backbones import check_sharing, convolutions, evenly_spaced, first_middle_last


def test_convolutions_are_those_of_the_main_path() -> None:
    names = convolutions(network("cifar_resnet20", "gcp", 10, 3, reduced_channels=8))
    assert names[0] == "stem.0.weight"
    assert names[-1] == "head.reduction.0.weight"
    assert len(names) == 20
    assert not any("downsample" in name for name in names)


@pytest.mark.parametrize(
    ("backbone", "reduced", "first", "middle", "last"),
    [
        ("digits_tiny", 0, "stem.0", "features.0", "features.3"),
        ("cifar_resnet8", 0, "stem.0", "features.stage2.0.conv1", "features.stage3.0.conv2"),
        ("resnet18", 64, "stem.conv1", "features.layer3.0.conv1", "head.reduction.0"),
        ("mobilenet_v2", 64, "stem.0.0", "features.10.conv.0.0", "head.reduction.0"),
        ("shufflenet_v2_x0_5", 64, "stem.conv1.0", "features.stage3.4.branch2.0", "head.reduction.0"),
    ],
)
def test_three_are_chosen_by_depth(backbone: str, reduced: int, first: str, middle: str, last: str) -> None:
    for head in ("gap", "gcp"):
        with torch.device("meta"):
            names = first_middle_last(network(backbone, head, 10, reduced_channels=reduced), 10**7)
        assert names == {"first": f"{first}.weight", "middle": f"{middle}.weight", "last": f"{last}.weight"}


def test_large_convolutions_are_passed_over() -> None:
    with torch.device("meta"):
        names = first_middle_last(network("cifar_resnet8", "gap", 10), 20_000)
        resnet = first_middle_last(network("resnet18", "gcp", 10, reduced_channels=256), 50_000)
    assert names["last"] == "features.stage3.0.conv1.weight"  # conv2 has 36,864 weights, conv1 18,432
    assert len({*resnet.values()}) == 3
    with pytest.raises(InputError, match="no convolution of at most 10 weights"):
        first_middle_last(network("digits_tiny", "gap", 10, 1), 10)


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

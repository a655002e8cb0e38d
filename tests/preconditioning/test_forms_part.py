"""Part B of the preconditioning study: layers, what is measured there against autograd, and verdicts of both outcomes."""

import copy
import dataclasses

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from secondorder.data import ImageDataset, load_dataset
from secondorder.networks import network
from secondorder.pooling import pooling_head
from secondorder.preconditioning import FORMS as LIBRARY_FORMS
from studies.preconditioning.forms.figures import FORMS
from studies.preconditioning.forms.layers import cut_networks, cut_points, last_convolution
from studies.preconditioning.forms.measure import against, compare, measure
from studies.preconditioning.forms.section import part
from studies.preconditioning.settings import PRESETS
from studies.preconditioning.situation import Situation

SMOKE = dataclasses.replace(PRESETS["smoke"], backbone="digits_tiny", train_limit=None)
COSINES = {"newton_schulz": 0.99, "trimmed_rotated": 0.93, "unpreconditioned": 0.88, "trimmed": 0.6}


@pytest.fixture(scope="module")
def situation() -> Situation:
    torch.manual_seed(0)
    data: ImageDataset = load_dataset("digits", limit=256)
    return Situation(network("digits_tiny", "gcp", 10, 1), data, SMOKE, 0)


def table_of(
    cosines: dict[str, float], seeds: int = 3, layers: tuple[str, ...] = ("stem", "features.3")
) -> pd.DataFrame:
    rows = []
    for seed in range(seeds):
        for backbone, step in (("untrained", 0), ("gap", 100), ("gcp", 50), ("gcp", 100)):
            keys = {
                "backbone": backbone,
                "seed": seed,
                "step": step,
                "moment": step / 100,
                "part": "forms",
                "head": "gcp",
            }
            for layer in layers:
                for form, cosine in cosines.items():
                    values = {"cosine": cosine - 0.001 * seed, "relative_error": 1.5 - cosine}
                    values |= {f"weight_{name}": value for name, value in values.items()}
                    named = keys | {"layer": layer, "setting": form}
                    rows += [named | {"measure": name, "value": value} for name, value in values.items()]
    return pd.DataFrame(rows).assign(batch=-1)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("digits_net", [("stem", 0), ("features.0", 3), ("features.3", 6), ("features.6", 9)]),
        ("digits_tiny", [("stem", 0), ("features.0", 3), ("features.3", 6)]),
        ("cifar_resnet8", [("stem", 0), ("features.stage1", 1), ("features.stage2", 2), ("features.stage3", 3)]),
    ],
)
def test_layers_end_before_the_next_convolution(backbone: str, expected: list[tuple[str, int]]) -> None:
    features = network(backbone, "gcp", 10, 1).features
    assert cut_points(features) == expected
    assert expected[-1][1] == len(list(features.children()))


def test_networks_end_at_their_layers(situation: Situation) -> None:
    networks = dict(cut_networks(situation))
    assert list(networks) == ["stem", "features.0", "features.3"]
    images, _ = situation.some_images(4)
    outputs = {}
    for name, one in networks.items():
        assert one(images).shape == (4, 10)
        assert one.classifier.weight.dtype == torch.float64
        outputs[name] = one.features(one.stem(images))
    full = situation.frozen.features
    assert isinstance(full, nn.Sequential)
    torch.testing.assert_close(outputs["features.0"], full[:3](situation.frozen.stem(images)))
    torch.testing.assert_close(outputs["features.3"], full(situation.frozen.stem(images)))
    logits = situation.heads["gcp"](images)
    torch.testing.assert_close(networks["features.3"](images), logits)
    assert all(
        p.requires_grad for p in situation.heads["gcp"].parameters()
    )  # measuring must not freeze what others use


def test_the_last_convolution_is_on_the_main_path() -> None:
    resnet = network("cifar_resnet8", "gcp", 10, 3)
    assert last_convolution(resnet) is resnet.get_submodule("features.stage3.0.conv2")
    reduced = network("cifar_resnet8", "gcp", 10, 3, reduced_channels=8)
    assert last_convolution(reduced) is reduced.get_submodule("head.reduction.0")


def test_the_published_backward_pass_against_autograd_of_the_whole_network(situation: Situation) -> None:
    """dL/dX and dL/dW of the published head and of the exact one, for the same dL/dZ, without any closed form."""
    own = copy.deepcopy(situation.heads["gcp"])
    images, labels = situation.some_images(8)
    result = compare(copy.deepcopy(own), images, labels)

    X = own.features(own.stem(images))
    weight = last_convolution(own).weight
    z = own.head(X)
    loss = cross_entropy(own.classifier(z), labels)
    (g,) = torch.autograd.grad(loss, z, retain_graph=True)
    published = torch.autograd.grad(loss, (X, weight), retain_graph=True)
    surrogate = (pooling_head("gcp_exact", X.shape[1])(X) * g).sum()
    exact = torch.autograd.grad(surrogate, (X, weight))
    for prefix, a, b in zip(("", "weight_"), published, exact, strict=True):
        cosine = float(cosine_similarity(a.flatten(), b.flatten(), dim=0))
        assert result["newton_schulz", f"{prefix}cosine"] == pytest.approx(cosine, abs=1e-9)
        error = float((a - b).norm() / b.norm())
        assert result["newton_schulz", f"{prefix}relative_error"] == pytest.approx(error, abs=1e-9)
    assert {form for form, _ in result} == set(FORMS)


def test_every_form_of_the_library_has_a_line_in_the_figure() -> None:
    assert set(FORMS) == set(LIBRARY_FORMS) - {"exact"} | {"newton_schulz"}


def test_measured_rows(situation: Situation) -> None:
    rows = pd.DataFrame(measure(situation))
    assert all(p.requires_grad for p in situation.heads["gcp"].parameters())  # other parts use the same networks
    assert len(rows) == 3 * 4 * 4
    assert rows.value.notna().all()
    assert (rows[rows.measure.str.endswith("cosine")].value.abs() <= 1 + 1e-12).all()
    named = rows.set_index(["layer", "setting", "measure"]).value
    assert named["features.3", "newton_schulz", "cosine"] > 0.9
    for layer in ("stem", "features.0", "features.3"):
        assert named[layer, "trimmed", "cosine"] < named[layer, "trimmed_rotated", "cosine"]


def test_a_gradient_of_zero_has_no_row(situation: Situation) -> None:
    exact = torch.ones(3)
    assert against(torch.zeros(3), exact) == {"relative_error": 1.0}
    assert against(2 * exact, exact) == pytest.approx({"relative_error": 1.0, "cosine": 1.0})

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    dead = copy.deepcopy(situation.heads["gcp"])
    dead.features = nn.Sequential(dead.features, Zero())
    assert compare(dead, *situation.some_images(4)) == {}


def test_verdicts_follow_the_numbers() -> None:
    found = [claim.verdict for claim in part(table_of(COSINES)).claims]
    assert found == ["not supported", "supported"] * 2 + ["not supported", "not supported", "supported", "supported"]
    other = {"newton_schulz": 0.8, "trimmed_rotated": 0.7, "unpreconditioned": 0.75, "trimmed": 0.95}
    found = [claim.verdict for claim in part(table_of(other)).claims]
    assert found == ["supported", "not supported"] * 2 + ["supported", "supported", "not supported", "not supported"]
    claims = part(table_of(COSINES)).claims
    assert claims[0].interval.estimate == pytest.approx(0.6 - 0.88)
    assert {claim.group for claim in claims} == {"B: the published approximation"}
    assert len({claim.meaning for claim in claims}) == len(claims)


def test_only_the_last_layer_of_the_backbone_trained_under_gcp_is_judged_first() -> None:
    table = table_of(COSINES)
    elsewhere = ~((table.backbone == "gcp") & (table.layer == "features.3") & (table.step == 100))
    table.loc[elsewhere & (table.setting == "trimmed"), "value"] = 0.99
    first, *_ = part(table).claims
    assert first.verdict == "not supported"
    assert "last layer, trained under GCP" in first.quantity


def test_one_seed_one_backbone_and_no_rows() -> None:
    table = table_of(COSINES)
    one = part(table[table.seed == 0])
    assert {claim.verdict for claim in one.claims} == {"undecided"}
    untrained = part(table[table.backbone == "untrained"])
    assert len(untrained.claims) == 6
    same = part(table.assign(value=table.value.where(table.seed < 0, 0.95)))
    assert same.claims[0].verdict == "undecided"  # a difference of exactly zero
    assert part(table[:0]).claims == []


def test_figure_and_table() -> None:
    shown = part(table_of(COSINES))
    (picture,), (summary,) = shown.pictures, shown.tables
    assert len(picture.figure.axes) == 6
    assert "4 of 8 claims hold" in picture.caption
    assert len(summary.data) == 3 * 2 * 4
    assert not summary.data.isna().any().any()
    picture.figure.draw_without_rendering()

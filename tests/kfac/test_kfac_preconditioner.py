"""KFACPreconditioner before torch's optimisers is KFAC; the report knows every parameter."""

from typing import Any

import pytest
import torch
import torchvision
from kfac_training import KINDS, batches, convnet, same, train, weights
from natural import KFAC
from torch import nn
from torch.nn import functional as F

from secondorder.kfac import Fisher, KFACPreconditioner, Options
from secondorder.kfac.report import Report
from secondorder.networks import network

# ---------------------------------------------------------------------------------------------- with other optimisers


def precondition(
    model: nn.Module, pre: KFACPreconditioner, optimizer: torch.optim.Optimizer, reduction: str = "mean", steps: int = 8
) -> None:
    for x, y in batches(steps):
        logits = model(x)
        pre.update_curvature(logits)
        loss = F.cross_entropy(logits, y, reduction=reduction)
        optimizer.zero_grad()
        loss.backward()
        assert pre.step()
        optimizer.step()


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "cholesky", "wide", "empirical", "exact", "reduce"])
def test_with_sgd_it_is_the_optimiser(kind: str) -> None:
    settings: dict[str, Any] = {"factor_interval": 2, "inverse_interval": 3, **KINDS[kind]}
    model, other = convnet(), convnet()
    optimizer = KFAC(model, 0.05, momentum=0.8, clip=None, **settings)
    train(model, optimizer, batches(8))
    pre = KFACPreconditioner(other, **settings)
    precondition(other, pre, torch.optim.SGD(other.parameters(), 0.05, momentum=0.8))
    assert same(weights(model), weights(other))
    assert same(optimizer.preconditioner.state_dict(), pre.state_dict())


def test_sums_become_means() -> None:
    found = []
    for reduction in ("mean", "sum"):
        model = convnet()
        pre = KFACPreconditioner(model, fisher=Fisher(reduction=reduction))
        precondition(model, pre, torch.optim.SGD(model.parameters(), 0.05), reduction)
        found.append(weights(model))
    for name, w in found[0].items():
        torch.testing.assert_close(w, found[1][name], rtol=1e-10, atol=1e-12)


def test_with_adam_and_clipping() -> None:
    model = convnet()
    before = weights(model)
    pre, adam = KFACPreconditioner(model), torch.optim.AdamW(model.parameters(), 0.01)
    for x, y in batches(3):
        adam.zero_grad()
        logits = model(x)
        pre.update_curvature(logits)
        F.cross_entropy(logits, y).backward()
        raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        pre.step()
        assert all(torch.equal(raw[name], model.get_parameter(name).grad) == (name[0] == "1") for name in raw)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    assert not any(torch.equal(w, before[name]) for name, w in weights(model).items())


def test_sparse_embeddings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(20, 3)).double()
    words = torch.randint(9, (40, 5))
    before = weights(model)
    pre, sgd = KFACPreconditioner(model), torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        sgd.zero_grad()
        logits = model(words)
        pre.update_curvature(logits)
        F.cross_entropy(logits, words[:, 0] % 3).backward()
        pre.step()
        sgd.step()
    assert not any(torch.equal(w, before[name]) for name, w in weights(model).items())


# -------------------------------------------------------------------------------------------------------- the report


MODELS: dict[str, Any] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "gcp": lambda: network("digits_net", "gcp", 10, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_report_lists_every_parameter(name: str) -> None:
    model = MODELS[name]()
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    report = KFAC(model, 0.1).report()
    assert [row.parameter for row in report.parameters] == [name for name, _ in model.named_parameters()]
    text = str(report)
    for row, p in zip(report.parameters, model.parameters(), strict=True):
        kind = kinds[row.parameter.rpartition(".")[0]]
        assert row.shape == tuple(p.shape)
        assert row.reason == kind
        assert row.treatment == ("kfac" if kind in ("Conv2d", "Linear") else "fallback")
        assert bool(row.input_factor) == bool(row.gradient_factor) == (row.treatment == "kfac")
        assert row.parameter in text


def test_report_of_sizes() -> None:
    rows = {
        row.parameter: row for row in KFAC(torchvision.models.mobilenet_v2(num_classes=10), 0.1).report().parameters
    }
    assert (rows["features.0.0.weight"].input_factor, rows["features.0.0.weight"].gradient_factor) == (
        "27 x 27",
        "32 x 32",
    )
    depthwise = rows["features.1.conv.0.0.weight"]
    assert (depthwise.input_factor, depthwise.gradient_factor) == ("32 x 9 x 9", "32 x 1 x 1")
    head = rows["classifier.1.weight"]
    assert (head.input_factor, head.gradient_factor) == ("? x 1281 rows", "10 x 10")


def test_report_after_steps() -> None:
    model = convnet()
    model[3].weight.requires_grad_(False)
    settings = {"approximation": {"0": "ekfac"}, "options": Options(wide_inputs=16), "fisher": "exact"}
    optimizer = KFAC(model, 0.1, **settings)
    empty = optimizer.report()
    assert (empty.bytes, empty.steps, dict(empty.events)) == (0, 0, {})
    train(model, optimizer, batches(2))
    x, y = batches(1)[0]
    train(model, optimizer, [(x * float("nan"), y)])
    report = optimizer.report()
    table = report.table().set_index("parameter")
    assert dict(table.treatment) == {
        "0.weight": "ekfac",
        "0.bias": "ekfac",
        "1.weight": "fallback",
        "1.bias": "fallback",
        "3.weight": "frozen",
        "6.weight": "kfac",
        "6.bias": "kfac",
    }
    assert table.input_factor["6.weight"] == "12 x 17 rows"
    double = 8
    assert table.factor_bytes["0.weight"] == double * (19**2 + 4**2 + 4 * 19)  # A, B, squared gradients
    assert table.inverse_bytes["0.weight"] == double * (19**2 + 4**2 + 4 * 19 + 1)
    assert table.factor_bytes["6.weight"] == double * (12 * 17 + 3**2)
    assert table.factor_bytes["0.bias"] == table.factor_bytes["1.weight"] == table.inverse_bytes["6.bias"] == 0
    assert report.bytes == table.factor_bytes.sum() + table.inverse_bytes.sum()
    assert report.steps == 2
    assert set(report.seconds) == {"curvature", "factors", "inverses", "preconditioning", "update"}
    assert report.calls["update"] == 2
    assert all(seconds > 0 for seconds in report.seconds.values())
    text = str(report)
    for part in ("2 steps, ", "curvature: ", "1 x step with gradients that are not finite, skipped", "GroupNorm"):
        assert part in text


def test_events_are_sentences() -> None:
    report = Report([], {}, {}, {"jitter": 2, "kept": 1, "0: no factors yet": 3}, 4)
    assert str(report).splitlines()[-3:] == [
        "2 x a factor needed more on its diagonal for its Cholesky decomposition",
        "1 x a layer kept its last good inverse",
        "3 x 0: no factors yet",
    ]

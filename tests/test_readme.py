"""The Python of the README runs as it stands, block after block, and gives what the text says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names() -> list[dict[str, Any]]:
    """What is defined after each block; all run in one namespace."""
    namespace: dict[str, Any] = {}
    after = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), namespace)
            after.append(dict(namespace))
    return after


def test_networks_and_heads(names: list[dict[str, Any]]) -> None:
    own = names[0]
    count = sum(p.numel() for p in own["model"].parameters())
    assert f"# {count / 1e6:.2f} M parameters" in BLOCKS[0]
    assert own["logits"].shape == (2, 1000)
    assert own["logits"].isfinite().all()
    assert own["vector"].shape == (2, 64 * 65 // 2)
    head, layers, maps = own["head"].eval(), own["layers"].eval(), torch.randn(2, 512, 7, 7)
    assert torch.allclose(layers(maps), head(maps), rtol=1e-5, atol=1e-5)
    assert {id(p) for p in layers.parameters()} == {id(p) for p in head.parameters()}
    assert own["mine"].classifier.in_features == 128 * 129 // 2
    assert own["mine"].eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_curvature(names: list[dict[str, Any]]) -> None:
    own = names[1]
    roots = torch.linalg.svdvals(own["ggn"].rows().double())
    rank = 8 * 9  # of 8 images and 10 classes, whose softmax leaves out one direction
    condition = own["spectral_summary"](own["ggn"]).condition
    assert condition.value == pytest.approx(float(roots[0] / roots[rank - 1]) ** 2, rel=1e-3)
    assert condition.error == 0
    G, K = own["ggn"].dense().double(), own["kfac"].dense().double()
    cosine = own["fidelity"](own["kfac"], own["ggn"].factored()).cosine
    assert cosine.value == pytest.approx(float((K * G).sum() / K.norm() / G.norm()), rel=1e-4)
    v = torch.randn(len(G))
    assert torch.allclose(own["ggn"] @ v, G.float() @ v, rtol=0, atol=1e-4 * float((own["ggn"] @ v).abs().max()))
    assert float((own["hessian"] @ v - own["ggn"] @ v).norm() / (own["hessian"] @ v).norm()) > 0.1


def test_backpack(names: list[dict[str, Any]]) -> None:
    own = names[2]
    expected = own["ggn"].diagonal()
    assert own["diagonal"].shape == own["model"].get_parameter(own["name"]).shape
    assert (own["diagonal"].flatten() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_kfac(names: list[dict[str, Any]]) -> None:
    own = names[3]
    report = own["optimizer"].report()
    assert report.steps == 2
    assert report.events == {}
    assert [row.parameter for row in report.parameters] == [name for name, _ in own["learner"].named_parameters()]
    assert own["logits"].isfinite().all()


def test_preconditioning(names: list[dict[str, Any]]) -> None:
    own = names[4]
    maps, spectrum = own["maps"], own["head_spectrum"]
    root, none = spectrum(maps, "gcp_exact").condition, spectrum(maps, "covariance").condition
    assert float(root.max()) <= 2**0.5 + 1e-9
    assert (none > root).all()
    x = maps.clone().requires_grad_()
    head = own["pooling_head"]("gcp_exact", 16)
    (head(x) * own["incoming"]).sum().backward()
    assert torch.allclose(own["exact"], x.grad, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(own["printed"], x.grad, rtol=0.1)
    gradient = torch.autograd.grad(
        own["loss"](own["model"](own["batch"][0]), own["batch"][1]), own["model"].get_parameter(own["name"])
    )[0]
    cosine = torch.cosine_similarity(own["direction"][own["name"]].flatten(), gradient.flatten(), dim=0)
    assert own["alignment"](own["direction"], {own["name"]: gradient}).whole == pytest.approx(float(cosine), rel=1e-4)
    assert 0.01 < float(cosine) < 0.99

"""The Python of every README runs as it stands, block after block, and gives what the text says; what it links to is there."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from undrawn_figures import undrawn_figures

from secondorder.curvature import relative_difference
from studies.engine.command import measure, write_pages
from studies.engine.records import read_records
from studies.page.readme import BEGIN, END, results_table
from studies.settings import Common
from studies.training import Training

ROOT = Path(__file__).parents[1]
CODE = ("README.md", *(f"secondorder/{part}/README.md" for part in (
    "curvature", "kfac", "landscape", "pooling", "preconditioning", "robustness", "training",
    "transfer")), "CONTRIBUTING.md")  # fmt: skip
"""With Python in them; all blocks of a file run in one namespace."""
TEXTS = (*CODE, "studies/README.md", "reports/quick/report.md", "reports/cifar10/report.md")


def blocks(file: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)


@cache
def names(file: str) -> dict[str, Any]:
    """What is defined when all blocks of a file have run."""
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(relative_difference.__kwdefaults__, "probes", 4)  # of 20, each of which takes a second
        torch.manual_seed(0)
        for block in blocks(file):
            exec(compile(block, file, "exec"), namespace)
    return namespace


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    """Optimisers among what is defined keep the whole process uncompiled."""
    yield
    names.cache_clear()
    names_before_training.cache_clear()


def of(part: str) -> dict[str, Any]:
    return names(f"secondorder/{part}/README.md")


def test_every_file_with_python_is_here() -> None:
    files = (path.relative_to(ROOT).as_posix() for folder in ("secondorder", "studies") for path in
             (ROOT / folder).rglob("*.md"))  # fmt: skip
    assert {file for file in [*files, "README.md", "CONTRIBUTING.md"] if blocks(file)} == set(CODE)


@pytest.mark.parametrize("file", TEXTS)
def test_links_lead_to_files_in_git(file: str) -> None:
    text, folder = (ROOT / file).read_text(), (ROOT / file).parent
    links = {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    assert [link for link in links if not (folder / link).exists()] == []
    ignored = subprocess.run(["git", "check-ignore", *links], cwd=folder, capture_output=True, text=True)
    assert ignored.stdout == ""
    paths = re.findall(r"`((?:tests|secondorder|studies)/[\w./]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_first_page_is_short_and_has_a_place_for_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 130
    assert text.index("<!-- results -->\n") < text.index("\n<!-- end of results -->")
    assert len(re.findall(r"^pip install .* && pytest", text, re.MULTILINE)) == 1  # as .ci/run reads it


def test_the_first_page() -> None:
    page = names("README.md")
    assert page["vectors"].shape == (2, 64 * 65 // 2)
    stem = page["model"].stem[0].weight
    assert torch.equal(stem, names_before_training()["trained"].stem[0].weight)
    assert page["condition"].error == 0
    assert page["condition"].value > 1
    assert page["optimizer"].report().steps == 1
    assert not torch.equal(page["trained"].stem[0].weight, stem)
    assert float(page["root"].max()) <= 2**0.5 + 1e-9
    assert (page["plain"] > page["root"]).all()


@cache
def names_before_training() -> dict[str, Any]:
    """What the first two blocks of the first page define."""
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks("README.md")[:2]:
            exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_pooling() -> None:
    pytest.importorskip("onnxscript")
    page = of("pooling")
    count = sum(p.numel() for p in page["published"].parameters())
    assert f"# {count / 1e6:.2f} M parameters" in blocks("secondorder/pooling/README.md")[0]
    assert page["logits"].shape == (2, 1000)
    assert page["logits"].isfinite().all()
    assert page["mine"].classifier.in_features == 128 * 129 // 2
    assert page["mine"].eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    head, tokens, layers = page["head"], page["tokens"], page["layers"]
    assert torch.allclose(layers(tokens), head(tokens), rtol=1e-5, atol=1e-5)
    assert {id(p) for p in layers.parameters()} == {id(p) for p in head.parameters()}
    assert page["pooled"].shape == (2, 16 * 17 // 2)
    assert page["nothing"].shape == (0, 136)
    torch.testing.assert_close(page["pooled"][1:], head(tokens[1:, :30]), rtol=1e-4, atol=1e-5)


def test_transfer() -> None:
    page = of("transfer")
    assert set(page["losses"]) >= {"loss_classifier", "loss_box_reg"}
    assert {"boxes", "labels", "scores"} == set(page["found"][0])
    assert page["maps"].shape == (40, 64, 8, 8)
    assert page["labels"][page["shots"]].tolist() == [0] * 5 + [1] * 5
    assert page["features"].shape == (40, 64 + 64 * 65 // 2)
    assert 0 <= page["accuracy"] <= 1
    assert len(page["score"]) == 2


def test_deployment() -> None:
    pytest.importorskip("onnxscript")
    page = of("pooling")
    more = page["more"].detach().clone().requires_grad_()
    page["gcp"](more).sum().backward()
    torch.testing.assert_close(page["more"].grad, more.grad, rtol=1e-4, atol=1e-5)
    assert len(page["onnx_program"].model.graph.inputs) == 1
    exact, maps = page["exact"], page["maps"]
    torch.testing.assert_close(page["predictor"].module()(maps), exact(maps), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(page["trainable"](maps), exact(maps), rtol=1e-3, atol=1e-4)
    assert page["covariance"].shape == (2, 64, 64)


def test_curvature() -> None:
    page = of("curvature")
    roots = torch.linalg.svdvals(page["ggn"].rows().double())
    rank = 8 * 9  # of 8 images and 10 classes, whose softmax leaves out one direction
    condition = page["spectral_summary"](page["ggn"]).condition
    assert condition.value == pytest.approx(float(roots[0] / roots[rank - 1]) ** 2, rel=1e-3)
    assert condition.error == 0
    G, K = page["ggn"].dense().double(), page["kfac"].dense().double()
    cosine = page["fidelity"](page["kfac"], page["ggn"].factored()).cosine
    assert cosine.value == pytest.approx(float((K * G).sum() / K.norm() / G.norm()), rel=1e-4)
    v = torch.randn(len(G))
    product = page["ggn"] @ v
    assert torch.allclose(product, G.float() @ v, rtol=0, atol=1e-4 * float(product.abs().max()))
    left = page["ggn"] @ page["natural"] + 0.1 * page["natural"] - 1
    assert float(left.norm()) < 1e-4 * len(G) ** 0.5
    assert float((page["hessian"] @ v - product).norm() / (page["hessian"] @ v).norm()) > 0.1
    x = page["batch"][0][:1].clone().requires_grad_()
    z = page["model"](x)
    J = torch.stack([torch.autograd.grad(k, x, retain_graph=True)[0].flatten() for k in z[0]]).double()
    p = z.detach()[0].double().softmax(0)
    H = (p.diag() - torch.outer(p, p)) / 8
    assert float(page["sharpness"]) == pytest.approx(float(torch.linalg.eigvals(H @ J @ J.T).real.max()), rel=1e-4)
    assert page["stem"].size == 8 * page["model"].stem(page["batch"][0])[0].numel()
    loaded = page["loaded"]
    assert torch.equal(loaded["kfac"] @ v, page["kfac"] @ v)
    assert torch.equal(loaded["ggn"] @ v, page["ggn"].factored() @ v)
    assert loaded["spectrum"] == page["spectral_summary"](page["ggn"])


def test_costs_of_curvature() -> None:
    page = of("curvature")
    cost = page["cost"]
    assert page["costs"].samples == 512
    assert cost.product.seconds == cost.product.flops / 5e10
    assert cost.method == "lanczos"
    assert cost.product.seconds < cost.summary.seconds < cost.summary_most.seconds


def test_data_sets_and_structures_in_curvature() -> None:
    ns = of("curvature")
    images, labels = ns["data"].tensors
    one = ns["curvature_blocks"](ns["model"], ns["loss"], (images, labels), "ggn", [ns["name"]])[ns["name"]]
    v = torch.randn(one.size)
    torch.testing.assert_close(ns["whole"] @ v, one @ v, rtol=1e-3, atol=1e-5 * float((one @ v).abs().max()))
    assert ns["of_factors"].size == one.size
    assert torch.equal(ns["resumed"], ns["whole"] @ torch.ones(one.size))
    assert torch.equal(ns["kept"] @ v, ns["of_factors"] @ v)
    assert not ns["folder"].exists()
    assert list(ns["of_both"]) == list(ns["of_logits"])
    assert not bool(ns["of_logits"]["lengths.weight"].dense().any())
    assert bool(ns["of_both"]["lengths.weight"].dense().any())


def test_attention_in_curvature() -> None:
    page = of("curvature")
    H, v = page["attention"], torch.randn(3 * 8 * 8)
    images, labels = page["sequences"]
    w = page["transformer"][0].self_attn.in_proj_weight
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        g = torch.autograd.grad(page["loss"](page["transformer"](images), labels), w, create_graph=True)[0]
    product = torch.autograd.grad(g.flatten() @ v, w)[0].flatten()
    assert (H @ v - product).abs().max() <= 1e-4 * product.abs().max()
    size = 8 * 8
    assert [page["factors"].dense()[i * size : (i + 1) * size, :size].any() for i in range(3)] == [True, False, False]


def test_backpack() -> None:
    page = of("curvature")
    expected = page["ggn"].diagonal()
    assert page["diagonal"].shape == page["model"].get_parameter(page["name"]).shape
    assert (page["diagonal"].flatten() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_kfac() -> None:
    page = of("kfac")
    report = page["optimizer"].report()
    assert report.steps == 2
    assert report.events == {}
    assert [row.parameter for row in report.parameters] == [name for name, _ in page["learner"].named_parameters()]
    assert page["logits"].isfinite().all()


def test_landscape() -> None:
    page = of("landscape")
    assert page["weights"].loss.shape == (5,)
    assert page["features"].loss_at_origin == pytest.approx(page["weights"].loss_at_origin, rel=1e-5)
    plane, model = page["plane"], page["model"]
    with torch.no_grad():
        whole = torch.nn.functional.cross_entropy(model(page["images"]), page["labels"])
    assert plane.loss_at_origin == plane.loss[2, 2] == pytest.approx(float(whole), rel=1e-5)
    assert (plane.loss > plane.loss_at_origin).any()
    lengths = [d.norm() for d in page["steepest"].values()]
    assert float(torch.stack(lengths).norm()) == pytest.approx(1, rel=1e-6)
    low, middle, high = page["sharp"].loss[1:4, 2]
    assert float(low - 2 * middle + high) > 0.1 * 0.05**2 * float(page["top"].values[0])  # not infinitely near to w
    page["figure"].draw_without_rendering()
    assert page["axes"].get_xlim() == (-1, 1)
    assert len(page["filled"].levels) > 8


def test_preconditioning() -> None:
    from secondorder.pooling import pooling_head

    page = of("preconditioning")
    maps, spectrum = page["maps"], page["head_spectrum"]
    root, none = spectrum(maps, "gcp_exact").condition, spectrum(maps, "covariance").condition
    assert float(root.max()) <= 2**0.5 + 1e-9
    assert (none > root).all()
    x = maps.clone().requires_grad_()
    (pooling_head("gcp_exact", 16)(x) * page["incoming"]).sum().backward()
    assert torch.allclose(page["exact"], x.grad, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(page["printed"], x.grad, rtol=0.1)
    images, labels = page["batch"]
    model, name = page["model"], page["name"]
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    gradient = torch.autograd.grad(loss, model.get_parameter(name))[0]
    cosine = torch.cosine_similarity(page["direction"][name].flatten(), gradient.flatten(), dim=0)
    assert page["alignment"](page["direction"], {name: gradient}).whole == pytest.approx(float(cosine), rel=1e-4)
    assert 0.01 < float(cosine) < 0.99


def test_training() -> None:
    page = of("training")
    first, again = page["trained"], page["again"]
    assert [row["epoch"] for row in first.history] == [1, 2]
    assert again.history == first.history
    state = again.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in first.model.state_dict().items())
    assert not first.model.training


def test_the_first_page_has_the_results_of_the_reports() -> None:
    """To bring it up to date: python -m studies.page.readme, between the two markers."""
    text = (ROOT / "README.md").read_text()
    assert text.split(BEGIN)[1].split(END)[0].strip() == results_table(ROOT / "reports").strip()


@undrawn_figures()
def test_the_example_of_a_study_trains_measures_judges_and_has_a_page(tmp_path: Path) -> None:
    study = names("CONTRIBUTING.md")["STUDY"]
    assert len(blocks("CONTRIBUTING.md")[0].splitlines()) <= 62
    common = Common(preset="smoke", out=tmp_path, seeds=2, processes=1, progress=False)
    settings = replace(
        study.presets["smoke"], training=Training("digits_tiny", train_limit=96, epochs=1, batch_size=32)
    )
    measure(common, {study.name: (study, settings)})
    write_pages(tmp_path, "smoke", {study.name: study}, [study.name])
    records = read_records(tmp_path, "weights")[0]
    assert set(records[records.quantity == "length"].step) == {0, 1, 2, 3}
    page = (tmp_path / "report.md").read_text()
    assert "shorter weights" in page
    assert "Length of the weights." in page

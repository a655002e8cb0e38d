"""What the preconditioning study measures of a backbone, against autograd, the optimiser and dense matrices."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.data import load_dataset
from secondorder.kfac import Damping, Fisher, KFACPreconditioner
from secondorder.networks import Network, network
from secondorder.pooling import pooling_head
from secondorder.preconditioning import KFACDirections, head_spectrum
from studies.backbones import convolutions
from studies.preconditioning.backbone import Backbone, Measures
from studies.preconditioning.blocks import AFTER_EXACT, AFTER_KFAC, CONDITION, ROLES, block_rows
from studies.preconditioning.blocks import COSINE as FIT
from studies.preconditioning.gradients import (
    ALL,
    MUON,
    NATURAL,
    PARTIAL,
    PERMUTED,
    PLAIN,
    POWERS,
    RANDOM,
    RESIDUAL,
    TURN,
    WITH_P,
    every_head,
    gradient_rows,
)
from studies.preconditioning.heads import CONDITION as HEAD_CONDITION
from studies.preconditioning.heads import COSINES, FEATURES, WORST, backward_rows, head_rows

LAYERS = ["stem.0", "features.0", "features.3"]
IMAGES = 4
MEASURES = Measures(
    heads=("gap", "covariance", "gcp", "gcp_exact"),
    images=64,
    head_images=8,
    curvature_images=IMAGES,
    newton_schulz_steps=(1,),
    dampings=(1.0,),
)


def backbone(measures: Measures = MEASURES) -> Backbone:
    torch.manual_seed(0)
    return Backbone(network("digits_tiny", "gap", 10, 1), load_dataset("digits", limit=256), measures, 0)


@pytest.fixture(scope="module")
def measured() -> Backbone:
    return backbone()


@pytest.fixture(scope="module")
def gradients(measured: Backbone) -> pd.DataFrame:
    return pd.DataFrame(gradient_rows(measured))


@pytest.fixture(scope="module")
def blocks(measured: Backbone) -> "pd.Series[float]":
    return pd.DataFrame(block_rows(measured)).set_index(["head", "layer", "quantity"]).value.sort_index()


def value(table: pd.DataFrame, **wanted: Any) -> float:
    same = [table[name].isna() if v is None else table[name] == v for name, v in wanted.items()]
    [found] = table[np.logical_and.reduce(same)].value
    return float(found)


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    weights = [model.get_parameter(f"{layer}.weight") for layer in LAYERS]
    return dict(zip(LAYERS, torch.autograd.grad(F.cross_entropy(model(images), labels), weights), strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0))


# ------------------------------------------------------------------------------------------------------------- backbones


def test_classifiers_fit_the_features_of_training_mode_and_the_model_stays() -> None:
    measured = backbone()
    before = copy.deepcopy(measured.model.state_dict())
    fitted = measured.networks["gcp"]
    assert all(torch.equal(v, before[name]) for name, v in measured.model.state_dict().items())
    assert measured.model.training
    assert fitted.training
    assert fitted.classifier.weight.dtype == torch.float64
    images, labels = measured.batch
    assert images.shape[0] == 64
    frozen = measured.frozen
    torch.testing.assert_close(  # training mode has the statistics of this very batch
        fitted.features(fitted.stem(images)), frozen.features(frozen.stem(images)), rtol=1e-9, atol=1e-9
    )
    assert float((fitted(images).argmax(1) == labels).double().mean()) > 0.6


# ----------------------------------------------------------------------------------------------------------------- heads


def test_every_head_is_measured_on_the_features_that_it_reads(measured: Backbone) -> None:
    rows = pd.DataFrame(head_rows(measured))
    frozen, images = measured.frozen, measured.images(8)[0]
    with torch.no_grad():
        features = frozen.features(frozen.stem(images))
    cases: list[tuple[str, Mapping[str, Any], float | None]] = [("covariance", {}, None), ("gcp_exact", {}, None)]
    for head, options, setting in [*cases, ("gcp", {"num_iter": 1}, 1.0), ("gcp", {"num_iter": 5}, 5.0)]:
        found = head_spectrum(features, head, **options).condition
        assert value(rows, head=head, setting=setting, quantity=HEAD_CONDITION) == pytest.approx(
            float(found.quantile(0.5))
        )
        assert value(rows, head=head, setting=setting, quantity=WORST) == pytest.approx(float(found.max()))
    assert value(rows, head="gap", quantity=HEAD_CONDITION) == pytest.approx(1.0)
    assert value(rows, head="gcp_exact", quantity=WORST) <= 2**0.5 + 1e-9
    kappa = torch.stack([torch.linalg.eigvalsh(torch.cov(x.flatten(1))) for x in features])
    assert value(rows, quantity=FEATURES) == pytest.approx(float((kappa[:, -1] / kappa[:, 0]).quantile(0.5)))


def test_images_with_constant_features_are_left_out() -> None:
    model = network("digits_tiny", "gap", 10, 1)
    constant = nn.Threshold(torch.inf, 1.0)
    nothing = Network(model.stem, nn.Sequential(model.features, constant), model.head, model.classifier)
    rows = pd.DataFrame(head_rows(replace(backbone(), model=nothing)))
    assert rows.value.isna().all()
    assert set(rows.quantity) == {HEAD_CONDITION, WORST}


# --------------------------------------------------------------------------------------------------------- backward pass


def test_backward_passes_against_autograd_of_the_whole_network(measured: Backbone) -> None:
    """dL/dX and dL/dW of the published head and of the exact one, for the same dL/dZ, without any closed form."""
    rows = pd.DataFrame(backward_rows(measured))
    model, (images, labels) = copy.deepcopy(measured.networks["gcp"]), measured.images(8)
    X, weight = model.features(model.stem(images)), model.get_parameter(convolutions(model)[-1])
    z = model.head(X)
    loss = F.cross_entropy(model.classifier(z), labels)
    (g,) = torch.autograd.grad(loss, z, retain_graph=True)
    published = torch.autograd.grad(loss, (X, weight), retain_graph=True)
    exact = torch.autograd.grad((pooling_head("gcp_exact", X.shape[1])(X) * g).sum(), (X, weight), retain_graph=True)
    plain = torch.autograd.grad((pooling_head("covariance", X.shape[1])(X) * g).sum(), (X, weight))
    for of, ours, root, none in zip(("dL/dX", "dL/dW"), published, exact, plain, strict=True):
        quantity = COSINES[of]
        assert value(rows, layer="newton_schulz", quantity=quantity) == pytest.approx(cosine(ours, root), abs=1e-9)
        assert value(rows, layer="unpreconditioned", quantity=quantity) == pytest.approx(cosine(none, root), abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- gradients


def test_cosines_are_those_of_autograd_and_of_the_optimiser(measured: Backbone, gradients: pd.DataFrame) -> None:
    images, labels = measured.batch
    g_gap = gradient(measured.networks["gap"], images, labels)
    optimised = measured.under("gap")
    kfac = KFACPreconditioner(optimised, damping=Damping(0.01), fisher=Fisher("exact"))
    kfac.update_curvature(optimised(images))
    for name, p in optimised.named_parameters():
        p.grad = g_gap.get(name.removesuffix(".weight"), torch.zeros_like(p)).clone()
    kfac.gathering.check = None  # no gradient of biases
    kfac.step()
    for head in ("covariance", "gcp"):
        g = gradient(measured.networks[head], images, labels)
        for layer in LAYERS:
            P_g = optimised.get_parameter(f"{layer}.weight").grad
            assert P_g is not None
            plain, turn, with_P = cosine(g[layer], g_gap[layer]), cosine(g_gap[layer], P_g), cosine(g[layer], P_g)
            at = {"layer": layer, "setting": 0.01}
            assert value(gradients, head=head, quantity=PLAIN, layer=layer) == pytest.approx(plain, abs=1e-3)
            assert value(gradients, head="gap", quantity=TURN, **at) == pytest.approx(turn, abs=1e-3)
            assert value(gradients, head=head, quantity=WITH_P, **at) == pytest.approx(with_P, abs=1e-3)
            partial = (with_P - plain * turn) / np.sqrt((1 - plain**2) * (1 - turn**2))
            assert value(gradients, head=head, quantity=PARTIAL, **at) == pytest.approx(partial, abs=2e-3)
        whole = [torch.cat([t.flatten() for t in each.values()]) for each in (g, g_gap)]
        assert value(gradients, head=head, quantity=PLAIN, layer=ALL) == pytest.approx(cosine(*whole), abs=1e-3)


def test_every_head_has_its_rows(gradients: pd.DataFrame) -> None:
    heads = [(h, "") for h in ("covariance", "gcp", "gcp_exact")] + [("gcp", f", {c}") for c in (RANDOM, PERMUTED)]
    expected = {("gap", TURN, layer, d) for layer in (*LAYERS, ALL) for d in (0.01, 1.0)}
    others = [(f", {name}", 0.01) for name in POWERS] + [(f", {MUON}", -1.0)]
    expected |= {("gap", f"{TURN}{which}", layer, d) for which, d in others for layer in (*LAYERS, ALL)}
    for (head, end), layer in ((h, layer) for h in heads for layer in (*LAYERS, ALL)):
        expected |= {(head, f"{q}{end}", layer, d) for q in (WITH_P, PARTIAL) for d in (0.01, 1.0)}
        expected |= {(head, f"{q}{end}{which}", layer, d) for q in (WITH_P, PARTIAL) for which, d in others}
        expected.add((head, f"{PLAIN}{end}", layer, -1.0))
    keys = gradients.fillna({"setting": -1.0})[["head", "quantity", "layer", "setting"]]
    assert sorted(keys.itertuples(index=False, name=None)) == sorted(expected)
    assert gradients.value.abs().max() <= 1


def test_other_ways_to_turn_a_gradient(measured: Backbone, gradients: pd.DataFrame) -> None:
    """P^(1/2) twice is P, and U V^T has the singular values 1."""
    images, labels = measured.batch
    g_gap, g = (gradient(measured.networks[head], images, labels) for head in ("gap", "gcp"))
    weights = {f"{layer}.weight": g_gap[layer] for layer in LAYERS}
    kfac = KFACDirections(measured.networks["gap"], measured.batch, params=list(weights))
    root = kfac.direction(weights, 0.01, 0.5)
    for name, P_g in kfac.direction(weights, 0.01).items():
        torch.testing.assert_close(kfac.direction(root, 0.01, 0.5)[name], P_g, rtol=1e-8, atol=1e-10)
        layer = name.removesuffix(".weight")
        U, _, Vh = torch.linalg.svd(g_gap[layer].flatten(1), full_matrices=False)
        for which, turned, d in (("P^1/2", root[name], 0.01), (MUON, U @ Vh, None)):
            at = {"head": "gcp", "layer": layer, "quantity": f"{WITH_P}, {which}"} | (
                {} if d is None else {"setting": d}
            )
            assert value(gradients, **at) == pytest.approx(cosine(g[layer], turned), abs=2e-3)


def test_controls_are_what_they_say(measured: Backbone, gradients: pd.DataFrame) -> None:
    heads, again, true = every_head(measured), every_head(measured), measured.data.train.labels
    assert all(torch.equal(heads[head][1], true) for head in (*MEASURES.heads, f"gcp, {RANDOM}"))
    network_of, permuted = heads[f"gcp, {PERMUTED}"]
    assert torch.equal(permuted.sort().values, true.sort().values)
    assert torch.equal(permuted, again[f"gcp, {PERMUTED}"][1])
    assert float((permuted == true).double().mean()) < 0.3
    fitted, random = heads["gcp"][0].classifier, heads[f"gcp, {RANDOM}"][0].classifier
    assert isinstance(fitted, nn.Linear)
    assert isinstance(random, nn.Linear)
    torch.testing.assert_close(random.weight.norm(), fitted.weight.norm())
    assert abs(cosine(random.weight, fitted.weight)) < 0.3
    assert not random.bias.any()
    # gradients of the permuted head are taken with the permuted labels of the very images
    images, labels = measured.batch
    indices = torch.linspace(0, 255, 64, dtype=torch.float64).round().long()
    g = gradient(network_of, images, permuted[indices])["stem.0"]
    plain = cosine(g, gradient(measured.networks["gap"], images, labels)["stem.0"])
    assert value(gradients, quantity=f"{PLAIN}, {PERMUTED}", layer="stem.0") == pytest.approx(plain, abs=1e-3)


def test_the_natural_gradient_is_solved_and_a_dead_layer_has_no_row() -> None:
    measures = replace(MEASURES, heads=("gap", "gcp"), images=16, natural_gradient=True)
    dead = backbone(measures)
    with torch.no_grad():
        dead.model.get_submodule("features.0").weight.zero_()  # type: ignore[operator]
        dead.model.get_submodule("features.1").weight.zero_()  # type: ignore[operator]
        dead.model.get_submodule("features.1").bias.fill_(-1.0)  # type: ignore[operator]
    rows = pd.DataFrame(gradient_rows(dead))
    assert value(rows, quantity=RESIDUAL) <= 1e-3
    assert set(rows[rows.quantity == f"{PARTIAL}, {NATURAL}"].layer) <= {"features.3", ALL}
    assert not set(LAYERS[:2]) & set(rows.layer)
    assert np.isfinite(rows.value).all()


# ---------------------------------------------------------------------------------------------------------------- blocks


def dense_block(measured: Backbone, head: str, name: str) -> Tensor:
    """The GGN of a weight by torch.func, in training mode."""
    model = copy.deepcopy(measured.networks[head])
    for layer in model.modules():  # the same function, without statistics to write to
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
            layer.num_batches_tracked = None
    images, _ = measured.images(IMAGES)
    weight = model.get_parameter(name).detach()

    def logits(w: Tensor) -> Tensor:
        return functional_call(model, {name: w}, (images,))

    with torch.no_grad():
        J, p = jacrev(logits)(weight).flatten(2), logits(weight).softmax(1)
    return torch.einsum("nkp,nkl,nlq->pq", J, p.diag_embed() - p[:, :, None] * p[:, None, :], J) / IMAGES


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("head", ["gap", "gcp"])
def test_blocks_against_dense_matrices(measured: Backbone, blocks: "pd.Series[float]", head: str, place: int) -> None:
    model = measured.networks[head]
    name = convolutions(model)[place]
    ggn = dense_block(measured, head, name)
    kfac = curvature_blocks(model, F.cross_entropy, measured.images(IMAGES), "kfac_expand", [name], fisher="exact")
    K = kfac[name].dense()
    spectra = {CONDITION: torch.linalg.eigvalsh(ggn)}
    for quantity, matrix in ((AFTER_KFAC, K), (AFTER_EXACT, ggn)):
        damping = 0.01 * matrix.square().sum() / matrix.trace()
        L = torch.linalg.cholesky(matrix + damping * torch.eye(len(K), dtype=K.dtype))  # L^-1 F L^-T is similar to P F
        half = torch.linalg.solve_triangular(L, ggn, upper=False)
        spectra[quantity] = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.mT, upper=False))
    at = blocks[head, ROLES[place]]
    k = -(-min(len(ggn), IMAGES * 9) // 2)
    for quantity, values in spectra.items():
        assert at[quantity] == pytest.approx(float(values[-1] / values[-k]), rel=1e-5), quantity
    assert at[FIT] == pytest.approx(float((K * ggn).sum() / (K.norm() * ggn.norm())), rel=1e-9)


def test_float32_agrees(measured: Backbone, blocks: "pd.Series[float]") -> None:
    single = backbone(replace(MEASURES, heads=("gap", "gcp"), precision="float32"))
    found = pd.DataFrame(block_rows(single)).set_index(["head", "layer", "quantity"]).value
    assert np.allclose(found, blocks[found.index], rtol=0.05)

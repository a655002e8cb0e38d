"""Part D of the preconditioning study: what is measured against dense matrices, and what the section makes of it."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks, fidelity
from secondorder.curvature.operators import (
    DenseOperator,
    DiagonalOperator,
    FactoredOperator,
    KroneckerOperator,
    damped_inverse_root,
)
from secondorder.data import load_dataset
from secondorder.networks import network
from studies.preconditioning.blocks.claims import GROUP
from studies.preconditioning.blocks.measure import (
    AFTER,
    BEFORE,
    CONSTANTS,
    EXACT,
    SQUARED,
    conditioning,
    ends,
    measure,
    of_block,
    of_hessian,
)
from studies.preconditioning.blocks.reading import per_seed
from studies.preconditioning.blocks.section import all_claims, part
from studies.preconditioning.reading import at_the_end
from studies.preconditioning.settings import PRESETS, Settings
from studies.preconditioning.situation import HEADS, Situation
from studies.report.section import Claim
from studies.statistics import NOT_SUPPORTED, SUPPORTED, UNDECIDED, geometric_interval

IMAGES = 4
SETTINGS = Settings(backbone="digits_tiny", curvature_images=IMAGES, reference_images=32, train_limit=128)


@pytest.fixture(scope="module")
def situation() -> Situation:
    torch.manual_seed(0)
    data = load_dataset("digits", None, limit=128)
    return Situation(network("digits_tiny", "gap", 10, 1), data, SETTINGS, 0)


@pytest.fixture(scope="module")
def rows(situation: Situation) -> pd.DataFrame:
    torch.manual_seed(0)
    return pd.DataFrame(measure(situation))


def names(model: nn.Module) -> dict[str, str]:
    convolutions = [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return dict(zip(("first", "middle", "last"), convolutions, strict=True))


def without_running_statistics(model: nn.Module) -> nn.Module:
    """The same function in training mode, for torch.func: batch norm has no statistics to write to."""
    model = copy.deepcopy(model)
    assert model.training
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
            layer.num_batches_tracked = None
    return model


def dense_blocks(situation: Situation, head: str, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """GGN, Hessian and J^T J of a weight by torch.func."""
    model = without_running_statistics(situation.training_heads[head])
    name = names(model)[layer]
    images, labels = situation.some_images(IMAGES)
    weight = model.get_parameter(name).detach()

    def logits(w: Tensor) -> Tensor:
        return functional_call(model, {name: w}, (images,))

    with torch.no_grad():
        J, p = jacrev(logits)(weight).flatten(2), logits(weight).softmax(1)
        H = hessian(lambda w: F.cross_entropy(logits(w), labels))(weight).reshape([weight.numel()] * 2)
    middle = p.diag_embed() - p[:, :, None] * p[:, None, :]
    ggn = torch.einsum("nkp,nkl,nlq->pq", J, middle, J) / IMAGES
    flat = J.flatten(0, 1)
    return ggn, H.detach(), flat.mT @ flat


def measures_of(values: Tensor, possible: int) -> dict[str, float]:
    """The measures of a spectrum by NumPy."""
    v = np.sort(values.numpy())[::-1].clip(0)
    on_range, shares = v[v > 1e-5 * v[0]], v[v > 0] / v.sum()
    return {
        "half_rank_condition": v[0] / v[int(np.ceil(possible / 2)) - 1],
        "largest_to_mean": v[0] / (v.sum() / possible),
        "condition": v[0] / on_range[-1],
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
        "trace": v.sum(),
        "largest": v[0],
    }


@pytest.mark.parametrize("layer", ["first", "middle", "last"])
@pytest.mark.parametrize("head", HEADS)
def test_blocks_against_dense_matrices(situation: Situation, rows: pd.DataFrame, head: str, layer: str) -> None:
    ggn, _, _ = dense_blocks(situation, head, layer)
    model, batch = situation.training_heads[head], situation.some_images(IMAGES)
    kfac = curvature_blocks(model, F.cross_entropy, batch, "kfac_expand", [names(model)[layer]], fisher="exact")
    K = kfac[names(model)[layer]].dense()
    unit = torch.eye(len(K), dtype=torch.float64)
    truths = {BEFORE: torch.linalg.eigvalsh(ggn)}
    for setting, matrix, damping in ((AFTER, K, 0.01), ("K-FAC 0.0001", K, 1e-4), (EXACT, ggn, 0.01)):
        added = damping * matrix.square().sum() / matrix.trace()
        L = torch.linalg.cholesky(matrix + added * unit)  # L^-1 F L^-T is similar to P F
        half = torch.linalg.solve_triangular(L, ggn, upper=False)
        truths[setting] = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.mT, upper=False))
    own = rows[(rows["head"] == head) & (rows.layer == layer)].set_index(["setting", "measure"]).value
    settings = set(truths) - (set() if layer == "last" else {"K-FAC 0.0001"})
    assert settings <= set(own.index.get_level_values("setting"))
    possible = min(len(ggn), IMAGES * 9)
    for setting in settings:
        for name, value in measures_of(truths[setting], possible).items():
            assert own[setting, name] == pytest.approx(value, rel=1e-5), (setting, name)
    assert own[BEFORE, "cosine"] == pytest.approx(float((K * ggn).sum() / (K.norm() * ggn.norm())), rel=1e-9)
    exact = curvature_blocks(model, F.cross_entropy, batch, "ggn", [names(model)[layer]])
    library = fidelity(kfac[names(model)[layer]], exact[names(model)[layer]])
    for measured in ("cosine", "relative_error", "best_scale"):
        assert own[BEFORE, measured] == pytest.approx(getattr(library, measured).value, rel=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_the_last_convolution_against_dense_matrices(situation: Situation, rows: pd.DataFrame, head: str) -> None:
    ggn, H, squared = dense_blocks(situation, head, "last")
    own = rows[(rows["head"] == head) & (rows.layer == "last")].set_index(["setting", "measure"]).value
    for name, value in measures_of(torch.linalg.eigvalsh(squared), min(len(ggn), IMAGES * 10)).items():
        assert own[SQUARED, name] == pytest.approx(value, rel=1e-5), name
    listed = own[BEFORE].filter(like="eigenvalue ")
    spectrum = torch.linalg.eigvalsh(ggn).flip(0)
    assert len(listed) > 10
    for name, value in listed.items():
        assert value == pytest.approx(float(spectrum[int(str(name).split()[1]) - 1]), rel=1e-6)
    extremes = torch.linalg.eigvalsh(H)
    assert float(extremes[0]) - 1e-12 <= own[BEFORE, "hessian_smallest"] < own[BEFORE, "hessian_largest"]
    assert own[BEFORE, "hessian_largest"] == pytest.approx(float(extremes[-1]), rel=0.05)  # six steps, from within
    exact = float((H - ggn).norm() / H.norm())
    assert own[BEFORE, "hessian_difference"] == pytest.approx(exact, rel=0.5, abs=1e-12)  # four random vectors
    assert exact > 0.01  # batch norm in training mode is not linear in the weights, whatever the head
    assert own[AFTER, "hessian_largest"] > 0


def test_the_hessian_is_preconditioned_by_the_same_root() -> None:
    """Where Hessian and GGN are equal they are so after K-FAC."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    ggn = FactoredOperator(rows)
    A, B = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    root = damped_inverse_root(KroneckerOperator(B @ B.mT, A @ A.mT), 0.01)
    found = {(setting, name): value for setting, name, value in of_hessian(DenseOperator(ggn.dense()), ggn, root, 0)}
    P = root.dense()
    assert found[BEFORE, "hessian_largest"] == pytest.approx(float(torch.linalg.eigvalsh(ggn.dense())[-1]), rel=0.01)
    after = float(torch.linalg.eigvalsh(P @ ggn.dense() @ P)[-1])
    assert found[AFTER, "hessian_largest"] == pytest.approx(after, rel=0.01)
    assert found[BEFORE, "hessian_difference"] < 1e-12


def test_constants_are_the_blocks_of_networks_in_eval_mode(situation: Situation, rows: pd.DataFrame) -> None:
    for head in HEADS:
        model = situation.heads[head]
        assert not model.training
        exact = curvature_blocks(model, F.cross_entropy, situation.some_images(IMAGES), "ggn", [names(model)["middle"]])
        spectrum = exact[names(model)["middle"]].eigenvalues()
        own = rows[(rows["head"] == head) & (rows.layer == "middle")].set_index(["setting", "measure"]).value
        assert own[CONSTANTS, "largest"] == pytest.approx(float(spectrum[-1]), rel=1e-6)
        assert (
            own[CONSTANTS, "largest"] > 1.05 * own[BEFORE, "largest"]
        )  # training mode is flat along the scale of a channel


def test_rows_have_the_form_of_the_study(rows: pd.DataFrame) -> None:
    assert set(rows.part) == {"blocks"}
    assert set(rows["head"]) == set(HEADS)
    assert np.isfinite(rows.value).all()
    assert not rows.duplicated(["layer", "head", "setting", "measure"]).any()
    assert rows.setting.map(type).eq(str).all()


def test_float32_settings_agree(situation: Situation, rows: pd.DataFrame) -> None:
    single = Situation(situation.backbone, situation.data, replace(SETTINGS, precision="float32"), 0)
    found = pd.DataFrame(measure(single))
    both = rows.merge(found, on=["layer", "head", "setting", "measure"], suffixes=("", "_single"))
    some = both[both.measure.isin(["largest", "trace", "cosine", "hessian_largest"]) & (both.setting == BEFORE)]
    assert len(some) > 20
    assert np.allclose(some.value, some.value_single, rtol=0.02)


def test_a_block_without_curvature_has_no_rows_and_an_unresolved_half_rank_has_no_row() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    block = KroneckerOperator(eye, eye)
    roots = {AFTER: damped_inverse_root(block, 0.01)}
    assert not list(of_block(FactoredOperator(torch.zeros(2, 9).double()), block, roots, 2, listed=True))
    assert "half_rank_condition" not in dict(conditioning(torch.tensor([1.0, 1e-20, 0.0]).double(), 3))
    assert dict(conditioning(torch.tensor([4.0, 2.0, 1.0]).double(), 3))["half_rank_condition"] == 2.0


def test_ends_of_a_small_operator_are_exact() -> None:
    assert ends(DiagonalOperator(torch.tensor([3.0, -1.0, 0.5]).double()), 0) == pytest.approx((-1.0, 3.0))


CONDITIONS = ("half_rank_condition", "largest_to_mean", "effective_rank", "largest", "trace")


def made(
    seeds: int, gcp: float = 0.5, spread: float = 0.05, exact_gcp: float = 0.5, cosine: float = 0.4
) -> Iterator[dict[str, object]]:
    """A table in which GCP's condition is `gcp` times that of the others before K-FAC and the same after it."""
    generator = np.random.default_rng(0)
    moments = [("untrained", 0), ("gap", 66), ("gap", 132), ("gcp", 66), ("gcp", 132)]
    for (backbone, step), seed, head in product(moments, range(seeds), HEADS):
        key = {"backbone": backbone, "seed": seed, "step": step, "moment": step / 132, "head": head, "part": "blocks"}
        for layer in ("first", "middle", "last"):
            for setting, measured, value in made_values(
                layer, *((gcp, exact_gcp, cosine) if head == "gcp" else (1, 1, 0.8))
            ):
                noisy = value * float(np.exp(spread * generator.standard_normal()))
                yield key | {"layer": layer, "batch": -1, "setting": setting, "measure": measured, "value": noisy}


def made_values(layer: str, before: float, exact: float, cosine: float) -> Iterator[tuple[str, str, float]]:
    """Setting, measure and value."""
    levels = {BEFORE: 100 * before, AFTER: 10.0, EXACT: 4 * exact, "exact 0.0001": 1.0}
    for setting, level in (levels | ({"K-FAC 0.0001": 8.0} if layer == "last" else {})).items():
        yield from ((setting, measured, level) for measured in CONDITIONS)
    yield from ((BEFORE, *pair) for pair in (("cosine", cosine), ("relative_error", 0.9), ("best_scale", 20.0)))
    if layer == "last":
        yield SQUARED, "half_rank_condition", 5 * before
        for setting in (BEFORE, AFTER):
            yield from ((setting, f"eigenvalue {rank}", 1.0 / rank) for rank in (1, 4, 9))
            yield from ((setting, f"hessian_{end}", value) for end, value in (("largest", 2.0), ("smallest", -1.0)))
        yield BEFORE, "hessian_difference", 0.4


def claims_at_the_end(table: pd.DataFrame) -> list[Claim]:
    return all_claims(at_the_end(table))


def verdicts(**options: float) -> dict[str, list[str]]:
    claims = claims_at_the_end(pd.DataFrame(made(4, **options)))
    found: dict[str, list[str]] = {}
    for claim in claims:
        assert claim.meaning
        assert claim.group == GROUP
        assert claim.interval.n == 4
        found.setdefault(claim.statement, []).append(claim.verdict)
    return found


BETTER = "GGN blocks below GCP are better conditioned than below GAP on the same weights: ratio below 1."
LESS = "K-FAC improves the conditioning less below GCP than below GAP: above 1."
PERSISTS = (
    "Control: at least half of the smaller gain, in logarithms, remains with the exact preconditioner (F + λI)⁻¹."
)
SOFTMAX = (
    "Control: without the softmax, J^T J of the last convolution is better conditioned below GCP than below GAP too."
)
FITS = "Control: K-FAC fits the exact GGN block of the last convolution worse below GCP than below GAP."


def test_claims_come_out_either_way() -> None:
    found = verdicts(gcp=0.5, exact_gcp=1.0, cosine=0.4)
    assert found[BETTER] == [SUPPORTED] * 6
    assert found[SOFTMAX] == found[LESS] == found[PERSISTS] == found[FITS] == [SUPPORTED] * 3
    found = verdicts(gcp=0.5, exact_gcp=0.5)
    assert found[LESS] == [SUPPORTED] * 3
    assert found[PERSISTS] == [NOT_SUPPORTED] * 3
    found = verdicts(gcp=2.0, exact_gcp=1.0, cosine=0.95)
    assert found[BETTER] == [NOT_SUPPORTED] * 6
    assert found[SOFTMAX] == found[LESS] == found[FITS] == [NOT_SUPPORTED] * 3
    assert PERSISTS not in found
    assert UNDECIDED in verdicts(gcp=1.0, cosine=0.8, spread=0.5)[LESS]


def test_values_of_the_claims() -> None:
    found: dict[str, list[float]] = {}
    for claim in claims_at_the_end(pd.DataFrame(made(3, spread=0.0, exact_gcp=0.75))):
        found.setdefault(claim.statement, []).append(claim.interval.estimate)
    assert found[BETTER] == pytest.approx([0.5] * 6)
    assert found[SOFTMAX] == pytest.approx([0.5] * 3)
    assert found[LESS] == pytest.approx([2.0] * 3)
    assert found[PERSISTS] == pytest.approx([1.5 / 2**0.5] * 3)
    assert found[FITS] == pytest.approx([0.5] * 3)
    assert (
        found["K-FAC improves the conditioning of the GGN blocks below GAP: after / before below 1."]
        == [pytest.approx(0.1)] * 3
    )
    assert (
        found["K-FAC improves the conditioning of the GGN blocks below GCP: after / before below 1."]
        == [pytest.approx(0.2)] * 3
    )


def test_only_the_last_moment_counts() -> None:
    table = pd.DataFrame(made(3))
    early = (table.step == 66) & (table["head"] == "gcp")
    changed = table.assign(value=table.value.where(~early, 1e6))
    assert [c.interval for c in claims_at_the_end(changed)] == [c.interval for c in claims_at_the_end(table)]


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds(seeds: int) -> None:
    found = part(pd.DataFrame(made(seeds)))
    assert {claim.interval.n for claim in found.claims} == {seeds}
    if seeds == 1:
        assert {claim.verdict for claim in found.claims} == {UNDECIDED}
    assert [len(picture.figure.axes) for picture in found.pictures] == [6, 4, 3]
    for table in found.tables:
        assert not table.data.isna().any().any()
        assert not table.data.astype(str).apply(lambda column: column.str.contains("nan|inf")).any().any()
        assert set(table.data.n) == {seeds}


def test_a_seed_with_a_missing_layer_is_left_out() -> None:
    table = pd.DataFrame(made(3))
    missing = (table.seed == 1) & (table.layer == "first") & (table["head"] == "gcp") & (table.setting == BEFORE)
    one = table[~(missing & (table.measure == "half_rank_condition"))]
    values = per_seed(one[one.backbone == "untrained"], BEFORE, "half_rank_condition")
    assert values["gcp"].isna().tolist() == [False, True, False]
    counts = {(claim.statement, "largest" in claim.quantity): claim.interval.n for claim in claims_at_the_end(one)}
    assert counts[BETTER, False] == counts[LESS, False] == 2
    assert counts[BETTER, True] == counts[FITS, False] == 3


def test_a_table_without_some_heads_or_rows() -> None:
    table = pd.DataFrame(made(2))
    assert part(table[table["head"] != "gap"]).claims
    assert part(table[table.backbone == "untrained"]).pictures
    assert not part(table[:0]).claims
    assert part(table[:0]).remarks


def test_the_smoke_preset_end_to_end() -> None:
    torch.manual_seed(0)
    data = load_dataset("digits", None, limit=256)
    settings = replace(PRESETS["smoke"], backbone="digits_tiny")
    rows = []
    for backbone, step in (("untrained", 0), ("gcp", 4)):
        for seed in (0, 1):
            torch.manual_seed(seed + step)
            found = measure(Situation(network("digits_tiny", "gcp", 10, 1), data, settings, seed))
            rows += [{"backbone": backbone, "seed": seed, "step": step, "moment": step / 4, **row} for row in found]
    found_part = part(pd.DataFrame(rows))
    assert {claim.statement for claim in found_part.claims} >= {BETTER, SOFTMAX, LESS, FITS}
    assert {claim.interval.n for claim in found_part.claims} == {2}
    assert len(found_part.pictures) == len(found_part.tables) == 3
    assert geometric_interval([2.0, 8.0]).estimate == pytest.approx(4.0)

"""Arguments of curvature_blocks, operators and estimators that cannot be used are refused in one line that names them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import batch, chain
from torch import nn

from secondorder.curvature import (
    QUANTITIES,
    curvature_blocks,
    fidelity,
    spectral_density,
    spectral_summary,
    top_eigenvalues,
)
from secondorder.curvature.backpack import backpack_quantity, supports
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.spectrum.trace_estimates import trace_estimate
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()


class Returns(nn.Module):
    """A network of odd outputs."""

    def __init__(self, odd: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.odd = nn.Linear(72, 3).double(), odd

    def forward(self, x: torch.Tensor) -> Any:
        return self.odd(self.layer(x.flatten(1)))


BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "quantity without hash": ({"quantity": []}, r"unknown quantity \[\]; choose one of"),
    "quantity array": ({"quantity": np.zeros(2)}, "unknown quantity array"),
    "fisher array": ({"quantity": "kfac_expand", "fisher": np.zeros(2)}, "unknown fisher array"),
    "seed tensor": (
        {"quantity": "mc_fisher", "seed": torch.tensor(1.0)},
        r"seed must be a whole number .*, got tensor\(1\.\)",
    ),
    "seed negative": ({"seed": -1}, "seed must be a whole number .*, got -1"),
    "seed beyond": ({"seed": 2**63}, "seed must be .*, got 9223372036854775808"),
    "params number": ({"params": 3}, "params 3: must be names of parameters"),
    "params of numbers": ({"params": [[]]}, r"unknown parameter \[\]"),
    "network": ({"network": "resnet18"}, "network str: must be a torch.nn.Module"),
    "meta": ({"network": chain().to("meta")}, "parameter 0.weight is on the device 'meta'"),
    "lazy": (
        {"network": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))},
        "parameter 1.weight is not initialised yet; run the",
    ),
    "no outputs": (
        {"network": Returns(lambda z: z[:, :0])},
        r"the network returns shape \[2, 0\] for 2 images: no outputs",
    ),
    "images on meta": (
        {"batch": (torch.zeros(3, 2, 6, 6, dtype=torch.float64, device="meta"), torch.zeros(3).long())},
        "images or labels are on the device 'meta'",
    ),
    "complex outputs": ({"network": Returns(lambda z: z.to(torch.complex128))}, "the network returns torch.complex128"),
    "detached loss": ({"loss": lambda z, y: z.detach().sum()}, "does not depend on the outputs"),
    "four weights": ({"loss": nn.CrossEntropyLoss(torch.ones(4))}, "must be 3 finite numbers of at least 0"),
    "negative weights": ({"loss": nn.CrossEntropyLoss(-torch.ones(3))}, r"weights \[-1.0, -1.0, -1.0\] of the loss"),
    "no second derivative": (
        {"loss": nn.MultiMarginLoss(p=2)},
        "a second derivative of MultiMarginLoss fails: derivative for",
    ),
    "no second derivative, hessian": (
        {"loss": nn.MultiMarginLoss(p=2), "quantity": "hessian"},
        "a second derivative of MultiMarginLoss fails: derivative for",
    ),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(case: str) -> None:
    changes, message = BLOCKS[case]
    given = {"network": chain(), "loss": CE, "batch": batch(CE), "quantity": "ggn"} | changes

    def multiplied() -> None:
        blocks = curvature_blocks(**given)
        blocks.whole @ torch.ones(blocks.whole.size, dtype=torch.float64)

    with pytest.raises(InputError, match=message):
        multiplied()


OPERATORS: dict[str, tuple[Callable[[], Any], str]] = {
    "dense": (lambda: DenseOperator([[1.0]]), "a dense operator needs a tensor, got list"),  # type: ignore[arg-type]
    "dense complex": (
        lambda: DenseOperator(torch.eye(2, dtype=torch.complex64)),
        "real floating-point .* torch.complex64",
    ),
    "dense whole": (
        lambda: DenseOperator(torch.eye(2, dtype=torch.int64)),
        "real floating-point numbers, got torch.int64",
    ),
    "diagonal": (lambda: DiagonalOperator(3), "a diagonal operator needs a tensor, got int"),  # type: ignore[arg-type]
    "factored": (lambda: FactoredOperator(None), "a factor needs a tensor, got NoneType"),  # type: ignore[arg-type]
    "blocks": (lambda: BlockDiagonalOperator(3), "needs a list of symmetric operators, got 3"),  # type: ignore[arg-type]
    "blocks of numbers": (lambda: BlockDiagonalOperator([1]), "needs a list of symmetric operators"),  # type: ignore[list-item]
    "product": (
        lambda: DiagonalOperator(torch.ones(2)) @ "x",
        r"a product with an operator of shape \[2, 2\] needs a tensor",
    ),  # type: ignore[operator]
    "limit": (lambda: DiagonalOperator(torch.ones(2)).dense("x"), "limit must be a number above 0, got 'x'; in bytes"),  # type: ignore[arg-type]
    "memory": (
        lambda: spectral_density(two(), "lanczos", memory="2 GiB"),
        "memory must be a finite number above 0, got '2 GiB'",
    ),  # type: ignore[arg-type]
    "memory nan": (
        lambda: top_eigenvalues(two(), 1, memory=float("nan")),
        "memory must be a finite number above 0, got nan",
    ),  # type: ignore[arg-type]
    "probes": (
        lambda: trace_estimate(two(), "hutchinson", probes=10**30),
        "probes must be a whole number from 1 to 2147483647, got 1000000",
    ),
    "method": (lambda: spectral_summary(two(), []), r"unknown method \[\]"),  # type: ignore[arg-type]
    "meta": (
        lambda: top_eigenvalues(DenseOperator(torch.ones(2, 2, device="meta")), 1),
        "on the device 'meta', which holds no",
    ),
    "fidelity": (lambda: fidelity(two(), two(), np.zeros(2)), "unknown method array"),  # type: ignore[arg-type]
    "backpack seed": (
        lambda: backpack_quantity(chain(), CE, batch(CE), None, seed="x"),  # type: ignore[arg-type]
        "seed must be a whole number .*, got 'x'",
    ),
    "supports": (lambda: supports(chain(), []), r"unknown quantity \[\]"),  # type: ignore[arg-type]
}


def two() -> SymmetricOperator:
    return DenseOperator(torch.eye(2).double())


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_and_estimators(case: str) -> None:
    make, message = OPERATORS[case]
    with pytest.raises(InputError, match=message):
        make()


def test_a_complex_vector_is_not_cut_to_its_real_part() -> None:
    with pytest.raises(InputError, match=r"real floating-point numbers, got torch\.complex64"):
        two() @ torch.ones(2, dtype=torch.complex64)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_dense_matrices_are_exactly_symmetric(quantity: str) -> None:
    """Products of matrices may round the two triangles differently; sizes at which they do."""
    model = chain("covariance", channels=7)
    blocks = curvature_blocks(model, CE, batch(CE, 5), quantity, ["2.weight", "2.bias"])
    for operator in (*blocks.values(), blocks.whole):
        assert torch.equal(operator.dense(), operator.dense().mT)
    rows = torch.randn(13, 37, dtype=torch.float64)
    matrix = KroneckerOperator(FactoredOperator(rows), rows.mT @ rows).dense()
    assert torch.equal(matrix, matrix.mT)


@pytest.mark.parametrize("scale", [2.0**-660, 2.0**660])
def test_lanczos_at_any_scale(scale: float) -> None:
    """Squares of the entries leave the range of numbers; a power of two changes nothing else."""
    values = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    matrix = (Q * values) @ Q.mT
    found, plain = (spectral_summary(DenseOperator(A), "lanczos", deflate=2) for A in (scale * matrix, matrix))
    for name in ("largest", "smallest", "largest_magnitude", "trace", "frobenius_norm"):
        assert getattr(found, name).value / scale == pytest.approx(getattr(plain, name).value, rel=1e-9)
    for name in ("rank", "condition", "effective_rank", "stable_rank", "participation", "negative_share"):
        assert getattr(found, name).value == pytest.approx(getattr(plain, name).value, rel=1e-9)
    assert plain.largest.value == pytest.approx(5.0, rel=1e-9)
    assert bool(top_eigenvalues(DenseOperator(scale * matrix), 2).converged.all())

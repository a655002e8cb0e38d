"""What a backward pass evaluates again (checkpoints), and backward passes that are no derivative."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import CLASSES, around, relative, reverse_ggn, rows, true_hessian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secondorder.curvature import curvature_blocks
from secondorder.curvature.operators import SymmetricOperator
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()


class Checkpointed(nn.Module):
    """Two linear layers with something between them, of which only the input is kept, and another one."""

    def __init__(self, between: nn.Module, kept: bool = False, **options: Any) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(6, 4), between, nn.Tanh(), nn.Linear(4, 4))
        self.last, self.kept, self.options = nn.Linear(4, CLASSES), kept, options

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x) if self.kept else checkpoint(self.part, x, use_reentrant=False, **self.options))


BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "batch norm": lambda: nn.BatchNorm1d(4),
    "dropout": lambda: nn.Dropout(0.4),
}


def pair(between: str) -> tuple[nn.Module, nn.Module]:
    """A network with a checkpoint, and the same without."""
    model, plain = (Checkpointed(BETWEEN[between](), kept).double() for kept in (False, True))
    plain.load_state_dict(model.state_dict())
    return model, plain


@pytest.mark.parametrize(
    ("between", "params"),
    [
        *((between, None) for between in BETWEEN),
        *(("dropout", params) for params in (["part.0.weight"], ["part.0.bias", "last.weight"], ["part.3.bias"])),
    ],
)
@pytest.mark.parametrize("quantity", ["ggn", "hessian", "diagonal", "kfac_expand"])
def test_checkpoints_are_evaluated_in_the_state_of_the_construction(
    between: str, quantity: str, params: list[str] | None
) -> None:
    model, plain = pair(between)
    if quantity == "kfac_expand" and params is None:
        params = ["part.0.weight", "part.3.bias"]
    batch, state = rows(), torch.get_rng_state()
    truth = curvature_blocks(plain, CE, batch, quantity, params).whole
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = curvature_blocks(model, CE, batch, quantity, params).whole
    for p in model.parameters():  # unnoticed, and of no account
        p.data.add_(1)
    model.eval()
    v = torch.randn(found.size, generator=torch.Generator().manual_seed(1)).double()
    assert relative(found.dense(), truth.dense()) <= 1e-12
    assert relative(found @ v, truth @ v) <= 1e-12
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())
    assert torch.equal(state, torch.get_rng_state())


def test_hessian_of_a_checkpoint_is_that_of_torch_func() -> None:
    model, plain = pair("nothing")
    batch = rows()
    assert (
        relative(curvature_blocks(model, CE, batch, "hessian").whole.dense(), true_hessian(plain, CE, batch)) <= 1e-12
    )


def hooked(hook: Callable[[Tensor], Tensor]) -> nn.Module:
    """A network with a hook on the gradient of a hidden layer."""

    def watched(h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(hook)
        return h

    return around(watched)


NO_DERIVATIVES: dict[str, Callable[[], nn.Module]] = {
    "clipped": lambda: hooked(lambda g: g.clamp(-0.01, 0.01)),
    "normalised": lambda: hooked(lambda g: g / (g.norm() + 1e-9)),
    "noise": lambda: hooked(lambda g: g * torch.rand_like(g)),
    "other masks": lambda: Checkpointed(nn.Dropout(0.4), preserve_rng_state=False).double(),
}


def product(operator: SymmetricOperator) -> Tensor:
    return operator @ torch.ones(operator.size, dtype=operator.dtype)


@pytest.mark.parametrize("kind", NO_DERIVATIVES)
@pytest.mark.parametrize("quantity", ["ggn", "hessian", "diagonal", "kfac_expand"])
def test_backward_passes_that_are_no_derivative_are_refused(kind: str, quantity: str) -> None:
    torch.manual_seed(3)
    model, batch, state = NO_DERIVATIVES[kind](), rows(), torch.get_rng_state()
    with pytest.raises(InputError, match=r"backward pass .* is not linear .* leave that out"):
        product(curvature_blocks(model, CE, batch, quantity).whole)
    assert torch.equal(state, torch.get_rng_state())
    if quantity == "ggn":
        with pytest.raises(InputError, match=r"backward pass .* is not linear .* leave that out"):
            curvature_blocks(model, CE, batch, quantity).whole.dense()
        assert torch.equal(state, torch.get_rng_state())


def test_a_hook_that_is_linear_is_the_derivative() -> None:
    model, batch = hooked(lambda g: -2 * g), rows()
    assert (
        relative(
            curvature_blocks(model, CE, batch, "diagonal").whole.diagonal(), reverse_ggn(model, CE, batch).diagonal()
        )
        <= 1e-12
    )

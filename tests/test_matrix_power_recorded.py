"""Matrix functions and pooling heads in recorded computations (`torch.func.linearize`, `make_fx`): no operation in place.

A recorder keeps what does not depend on the tangents as constants, and replays an operation that changes one at every product.
"""

from collections.abc import Callable

import pytest
import torch
from matrix_functions import F64, FUNCTIONS, features, psd
from torch import Tensor
from torch.func import grad, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from secondorder.matrix_power import covariance
from secondorder.pooling import POOLINGS, pooling_head

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),  # of PyTorch's own recorder
]

WIDE, TALL = (2, 3, 2, 2), (2, 4, 2, 1)  # more positions than channels, and fewer
WEIGHTS = torch.tensor([[1.0, 2.0, 0.5, 1.0]], dtype=F64).expand(2, -1)


def head(name: str, channels: int) -> Callable[[Tensor], Tensor]:
    return pooling_head(name, channels).double().eval()


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]] = {
    **{f"matrix {name}": (f, lambda: psd(2, 3)) for name, (f, _) in FUNCTIONS.items()},
    **{f"channels {name}": (f, lambda: features(2, 3, 5)) for name, (_, f) in FUNCTIONS.items()},
    "channels covariance": (covariance, lambda: features(2, 3, 5)),
    **{f"head {name}, wide": (head(name, 3), lambda: features(*WIDE)) for name in POOLINGS},
    **{f"head {name}, tall": (head(name, 4), lambda: features(*TALL)) for name in POOLINGS},
    "chain": (head("gcp", 3).chain(), lambda: features(*WIDE)),  # type: ignore[attr-defined]
    "weighted covariance": (lambda x: head("covariance", 3)(x, WEIGHTS), lambda: features(*WIDE)),
}


class Mutations(TorchDispatchMode):
    """Writes down the operations inside that change a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.is_mutable:
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_changed_in_place_while_a_recorder_listens(name: str) -> None:
    function, inputs = CASES[name]
    x, v = inputs(), inputs()

    def gradient(x: Tensor) -> Tensor:
        return grad(lambda x: function(x).square().sum())(x)

    with Mutations() as found:
        jvp(function, (x,), (v,))
        jvp(gradient, (x,), (v,))
        vjp(gradient, x)[1](v)
        vmap(lambda v: jvp(function, (x,), (v,))[1])(torch.stack([v, -v]))
    # PyTorch gives a tangent the strides of its primal, in a new tensor that is wholly written
    assert found.seen <= {"aten.copy_.default"}


@pytest.mark.parametrize(
    "name", ["channels one_step", "channels newton_schulz", "channels eigh", "weighted covariance"]
)
def test_what_is_linearised_gives_the_same_product_every_time(name: str) -> None:
    """Also of a gradient, products with a Hessian: its first was right, the second off by its size, the third by 1e17."""
    function, inputs = CASES[name]
    of_gradient = grad(lambda x: function(x).square().sum()) if name == "channels one_step" else function
    x, V = inputs(), torch.stack([inputs(), inputs()])
    want = torch.stack([jvp(of_gradient, (x,), (v,))[1] for v in V])
    _, product = linearize(of_gradient, x)
    for _ in range(3):
        torch.testing.assert_close(torch.stack([product(v) for v in V]), want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(vmap(product)(V), want, rtol=1e-11, atol=1e-11)

"""Curvature leaves the user's network, batch and random state as they were, bit for bit."""

import random
from collections.abc import Callable
from pathlib import Path

import backpack
import numpy as np
import pytest
import torch
from small_networks import batch, chain, relative
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from secondorder.curvature import QUANTITIES, curvature_blocks, kronecker_parameters
from secondorder.curvature.matrix_free.random_state import RandomState
from secondorder.errors import InputError
from secondorder.pooling import pooling_head

CE = nn.CrossEntropyLoss()


class Remembering(nn.Module):
    """Writes attributes and a buffer, draws random numbers of all three kinds and changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen = True
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        self.calls.add_(1)
        return x.add_(0.01 * noise).mul_(self.calls)


def network() -> nn.Sequential:
    model = nn.Sequential(
        Remembering(),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        Remembering(),
        nn.ReLU(inplace=True),
        *pooling_head("gcp", 4).chain(),
        nn.Linear(10, 3),
    ).double()
    model[6].eval()
    model[1].weight.grad = torch.randn_like(model[1].weight)
    model[2].bias.requires_grad_(False)
    model[5].weight.register_hook(lambda g: 2 * g)
    model[3].register_forward_hook(lambda module, args, output: output * 1.5)
    model[5].register_forward_pre_hook(lambda module, args: (args[0] - 0.1,))
    model[8].register_full_backward_hook(lambda module, g_in, g_out: (2 * g_in[0],))
    return model


def hooks(model: nn.Module) -> list[tuple[str, list[object]]]:
    kinds = [name for name in vars(nn.Module()) if "hooks" in name]
    return [
        (f"{path}.{kind}", list(vars(part)[kind].items())) for path, part in model.named_modules() for kind in kinds
    ]


def state(model: nn.Module) -> dict[str, object]:
    return {
        "values": {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())},
        "objects": {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())},
        "versions": {name: t._version for name, t in (*model.named_parameters(), *model.named_buffers())},
        "grads": {
            name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
        },
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [part.training for part in model.modules()],
        "attributes": {path: {k: id(v) for k, v in vars(part).items()} for path, part in model.named_modules()},
        "hooks": hooks(model),
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)  # type: ignore[attr-defined, index]
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))  # type: ignore[arg-type]
    return a == b


def check_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert [name for name in before if not same(before[name], after[name])] == []


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_everything_is_as_before(quantity: str) -> None:
    model, data = network(), batch(CE, 4)
    kept = tuple(t.clone() for t in data)
    params = kronecker_parameters(model) if QUANTITIES[quantity].kronecker else None
    before = state(model)
    blocks = curvature_blocks(model, CE, data, quantity, params)
    check_same(before, state(model))
    v = torch.randn(blocks.whole.size, generator=torch.Generator().manual_seed(1)).double()
    first = blocks.whole @ v
    blocks.whole.trace()
    next(iter(blocks.values())).dense()
    check_same(before, state(model))
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))
    assert float(first.norm()) > 0
    random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    assert torch.equal(first, blocks.whole @ v)  # the same dropout masks in every product


def test_everything_is_as_before_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            self.reached = True
            raise RuntimeError("broken")

    model, data = network(), batch(CE, 4)
    model.append(Failing())
    before = state(model)
    with pytest.raises(InputError, match=r"the network fails for images \[4, 2, 6, 6\]: broken"):
        curvature_blocks(model, CE, data, "ggn")
    check_same(before, state(model))
    with pytest.raises(InputError):
        curvature_blocks(network(), CE, (data[0], data[1] + 7), "ggn")


def test_forward_hooks_act_and_backward_hooks_do_not() -> None:
    model, data = chain("gcp"), batch(CE, 3)
    plain = curvature_blocks(model, CE, data, "ggn").whole.dense()
    model[1].register_full_backward_hook(lambda module, g_in, g_out: (2 * g_in[0],))
    model[2].weight.register_hook(lambda g: 5 * g)
    assert relative(curvature_blocks(model, CE, data, "ggn").whole.dense(), plain) <= 1e-14
    hooked = chain("gcp")
    hooked.load_state_dict(model.state_dict())
    hooked[0].register_forward_hook(lambda module, args, output: output.square())
    squared = chain("gcp")
    squared.load_state_dict(model.state_dict())
    squared.insert(1, Squared())
    truth = curvature_blocks(squared, CE, data, "ggn").whole.dense()
    assert relative(curvature_blocks(hooked, CE, data, "ggn").whole.dense(), truth) <= 1e-13
    assert relative(truth, plain) > 1e-3
    factors = [curvature_blocks(m, CE, data, "kfac_expand").whole.dense() for m in (hooked, squared)]
    assert relative(*factors) <= 1e-13


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_networks_extended_for_backpack() -> None:
    model, data = chain("gap"), batch(CE, 3)
    plain = curvature_blocks(model, CE, data, "ggn").whole.dense()
    extended, loss = backpack.extend(model), backpack.extend(CE)
    with backpack.backpack(backpack.extensions.BatchGrad()):
        loss(extended(data[0]), data[1]).backward()
    before = state(extended)
    for quantity in QUANTITIES:
        blocks = curvature_blocks(extended, loss, data, quantity)
        if quantity == "ggn":
            assert relative(blocks.whole.dense(), plain) <= 1e-14
    check_same(before, state(extended))


WRAPPERS: dict[str, Callable[[nn.Module], tuple[nn.Module, str]]] = {
    "data parallel": lambda model: (nn.DataParallel(model), "module."),
    "compiled": lambda model: (torch.compile(model), "_orig_mod."),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks(wrapper: str) -> None:
    model, data = chain("gcp"), batch(CE, 3)
    plain = curvature_blocks(model, CE, data, "ggn")
    wrapped, prefix = WRAPPERS[wrapper](model)
    blocks = curvature_blocks(wrapped, CE, data, "ggn")
    assert list(blocks) == [name for name, _ in wrapped.named_parameters()] == [prefix + name for name in plain]
    assert relative(blocks.whole.dense(), plain.whole.dense()) <= 1e-14
    names = kronecker_parameters(wrapped)
    assert list(curvature_blocks(wrapped, CE, data, "kfac_expand", names)) == names


def test_distributed_networks(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, data = chain("gcp"), batch(CE, 3)
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = state(wrapped)
        blocks = curvature_blocks(wrapped, CE, data, "ggn")
        assert list(blocks) == [name for name, _ in wrapped.named_parameters()]
        assert relative(blocks.whole.dense(), curvature_blocks(model, CE, data, "ggn").whole.dense()) <= 1e-14
        check_same(before, state(wrapped))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reparametrised_weights() -> None:
    data = batch(CE, 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double()
    for build in (weight_norm, nn.utils.parametrizations.weight_norm):
        reparametrised = nn.Sequential(nn.Flatten(), build(nn.Linear(72, 3).double()))
        blocks = curvature_blocks(reparametrised, CE, data, "ggn")
        g, v = (p for name, p in reparametrised.named_parameters() if "bias" not in name)
        # W = g v / |v| row by row: dW/dg = v / |v|, so that the block of g follows from that of W.
        direction = (v / v.norm(dim=1, keepdim=True)).detach()
        with torch.no_grad():
            model[1].weight.copy_(g * direction)
            model[1].bias.copy_(reparametrised[1].bias)
        G = curvature_blocks(model, CE, data, "ggn")["1.weight"].dense()
        J = torch.block_diag(*direction.unsqueeze(-1))
        name = next(name for name in blocks if "weight_g" in name or "original0" in name)
        assert relative(blocks[name].dense(), J.mT @ G @ J) <= 1e-12


def test_inside_no_grad_and_autocast() -> None:
    model, data = chain("gcp"), batch(CE, 3)
    truth = curvature_blocks(model, CE, data, "ggn").whole.dense()
    with torch.no_grad():
        assert relative(curvature_blocks(model, CE, data, "ggn").whole.dense(), truth) <= 1e-14
        H = curvature_blocks(model, CE, data, "hessian")["0.bias"].dense()
    assert relative(curvature_blocks(model, CE, data, "hessian")["0.bias"].dense(), H) <= 1e-14
    model.float()
    single = curvature_blocks(model, CE, (data[0].float(), data[1]), "ggn").whole.dense()
    with torch.autocast("cpu", torch.bfloat16):
        again = curvature_blocks(model, CE, (data[0].float(), data[1]), "ggn").whole.dense()
    assert torch.equal(single, again)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        curvature_blocks(model, CE, data, "ggn")


def test_a_module_with_two_names() -> None:
    """`torch.func.functional_call` leaves its tensors behind in one."""
    model, plain = (
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double() for _ in range(2)
    )
    model[2] = model[0]
    plain[2].weight, plain[2].bias = plain[0].weight, plain[0].bias
    plain.load_state_dict(model.state_dict())
    data, before = (torch.randn(3, 4).double(), torch.tensor([0, 1, 2])), list(model.parameters())
    for quantity in ("ggn", "hessian", "kfac_expand"):
        whole, truth = (curvature_blocks(net, CE, data, quantity).whole.dense() for net in (model, plain))
        assert relative(whole, truth) <= 1e-12
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
        assert model[2].weight is model[0].weight is before[0]


def test_the_state_of_a_parametrisation() -> None:
    """Reading its weight is an iteration, in training mode."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3)).double()
    data = torch.randn(3, 4).double(), torch.tensor([0, 1, 2])
    for quantity in ("ggn", "kfac_expand", "kfac_reduce", "ekfac"):
        before = state(model)
        curvature_blocks(model, CE, data, quantity, kronecker_parameters(model)).whole.dense()
        check_same(before, state(model))


class Cached(nn.Module):
    """Remembers in a dictionary what it has made of its weight, and counts in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.memory, self.calls = nn.Linear(4, 3), {}, [1.0]  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        if "size" not in self.memory:
            self.memory["size"] = self.layer.weight.square().sum()
        self.calls.append(1.0)
        return self.layer(x.tanh()).sin() * self.memory["size"] * len(self.calls)


def test_lists_and_dictionaries_of_a_module() -> None:
    """What a forward pass puts there has no part in the next one."""
    model, data = Cached().double(), (torch.randn(3, 4).double(), torch.tensor([0, 1, 2]))
    w = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(w: Tensor) -> Tensor:
        weight, bias = w[:12].view(3, 4), w[12:]
        return nn.functional.cross_entropy(
            (data[0].tanh() @ weight.T + bias).sin() * weight.square().sum() * 2, data[1]
        )

    truth = torch.func.hessian(loss)(w)
    for chunk in (None, 2, None):
        whole = curvature_blocks(model, CE, data, "hessian", chunk=chunk).whole
        assert relative(whole.dense(), truth) <= 1e-12
        assert relative(whole @ w, truth @ w) <= 1e-12
    assert model.calls == [1.0]
    assert not model.memory


def test_every_part_draws_numbers_of_its_own_and_the_same_each_time() -> None:
    state = RandomState()

    def drawn(part: int) -> list[float]:
        torch.rand(5)  # the present state does not matter
        with state.replayed(part):
            return [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002

    first = [drawn(part) for part in range(3)]
    assert first == [drawn(part) for part in range(3)]
    for library in zip(*first, strict=True):
        assert len(set(library)) == 3

"""Factors from hooks: against dense ground truth and curvlinops, through everything models do, without touching them."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from curvlinops import KFACLinearOperator
from layer_truth import dense_block, true_factors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from secondorder.errors import InputError
from secondorder.kfac.capture import Capture
from secondorder.kfac.fisher import output_gradients
from secondorder.kfac.layers import KroneckerLayer, find_layers
from secondorder.kfac.statistics import LayerStatistics
from secondorder.networks import network

EVEN = "ignore:Using padding='same' with even kernel lengths"
MAPS = {"1d": (4, 9), "2d": (4, 7, 6), "3d": (4, 4, 5, 3)}
SMALL_MAPS = {"1d": (4, 5), "2d": (4, 3, 4), "3d": (4, 2, 2, 1)}
CONVOLUTIONS = {
    "3": {"kernel_size": 3, "padding": 1},
    "1": {"kernel_size": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "no padding": {"kernel_size": 2},
    "same": {"kernel_size": 4, "padding": "same"},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": "same", "groups": 4, "stride": 1},
}
TRANSPOSED = {
    "plain": {"kernel_size": 2},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "gaps": {"kernel_size": 1, "stride": 2},
    "cut": {"kernel_size": 2, "padding": 2, "stride": 2, "output_padding": 1},
    "dilation": {"kernel_size": 2, "stride": 2, "dilation": 3, "padding": 1},
    "groups": {"kernel_size": 3, "stride": 2, "groups": 2},
    "depthwise": {"kernel_size": 2, "groups": 4},
}
LAYERS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(4, 3, bias), (4,)),
    "linear on sequences": (lambda bias: nn.Linear(4, 3, bias), (5, 4)),
    "linear on maps": (lambda bias: nn.Linear(4, 3, bias), (2, 3, 4)),
    "uneven": (lambda bias: nn.Conv2d(4, 6, (3, 1), (1, 2), (2, 0), bias=bias), (4, 7, 6)),
} | {
    f"conv{dimension} {name}": (
        lambda bias, kind=kind, options=options: kind(4, 8, **options, bias=bias),
        MAPS[dimension],
    )
    for dimension, kind in (("1d", nn.Conv1d), ("2d", nn.Conv2d), ("3d", nn.Conv3d))
    for name, options in CONVOLUTIONS.items()
    if dimension != "3d" or name not in ("same", "circular", "depthwise")
}
LAYERS |= {
    f"transposed{dimension} {name}": (
        lambda bias, kind=kind, options=options: kind(4, 8, **options, bias=bias),
        SMALL_MAPS[dimension],
    )
    for dimension, kind in (("1d", nn.ConvTranspose1d), ("2d", nn.ConvTranspose2d), ("3d", nn.ConvTranspose3d))
    for name, options in TRANSPOSED.items()
    if dimension != "3d" or name in ("stride", "groups")
}
LAYERS["transposed uneven"] = (
    lambda bias: nn.ConvTranspose2d(4, 6, (3, 1), (1, 2), (2, 0), (0, 1), 2, bias, (2, 1)),
    (4, 4, 3),
)


class Captured:
    """A model with its layers, their statistics and a capture that runs."""

    def __init__(
        self, model: nn.Module, sharing: str = "expand", approximation: str = "kfac", wide: int = 4096
    ) -> None:
        self.model = model
        layers, _ = find_layers(model, approximation, sharing, wide)
        self.layers: dict[str, KroneckerLayer] = {layer.name: layer for layer in layers}
        self.statistics = {layer.name: LayerStatistics(layer) for layer in layers}
        self.capture = Capture(layers, self.statistics, model)
        self.capture.start()

    def exact(self, x: Tensor, likelihood: str = "cross_entropy") -> Tensor:
        z = self.model(x)
        self.capture.from_logits(z, output_gradients(z, "exact", likelihood))
        return z

    def committed(self, gradient_scale: float) -> dict[str, LayerStatistics]:
        for statistics in self.statistics.values():
            statistics.commit(0.0, gradient_scale)
        return self.statistics


def close(a: Tensor | None, b: Tensor, tolerance: float = 1e-12) -> None:
    assert a is not None
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def own_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


# A bias and a sum over positions meet in few lines, which are the same for all convolutions: those take turns.
TURNS = [((True, "expand"), (False, "reduce")), ((True, "reduce"), (False, "expand"))]
FACTORS = [(kind, *case) for turn, kind in enumerate(LAYERS) for case in TURNS[turn % 2]]
FACTORS += [
    (kind, *case)
    for turn, kind in enumerate(LAYERS)
    for case in TURNS[1 - turn % 2]
    if kind.startswith("linear") or kind.endswith((" 3", " groups", " plain"))
]


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize(("kind", "bias", "sharing"), FACTORS)
def test_factors_of_every_kind_of_layer(kind: str, bias: bool, sharing: str) -> None:
    make, shape = LAYERS[kind]
    x = torch.randn(3, *shape).double()
    layer = make(bias).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(x)[0].numel(), 3).double())
    captured = Captured(model, sharing)
    captured.exact(x)
    captured.capture.stop()
    y = torch.zeros(3, dtype=torch.long)
    for index, statistics in captured.committed(1 / 3).items():
        if index == "3" and not kind.startswith("linear"):
            continue  # the truth of a wide linear layer takes most of the time, and is that of every other kind
        module = model.get_submodule(index)
        A, B = true_factors(module, model, x, own_cross_entropy, y, sharing, statistics.layer.bias is not None)
        close(statistics.A, A)
        close(statistics.B, B)
        assert statistics.samples == 3


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("likelihood", ["cross_entropy", "mse"])
def test_equal_to_curvlinops(likelihood: str, joined: bool, sharing: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=joined),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), padding=(0, 2), dilation=(1, 2), bias=joined),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(24, 3, bias=joined),
    ).double()
    x = torch.randn(4, 2, 6, 6).double()
    y = torch.randint(3, (4,)) if likelihood == "cross_entropy" else torch.randn(4, 3).double()
    loss = nn.CrossEntropyLoss() if likelihood == "cross_entropy" else nn.MSELoss()
    oracle = KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type="type-2",
        kfac_approx=sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    truth = oracle @ torch.eye(oracle.shape[1]).double()
    captured = Captured(model, sharing)
    captured.exact(x, likelihood)
    start = 0
    for statistics in captured.committed(1 / 4).values():
        A, B, layer = statistics.A, statistics.B, statistics.layer
        assert A is not None
        assert B is not None
        size = layer.outputs * layer.inputs
        order = torch.arange(size).view(layer.outputs, -1)
        if joined:  # curvlinops has the bias after the whole weight
            order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
        block = dense_block(A, B)[order.flatten()][:, order.flatten()]
        close(block, truth[start : start + size, start : start + size])
        start += size
    assert start == len(truth)


def test_monte_carlo_is_right_in_expectation() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4).double()
    exact = Captured(copy.deepcopy(model))
    exact.exact(x)
    truth = exact.committed(1 / 6)
    captured = Captured(model)
    z = model(x)
    captured.capture.from_logits(z, output_gradients(z, "mc", generator=torch.Generator().manual_seed(0), samples=3000))
    for name, statistics in captured.committed(1 / 6).items():
        close(statistics.A, truth[name].A)  # type: ignore[arg-type]
        close(statistics.B, truth[name].B, 0.04)  # type: ignore[arg-type]  # 18,000 draws


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_accumulated_batches_equal_one(sharing: str) -> None:
    model, x, y = small(), torch.randn(6, 2, 6, 6).double(), torch.randint(3, (6,))
    for empirical in (False, True):
        whole, parts = Captured(model, sharing), Captured(model, sharing)
        for captured, batches in ((whole, [slice(0, 6)]), (parts, [slice(0, 2), slice(2, 6)])):
            if empirical:
                captured.capture.from_backward()
                losses = [F.cross_entropy(model(x[rows]), y[rows], reduction="sum") / 6 for rows in batches]
                sum(losses).backward()  # both forwards before one backward
            else:
                for rows in batches:
                    captured.exact(x[rows])
            captured.capture.stop()
        for one, other in zip(whole.committed(1.0).values(), parts.committed(1.0).values(), strict=True):
            close(other.A, one.A)  # type: ignore[arg-type]
            close(other.B, one.B)  # type: ignore[arg-type]
            assert one.samples == other.samples == 6


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_empirical_factors_come_with_the_backward_of_the_loss(sharing: str) -> None:
    model, x, y = small(), torch.randn(5, 2, 6, 6).double(), torch.randint(3, (5,))
    captured = Captured(model, sharing)
    captured.capture.from_backward()
    F.cross_entropy(model(x), y).backward()
    captured.capture.stop()
    other = Captured(model, sharing)
    z = model(x)
    own = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z, retain_graph=True)[0]
    other.capture.from_logits(z, own[None])
    truth = other.committed(1 / 5)
    for name, statistics in captured.committed(5.0).items():
        close(statistics.A, truth[name].A)  # type: ignore[arg-type]
        close(statistics.B, truth[name].B)  # type: ignore[arg-type]


class Reused(nn.Module):
    """One layer twice in a forward, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.again, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.again.weight, self.again.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(x)))
        return self.last(torch.tanh(self.again(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_uses_of_one_weight_in_one_forward_are_positions(sharing: str) -> None:
    model, x, y = Reused().double(), torch.randn(5, 4).double(), torch.zeros(5, dtype=torch.long)
    captured = Captured(model, sharing)
    captured.exact(x)
    assert [len(layer.modules) for layer in captured.layers.values()] == [1, 2, 1]
    found = captured.committed(1 / 5)
    A, B = true_factors(model.twice, model, x, own_cross_entropy, y, sharing, True)
    close(found["twice"].A, A)
    close(found["twice"].B, B)
    # The same function with one module in both places is the truth for two modules with one weight.
    single = copy.deepcopy(model)
    single.again = single.first
    A, B = true_factors(single.first, single, x, own_cross_entropy, y, sharing, True)
    close(found["first"].A, A)
    close(found["first"].B, B)
    assert found["twice"].samples == found["first"].samples == 5


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_checkpointed_segments_count_once(fisher: str) -> None:
    model, x, y = small(), torch.randn(4, 2, 6, 6).double(), torch.randint(3, (4,))

    def through_checkpoint(images: Tensor) -> Tensor:
        return model[4:](checkpoint(model[:4], images, use_reentrant=False))

    found = []
    for run in (model, through_checkpoint):
        captured = Captured(model)
        if fisher == "empirical":
            captured.capture.from_backward()
        z = run(x)
        if fisher == "exact":
            captured.capture.from_logits(z, output_gradients(z, "exact"))
        F.cross_entropy(z, y).backward()
        assert fisher == "empirical" or captured.capture.uses == 3
        captured.capture.stop()
        found.append(captured.committed(1.0))
    for name, statistics in found[0].items():
        close(found[1][name].A, statistics.A)  # type: ignore[arg-type]
        close(found[1][name].B, statistics.B)  # type: ignore[arg-type]
        assert found[1][name].samples == 4


def test_reentrant_checkpoints() -> None:
    model, x, y = small(), torch.randn(4, 2, 6, 6).double().requires_grad_(), torch.randint(3, (4,))

    def run() -> Tensor:
        return model[4:](checkpoint(model[2:4], model[:2](x), use_reentrant=True))

    captured = Captured(model)
    z = run()
    with pytest.raises(InputError, match="use_reentrant=True hides layers from K-FAC"):
        captured.capture.from_logits(z, output_gradients(z, "exact"))
    captured.capture.start()
    captured.capture.from_backward()  # the inner backward brings what is needed
    F.cross_entropy(run(), y).backward()
    captured.capture.stop()
    plain = Captured(model)
    plain.capture.from_backward()
    F.cross_entropy(model(x), y).backward()
    truth = plain.committed(1.0)
    for name, statistics in captured.committed(1.0).items():
        close(statistics.A, truth[name].A)  # type: ignore[arg-type]
        close(statistics.B, truth[name].B)  # type: ignore[arg-type]


def test_other_backward_passes_and_forwards_do_not_count() -> None:
    model, x, y = small(), torch.randn(4, 2, 6, 6).double(), torch.randint(3, (4,))
    captured = Captured(model)
    captured.capture.from_backward()
    with torch.no_grad():
        model(x)
    assert captured.capture.uses == 0
    images = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(images), y), images)  # an adversarial example, say
    assert not any(statistics.used for statistics in captured.statistics.values())
    F.cross_entropy(model(x), y).backward()
    assert {statistics.staged_samples for statistics in captured.statistics.values()} == {4.0}


def test_only_uses_that_the_logits_depend_on() -> None:
    model, x = small(), torch.randn(4, 2, 6, 6).double()
    captured = Captured(model)
    first, second = model(x[:1]), model(x[1:])
    captured.capture.from_logits(first, output_gradients(first, "exact"))
    assert captured.statistics["0"].staged_samples == 1
    captured.capture.from_logits(second, output_gradients(second, "exact"))
    both = captured.committed(1.0)
    whole = Captured(model)
    whole.exact(x)
    for name, statistics in whole.committed(1.0).items():
        close(both[name].A, statistics.A)  # type: ignore[arg-type]
        close(both[name].B, statistics.B)  # type: ignore[arg-type]


def test_hooks_of_the_user_come_after() -> None:
    model, x = small(), torch.randn(4, 2, 6, 6).double()
    model[5].register_forward_hook(lambda module, args, out: 2 * out)
    captured = Captured(model)
    z = captured.exact(x)
    B = captured.committed(1.0)["5"].B
    g = 2 * output_gradients(z, "exact").flatten(0, 1)
    close(B, (g.mT @ g)[None])


def test_calls_without_a_batch_and_by_keyword() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(0), nn.Linear(9, 3)).double()
    x = torch.randn(2, 5).double()
    batched = Captured(nn.Sequential(model[0], model[1], nn.Flatten(), model[3]))
    batched.exact(x[None])
    single = Captured(model)
    z = model[3](input=model[:3](x))
    single.capture.from_logits(z, output_gradients(z[None], "exact")[:, 0])
    truth = batched.committed(1.0)
    for name, statistics in single.committed(1.0).items():
        close(statistics.A, truth[name].A)  # type: ignore[arg-type]
        close(statistics.B, truth[name].B)  # type: ignore[arg-type]


def test_input_changed_in_place() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x + 1
            z = self.one(h)
            h.mul_(2)
            return self.two(z)

    captured = Captured(Changed())
    z = captured.model(torch.randn(2, 3))
    with pytest.raises(InputError, match="input of layer one was changed in place after the layer had used it"):
        captured.capture.from_logits(z, output_gradients(z, "exact"))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_autocast(fisher: str) -> None:
    model, x, y = small().float(), torch.randn(8, 2, 6, 6), torch.randint(3, (8,))
    found = []
    for enabled in (True, False):
        captured = Captured(model)
        if fisher == "empirical":
            captured.capture.from_backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = model(x)
            loss = F.cross_entropy(z, y)
        assert z.dtype == (torch.bfloat16 if enabled else torch.float32)
        if fisher == "exact":
            captured.capture.from_logits(z, output_gradients(z, "exact"))
        loss.backward()
        found.append(captured.committed(1.0))
    for name, statistics in found[1].items():
        for half, full in ((found[0][name].A, statistics.A), (found[0][name].B, statistics.B)):
            assert half is not None
            assert half.dtype == torch.float32
            close(half, full, 0.04)  # type: ignore[arg-type]  # bfloat16 has 8 bits


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("model", [small, lambda: network("cifar_resnet8", "gcp", 10)])
def test_the_users_gradients_are_the_same_bit_for_bit(model: Callable[[], nn.Module], fisher: str) -> None:
    plain = model()
    dtype = next(plain.parameters()).dtype
    x, y = torch.randn(4, 2 if dtype == torch.float64 else 3, *((6, 6) if dtype == torch.float64 else (16, 16))), None
    x, y = x.to(dtype), torch.randint(3, (4,))
    watched = copy.deepcopy(plain)
    hooks = [dict(vars(module)) for module in watched.modules()]
    F.cross_entropy(plain(x), y).backward()
    state = torch.get_rng_state()
    captured = Captured(watched)
    if fisher == "empirical":
        captured.capture.from_backward()
    z = watched(x)
    if fisher == "mc":
        captured.capture.from_logits(z, output_gradients(z, "mc", generator=torch.Generator()))
        assert all(p.grad is None for p in watched.parameters())
    F.cross_entropy(z, y).backward()
    captured.capture.stop()
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
        assert not q._backward_hooks
    for p, q in zip(plain.buffers(), watched.buffers(), strict=True):
        assert torch.equal(p, q)
    for module, before in zip(watched.modules(), hooks, strict=True):
        assert vars(module).keys() == before.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for statistics in captured.committed(1.0).values():
        assert bool(torch.isfinite(statistics.B).all())  # type: ignore[arg-type]
        assert float(statistics.B.diagonal(dim1=1, dim2=2).sum()) > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("fisher", ["exact", "empirical", "nothing"])
def test_nothing_recorded_stays_alive(fisher: str) -> None:
    model, x = small(), torch.randn(2, 2, 6, 6).double()
    seen: list[weakref.ref[Tensor]] = []
    captured = Captured(model)
    handle = model[5].register_forward_hook(lambda _, args, out: seen.append(weakref.ref(args[0])))
    if fisher == "empirical":
        captured.capture.from_backward()
    z = model(x)
    if fisher == "exact":
        captured.capture.from_logits(z, output_gradients(z, "exact"))
    if fisher == "empirical":
        z.sum().backward()
    if fisher == "nothing":
        captured.capture.stop()
    del z
    handle.remove()
    gc.collect()
    assert seen
    assert seen[0]() is None


def test_recording_goes_on_from_step_to_step() -> None:
    model, x, y = small(), torch.randn(4, 2, 6, 6).double(), torch.randint(3, (4,))
    captured = Captured(model)
    captured.capture.from_backward()
    values = []
    for _ in range(2):
        model(x)  # without a backward: forgotten
        F.cross_entropy(model(x), y).backward()
        values.append([tensor.clone() for s in captured.statistics.values() for tensor in s.staged_tensors()])
        captured.committed(1.0)
        captured.capture.forget()
        assert captured.capture.uses == 0
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_records_live_as_long_as_the_graph(fisher: str) -> None:
    model, x = small(), torch.randn(2, 2, 6, 6).double()
    captured = Captured(model)
    if fisher == "empirical":
        captured.capture.from_backward()
    gc.disable()
    try:
        for backward in (False, True, False):
            z = model(x)  # never a step
            if backward:
                z.sum().backward()
            del z
            assert not captured.capture._recorded
            assert not captured.capture._waiting
    finally:
        gc.enable()
    images = x.clone().requires_grad_()
    for _ in range(2):
        torch.autograd.grad(model(images).sum(), images)  # brings no weight's gradient
    assert sum(map(len, captured.capture._arrived.values())) <= 3


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_hooks_go_with_the_capture(fisher: str) -> None:
    model, x = small(), torch.randn(2, 2, 6, 6).double()
    captured = Captured(model)
    if fisher == "empirical":
        captured.capture.from_backward()
    z = model(x)
    capture = weakref.ref(captured.capture)
    gc.disable()
    try:
        del captured
        assert capture() is None
    finally:
        gc.enable()
    z.sum().backward()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_forward_counts_once() -> None:
    model, x = small(), torch.randn(2, 2, 6, 6).double()
    captured = Captured(model)
    z = captured.exact(x)
    with pytest.raises(InputError, match=r"has been counted; call it once per forward, with all outputs in one call"):
        captured.capture.from_logits(z * 2, output_gradients(z, "exact"))
    captured.capture.forget()
    captured.capture.from_logits(z, output_gradients(z, "exact"))  # of an earlier step: nothing


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_layers_frozen_and_unfrozen_later(fisher: str) -> None:
    model, x, y = small(), torch.randn(4, 2, 6, 6).double(), torch.randint(3, (4,))
    captured = Captured(model)
    model[2].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    for frozen in (True, False):
        model[2].weight.requires_grad_(not frozen)
        if fisher == "empirical":
            captured.capture.from_backward()
            F.cross_entropy(model(x), y).backward()
        else:
            captured.exact(x)
        assert captured.statistics["2"].used == (fisher == "exact" or not frozen)
        for statistics in captured.statistics.values():
            statistics.discard()
        captured.capture.forget()


def test_two_captures_on_parts_of_one_model() -> None:
    encoder, head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 3))
    model, x, y = nn.Sequential(encoder, head).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    values = []
    for together in (False, True):
        one, other = Captured(head), Captured(encoder)  # a pull to the encoder goes through the head
        one.capture.from_backward()
        z = model(x)
        if together:
            other.capture.from_logits(z, output_gradients(z, "exact"))
            assert not one.capture._arrived
        F.cross_entropy(z, y).backward()
        values.append([tensor.clone() for s in one.statistics.values() for tensor in s.staged_tensors()])
        one.capture.stop()
        other.capture.stop()
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_rows_of_the_output() -> None:
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.layer(x.flatten(0, 1)).view(*x.shape[:2], 3)
            return {"loss": z.square().sum(), "logits": z}

    captured = Captured(Dictionary())
    captured.capture.from_backward()
    captured.model(torch.randn(7, 5, 4))  # without a backward
    for _ in range(2):
        captured.model(torch.randn(2, 5, 4))["loss"].backward()
    assert captured.capture.rows == 4
    captured.capture.forget()
    assert captured.capture.rows == 0
    captured.model.layer(torch.randn(2, 4)).sum().backward()
    assert captured.capture.rows is None

"""Training loops of models that torch.compile has been at: ragged batches, evaluation, resumed and warmed-up trainings."""

import gc
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch._inductor.config
from kfac_training import weights
from natural import KFAC
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.types import ConvertFrameReturn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import KFACPreconditioner

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # at which the compiler itself looks

Compiled = tuple[Callable[..., Any], nn.Module]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    gc.collect()  # an optimiser that the traceback of another test's error holds keeps everything uncompiled
    torch._dynamo.reset()
    counters.clear()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


def whole(model: nn.Module, backend: str) -> Compiled:
    made = torch.compile(model, backend=backend)
    return made, made  # type: ignore[return-value]


def outside(model: nn.Module, backend: str) -> Compiled:
    return torch.compile(model, backend=backend, fullgraph=True), model


def in_place(model: nn.Module, backend: str) -> Compiled:
    model.compile(backend=backend)
    return model, model


def a_part(model: nn.Module, backend: str) -> Compiled:
    model[3] = torch.compile(model[3], backend=backend)
    return model, model


def warmed_up(model: nn.Module, backend: str) -> Compiled:
    before = weights(model)
    made = torch.compile(model, backend=backend)
    made(torch.randn(12, 5).double()).sum().backward()
    model.zero_grad()
    model.load_state_dict(before)
    return made, model


def a_function(model: nn.Module, backend: str) -> Compiled:
    return torch.compile(lambda x: model(x), backend=backend), model


def uncompiled(model: nn.Module, backend: str) -> Compiled:
    return model, model


def trained(compiled: Callable[..., Compiled], backend: str, steps: int, **settings: Any) -> nn.Module:
    """Epochs of two batches and a ragged one with an evaluation after each; resumed in the middle by a new optimiser."""
    model = network()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(27, 5, dtype=torch.float64, generator=generator)
    y = x[:, :3].argmax(1)
    call, given = compiled(model, backend)
    optimizer = KFAC(given, 0.05, **settings)
    for step in range(steps):
        rows = slice(12 * (step % 3), 12 * (step % 3 + 1))
        optimizer.zero_grad()
        z = call(x[rows])
        optimizer.update_curvature(z)
        F.cross_entropy(z, y[rows]).backward()
        optimizer.step()
        if step % 3 == 2:
            model.eval()
            with torch.no_grad():
                call(x)
            model.train()
        if step == steps // 2:
            state, optimizer = optimizer.state_dict(), KFAC(given, 0.05, **settings)
            optimizer.load_state_dict(state)
    return model


@cache
def plainly_trained(steps: int, **settings: Any) -> list[Tensor]:
    """The weights without a compiler."""
    weights = [p.detach() for p in trained(uncompiled, "eager", steps, **settings).parameters()]
    assert not counters["stats"]
    return weights


@pytest.mark.parametrize(
    ("compiled", "fisher"),
    [
        (whole, "mc"),
        (outside, "exact"),
        (in_place, "mc"),
        (a_part, "mc"),
        (warmed_up, "empirical"),
        (a_function, "mc"),
    ],
)
def test_a_compiled_model_trains_as_itself(compiled: Callable[..., Compiled], fisher: str) -> None:
    settings = {"fisher": fisher, "factor_interval": 5, "inverse_interval": 5}
    plain = plainly_trained(24, **settings)
    model = trained(compiled, "eager", 24, **settings)
    assert not counters["graph_break"]
    assert (
        1 <= counters["stats"]["unique_graphs"] <= 5
    )  # training and evaluation, 12 rows and any number: not one a step
    for p, q in zip(plain, model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert stance() == "default"


def test_long_trainings() -> None:
    plain, model = (trained(made, "aot_eager", 120, inverse_interval=30) for made in (uncompiled, whole))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # here, and not in processes that have to start
    plain, model = (
        trained(made, "inductor", 12, factor_interval=4, inverse_interval=4) for made in (uncompiled, whole)
    )
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_factors_in_every_step() -> None:
    plain, model = (trained(made, "eager", 9, factor_interval=1) for made in (uncompiled, whole))
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_compiled_training_step() -> None:
    def train(compile_it: bool, make: Callable[[nn.Module], Any]) -> nn.Module:
        model = network()
        x, y = torch.randn(10, 5).double(), torch.randint(3, (10,))
        kfac = make(model)
        sgd = None if isinstance(kfac, KFAC) else torch.optim.SGD(model.parameters(), 0.1)

        def step(x: Tensor, y: Tensor) -> None:
            model.zero_grad()
            z = model(x)
            kfac.update_curvature(z)
            F.cross_entropy(z, y).backward()
            kfac.step()
            if sgd is not None:
                sgd.step()

        run = torch.compile(step, backend="eager") if compile_it else step
        for i in range(16):
            run(x[i % 4 :], y[i % 4 :])
        return model

    for make in (lambda m: KFAC(m, 0.1, factor_interval=4), lambda m: KFACPreconditioner(m, factor_interval=4)):
        plain, compiled = (train(compile_it, make) for compile_it in (False, True))
        for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_the_compiler_is_given_back() -> None:
    def model() -> nn.Module:
        return nn.Linear(3, 2)

    one = KFAC(model(), 0.1)
    other = KFACPreconditioner(model())
    assert stance() == "force_eager"
    with other.watching_nothing():
        assert stance() == "force_eager"
    del one
    with other.watching_nothing():
        assert stance() == "default"
    del other
    assert stance() == "default"
    with torch.compiler.set_stance("eager_on_recompile"):
        one = KFAC(model(), 0.1)
        del one
        assert stance() == "eager_on_recompile"


def test_an_optimiser_that_is_collected_within_a_compiled_program() -> None:
    """There the stance may not be changed: what was given back nowhere left the whole process uncompiled."""

    def program(*frame: Any) -> ConvertFrameReturn:
        return ConvertFrameReturn()

    optimizer = KFAC(nn.Linear(3, 2), 0.1)
    optimizer.itself = optimizer  # type: ignore[attr-defined]
    assert stance() == "force_eager"
    del optimizer
    set_eval_frame(program)
    try:
        gc.collect()
    finally:
        set_eval_frame(None)
    assert stance() == "default"


def test_another_stance_is_an_error_and_no_wrong_factors() -> None:
    model = network()
    made = torch.compile(model, backend="eager")
    optimizer = KFAC(model, 0.1)
    with torch.compiler.set_stance("default"):
        z = made(torch.randn(4, 5).double())
    with pytest.raises(InputError, match=r"set_stance\('force_eager'\)"):
        optimizer.update_curvature(z)

"""Long computations that are killed and go on: to the last bit what they would have been, and nothing is evaluated twice."""

import os
import re
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import (
    curvature_blocks,
    curvature_costs,
    damped_inverse,
    fidelity,
    long_run,
    spectral_density,
    spectral_summary,
    top_eigenvalues,
)
from secondorder.curvature.matrix_free import memory
from secondorder.curvature.operators import DampedOperator, DenseOperator, SymmetricOperator
from secondorder.curvature.resuming import journal
from secondorder.curvature.resuming.long_run import active
from secondorder.curvature.spectrum import trace_estimate
from secondorder.errors import InputError

F64 = torch.float64
Data = list[tuple[Tensor, Tensor]]


class Interrupted(BaseException):
    """As by Ctrl-C."""


class Evaluations:
    """Those of all networks, outside of them: a network is left as it was. At some of them something happens."""

    count = 0
    at: ClassVar[dict[int, Callable[[], None]]] = {}


class Counted(nn.Module):
    """Linear - tanh - linear, which counts its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        Evaluations.count += 1
        Evaluations.at.get(Evaluations.count, lambda: None)()
        out: Tensor = self.last(self.first(x).tanh())
        return out


def made(seed: int = 0) -> tuple[Counted, Data]:
    source = torch.Generator().manual_seed(seed)
    data = [
        (torch.randn(n, 3, generator=source, dtype=F64), torch.randint(3, (n,), generator=source)) for n in (3, 3, 2)
    ]
    model = Counted().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=F64))
    return model, data


CE = nn.CrossEntropyLoss()


def whole(quantity: str, model: nn.Module, data: Any, params: list[str] | None = None, **options: Any) -> Any:
    return curvature_blocks(model, CE, data, quantity, params, **options).whole


def vectors(block: SymmetricOperator, count: int = 2) -> Tensor:
    return torch.randn(block.size, count, generator=torch.Generator().manual_seed(3), dtype=F64)


def products(model: nn.Module, data: Data) -> list[Any]:
    hessian, ggn = whole("hessian", model, data, chunk=2), whole("ggn", model, data)
    return [hessian @ vectors(hessian), ggn @ vectors(ggn), ggn @ vectors(ggn, 1)[:, 0]]


def spectra(model: nn.Module, data: Data) -> list[Any]:
    """Also with probes one after the other, each from the random numbers where the last one left them."""
    few, hessian = whole("hessian", model, data, ["last.bias"]), whole("hessian", model, data)
    first = spectral_density(few, "lanczos", probes=2, steps=2, deflate=1)
    second = spectral_density(hessian, "lanczos", probes=2, steps=3, memory=8 * 17 * 9)
    return [first.nodes, first.weights, second.nodes, second.weights, spectral_summary(few)]


def one_batch(model: nn.Module, data: Data) -> list[Any]:
    batch = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    return [whole("hessian", model, batch).dense(), whole("ggn", model, batch, chunk=3).dense()]


def factors(model: nn.Module, data: Data) -> list[Any]:
    kinds: list[tuple[str, dict[str, Any]]] = [("kfac_expand", {}), ("kfac_reduce", {"fisher": "mc", "samples": 2}),
                                               ("ekfac", {})]  # fmt: skip
    return [whole(kind, model, data, memory=40_000, **options).dense() for kind, options in kinds]


def matrices(model: nn.Module, data: Data) -> list[Any]:
    ggn = whole("ggn", model, data)
    return [
        ggn.dense(), ggn.rows(), ggn.diagonal(), ggn.gram(), whole("diagonal", model, data).dense(),
        whole("mc_fisher", model, data, samples=2).dense(),
    ]  # fmt: skip


def products_of_others(model: nn.Module, data: Data) -> list[Any]:
    ggn = whole("ggn", model, data, ["last.bias"])
    other = DampedOperator(whole("hessian", model, data, ["first.weight"]), 0.5)
    return [
        damped_inverse(ggn, 0.1) @ vectors(ggn), trace_estimate(other, "hutchinson", probes=3),
        spectral_summary(other), fidelity(ggn, DenseOperator(torch.eye(3, dtype=F64)), probes=2),
    ]  # fmt: skip


def some_of_all(model: nn.Module, data: Data) -> list[Any]:
    hessian = whole("hessian", model, data, ["last.bias"])
    return [hessian @ vectors(hessian), spectral_density(hessian, "lanczos", probes=1, steps=3).nodes,
            whole("ekfac", model, data).dense()]  # fmt: skip


def columns(model: nn.Module, data: Data) -> list[Any]:
    """In several units for each part of the data: of single columns, as the memory is small."""
    ggn = whole("ggn", model, data, ["last.bias"])
    return [ggn @ vectors(ggn, 3), whole("kfac_expand", model, data, memory=4000).dense()]


PROGRAMS: dict[str, Callable[[nn.Module, Data], list[Any]]] = {
    program.__name__: program
    for program in (products, spectra, one_batch, factors, matrices, products_of_others, some_of_all, columns)
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return all(map(same, vars(a).values(), vars(b).values())) if hasattr(a, "values") else bool(a == b)


def run(program: str, folder: Path, at: dict[int, Callable[[], None]], every: float = 0) -> tuple[list[Any], int]:
    """What a program finds, and evaluations of its network."""
    model, data = made()
    Evaluations.count, Evaluations.at = 0, at
    try:
        with long_run(folder, progress=False, every=every):
            found = PROGRAMS[program](model, data)
    finally:
        Evaluations.at = {}
    return found, Evaluations.count


@pytest.fixture(autouse=True)
def _kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that the system has; bringing it to the disk takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@contextmanager
def left_by_an_exception(folder: Path, every: float = 0, refused: str | None = None) -> Iterator[None]:
    """A run that is interrupted at the end, or refused in these words."""
    expected = pytest.raises(Interrupted) if refused is None else pytest.raises(InputError, match=refused)
    with expected as caught, long_run(folder, progress=False, every=every):
        yield
        raise Interrupted
    assert "\n" not in str(caught.value)


def refused_at_once(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught, long_run(folder):
        pass
    assert "\n" not in str(caught.value)


def interrupt() -> None:
    raise Interrupted


def interrupted(program: str, folder: Path, at: int, every: float = 0) -> None:
    with pytest.raises(Interrupted):
        run(program, folder, {at: interrupt}, every)


@pytest.mark.parametrize("program", PROGRAMS)
def test_goes_on_after_interruptions(program: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    truth, count, again = evaluations(program, folder)
    total, found = 0, []
    while not found:
        assert total < 3 * count, "no progress"
        with suppress(Interrupted):
            found = run(program, folder, {again + (count - again) // 3 + 1: interrupt})[0]
            assert same(found, truth)
            assert not folder.exists()
        total += Evaluations.count - again - 1
    assert total <= count  # nothing was evaluated twice but what is tried at the beginning


def evaluations(program: str, folder: Path) -> tuple[list[Any], int, int]:
    """What a program finds, its evaluations, and how many there are when all that can be kept is there."""
    model, data = made()
    truth = PROGRAMS[program](model, data)
    found, count = run(program, folder, {})
    assert same(found, truth)
    assert not folder.exists()
    interrupted(program, folder, count)
    found, again = run(program, folder, {})
    assert same(found, truth)
    return truth, count, again


def killed_at(program: str, folder: Path, evaluation: int, result: Path) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    at = {evaluation: lambda: os.kill(os.getpid(), signal.SIGKILL)} if evaluation else {}
    torch.save(run(program, folder, at)[0], result)


def test_goes_on_after_it_was_killed_several_times(tmp_path: Path, forkserver: ForkServerContext) -> None:
    program, folder, result = "some_of_all", tmp_path / "checkpoint", tmp_path / "result"
    truth, count, again = evaluations(program, folder)
    deaths = 0
    while not result.exists():
        assert deaths < 9, "no progress"
        process = forkserver.Process(target=killed_at, args=(program, folder, again + (count - again) // 6 + 1, result))
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
        deaths += process.exitcode != 0
    assert deaths >= 2
    assert same(torch.load(result), truth)
    assert not folder.exists()


def test_goes_on_when_it_was_killed_while_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some writing on the disk takes nothing more, as if the process had ended there."""
    program, folder, writing = "columns", tmp_path / "checkpoint", journal.writing_atomically
    truth, _ = run(program, tmp_path / "other", {})
    written, last = 0, 10**9

    def failing(path: Path) -> Any:
        nonlocal written
        written += 1
        if written > last:
            raise OSError(28, "No space left on device")
        return writing(path)

    monkeypatch.setattr(journal, "writing_atomically", failing)
    run(program, folder, {})
    for last in range(1, written, 3):  # noqa: B007  `failing` reads it
        written = 0
        with pytest.raises(
            InputError, match=r"cannot write the checkpoint .*: No space left on device; choose another"
        ):
            run(program, folder, {})
        with monkeypatch.context() as other:
            other.setattr(journal, "writing_atomically", writing)
            assert same(run(program, folder, {})[0], truth)


def test_what_is_finished_is_held_back_until_it_is_time_and_written_on_the_way_out(tmp_path: Path) -> None:
    model, data = made()
    hessian, v = whole("hessian", model, data), torch.ones(17, dtype=F64)
    with left_by_an_exception(tmp_path, every=1e6):
        first = hessian @ v
        before = first.clone()
        first.zero_()
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "0.records"}
    assert (tmp_path / "1.records").exists()
    with long_run(tmp_path, progress=False):
        count = Evaluations.count
        assert torch.equal(hessian @ v, before)
        assert Evaluations.count == count


def test_the_spectrum_takes_the_place_of_its_products(tmp_path: Path) -> None:
    model, data = made()
    hessian = whole("hessian", model, data, ["last.bias"])
    with long_run(tmp_path, progress=False, every=0):
        spectral_summary(hessian, "lanczos", probes=2, steps=3)
        files = [path for path in tmp_path.iterdir() if path.suffix]
        assert len(files) == 2
        assert sum(path.stat().st_size for path in files) < 2e4
    assert not tmp_path.exists()


def test_products_of_what_is_finished_are_not_written(tmp_path: Path) -> None:
    model, data = made()
    hessian = whole("hessian", model, data, ["last.bias"])
    with left_by_an_exception(tmp_path, every=1e6):
        spectral_density(hessian, "lanczos", probes=1, steps=3)
        run = active()
        assert run is not None
        assert [step.what for step, _ in run._held] == ["spectral_density"]


def test_other_settings_of_what_is_not_finished_are_refused(tmp_path: Path) -> None:
    model, data = made()
    hessian = whole("hessian", model, data)
    Evaluations.count, Evaluations.at = 0, {5: interrupt}
    with left_by_an_exception(tmp_path):
        top_eigenvalues(hessian, 2)
    Evaluations.at = {}
    with left_by_an_exception(tmp_path, refused="another computation: k is 3, was 2"):
        top_eigenvalues(hessian, 3)


def test_memory_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How data are divided depends on it, and on that the bits."""
    model, data = made()
    for there in (20_000, 10**9):
        monkeypatch.setattr(memory, "available_memory", lambda device, there=there: there)
        with left_by_an_exception(tmp_path):
            block = whole("hessian", model, [(torch.cat([x] * 9), torch.cat([y] * 9)) for x, y in data])
            assert block.jacobian.chunk < 27


def changed(name: str, model: Any, data: Any, options: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The model, data and loss with one thing changed."""
    loss: Any = CE
    if name == "parameter":
        with torch.no_grad():
            model.last.weight[0, 0] += 1e-15
    elif name == "buffer":
        model.register_buffer("unused", torch.ones(1, dtype=F64))
    elif name == "image":
        data[1][0][0, 0] += 1e-15
    elif name == "label":
        data[2][1][0] = (data[2][1][0] + 1) % 3
    elif name == "batches":
        data = data[:2]
    elif name == "smoothing":
        loss = nn.CrossEntropyLoss(label_smoothing=1e-9)
    elif name == "code":
        model.first.forward = lambda x: F.linear(x, model.first.weight, model.first.bias) * 1.001
    elif name == "code of the loss":
        loss = nn.CrossEntropyLoss(reduction="sum")
    elif name == "mode":
        model.eval()
    elif name in ("chunk", "seed", "params", "steps", "quantity"):
        options = options | {
            name: {"chunk": 2, "seed": 1, "params": ["last.bias"], "steps": 4, "quantity": "ggn"}[name]
        }
    return model, data, loss, options


OTHERS = {
    "parameter": "parameter last.weight has changed", "buffer": "buffer unused is new",
    "image": "batch 1 has changed", "label": "batch 2 has changed", "batches": "the number of batches is 2, was 3",
    "smoothing": "the loss's settings and labels has changed", "code": "the outputs has changed",
    "code of the loss": "the loss has changed", "mode": "the network has changed",
    "chunk": "chunk is 2, was 3", "seed": "the random labels has changed",
    "params": "the chosen parameters has changed", "steps": "steps is 4, was 3",
    "quantity": "fisher is 'exact', was 'mc'",
}  # fmt: skip


@pytest.mark.parametrize("name", ["nothing", *OTHERS])
def test_the_checkpoint_of_another_computation_is_refused(name: str, tmp_path: Path) -> None:
    defaults: dict[str, Any] = {"chunk": 3, "seed": 0, "params": None, "steps": 3, "quantity": "mc_fisher"}

    def compute(model: Any, data: Any, loss: Any, options: dict[str, Any]) -> None:
        steps, quantity = options["steps"], options["quantity"]
        rest = {key: options[key] for key in ("chunk", "seed", "params")}
        block = curvature_blocks(model, loss, data, quantity, memory=10**9, **rest).whole
        spectral_density(block, "lanczos", probes=2, steps=steps, memory=10**9)

    with left_by_an_exception(tmp_path):
        compute(*made(), CE, defaults)
    message = f"checkpoint .* is of another computation: .*({OTHERS.get(name)}); use another folder, or delete"
    with left_by_an_exception(tmp_path, refused=None if name == "nothing" else message):
        compute(*changed(name, *made(), defaults))


def test_one_batch_is_known_by_its_images_and_labels(tmp_path: Path) -> None:
    model, data = made()
    for place, message in ((0, "the images has changed"), (1, "the loss'?s? ?.*has changed")):
        batch = [t.clone() for t in data[0]]
        with left_by_an_exception(tmp_path / str(place)):
            whole("ggn", model, tuple(batch)) @ torch.ones(17, dtype=F64)
        batch[place] = (batch[place] + 1) % 3
        with left_by_an_exception(tmp_path / str(place), refused=message):
            whole("ggn", model, tuple(batch)) @ torch.ones(17, dtype=F64)


def test_dropout_masks_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    batch = made()[1][0]
    for seed, message in ((1, None), (1, None), (2, "the outputs has changed|the random state has changed")):
        torch.manual_seed(seed)
        with left_by_an_exception(tmp_path, refused=message):
            block = whole("ggn", model, batch)
            block @ torch.ones(block.size, dtype=F64)


class Own(SymmetricOperator):
    def __init__(self, factor: float) -> None:
        super().__init__(5, F64, torch.device("cpu"))
        self.factor = factor

    def _matmat(self, V: Tensor) -> Tensor:
        return self.factor * V


@pytest.mark.parametrize("kind", ["dense", "own"])
def test_operators_that_hold_their_numbers_are_known_by_these(kind: str, tmp_path: Path) -> None:
    def operator(factor: float) -> SymmetricOperator:
        return Own(factor) if kind == "own" else DampedOperator(DenseOperator(factor * torch.eye(5, dtype=F64)), 1)

    for factor, message in ((1.0, None), (1.0, None), (1.5, "is of another computation: .* has changed")):
        with left_by_an_exception(tmp_path, refused=message):
            top_eigenvalues(operator(factor), 1)


def kept(folder: Path) -> Path:
    model, data = made()
    with left_by_an_exception(folder):
        whole("hessian", model, data, memory=10**9) @ torch.ones(17, dtype=F64)
    return max(folder.glob("*.records"))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text", "other", "version"])
def test_a_damaged_record_is_named(damage: str, tmp_path: Path) -> None:
    file = kept(tmp_path)
    content = file.read_bytes()
    if damage == "bit":
        with zipfile.ZipFile(file) as packed:
            largest = max(packed.infolist(), key=lambda info: info.file_size)
        place = largest.header_offset + 30 + len(largest.filename) + 64
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    written = {"cut": content[:-40], "empty": b"", "text": b"nothing", "bit": content}
    if damage in written:
        file.write_bytes(written[damage])
    else:
        torch.save({"format": journal.FORMAT if damage == "version" else "other", "version": 99, "content": 1}, file)
    refused_at_once(tmp_path, r"\d\.records' was not written by long_run, or is damaged \(.*\); delete it")
    model, data = made()
    file.unlink()
    with long_run(tmp_path, progress=False):
        whole("hessian", model, data, memory=10**9) @ torch.ones(17, dtype=F64)


def test_another_number_of_threads_is_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    torch.set_num_threads(2)
    refused_at_once(tmp_path, r"another computation: torch.get_num_threads\(\) is 2, was 1; use another")


@pytest.mark.parametrize("quantity", ["ggn", "hessian"])
def test_the_product_with_other_vectors_is_refused(quantity: str, tmp_path: Path) -> None:
    block, v = whole(quantity, *made()), torch.ones(17, dtype=F64)
    for factor, message in ((1, None), (2, "another computation: the vectors of the product has changed")):
        with left_by_an_exception(tmp_path, refused=message):
            block @ (factor * v)


def test_another_order_is_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    with left_by_an_exception(tmp_path, refused="is of another computation: top_eigenvalues comes where product came"):
        top_eigenvalues(DenseOperator(torch.eye(3)), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": 3}, "checkpoint must be a path or None, got 3"),
        ({"every": -1}, "every must be a finite number of at least 0, got -1; in seconds"),
        ({"progress": "yes"}, "progress must be True or False, got 'yes'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)), long_run(**arguments):
        pass


def test_folders_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for folder, message in (
        (tmp_path, r"has other files in it \('thesis.tex'\)"),
        (tmp_path / "thesis.tex", "cannot write"),
    ):
        refused_at_once(folder, message)
    with long_run(), pytest.raises(InputError, match="a long_run within a long_run"), long_run():
        pass
    assert (tmp_path / "thesis.tex").read_text() == "x"


def bars(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the bars on standard error said at last."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return [line.strip() for line in captured.err.split("\r") if line.strip()]


def test_progress_says_what_is_done_and_how_much_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, data = made()
    hessian = whole("hessian", model, data)
    assert bars(capsys) == []
    with long_run():
        whole("ggn", model, data)
        assert {line.split(":")[0] for line in bars(capsys)} == {"checksums of the data", "normalisation of the loss"}
        hessian @ vectors(hessian, 5)
        assert any(re.match(r"product: .*\b0/15\b", line) for line in bars(capsys))  # batches x vectors
        spectral_density(hessian, "lanczos", probes=3, steps=4)
        assert any(re.match(r"spectral_density: lanczos: .*\b0/36\b", line) for line in bars(capsys))
        whole("kfac_expand", model, data)
        assert any(re.match(r"factors: .*\b0/3\b", line) for line in bars(capsys))
        costs = curvature_costs(model, CE, data[0], "ggn").whole.product
        assert costs.flops > 0
        assert bars(capsys) == []
    with long_run(progress=False):
        hessian @ vectors(hessian, 5)
    assert bars(capsys) == []


def test_costs_are_no_steps(tmp_path: Path) -> None:
    model, data = made()
    with long_run(tmp_path, progress=False, every=0):
        cost = curvature_costs(model, CE, data[0], "ggn", memory=10**9)
        assert cost.whole.product.flops == curvature_costs(model, CE, data[0], "ggn", memory=10**9).whole.product.flops
        assert [path.name for path in tmp_path.iterdir()] in (["0.records", ".lock"], [".lock", "0.records"])

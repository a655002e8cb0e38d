"""Memory: estimates, budgets, refusals before anything is computed, and a peak that is bounded."""

import gc
import re
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import batch, chain, relative
from torch import nn

from secondorder.curvature import QUANTITIES, curvature_blocks
from secondorder.curvature.kronecker.storage import factor_sizes
from secondorder.curvature.matrix_free.batch_parts import part_size, probed
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.memory import BLOCK_BYTES, GIB, available_memory, budget, check_memory
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()
CPU = torch.device("cpu")


def test_available_memory_is_what_the_system_says() -> None:
    page = resource.getpagesize()
    there = available_memory(CPU)
    assert 64 * page < there < 2**50
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        total = int(re.search(r"MemTotal:\s+(\d+)", meminfo.read_text()).group(1)) * 1024  # type: ignore[union-attr]
        assert there <= total
    assert budget(None, CPU) <= there * 1.05
    assert budget(10**6, CPU) == 10**6


@pytest.mark.parametrize("memory", [0, -5, True, "1 GiB", float("nan")])
def test_budgets_that_are_no_number_of_bytes_are_refused(memory: object) -> None:
    with pytest.raises(InputError, match=r"memory must be a number above 0, got .* bytes"):
        budget(memory, CPU)  # type: ignore[arg-type]


def test_refusals_name_both_numbers_and_the_way_out() -> None:
    check_memory(GIB, GIB, "this", "use less")
    with pytest.raises(InputError, match=r"^this needs about 3 GiB, 1\.5 GiB are available; use less$"):
        check_memory(3 * GIB, int(1.5 * GIB), "this", "use less")


def test_the_probe_measures_what_a_sample_keeps_for_its_graph() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 3))
    probe, _ = probed(FrozenNetwork(model), torch.randn(8, 100))
    assert probe.outputs == (3,)
    assert probe.coupling is None
    assert probe.sample_bytes == 4 * (100 + 50 + 30 + 100)  # inputs of the linear layers, outputs of tanh, the image


@pytest.mark.parametrize(
    ("chunk", "available", "coupling", "expected"),
    [
        (None, 1000, None, 10),
        (None, 999, None, 9),
        (None, 190, None, 1),
        (None, 1000, "batch norm", 10),
        (3, 1000, None, 3),
        (30, 1000, None, 10),
        (10, 1000, "batch norm", 10),
    ],
)
def test_parts_are_as_large_as_the_memory_allows(
    chunk: int | None, available: int, coupling: str | None, expected: int
) -> None:
    assert part_size(10, chunk, 90, 100, available, lambda: coupling) == expected


@pytest.mark.parametrize(
    ("chunk", "available", "coupling", "message"),
    [
        (None, 189, None, "with 1 of 10 samples at a time needs about 1.77e-07 GiB, 1.76e-07 GiB are available"),
        (4, 300, None, "with 4 of 10 samples.*use a smaller chunk or fewer parameters"),
        (None, 300, "batch norm", "with 10 of 10 samples.*batch norm, so use a smaller batch"),
        (4, 1000, "batch norm", "chunk=4 would change the result: batch norm; use chunk=None"),
    ],
)
def test_what_does_not_fit_is_refused(chunk: int | None, available: int, coupling: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        part_size(10, chunk, 90, 100, available, lambda: coupling)


@pytest.mark.parametrize("quantity", ["ggn", "hessian", "kfac_expand", "ekfac", "diagonal"])
def test_little_memory_divides_the_batch_and_changes_nothing(quantity: str) -> None:
    model, data = chain("gcp"), batch(CE, 6)
    whole = curvature_blocks(model, CE, data, quantity)
    v = torch.randn(whole.whole.size).double()
    network, row = FrozenNetwork(model), QUANTITIES[quantity]
    probe, _ = probed(network, data[0], dict.fromkeys(model.modules()))
    samples = 2.5 * (row.graphs * probe.sample_bytes + 9 * 3 * 8)
    copies = sum(t.nbytes for t in (*data, *model.parameters()))
    memory = int((row.fixed(network, probe, 6) + copies + samples) / 0.75)  # a quarter is left for rows
    divided = curvature_blocks(model, CE, data, quantity, memory=memory)
    if quantity in ("ggn", "hessian"):
        assert divided.whole.jacobian.chunk == 2  # type: ignore[attr-defined]
    assert relative(divided.whole @ v, whole.whole @ v) <= 1e-11


@pytest.mark.parametrize("chunk", [None, 4])
def test_few_samples_that_formulas_were_tried_on_are_not_held(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Linearisation]] = []
    linearise = Linearisation.__init__

    def noted(self: Linearisation, *args: Any, **options: Any) -> None:
        made.append(weakref.ref(self))
        linearise(self, *args, **options)

    monkeypatch.setattr(Linearisation, "__init__", noted)
    whole = curvature_blocks(chain("gcp"), CE, batch(CE, 12), "ggn", chunk=chunk).whole
    whole @ torch.ones(whole.size).double()
    assert len(made) > 1
    gc.collect()
    assert [len(part().z) for part in made if part() is not None] == ([12] if chunk is None else [])  # type: ignore[union-attr]


def test_too_little_memory_is_refused_before_the_batch_is_evaluated() -> None:
    evaluated: list[int] = []
    model, data = chain("gcp"), batch(CE, 6)
    model[0].register_forward_hook(lambda layer, args, output: evaluated.append(len(output)))
    with pytest.raises(
        InputError, match=r"needs about \S+ GiB, 9\.31e-06 GiB are available; use a smaller chunk or fewer"
    ):
        curvature_blocks(model, CE, data, "ggn", memory=10_000)
    # the probe, its images with gradients, each in other company, the first alone
    assert evaluated == [2, 2, 2, 2, 1]
    whole = curvature_blocks(model, CE, data, "ggn", memory=28_000).whole
    with pytest.raises(InputError, match="a factor of 18 x 202 needs about"):
        whole.rows()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"202 x 202 takes .* more than the limit"):
        whole.dense(limit=1000)


PEAKS = """
import os, re, resource, torch
from pathlib import Path
from torch import nn
from secondorder.curvature import curvature_blocks
from secondorder.curvature.kronecker import blocks

def peak():  # getrusage counts the parent's peak, too
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text()).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def growth(model, chunk, count=128):
    data = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
    before = peak()
    whole = curvature_blocks(model, nn.CrossEntropyLoss(), data, "ggn", chunk=chunk).whole
    whole @ torch.randn(whole.size)
    return peak() - before

def parts_and_whole():
    layers = [layer for width in (3, 16, 16) for layer in (nn.Conv2d(width, 16, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    growth(model, 2, 4)  # what libraries allocate once
    parts = growth(model, 8)
    print(parts, parts + growth(model, 128), flush=True)

def resident(key):  # MiB
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024

def run(model, width, quantity, count=64, **options):
    data = torch.randn(count, width), torch.randint(10, (count,))
    Path("/proc/self/clear_refs").write_text("5")  # the greatest is the present
    before = resident("VmRSS")
    curvature_blocks(model, nn.CrossEntropyLoss(), data, quantity, **options)
    return resident("VmHWM") - before

def rows_and_factors():
    for quantity in ("kfac_expand", "diagonal"):
        run(nn.Linear(20, 10), 20, quantity)  # what libraries allocate once
    million = nn.Sequential(nn.Linear(1000, 990), nn.Tanh(), nn.Linear(990, 10))
    rows = run(million, 1000, "diagonal", memory=48 * 2**20)
    blocks.WIDE_INPUT = 4096  # a factor in full
    # few images, for the factor is made of one at a time
    print(rows, run(nn.Linear(4096, 10), 4096, "kfac_expand", 12, memory=200 * 2**20), flush=True)

torch.set_num_threads(1)
linux = Path("/proc/self/clear_refs").exists()
for measure in (parts_and_whole, rows_and_factors) if linux else (parts_and_whole,):
    child = os.fork()  # what one has freed and the allocator holds is not there for the other
    if not child:
        measure()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def peaks() -> list[float]:
    """What processes of their own measure, after one import; only the first two numbers where the system is not Linux."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAKS], capture_output=True, text=True, check=True)
    return [float(number) for number in run.stdout.split()]


def test_parts_bound_the_peak(peaks: list[float]) -> None:
    parts, at_once = peaks[:2]
    assert at_once > 30_000
    assert 0 <= parts < 0.5 * at_once


@pytest.mark.parametrize(
    ("layer", "kind", "sharing", "wide", "expected"),
    [
        (nn.Linear(30, 5), "weight", "expand", 4096, (900, 25, 150, 0)),
        (nn.Linear(30, 5), "bias", "expand", 4096, (0, 25, 5, 0)),
        (nn.Linear(30, 5), "weight", "expand", 8, (8 * 30, 25, 5 * 8, 0)),  # 2 samples with 4 positions
        (nn.Linear(30, 5), "weight", "reduce", 8, (2 * 30, 25, 5 * 2, 0)),
        (nn.Conv2d(4, 6, 3, groups=2), "weight", "expand", 8, (2 * 8 * 18, 2 * 9, 2 * 3 * 8, 4 * 36)),
    ],
)
def test_sizes_of_kronecker_factors(
    layer: nn.Module, kind: str, sharing: str, wide: int, expected: tuple[int, ...]
) -> None:
    shape = torch.Size([2, 4, 5] if isinstance(layer, nn.Linear) else [2, 6, 2, 2])
    sizes = factor_sizes(layer, [shape], kind, 2, sharing, wide)
    assert (sizes.input, sizes.gradient, sizes.scales, sizes.unfolded) == expected


@pytest.mark.parametrize("quantity", ["kfac_expand", "kfac_reduce", "ekfac"])
def test_factors_that_do_not_fit_are_refused(quantity: str) -> None:
    """A [4096, 4096] in float32 is 64 MiB, twice that with the block made of it."""
    model, data = nn.Linear(4096, 10), (torch.zeros(4100, 4096), torch.zeros(4100).long())
    with pytest.raises(
        InputError, match=r"with \d+ of 4100 samples at a time needs about 0\.\d+ GiB, 0\.00186 GiB are"
    ):
        curvature_blocks(model, CE, data, quantity, memory=2_000_000)


def test_rows_are_held_in_blocks_that_the_budget_allows() -> None:
    model, data = chain("gcp"), batch(CE, 6)
    jacobian = curvature_blocks(model, CE, data, "ggn", memory=2 * GIB).whole.jacobian  # type: ignore[attr-defined]
    assert jacobian.block_bytes == BLOCK_BYTES
    jacobian = curvature_blocks(model, CE, data, "ggn", memory=200_000).whole.jacobian  # type: ignore[attr-defined]
    assert 0 < jacobian.block_bytes <= 200_000 / 4


def test_the_peak_stays_in_the_budget(peaks: list[float]) -> None:
    if not Path("/proc/self/clear_refs").exists():  # not Linux: the blocks above are all there is to see
        return
    rows, factors = peaks[2:]
    # Resident memory also counts what libraries and the allocator hold for themselves, up to 40 MiB here and never the same;
    # without the budget the rows take 700 MiB.
    assert 10 < rows < 48 + 40
    assert 64 < factors < 200 + 40

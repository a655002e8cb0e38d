"""Memory: estimates, budgets, refusals before anything is computed, and a peak that is bounded."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_networks import batch, chain, relative
from torch import nn

from secondorder.curvature import QUANTITIES, curvature_blocks
from secondorder.curvature.matrix_free.batch_parts import part_size, probed
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.memory import GIB, available_memory, budget, check_memory
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
    with pytest.raises(InputError, match=r"memory .*positive number of bytes"):
        budget(memory, CPU)  # type: ignore[arg-type]


def test_refusals_name_both_numbers_and_the_way_out() -> None:
    check_memory(GIB, GIB, "this", "use less")
    with pytest.raises(InputError, match=r"^this needs about 3 GiB, 1\.5 GiB are available; use less$"):
        check_memory(3 * GIB, int(1.5 * GIB), "this", "use less")


def test_the_probe_measures_what_a_sample_keeps_for_its_graph() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 3))
    probe = probed(FrozenNetwork(model), torch.randn(8, 100))
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
    assert part_size(10, chunk, 90, 100, available, coupling) == expected


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
        part_size(10, chunk, 90, 100, available, coupling)


@pytest.mark.parametrize("quantity", ["ggn", "hessian", "kfac_expand", "ekfac", "diagonal"])
def test_little_memory_divides_the_batch_and_changes_nothing(quantity: str) -> None:
    model, data = chain("gcp"), batch(CE, 6)
    whole = curvature_blocks(model, CE, data, quantity)
    v = torch.randn(whole.whole.size).double()
    sample = probed(FrozenNetwork(model), data[0]).sample_bytes
    memory = int(4 * 8 * whole.whole.size + 2.5 * QUANTITIES[quantity].graphs * sample)
    divided = curvature_blocks(model, CE, data, quantity, memory=memory)
    if quantity in ("ggn", "hessian"):
        assert divided.whole.jacobian.chunk == 2  # type: ignore[attr-defined]
    assert relative(divided.whole @ v, whole.whole @ v) <= 1e-11


def test_too_little_memory_is_refused_before_the_batch_is_evaluated() -> None:
    evaluated: list[int] = []
    model, data = chain("gcp"), batch(CE, 6)
    model[0].register_forward_hook(lambda layer, args, output: evaluated.append(len(output)))
    with pytest.raises(
        InputError, match=r"needs about \S+ GiB, 9\.31e-06 GiB are available; use a smaller chunk or fewer"
    ):
        curvature_blocks(model, CE, data, "ggn", memory=10_000)
    assert evaluated == [2]  # the probe
    whole = curvature_blocks(model, CE, data, "ggn", memory=28_000).whole
    with pytest.raises(InputError, match="a factor of 18 x 202 needs about"):
        whole.rows()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"202 x 202 takes .* more than the limit"):
        whole.dense(limit=1000)


PEAK = """
import re, resource, torch
from pathlib import Path
from torch import nn
from secondorder.curvature import curvature_blocks

def peak():  # getrusage counts the parent's peak, too
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text()).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def growth(chunk):
    whole = curvature_blocks(model, nn.CrossEntropyLoss(), data, "ggn", chunk=chunk).whole
    whole @ torch.randn(whole.size)
    return peak() - before

torch.set_num_threads(1)
layers = [layer for width in (3, 16, 16) for layer in (nn.Conv2d(width, 16, 3, padding=1), nn.ReLU())]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
data = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
before = peak()
print(growth(8), growth(128))
"""


def test_parts_bound_the_peak() -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK], capture_output=True, text=True, check=True)
    parts, at_once = map(float, run.stdout.split())
    assert 0 < parts < 0.5 * at_once

"""Performance study: time and memory of the GCP head against the textbook version, of curvature and of K-FAC's steps.

Everything is timed in one process, one CPU thread unless asked otherwise, interleaved: each repeat runs every variant once,
beginning with another one each time, so that a busy moment of a shared machine meets all of them. Medians over repeats are
compared. The bound is one batched product of C x n by n x C matrices, n = min(C, H W): neither the covariance nor its root is
formed with less.

Results: ``performance.csv``, one row for each shape, variant and repeat, ``performance_curvature.csv``, one for each quantity
of `studies.performance.curvature_costs` and repeat, ``performance_kfac.csv``, one for each kind of step of
`studies.performance.kfac_costs` and repeat, and ``performance_kfac_parts.csv``, where the time of K-FAC's largest step goes.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from secondorder.errors import InputError, unknown
from secondorder.matrix_power.newton_schulz import newton_schulz_sqrt
from secondorder.networks import NETWORKS
from secondorder.pooling import POOLINGS, Covariance, UpperTriangle, pooling_head
from secondorder.training import is_main_process
from secondorder.untouched import same_randomness
from studies.performance.curvature_costs import actions as curvature_actions
from studies.performance.curvature_costs import cost_network, peak_rates, work
from studies.performance.kfac_costs import Case
from studies.performance.kfac_costs import measure as measure_kfac
from studies.results import provenance, write_table
from studies.settings import Common
from studies.timing import interleaved, peak_bytes, seconds

NAME, CURVATURE, KFAC_STEPS, KFAC_PARTS = (
    "performance",
    "performance_curvature",
    "performance_kfac",
    "performance_kfac_parts",
)
Shape = tuple[int, int, int, int]
Step = Callable[[Tensor], Tensor]


def parse_shape(text: str) -> Shape:
    """``32x256x7x7`` as (32, 256, 7, 7); InputError for anything else."""
    parts = text.split("x")
    if len(parts) != 4 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InputError(f"shape {text!r} is not images x channels x height x width, such as 32x256x7x7")
    n, c, h, w = (int(p) for p in parts)
    return n, c, h, w


@dataclass(frozen=True)
class Settings:
    """Settings of the performance study."""

    shapes: tuple[str, ...] = ("32x256x7x7", "8x256x14x14", "32x128x8x8", "64x64x8x8")
    """Feature maps to pool, as images x channels x height x width."""
    repeats: int = 15
    """Timed repeats of each variant; the median is compared."""
    timing_threads: int = 1
    """CPU threads while timing."""
    curvature_images: int = 64
    """Batch for which the curvature quantities are timed."""
    curvature_channels: int = 32
    """Channels of the first convolutions of the network that they are timed on; the later ones have twice as many."""
    kfac_backbone: str = "cifar_resnet20"
    """Network whose K-FAC steps are timed, on 32x32 images."""
    kfac_poolings: tuple[str, ...] = ("gap", "gcp")
    """Its heads, each timed."""
    kfac_images: int = 128
    """Batch of a K-FAC step."""
    kfac_repeats: int = 9
    """Timed repeats of each kind of K-FAC step; a 95 % interval of the median takes at least 6."""

    def __post_init__(self) -> None:
        for shape in self.shapes:
            parse_shape(shape)
        if self.repeats < 1 or self.timing_threads < 1:
            raise InputError(f"--repeats {self.repeats}, --timing-threads {self.timing_threads}: both are at least 1")
        if self.curvature_images < 1 or self.curvature_channels < 1:
            raise InputError(
                f"--curvature-images {self.curvature_images}, --curvature-channels {self.curvature_channels}: both are at least 1"
            )
        if self.kfac_backbone not in NETWORKS:
            raise unknown("backbone", self.kfac_backbone, NETWORKS)
        for pooling in self.kfac_poolings:
            if pooling not in POOLINGS:
                raise unknown("pooling", pooling, POOLINGS)
        if not self.kfac_poolings or self.kfac_images < 2 or self.kfac_repeats < 1:
            raise InputError(
                f"--kfac-poolings {' '.join(self.kfac_poolings)}, --kfac-images {self.kfac_images}, --kfac-repeats "
                f"{self.kfac_repeats}: at least 1 head, 2 images, 1 repeat"
            )

    @property
    def kfac_cases(self) -> list[Case]:
        """What K-FAC steps are timed on."""
        return [Case(self.kfac_backbone, pooling, self.kfac_images) for pooling in self.kfac_poolings]


PRESETS = {
    "smoke": Settings(
        shapes=("2x8x3x3", "2x4x4x4"),
        repeats=2,
        curvature_images=2,
        curvature_channels=2,
        kfac_backbone="digits_tiny",
        kfac_images=4,
        kfac_repeats=2,
    ),
    "quick": Settings(repeats=9, kfac_backbone="cifar_resnet8", kfac_images=8, kfac_repeats=6),
    "cifar10": Settings(repeats=31),
    "paper": Settings(shapes=("256x256x14x14", "96x256x7x7", "256x128x14x14"), repeats=31),
}


def textbook(features: Tensor) -> Tensor:
    """The head as a textbook writes it: covariance, five Newton-Schulz steps, upper triangle, in plain autograd."""
    return UpperTriangle()(newton_schulz_sqrt(Covariance()(features), num_iter=5))


def _head(name: str, **options: Any) -> Callable[[int], Step]:
    return lambda channels: pooling_head(name, channels, **options)


VARIANTS: dict[str, Callable[[int], Step]] = {
    "textbook": lambda channels: textbook,
    "gcp": _head("gcp"),
    "gcp, products": _head("gcp", method="newton_schulz"),
    "gcp_exact": _head("gcp_exact"),
    "covariance": _head("covariance"),
}
BOUND = "one matrix product"


def forward_backward(step: Step, features: Tensor, cotangent: Tensor) -> None:
    """One forward and backward pass with a given gradient of the output."""
    features.grad = None
    step(features).backward(cotangent)


def measure_shape(shape: Shape, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of all variants at one shape, repeats interleaved after one untimed round that also measures memory."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator).relu_().to(device).requires_grad_()
    factor = features.detach().flatten(2)[..., : shape[1]].contiguous()
    actions: dict[str, Callable[[], object]] = {BOUND: lambda: torch.bmm(factor, factor.mT)}
    for name, build in VARIANTS.items():
        actions[name] = _action(build(shape[1]), features)
    memory = {}
    for name, action in actions.items():
        features.grad = None  # else the first to run would be charged with the gradient that the others replace
        memory[name] = peak_bytes(action, device)
    return [
        {
            "images": shape[0],
            "channels": shape[1],
            "height": shape[2],
            "width": shape[3],
            "variant": name,
            "repeat": repeat,
            "milliseconds": milliseconds,
            "peak_mib": memory[name] / 2**20,
        }
        for name, repeat, milliseconds in interleaved(actions, repeats, device)
    ]


def measure_curvature(images: int, channels: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of all curvature quantities, interleaved with a large matrix product and a large copy; changes the random state."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(images, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (images,), generator=generator).to(device)
    torch.manual_seed(0)
    timed = curvature_actions(batch, labels, channels)
    necessary = work(cost_network(channels).to(device), batch)
    memory = {name: peak_bytes(action, device) for name, action in timed.items()}
    rates = peak_rates(device)
    times: dict[tuple[str, int], float] = {}
    for name, repeat, milliseconds in interleaved(timed | rates, repeats, device):
        times[name, repeat] = milliseconds
    return [
        {
            "images": images,
            "channels": channels,
            "quantity": name,
            "repeat": repeat,
            "milliseconds": times[name, repeat],
            "peak_mib": memory[name] / 2**20,
            "operations": necessary.of(name)[0],
            "bytes": necessary.of(name)[1],
            "product_ms": times["matrix product", repeat],
            "copy_ms": times["copy", repeat],
        }
        for repeat in range(repeats)
        for name in timed
    ]


def kfac_tables(
    settings: Settings, repeats: int, device: torch.device, progress: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the K-FAC steps with every head, and of the parts of the largest."""
    steps, parts = [], []
    for case in tqdm(settings.kfac_cases, desc="K-FAC steps", unit="head", disable=not progress):
        with same_randomness():
            of_head, parts_of_head = measure_kfac(case, repeats, device)
        steps += of_head
        parts += parts_of_head
    return steps, parts


def _action(step: Step, features: Tensor) -> Callable[[], object]:
    with torch.no_grad():
        cotangent = torch.randn_like(step(features.detach()))
    return lambda: forward_backward(step, features, cotangent)


def check(common: Common, settings: Settings) -> torch.device:
    """The device, checked to exist."""
    return common.torch_device


def run(common: Common, settings: Settings, device: torch.device) -> None:
    """Time every shape and write the table; under several processes only the main one measures."""
    if not is_main_process():
        return
    start, rows, threads = time.perf_counter(), [], torch.get_num_threads()
    torch.set_num_threads(settings.timing_threads)
    try:
        for shape in tqdm(settings.shapes, desc=NAME, unit="shape", disable=not common.progress):
            rows += measure_shape(parse_shape(shape), settings.repeats, device)
        with same_randomness():
            curvature = measure_curvature(
                settings.curvature_images, settings.curvature_channels, settings.repeats, device
            )
        steps, parts = kfac_tables(settings, settings.kfac_repeats, device, common.progress)
        origin = provenance(
            NAME,
            asdict(settings) | {"preset": common.preset},
            [0],
            {"label": "random features"},
            device,
            time.perf_counter() - start,
        )
    finally:
        torch.set_num_threads(threads)
    write_table(common.folder, CURVATURE, pd.DataFrame(curvature))
    write_table(common.folder, KFAC_STEPS, pd.DataFrame(steps))
    write_table(common.folder, KFAC_PARTS, pd.DataFrame(parts))
    write_table(common.folder, NAME, pd.DataFrame(rows), origin)


def dry_run(common: Common, settings: Settings) -> list[str]:
    """Time one repeat of every shape and state what all repeats take."""
    device = common.torch_device
    torch.set_num_threads(settings.timing_threads)
    once: float = sum(seconds(lambda s=s: measure_shape(parse_shape(s), 1, device), device) for s in settings.shapes)  # type: ignore[misc]
    with same_randomness():
        once += seconds(
            lambda: measure_curvature(settings.curvature_images, settings.curvature_channels, 1, device), device
        )
    few = replace(settings, kfac_images=max(2, settings.kfac_images // 16))
    kfac = seconds(lambda: kfac_tables(few, 1, device), device) * settings.kfac_images / few.kfac_images
    return [
        f"{len(settings.shapes)} shapes and the curvature quantities, {settings.repeats} repeats: at most about "
        f"{once * settings.repeats:.0f} s on {device}",
        f"K-FAC steps, {settings.kfac_repeats} repeats: at most about {kfac * settings.kfac_repeats:.0f} s",
    ]

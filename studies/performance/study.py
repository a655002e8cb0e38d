"""Performance study: time and memory of the GCP head against the textbook version, of curvature and of K-FAC's steps.

Everything is timed by itself, interleaved: each repeat runs every variant once, beginning with another one each time, so that a
busy moment of a shared machine meets all of them. Ratios are taken within a repeat; their medians are compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from secondorder.errors import check_known
from secondorder.networks import NETWORKS
from secondorder.pooling import POOLINGS
from studies.checks import check_count, check_names
from studies.engine.plan import Computed, Measurement
from studies.engine.records import Row
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.performance.curvature_costs import measure_curvature
from studies.performance.heads import measure_heads, parse_shape
from studies.performance.kfac_costs import measure_kfac
from studies.performance.page import folds


@dataclass(frozen=True)
class Settings:
    """Settings of the performance study."""

    shapes: tuple[str, ...] = ("32x256x7x7", "8x256x14x14", "32x128x8x8", "64x64x8x8")
    """Feature maps to pool, as images x channels x height x width."""
    repeats: int = 15
    """Timed repeats of each variant; the median is compared."""
    curvature_images: int = 64
    """Batch for which the curvature quantities are timed."""
    curvature_channels: int = 32
    """Channels of the first convolutions of the network that they are timed on; the later ones have twice as many."""
    kfac_network: str = "cifar_resnet20"
    """Network whose K-FAC steps are timed, on 32x32 images."""
    kfac_heads: tuple[str, ...] = ("gap", "gcp")
    """Its heads, each timed."""
    kfac_images: int = 128
    """Batch of a K-FAC step."""
    kfac_repeats: int = 9
    """Timed repeats of each kind of K-FAC step; a 95 % interval of the median takes at least 6."""

    def __post_init__(self) -> None:
        for shape in self.shapes:
            parse_shape(shape)
        for name in ("repeats", "curvature_images", "curvature_channels", "kfac_repeats"):
            check_count(name, getattr(self, name))
        check_count("kfac_images", self.kfac_images, least=2)
        check_names("kfac_heads", self.kfac_heads)
        check_known("network", self.kfac_network, NETWORKS)
        for head in self.kfac_heads:
            check_known("pooling", head, POOLINGS)


def plan(context: Context) -> Plan:
    """A task for each shape, one for the curvature quantities, one for the K-FAC steps of each head; all at once."""
    s, device = context.settings, str(context.common.torch_device)

    def timed(name: str, measure: Callable[[Any], Iterator[Row]], case: dict[str, Any], **labels: str) -> Computed:
        measurement = Measurement(name, measure, case | {"device": device}, 2 if measure is measure_kfac else 1)
        return Computed(measurement, {"dataset": "random"} | labels, alone=True, device=device)

    def kfac(head: str) -> Computed:
        case = {"network": s.kfac_network, "head": head, "images": s.kfac_images, "repeats": s.kfac_repeats}
        network = f"{s.kfac_network}, batch {s.kfac_images}"
        return timed("K-FAC costs", measure_kfac, case, network=network, head=head)

    network = f"3-c-c-P-2c-2c-P, c = {s.curvature_channels}, batch {s.curvature_images}"
    sizes = {"images": s.curvature_images, "channels": s.curvature_channels, "repeats": s.repeats}
    yield [
        *(timed("heads", measure_heads, {"shape": f, "repeats": s.repeats}, network=f"features {f}") for f in s.shapes),
        timed("curvature costs", measure_curvature, sizes, network=network, head="gcp"),
        *map(kfac, s.kfac_heads),
    ]


STUDY = Study(
    name="performance",
    title="time and memory of the GCP head against the textbook version, of curvature quantities and of K-FAC's steps",
    presets={
        "smoke": Settings(
            shapes=("2x8x3x3", "2x4x4x4"),
            repeats=2,
            curvature_images=2,
            curvature_channels=2,
            kfac_network="digits_tiny",
            kfac_images=4,
            kfac_repeats=2,
        ),
        "quick": Settings(
            shapes=("32x256x7x7", "64x64x8x8"),
            repeats=7,
            curvature_images=16,
            kfac_network="digits_tiny",
            kfac_images=16,
            kfac_repeats=6,
        ),
        "cifar10": Settings(repeats=31),
        "paper": Settings(shapes=("256x256x14x14", "96x256x7x7", "256x128x14x14"), repeats=31),
    },
    seeds=dict.fromkeys(("smoke", "quick", "cifar10", "paper"), 1),
    plan=plan,
    folds=folds,
    may_grow=(),
)

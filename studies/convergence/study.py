"""Convergence study: does a GCP network converge under a rapid decay of the learning rate, where a GAP network needs a slow one?

Networks that differ in the head alone (same initial weights below it, same batches for each seed) are trained under the three
published schedules of their family, LRnorm, LRfast and LRadju (`secondorder.training.schedules`), stretched to

    E epochs of LRnorm, round(E E_ref / E_ref(norm)) epochs of LRfast and LRadju,    E_ref: the published length.

Published are 100, 53 and 50 epochs for ResNets, 400, 100 and 150 for MobileNetV2, 240, 60 and 100 for ShuffleNetV2. The base
learning rates relate to that of LRnorm as published (MobileNetV2: 0.06 to 0.045; others are equal).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from secondorder.errors import InputError, check_known
from secondorder.networks import NETWORKS
from secondorder.training import SCHEDULES
from studies.checks import check_count, check_names
from studies.convergence.claims import CLAIMS, MATCHED
from studies.convergence.costs import measure_costs
from studies.convergence.page import folds
from studies.engine.plan import HISTORY, Computed, Measurement, Trained, epochs
from studies.engine.records import Row
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.training import PRESETS, Training, TrainingFlags

CLAIMED = ("gap", "gcp")
KINDS = ("norm", "fast", "adju")
KFAC_RATES = {"kfac_adam": 0.06, "kfac": 0.1, "ekfac": 0.1}
"""K-FAC by the name of its optimiser -> the default learning rate of its step."""
FAMILIES = {
    "resnet": (("resnet", "cifar_resnet", "digits"), 256, 1e-4),
    "mobilenet": (("mobilenet",), 96, 4e-5),
    "shufflenet": (("shufflenet",), 1024, 4e-5),
}
"""Family, with schedules <family>_norm, _fast and _adju -> beginnings of its networks' names, published batch and weight decay.
The small networks for CIFAR and for digits have the schedules of ResNets."""


def family_of(network: str) -> str:
    """The family of a network; InputError for one that has none."""
    for family, (names, _, _) in FAMILIES.items():
        if network.startswith(names):
            return family
    known = "; ".join(f"{family}: {', '.join(names)}..." for family, (names, _, _) in FAMILIES.items())
    raise InputError(f"network {network!r}: no schedules were published for it; families by name are {known}")


@dataclass(frozen=True)
class Settings:
    """Settings of the convergence study."""

    heads: tuple[str, ...] = ("gap", "gap_lifted", "covariance", "gcp")
    """Pooling heads: gap and gcp, and the controls."""
    training: TrainingFlags = field(default_factory=Training)
    """How the first network is trained under LRnorm; epochs and learning rate of the others follow from it."""
    networks: tuple[str, ...] = ()
    """Further networks, trained under gap and gcp; of another family at its published learning rate (in proportion to the batch
    where that is smaller than the published one) and weight decay."""
    network_seeds: int = 2
    """Seeds of the further networks."""
    network_limit: int | None = None
    """Training images of the further networks; as many as of the first when not given."""
    published: bool = False
    """Train the further networks in batches and for epochs as published for their family, not like the first."""
    control_seeds: int = 2
    """Seeds of the controls; at most those of gap and gcp."""
    adju_seeds: int = 2
    """Seeds under LRadju; at most those under LRnorm and LRfast."""
    kfac: str = "kfac_adam"
    """K-FAC that trains gap and gcp, too (kfac_adam: its default step, kfac: the published one), at its untuned default rate."""
    kfac_seeds: int = 2
    """Seeds of it; 0: it is left out."""

    def __post_init__(self) -> None:
        check_names("heads", self.heads)
        check_names("networks", (self.training.network, *self.networks))
        for network in (self.training.network, *self.networks):
            check_known("network", network, NETWORKS)
            family_of(network)
        for head in (head for head in CLAIMED if head not in self.heads):
            raise InputError(f"--heads {' '.join(self.heads)}: {head} must be among them")
        if self.training.schedule != Training.schedule:
            raise InputError(
                f"--schedule {self.training.schedule}: this study trains under all three of a family; leave it out"
            )
        check_known("optimizer of --kfac", self.kfac, KFAC_RATES)
        for name in ("network_seeds", "control_seeds", "adju_seeds", "kfac_seeds"):
            check_count(name, getattr(self, name), least=0)
        if self.network_limit is not None:
            check_count("network_limit", self.network_limit)

    @property
    def trainings(self) -> list[Training]:
        """That of the first network, and those of the further ones."""
        first, home = self.training, family_of(self.training.network)
        further = []
        for network in self.networks:
            family = family_of(network)
            (_, published_batch, decay), norm = FAMILIES[family], SCHEDULES[f"{family}_norm"]
            batch, length = (published_batch, norm.epochs) if self.published else (first.batch_size, first.epochs)
            changes: dict[str, Any] = {"network": network, "batch_size": batch, "epochs": length}
            changes["train_limit"] = self.network_limit or first.train_limit
            if family != home:
                rate = times(norm.learning_rate or 0, min(batch, published_batch), published_batch)
                changes |= {"learning_rate": rate, "weight_decay": decay}
            further.append(replace(first, **changes))
        return [first, *further]


def times(value: float, numerator: float, denominator: float) -> float:
    """value numerator / denominator, with 6 digits; the value itself where the ratio is 1."""
    return value if numerator == denominator else float(f"{value * numerator / denominator:.6g}")


def under(training: Training, kind: str, rate: float | None = None) -> dict[str, Any]:
    """Fields of the run under "norm", "fast" or "adju" of the network's family, with the base learning rate `rate` of LRnorm."""
    family = family_of(training.network)
    norm, own = SCHEDULES[f"{family}_norm"], SCHEDULES[f"{family}_{kind}"]
    return {
        "schedule": f"{family}_{kind}",
        "epochs": max(1, round(training.epochs * (own.epochs or 1) / (norm.epochs or 1))),
        "learning_rate": times(rate or training.learning_rate, own.learning_rate or 0, norm.learning_rate or 1),
    }


def matched(training: Mapping[str, Any], settings: None = None) -> Iterator[Row]:
    """The epochs of a GAP network whose last stage has the stride of the GCP network, told apart by their layer."""
    for row in epochs(dict(training)):
        yield {**row, "layer": MATCHED}


STRIDE_OF_GCP = Measurement("training, stride of GCP", matched, of_training=True)


def networks(
    context: Context, training: Training, heads: Sequence[str], seeds: int, optimizer: str = "sgd", **changes: Any
) -> Iterator[Trained]:
    """The heads under all schedules, all of a seed before the next one; LRadju has fewer seeds."""
    rate = KFAC_RATES.get(optimizer)
    history = STRIDE_OF_GCP if "last_stride" in changes else HISTORY
    for seed in context.seeds[:seeds]:
        for kind in KINDS if seed < context.settings.adju_seeds else KINDS[:2]:
            fields = under(training, kind, rate) | changes | {"optimizer": optimizer}
            for head in heads:
                subject = training.subject(context.common, head, seed, **fields)
                yield Trained(subject, may_diverge=optimizer != "sgd", history=history)


def plan(context: Context) -> Plan:
    """The first network with all seeds, its controls, K-FAC, and then the further networks; and what each network costs."""
    s = context.settings
    first, *further = s.trainings
    controls = [head for head in s.heads if head not in CLAIMED]
    tasks = [
        *networks(context, first, CLAIMED, len(context.seeds)),
        *networks(context, first, controls, s.control_seeds),
        *(task for training in s.trainings for task in _at_stride_of_gcp(context, training)),
        *networks(context, first, CLAIMED, s.kfac_seeds, s.kfac),
        *(task for training in further for task in networks(context, training, CLAIMED, s.network_seeds)),
    ]
    yield [*tasks, *_costs(context, tasks)]


def _at_stride_of_gcp(context: Context, training: Training) -> Iterator[Trained]:
    """GAP with the stride of GCP, where the published networks differ in it."""
    strides = NETWORKS[training.network].last_stride
    if training.stride == "published" and strides is not None and strides[0] != strides[1]:
        yield from networks(context, training, ["gap"], context.settings.control_seeds, last_stride=strides[1])


def _costs(context: Context, tasks: Sequence[Trained]) -> Iterator[Computed]:
    """What each network costs that is trained, with each optimiser."""
    seen = set()
    device = str(context.common.torch_device)
    for task in tasks:
        run, data = task.subject.run, task.subject.data
        layer = MATCHED if task.history is STRIDE_OF_GCP else ""
        kind = (run.backbone, run.pooling, layer, run.optimizer)
        if kind not in seen:
            seen.add(kind)
            case = {"run": run.to_dict(), "classes": data.num_classes, "device": device}
            labels = task.subject.labels | {"layer": layer, "trained_under": ""}
            yield Computed(Measurement("costs of a network", measure_costs, case), labels, device=device)


STUDY = Study(
    name="convergence",
    title="does GCP converge under a rapid decay of the learning rate, as accurate as GAP under a slow one",
    presets={
        "smoke": Settings(training=replace(PRESETS["smoke"], epochs=3), control_seeds=1, adju_seeds=1, kfac_seeds=1),
        "quick": Settings(adju_seeds=1, kfac_seeds=1),
        "cifar10": Settings(
            training=PRESETS["cifar10"],
            networks=("cifar_resnet20", "shufflenet_v2_x0_5_small_images", "mobilenet_v2_small_images"),
            network_limit=5_000,
        ),
        "paper": Settings(
            training=replace(PRESETS["paper"], stride="published"),
            networks=("mobilenet_v2", "shufflenet_v2_x1_0"),
            published=True,
            kfac_seeds=1,
        ),
    },
    seeds={"smoke": 2, "quick": 4, "cifar10": 5, "paper": 2},
    plan=plan,
    claims=CLAIMS,
    folds=folds,
    may_grow=("heads", "networks", "network_seeds", "control_seeds", "adju_seeds", "kfac_seeds"),
)

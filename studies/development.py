"""``python -m studies.development``: the tasks on which K-FAC's default step rule was chosen, and how optimisers do on them.

Small tasks of many kinds, none of them of a study, with seeds that no study reports. SGD, AdamW, SOAP and Muon get the best of
several learning rates on every task, chosen by the very losses that are reported; K-FAC has its defaults, which were chosen here.
Every training follows a cosine schedule to 0; what counts is the loss on held-out samples. Records and a table are written to
``reports/development``.
"""

import argparse
import inspect
import itertools
import math
import tarfile
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.data import load_dataset
from secondorder.kfac import KFAC, STEP_RULES, Fisher
from secondorder.networks import network
from secondorder.networks.autoencoder import autoencoder
from studies.engine.command import measure
from studies.engine.plan import Computed, Measurement
from studies.engine.records import Row, read_records
from studies.engine.run import Plan
from studies.engine.study import Context, Study
from studies.results import write_file
from studies.settings import Common

STEPS, FIRST_SEED, EARLY = 2, 100, 20
"""The version of K-FAC's steps, the first seed, and the steps that do not count for the worst loss of a batch."""
Samples = tuple[Tensor, Tensor]
Task = tuple[Samples, Samples, nn.Module]
"""Samples to train on, held-out samples, and the network."""
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


class Block(nn.Module):
    """A pre-norm transformer block with causal attention of 4 heads, `[N, T, D]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.queries, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x + attention, then + the feed-forward part."""
        N, T, D = x.shape
        q, k, v = self.queries(self.norms[0](x)).view(N, T, 3, 4, D // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(N, T, D))
        return x + self.feed(self.norms[1](x))


class Characters(nn.Module):
    """A language model of two blocks; logits `[N, V, T]`."""

    def __init__(self, vocabulary: int, length: int, width: int = 48) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks, self.norm = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)
        self.logits = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next characters."""
        return self.logits(self.norm(self.blocks(self.embedding(x) + self.places))).mT


@cache
def source_text(length: int = 32) -> tuple[Samples, Samples, int]:
    """Characters of some of the standard library's source, the last tenth held out, and how many different ones there are."""
    text = "".join(inspect.getsource(module) for module in (argparse, typing, tarfile, inspect))
    known = {letter: index for index, letter in enumerate(sorted(set(text)))}
    codes = torch.tensor([known[letter] for letter in text])
    cut = len(codes) * 9 // 10

    def pieces(part: Tensor) -> Samples:
        whole = (len(part) - 1) // length * length
        return part[:whole].view(-1, length), part[1 : whole + 1].view(-1, length)

    return pieces(codes[:cut]), pieces(codes[cut:]), len(known)


@cache
def digits() -> tuple[Samples, Samples]:
    """Training and test images of scikit-learn's digits, with labels."""
    data = load_dataset("digits")
    train, test = (split.plain(torch.arange(len(split))) for split in (data.train, data.test))
    return train, test


def convolutions(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Three convolutions for the digits, each with a normalisation."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with rectifiers between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def separable(generator: torch.Generator) -> Task:
    """Two classes by the sign of one of 20 features, some of them on the wrong side."""
    x = torch.randn(10_000, 20, generator=generator)
    y = (x[:, 0] + 0.3 * torch.randn(len(x), generator=generator) > 0).long()
    return (x[:8000], y[:8000]), (x[8000:], y[8000:]), perceptron(20, 64, 2)


def regression(generator: torch.Generator) -> Task:
    """Friedman's first function of 10 uniform features, standardised, with noise."""
    x = torch.rand(6000, 10, generator=generator)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = ((y - 14.4) / 5 + 0.1 * torch.randn(len(x), generator=generator))[:, None]
    return (x[:4000], y[:4000]), (x[4000:], y[4000:]), perceptron(10, 64, 64, 1)


def cancer(generator: torch.Generator) -> Task:
    """Wisconsin's breast cancers, 30 standardised features: 400 samples, which every network soon knows by heart."""
    x, y = (torch.as_tensor(part) for part in load_breast_cancer(return_X_y=True))
    x, order = ((x - x.mean(0)) / x.std(0)).float(), torch.randperm(len(x), generator=generator)
    train, test = order[:400], order[400:]
    return (x[train], y[train]), (x[test], y[test]), perceptron(30, 64, 32, 2)


def characters(generator: torch.Generator) -> Task:
    """A small transformer that foretells the next character of source text."""
    train, test, vocabulary = source_text()
    return train, test, Characters(vocabulary, train[0].shape[1])


def encoded(generator: torch.Generator) -> Task:
    """The digits through a code of 10 numbers."""
    (train, _), (test, _) = digits()
    low, high = train.min(), train.max()
    train, test = (((x - low) / (high - low)).clamp(0, 1).flatten(1) for x in (train, test))
    return (train, train), (test, test), autoencoder(64, (60, 30, 10), "tanh", "glorot")


TASKS: dict[str, tuple[Callable[[torch.Generator], Task], int, int, str]] = {
    "separable": (separable, 32, 600, "cross_entropy"),
    "cancer": (cancer, 32, 150, "cross_entropy"),
    "regression": (regression, 64, 480, "mse"),
    "autoencoder": (encoded, 64, 440, "bce"),
    "group norm": (lambda _: (*digits(), convolutions(lambda width: nn.GroupNorm(4, width))), 64, 220, "cross_entropy"),
    "batch norm": (lambda _: (*digits(), convolutions(nn.BatchNorm2d)), 64, 220, "cross_entropy"),
    "GAP": (lambda _: (*digits(), network("digits_small", "gap", 10, 1)), 64, 220, "cross_entropy"),
    "GCP": (lambda _: (*digits(), network("digits_small", "gcp", 10, 1)), 64, 220, "cross_entropy"),
    "transformer": (characters, 32, 250, "cross_entropy"),
}
"""Name -> maker, batch, steps and loss."""


def _soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer.optimizer.soap import SOAP

    return SOAP(model.parameters(), lr=lr, weight_decay=0.0)


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Muon for all matrices but embeddings and the last layer, which go with vectors to its AdamW, as its authors advise; its
    updates are scaled by shape, so that one rate serves both."""
    from pytorch_optimizer import Muon

    last = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
    taken = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m is not last]
    left = [p for p in model.parameters() if all(p is not weight for weight in taken)]
    groups = [{"params": taken, "use_muon": True, "use_adjusted_lr": True}, {"params": left, "use_muon": False}]
    return Muon([group | {"lr": lr, "weight_decay": 0.0} for group in groups])


BUILD: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "sgd": lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9),
    "adamw": lambda model, lr: torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0),
    "soap": _soap,
    "muon": _muon,
}
RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "adamw": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "soap": (0.003, 0.01, 0.03),
    "muon": (0.005, 0.01, 0.02, 0.05),
    **{f"kfac {name}": (rule.learning_rate,) for name, rule in STEP_RULES.items()},
}
RATES["kfac adam"] = (0.06, 0.03, 0.12)
"""Learning rates by optimiser: tuned where there are several, but for "kfac adam", whose first is the default."""


def run(settings: Mapping[str, Any]) -> Iterator[Row]:
    """Train once: the held-out loss at the end, and the worst loss of a batch after the first steps."""
    make, size, steps, likelihood = TASKS[settings["task"]]
    loss_of, name, rate = LOSSES[likelihood], settings["optimizer"], settings["rate"]
    torch.manual_seed(settings["seed"])
    (x, y), (held, targets), model = make(torch.Generator().manual_seed(settings["seed"]))
    if name.startswith("kfac "):
        optimizer: torch.optim.Optimizer = KFAC(
            model, rate, step_rule=name.removeprefix("kfac "), fisher=Fisher(likelihood=likelihood)
        )
    else:
        optimizer = BUILD[name](model, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order, worst = torch.Generator().manual_seed(settings["seed"]), torch.empty(0, dtype=torch.long), 0.0
    for turn in range(steps):
        if len(order) < size:
            order = torch.randperm(len(x), generator=generator)
        rows, order = order[:size], order[size:]
        optimizer.zero_grad()
        outputs = model(x[rows])
        if isinstance(optimizer, KFAC):
            optimizer.update_curvature(outputs)
        loss = loss_of(outputs, y[rows])
        if not math.isfinite(value := float(loss.detach())):
            worst = math.inf
            break
        worst = max(worst, value) if turn >= EARLY else 0.0
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        parts = zip(held.split(200), targets.split(200), strict=True)
        total = sum(float(loss_of(model(a), b)) * len(a) for a, b in parts)
    end = total / len(held) if math.isfinite(worst + total) else math.inf
    yield {"quantity": "held-out loss", "setting": rate, "value": end}
    yield {"quantity": "worst batch loss", "setting": rate, "value": worst}


def plan(context: Context) -> Plan:
    """Every task with every optimiser, rate and seed."""
    yield [
        Computed(
            Measurement("development", run, case, STEPS if name.startswith("kfac ") else 1),
            {"network": task, "optimizer": name, "seed": case["seed"]},
        )
        for task in TASKS
        for name, rates in RATES.items()
        for rate in rates
        for case in (
            {"task": task, "optimizer": name, "rate": rate, "seed": FIRST_SEED + seed} for seed in context.seeds
        )
    ]


@dataclass(frozen=True)
class Settings:
    """There are none: all is above."""


STUDY = Study("development", "which step of K-FAC", {"quick": Settings()}, {"quick": 3}, plan)


def table_of(records: pd.DataFrame) -> pd.DataFrame:
    """Mean held-out losses, an optimiser a row (its best rate where it is tuned), a task a column."""
    ends = records[records.quantity == "held-out loss"]
    means = ends.groupby(["network", "optimizer", "setting"], sort=False).value.mean().reset_index()
    default = (means.optimizer != "kfac adam") | (means.setting == RATES["kfac adam"][0])
    best = means[default].groupby(["optimizer", "network"], sort=False).value.min().unstack("network")
    return best.loc[list(RATES), list(TASKS)]


def main() -> None:
    """Compute what is missing, and write the table."""
    common = Common(out=Path("reports/development"), store=Path("reports/store"))
    torch.set_num_threads(1)
    folder = common.folder
    folder.mkdir(parents=True, exist_ok=True)
    measure(common, {STUDY.name: (STUDY, Settings())})
    table = table_of(read_records(folder, STUDY.name)[0])
    lines = [["", *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [
        [name, *(f"{value:.4g}" for value in row)] for name, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    write_file(folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    from studies import development  # the jobs' processes know it by this name

    development.main()

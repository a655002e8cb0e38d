"""Probes of frozen features: how much of a task a linear classifier, or two convolutions, make of them.

A probe costs seconds, and what it finds is of the features alone: nothing below it is trained. Batch-norm statistics are those of
the network unless they are renewed on images of the task before (`torch.optim.swa_utils.update_bn`, `frozen_at`): without that,
networks are compared by how far the statistics of their own data lie from the task's, and a random network has none.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.accelerator import seed_random_numbers
from secondorder.errors import InputError, check_known, check_number, check_seed, check_whole, short
from secondorder.matrix_power.checks import FLOATS
from secondorder.optional import needed_by
from secondorder.pooling import PoolingHead, pooling_head
from secondorder.transfer.checks import WHOLE, check_tensor
from secondorder.untouched import same_randomness

CLASSES = "whole numbers, the class of each sample"
POOLED = ("mean", "mean_and_covariance")
ROUNDS = 2000
"""Steps of L-BFGS for a linear probe, at most."""


def pooled_features(maps: Tensor, kind: str = "mean") -> Tensor:
    """Features of an image for a linear probe, of maps ``[N, C, H, W]``.

    Args:
        maps: finite floating-point numbers.
        kind: "mean": m over positions, ``[N, C]``. "mean_and_covariance": m and s(S_ij) for i <= j,
            ``[N, C + C (C + 1) / 2]``, S the covariance over positions (divided by their number) and s(v) = sign(v) sqrt(|v|).

    Raises:
        InputError: for another kind, and maps that are no finite floating-point maps.
    """
    check_known("kind of pooled features", kind, POOLED)
    _check_maps("maps", maps)
    with torch.no_grad():
        mean = maps.mean((2, 3))
        if kind == "mean":
            return mean
        head: PoolingHead = pooling_head("covariance", maps.shape[1]).to(maps.device, maps.dtype).eval()
        covariance = head(maps)
        return torch.cat([mean, covariance.sign() * covariance.abs().sqrt()], 1)


def few_shot(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices ``[shots K]`` of as many samples of each class, drawn without replacement, class after class.

    Args:
        labels: class of each sample, ``[N]``.
        shots: samples of a class.
        seed: of the draw; global random numbers are not used.

    Raises:
        InputError: for a class that has fewer.
    """
    check_whole("shots", shots)
    check_seed(seed)
    check_tensor("labels", labels, WHOLE, CLASSES)
    if labels.ndim != 1 or not len(labels):
        raise InputError(f"labels of shape {list(labels.shape)}: must be {CLASSES}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten().cpu()
        if len(places) < shots:
            raise InputError(f"class {label} has {len(places)} samples: fewer than {shots} shots")
        drawn.append(places[torch.randperm(len(places), generator=generator)[:shots]])
    return torch.cat(drawn)


def linear_probe(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, strength: float = 0.1
) -> float:
    """Test accuracy of a logistic regression on standardised features.

    It minimises |W|^2 / 2 + strength sum_i cross-entropy_i over the weights of z = W (x - mean) / std + b, with mean and standard
    deviation of the training features.

    Args:
        features: ``[n, D]``, of the network to be probed; labels ``[n]`` of two classes or more.
        test_features: ``[m, D]``; labels ``[m]``.
        strength: of the data against the penalty, C of scikit-learn.

    Raises:
        InputError: for other shapes, features that are not finite, a single class, and a strength that is not positive.
        MissingLibraryError: without scikit-learn.
    """
    check_number("strength", strength, 0, math.inf, "()")
    for x, y, what in ((features, labels, "features"), (test_features, test_labels, "test_features")):
        check_tensor(what, x, FLOATS, "floating-point [n, D]")
        check_tensor(f"labels of {what}", y, WHOLE, CLASSES)
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(x) or x.shape[1:] != features.shape[1:]:
            raise InputError(f"{what} of shape {list(x.shape)} with labels {list(y.shape)}: must be [n, D] and [n]")
        if not x.isfinite().all():
            raise InputError(f"{what}: not all are finite numbers")
    if len(labels.unique()) < 2:
        raise InputError(f"labels are all {labels[0].item()}: a probe needs two classes")
    with needed_by("a linear probe"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ROUNDS))
    probe.fit(features.double().cpu().numpy(), labels.cpu().numpy())
    return float(probe.score(test_features.double().cpu().numpy(), test_labels.cpu().numpy()))


@dataclass(frozen=True)
class DenseScore:
    """How well classes of pixels are found, over all pixels of all test images."""

    intersection_over_union: tuple[float, ...]
    """Of each class, pixels that are and are found / pixels that are or are found; nan for one that is nowhere."""
    accuracy: float
    """Share of the pixels whose class is found."""


def dense_probe(
    maps: Tensor,
    masks: Tensor,
    test_maps: Tensor,
    test_masks: Tensor,
    *,
    seed: int = 0,
    width: int = 64,
    steps: int = 150,
    batch_size: int = 4,
    learning_rate: float = 3e-3,
) -> DenseScore:
    """Two convolutions (1x1 to `width` channels, ReLU, 3x3 to classes) on maps, resized bilinearly to the pixels, by Adam.

    Args:
        maps: frozen features of training images, ``[N, C, h, w]``, standardised channel by channel in here.
        masks: class of each pixel, int64 ``[N, H, W]``, 0 to K - 1.
        test_maps, test_masks: of test images, which may have another size.
        seed: of initial weights and batches; global random numbers are as before.
        width: channels between the convolutions.
        steps: of Adam, on `batch_size` images each, without augmentation.
        learning_rate: of Adam.

    Raises:
        InputError: for other shapes, maps that are not finite, and training masks of a single class.
    """
    for name, value in (("width", width), ("steps", steps), ("batch_size", batch_size)):
        check_whole(name, value)
    check_number("learning_rate", learning_rate, 0, math.inf, "()")
    check_seed(seed)
    _check_masks(maps, masks, test_maps, test_masks)
    classes = int(torch.stack([masks.max(), test_masks.max()]).max()) + 1
    deviation, mean = torch.std_mean(maps, (0, 2, 3), keepdim=True)
    scale = deviation.clamp_min(torch.finfo(maps.dtype).tiny)
    with same_randomness():
        seed_random_numbers(seed)
        probe = nn.Sequential(
            nn.Conv2d(maps.shape[1], width, 1), nn.ReLU(), nn.Conv2d(width, classes, 3, padding=1)
        ).to(maps.device, maps.dtype)
        optimizer = torch.optim.Adam(probe.parameters(), learning_rate)
        for _ in range(steps):
            rows = torch.randperm(len(maps))[:batch_size].to(maps.device)
            optimizer.zero_grad()
            F.cross_entropy(_logits(probe, (maps[rows] - mean) / scale, masks), masks[rows]).backward()
            optimizer.step()
    counts = torch.zeros(classes, classes, dtype=torch.int64)  # [truth, found]
    with torch.no_grad():
        for x, y in zip(test_maps.split(batch_size), test_masks.split(batch_size), strict=True):
            found = _logits(probe, (x - mean) / scale, y).argmax(1)
            counts += (y * classes + found).flatten().bincount(minlength=classes**2).reshape(classes, classes).cpu()
    right = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return DenseScore(tuple((right / union).tolist()), float(right.sum() / counts.sum()))


def _check_masks(maps: Tensor, masks: Tensor, test_maps: Tensor, test_masks: Tensor) -> None:
    """InputError unless maps `[N, C, h, w]` and masks `[N, H, W]` belong together, with two classes or more to learn."""
    for x, y, what in ((maps, masks, "maps"), (test_maps, test_masks, "test_maps")):
        _check_maps(what, x)
        check_tensor(f"masks of {what}", y, frozenset({torch.int64}), "int64 [N, H, W]")
        if y.ndim != 3 or 0 in y.shape or len(y) != len(x) or x.shape[1] != maps.shape[1] or x.dtype != maps.dtype:
            raise InputError(
                f"{what} {list(x.shape)}, {x.dtype}, masks {list(y.shape)}: must be [N, C, h, w] as maps, and [N, H, W]"
            )
    if len(masks.unique()) < 2 or min(masks.min(), test_masks.min()) < 0:
        raise InputError(f"masks of the classes {short(masks.unique().tolist())}: must be 0 to K - 1, two or more")


def _logits(probe: nn.Module, x: Tensor, masks: Tensor) -> Tensor:
    """Logits ``[N, K, H, W]`` at the pixels of the masks ``[N, H, W]``."""
    return F.interpolate(probe(x), size=masks.shape[1:], mode="bilinear")


def _check_maps(name: str, maps: Tensor) -> None:
    check_tensor(name, maps, FLOATS, "floating-point [N, C, H, W]")
    if maps.ndim != 4 or 0 in maps.shape:
        raise InputError(f"{name} of shape {list(maps.shape)}: must be floating-point [N, C, H, W]")
    if not maps.isfinite().all():
        raise InputError(f"{name}: not all are finite numbers")

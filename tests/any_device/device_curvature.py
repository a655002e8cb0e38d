"""Curvature of every kind, BackPACK through every head, landscape and preconditioning: on any device as on the CPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack import extensions
from devices import check, images_and_labels, moved, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import (
    QUANTITIES,
    curvature_blocks,
    fidelity,
    load_curvature,
    output_jacobians,
    save_curvature,
    spectral_summary,
)
from secondorder.curvature.backpack import backpack_quantity
from secondorder.errors import InputError
from secondorder.landscape import (
    LandscapeLine,
    LandscapePlane,
    equally_spaced,
    feature_landscape,
    filter_normalised_direction,
    landscape_plane,
    optimiser_step,
    weight_landscape,
)
from secondorder.networks import SharedBackbone, frozen_at
from secondorder.pooling import POOLINGS, pooling_head
from secondorder.preconditioning import (
    FORMS,
    HEAD_FUNCTIONS,
    alignment,
    gcp_backward,
    head_spectrum,
    kfac_direction,
    loss_gradient,
    natural_gradient_direction,
    whitened_features,
)

CE = nn.CrossEntropyLoss()
NAMES = ["stem.0.weight", "classifier.weight"]
EXTENSIONS = ["BatchGrad", "Variance", "DiagGGNExact", "DiagGGNMC", "DiagHessian", "KFLR", "GGNMP"]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_blocks(quantity: str, device: str) -> None:
    def measured(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Any]:
        blocks = curvature_blocks(model, CE, batch, quantity, NAMES, seed=3, chunk=4)
        V = torch.randn(blocks.whole.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        diagonal = (
            blocks.whole.diagonal() if quantity != "hessian" else V
        )  # which would take as many products as columns
        return [blocks.whole @ V.to(batch[0].device), diagonal.to(batch[0].device), blocks[NAMES[1]].dense()]

    model, batch = tiny(), images_and_labels()
    check(measured(*moved((model, batch), device)), measured(model, batch), device)


def test_output_jacobians(device: str) -> None:
    def measured(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Any]:
        found = output_jacobians(model, batch[0], NAMES)
        return [found.outputs, *found.jacobians.values(), found.gauss_newton(NAMES[0], CE, batch[1]).eigenvalues()]

    model, batch = tiny(), images_and_labels()
    check(measured(*moved((model, batch), device)), measured(model, batch), device)


def test_shared_backbones(device: str) -> None:
    def measured(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        shared = SharedBackbone(frozen_at(model, images), [(images, labels)], penalty=0.1)
        return shared.under("covariance")(images)

    model, (images, labels) = tiny(), images_and_labels()
    labels = torch.arange(len(labels)) % model.num_classes
    check(measured(*moved((model, images, labels), device)), measured(model, images, labels), device, 1e-4, 1e-4)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_spectra(method: str, device: str) -> None:
    def measured(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[float]:
        blocks = curvature_blocks(model, CE, batch, "ggn" if method == "lanczos" else "hessian", NAMES[1:])
        options = {"probes": 2, "steps": 4} if method == "lanczos" else {}
        found = spectral_summary(blocks.whole, method, **options)
        return [float(value) for name in ("largest", "trace", "effective_rank") for value in getattr(found, name)]

    model, batch = tiny("gap"), images_and_labels()
    check(measured(*moved((model, batch), device)), measured(model, batch), device, 1e-4, 1e-6)


def test_fidelity(device: str) -> None:
    def measured(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[float]:
        ggn, kfac = (curvature_blocks(model, CE, batch, quantity, NAMES) for quantity in ("ggn", "kfac_expand"))
        found = fidelity(kfac[NAMES[0]], ggn[NAMES[0]])
        return [float(found.cosine[0]), float(found.relative_error[0])]

    model, batch = tiny(), images_and_labels()
    check(measured(*moved((model, batch), device)), measured(model, batch), device)


def test_saving(device: str, tmp_path: Path) -> None:
    model, batch = moved((tiny(), images_and_labels()), device)
    blocks = curvature_blocks(model, CE, batch, "kfac_expand", NAMES)
    save_curvature(tmp_path / "kfac.pt", blocks)
    loaded = load_curvature(tmp_path / "kfac.pt", "cpu")
    assert loaded.whole.device.type == "cpu"
    assert torch.equal(loaded[NAMES[0]].dense(), blocks[NAMES[0]].dense().cpu())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_backpack_through_every_head(pooling: str, device: str) -> None:
    if pooling == "dropcov":
        pytest.skip("BackPACK does not know adaptive channel dropout")
    width = 3 if pooling == "gap" else 6
    model = nn.Sequential(nn.Conv2d(1, 3, 3), *pooling_head(pooling, 3).chain(), nn.Linear(width, 3)).double()
    batch = images_and_labels(4)

    def measured(model: nn.Module, batch: tuple[Tensor, Tensor], name: str) -> list[Any]:
        found = backpack_quantity(model, CE, batch, getattr(extensions, name)(), seed=0)["0.weight"]
        return found(torch.ones(1, 3, 1, 3, 3).to(batch[0])) if callable(found) else found

    for name in EXTENSIONS if pooling == "gcp" else ("DiagGGNExact", "DiagHessian"):
        check(measured(*moved((model, batch), device), name), measured(model, batch, name), device)


def lines(model: nn.Module, images: Tensor, labels: Tensor) -> list[LandscapeLine]:
    etas = equally_spaced(0.1, 2.0, 3)
    step = optimiser_step(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, images, labels)
    return [
        feature_landscape(model, F.cross_entropy, images, labels, etas, "descent"),
        feature_landscape(model, F.cross_entropy, images, labels, etas, "descent", predicted=True),
        weight_landscape(model, F.cross_entropy, images, labels, etas, step),
    ]


def test_landscape(device: str) -> None:
    model, batch = tiny(), images_and_labels()
    found, expected = lines(*moved((model, *batch), device)), lines(model, *batch)
    for ours, theirs in zip(found, expected, strict=True):
        check(vars(ours), vars(theirs), "cpu")  # a line is of numbers on the CPU


def plane(model: nn.Module, images: Tensor, labels: Tensor, loader: Any) -> LandscapePlane:
    d = filter_normalised_direction(model, 1)
    e = optimiser_step(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, images, labels)
    return landscape_plane(model, F.cross_entropy, loader, d, e, torch.tensor([0.0, 0.3]), batch_norm="batch")


def test_planes(device: str) -> None:
    """Of batches on the CPU, as a loader gives them."""
    model, batch = tiny(), images_and_labels()
    batches = [tuple(t[:2] for t in batch), tuple(t[2:] for t in batch)]
    check(vars(plane(*moved((model, *batch), device), batches)), vars(plane(model, *batch, batches)), "cpu")


def test_preconditioning(device: str) -> None:
    features = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    gradient = torch.randn(2, 10, dtype=torch.float64)

    def measured(features: Tensor, gradient: Tensor) -> list[Any]:
        spectra = [head_spectrum(features, pooling) for pooling in HEAD_FUNCTIONS]
        backward = [gcp_backward(features, gradient, form) for form in FORMS]
        return [*(vars(spectrum) for spectrum in spectra), *backward, whitened_features(features)]

    check(measured(*moved((features, gradient), device)), measured(features, gradient), device)


def test_directions(device: str) -> None:
    def measured(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Any]:
        gradient = loss_gradient(model, batch, params=NAMES)
        kfac = kfac_direction(model, batch, 0.1, params=NAMES)
        natural = natural_gradient_direction(model, batch, 0.1, params=NAMES)
        layers = alignment(kfac, natural.direction)
        return [gradient, kfac, natural.direction, vars(layers)]

    model, batch = tiny(), images_and_labels()
    check(measured(*moved((model, batch), device)), measured(model, batch), device, 1e-5, 1e-8)


def test_waits_of_a_landscape_line(device: str, waits: Callable[[], AbstractContextManager]) -> None:
    """Two, however many points it has: one when its numbers come to the CPU, one to see what has to be restored."""
    model, (images, labels) = moved((tiny(), images_and_labels()), device)
    for points in (2, 5):
        with waits() as found:
            feature_landscape(model, F.cross_entropy, images, labels, equally_spaced(0.1, 2.0, points))
        assert len(found) == 2, found
        with waits() as found:
            weight_landscape(model, F.cross_entropy, images, labels, equally_spaced(0.1, 2.0, points))
        assert len(found) == 2, found


@pytest.mark.usefixtures("without_float64")
def test_without_float64(device: str) -> None:
    """In float32 where that will do, else refused in one line."""
    model, (images, labels) = tiny().float(), images_and_labels()
    there = moved((model, images.float(), labels), device)
    for ours, theirs in zip(lines(*there), lines(model, images.float(), labels), strict=True):
        check(vars(ours), vars(theirs), "cpu", 1e-3, 1e-4)
    for quantity in ("ggn", "mc_fisher", "kfac_expand"):
        blocks = curvature_blocks(there[0], CE, there[1:], quantity, NAMES)
        assert blocks.whole.diagonal().isfinite().all()
    for measured in (lambda: spectral_summary(blocks.whole, "lanczos"), lambda: head_spectrum(there[1], "gcp")):
        with pytest.raises(InputError, match=r"needs float64, which the device pretend.* does not have; use the cpu"):
            measured()

"""Arguments of the preconditioning package that cannot be used are refused in one line that names them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secondorder.errors import InputError
from secondorder.networks import network
from secondorder.preconditioning import (
    alignment,
    bootstrap_interval,
    conjugate_gradients,
    gcp_backward,
    head_spectrum,
    kfac_direction,
    loss_gradient,
    natural_gradient_direction,
    partial_correlation,
    whitened_features,
)

MAPS = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GRAD = torch.ones(1, 2, 2, dtype=torch.float64)
B = torch.ones(3, dtype=torch.float64)
NAMED = {"a.weight": torch.ones(2)}


def given(function: Callable[..., Any], **changes: Any) -> Callable[[], Any]:
    """A call with a network and a batch."""
    batch = torch.zeros(4, 1, 8, 8), torch.arange(4) % 3
    return lambda: function(**({"network": network("digits_tiny", "gap", 3, 1), "batch": batch} | changes))


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "features of 8 bits": (
        lambda: whitened_features(MAPS.to(torch.float8_e4m3fn)),
        "real floating-point numbers, got torch.float8_e4m3fn",
    ),
    "pooling": (lambda: head_spectrum(MAPS, []), r"unknown pooling with a closed form \[\]"),  # type: ignore[arg-type]
    "coordinates": (lambda: head_spectrum(MAPS, "gap", coordinates=np.zeros(2)), "unknown coordinates array"),  # type: ignore[arg-type]
    "exact": (lambda: head_spectrum(MAPS, "gap", "no"), "exact must be True or False, got 'no'"),  # type: ignore[arg-type]
    "trace term": (lambda: head_spectrum(MAPS, "gcp", trace_term=None), "trace_term must be True or False, got None"),  # type: ignore[arg-type]
    "form": (lambda: gcp_backward(MAPS, GRAD, {}), r"unknown form \{\}; choose one of: exact"),  # type: ignore[arg-type]
    "gradient without numbers": (lambda: gcp_backward(MAPS, GRAD.to("meta")), "numbers, got a meta tensor"),
    "relative": (given(natural_gradient_direction, damping=0.1, relative=1), "relative must be True or False, got 1"),
    "relative of K-FAC": (given(kfac_direction, damping=0.1, relative="x"), "relative must be True or False, got 'x'"),
    "solver's product": (lambda: conjugate_gradients(3, B), "product 3: must be a function"),  # type: ignore[arg-type]
    "solver's product gives a list": (
        lambda: conjugate_gradients(lambda v: v.tolist(), B),
        "the product is list: must be a",
    ),
    "solver's product fails": (lambda: conjugate_gradients(lambda v: torch.ones(2, 2) @ v, B), "the product fails: "),
    "solver's b": (lambda: conjugate_gradients(lambda v: v, [1.0]), "b is list: must be a tensor"),  # type: ignore[arg-type]
    "solver's b complex": (lambda: conjugate_gradients(lambda v: v, B * 1j), "b has dtype torch.complex128"),
    "solver's start": (lambda: conjugate_gradients(lambda v: v, B, start=3), "start is int: must be a tensor"),  # type: ignore[arg-type]
    "solver's damping": (
        lambda: conjugate_gradients(lambda v: v, B, damping="x"),
        "damping must be a finite number of at least 0, got 'x'",
    ),  # type: ignore[arg-type]
    "solver's tolerance": (
        lambda: conjugate_gradients(lambda v: v, B, tolerance=None),
        "tolerance must be a number .*, got None",
    ),  # type: ignore[arg-type]
    "gradient": (
        given(natural_gradient_direction, damping=0.1, gradient=math.nan),
        "gradient nan: must be tensors by the names",
    ),
    "gradient of words": (
        given(kfac_direction, damping=0.1, gradient={"stem.0.weight": "x"}),
        "gradient .*: must be tensors by the names",
    ),
    "params": (given(loss_gradient, params=0.1), "params 0.1: must be names of parameters"),
    "network": (given(loss_gradient, network="resnet18"), "network str: must be a torch.nn.Module"),
    "loss": (given(loss_gradient, loss=3), "loss 3: must be a function of outputs and labels"),
    "loss of a vector": (
        given(loss_gradient, loss=nn.CrossEntropyLoss(reduction="none")),
        "CrossEntropyLoss must return one number",
    ),
    "labels": (
        given(loss_gradient, batch=(torch.zeros(2, 1, 8, 8), torch.tensor([0, 7]))),
        r"the loss of outputs \[2, 3\] and labels \[2\] fails: Target 7 is out of bounds",
    ),
    "direction": (lambda: alignment(3, NAMED), "direction 3: must be tensors by the names"),  # type: ignore[arg-type]
    "direction of words": (lambda: alignment(NAMED, {"a.weight": "x"}), "direction of 'a.weight' is str"),  # type: ignore[dict-item]
    "direction complex": (lambda: alignment(NAMED, {"a.weight": torch.ones(2) * 1j}), "is torch.complex64 on cpu"),
    "direction without numbers": (
        lambda: partial_correlation(NAMED, NAMED, {"a.weight": torch.ones(2, device="meta")}),
        "is torch.float32 on meta: must be a tensor of real floating-point numbers",
    ),
    "values": (lambda: bootstrap_interval(["a", "b"]), "needs a list of at least 2 numbers"),
    "statistic": (lambda: bootstrap_interval([1.0, 2.0], 0.5), "statistic 0.5: must be a function"),  # type: ignore[arg-type]
    "confidence": (
        lambda: bootstrap_interval([1.0, 2.0], confidence=torch.zeros(0)),
        r"confidence must be a number in \(0, 1\), got tensor",
    ),  # type: ignore[arg-type]
    "seed": (lambda: bootstrap_interval([1.0, 2.0], seed="x"), "seed must be a whole number of at least 0, got 'x'"),  # type: ignore[arg-type]
    "resamples": (
        lambda: bootstrap_interval([1.0, 2.0], resamples=10**30),
        "resamples must be a whole number from 100 to 10000000, got 1000000",
    ),
    "overflow": (
        lambda: bootstrap_interval([1.7e308, 1.7e308], np.sum),
        "the statistic of values up to 1.7e.* is not finite",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    make, message = CASES[case]
    with pytest.raises(InputError, match=message):
        make()

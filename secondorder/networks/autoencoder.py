"""Deep autoencoder of Hinton & Salakhutdinov (2006), the classical test of second-order optimisers (Martens & Grosse 2015)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, unknown

ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
INCOMING = 15  # weights other than zero into each unit, as published


def autoencoder(
    inputs: int, widths: Sequence[int], activation: str = "tanh", initialisation: str = "glorot"
) -> nn.Sequential:
    """Encoder `inputs` - widths[0] - ... - widths[-1] and the mirrored decoder: `[N, inputs]` to logits of pixels `[N, inputs]`.

    Every hidden layer but the last of the encoder, the code, has the activation (a key of ACTIVATIONS); code and output are
    linear. `initialisation` is a key of INITIALISATIONS. Full scale: widths 1000, 500, 250, 30.
    """
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if initialisation not in INITIALISATIONS:
        raise unknown("initialisation", initialisation, INITIALISATIONS)
    if inputs < 1 or not widths or any(width < 1 for width in widths):
        raise InputError(
            f"autoencoder of {inputs} inputs and widths {tuple(widths)}: give at least one, each at least 1"
        )
    sizes = [inputs, *widths, *reversed(widths[:-1]), inputs]
    layers: list[nn.Module] = []
    for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layers.append(INITIALISATIONS[initialisation](nn.Linear(fan_in, fan_out)))
        if number not in (len(widths), len(sizes) - 1):
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def glorot(layer: nn.Linear) -> nn.Linear:
    """N(0, 2 / (fan_in + fan_out)), no bias (Glorot & Bengio 2010)."""
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def sparse(layer: nn.Linear) -> nn.Linear:
    """N(0, 1) for INCOMING weights of each unit (all, when there are fewer), zero elsewhere, no bias (Martens 2010).

    The variance of a unit's input then does not depend on how many inputs there are.
    """
    weight: Tensor = layer.weight.zero_()
    for row in weight:
        chosen = torch.randperm(row.numel())[:INCOMING]
        row[chosen] = torch.randn(len(chosen))
    layer.bias.zero_()
    return layer


INITIALISATIONS: dict[str, Callable[[nn.Linear], nn.Linear]] = {"glorot": glorot, "sparse": sparse}

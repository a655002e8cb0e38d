"""Weights of published checkpoints: fast-MPN-COV, the code of Wang et al. (CVPR 2020), and torchvision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secondorder.errors import InputError, check_known, short
from secondorder.networks.composition import Network

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Names under which training scripts keep the weights in a checkpoint."""
REDUCTION = {"layer_reduce.": "0.", "layer_reduce_bn.": "1.", "representation.conv_dr_block.": ""}
"""Beginning of a name -> that below the network's reduction."""
CLASSIFIER = ("fc.", "classifier.1.", "classifier.")
COUNTER = "num_batches_tracked"
"""What checkpoints of old versions of PyTorch lack; it changes no output."""
PARTS = ("all", "trunk")


@torch.no_grad()
def load_published(network: Network, checkpoint: Mapping[str, Any], *, parts: str = "all") -> Network:
    """Copy the weights of a published checkpoint into a network, and return the network.

    Known are the names of torchvision's ResNets with ``layer_reduce``, ``layer_reduce_bn`` and ``fc`` behind them (fast-MPN-COV),
    those of the parts ``features``, ``representation`` and ``classifier`` (Wang et al., CVPR 2020), and torchvision's own, with
    or without ``module.`` before them. Where convolutions have other names, they are matched by their order; shapes are compared.

    Args:
        network: of `network(...)`, with the pooling, the reduction, the last stride and the number of classes of the checkpoint.
        checkpoint: what ``torch.load(file, weights_only=True)`` gives, the weights or a mapping that has them as ``state_dict``.
        parts: "all", or "trunk" for stem and features alone: head and classifier stay as they are.

    Raises:
        InputError: for a checkpoint that does not fit, naming the first weight; then nothing has been changed.

    Source: Li et al., "Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root
    Normalization", CVPR 2018, and Wang et al., CVPR 2020, for the names. The triangle's order is that of `secondorder.pooling`.
    """
    check_known("parts", parts, PARTS)
    if not isinstance(network, Network):
        raise InputError(f"network {short(network)}: must be one of secondorder.networks.network")
    own = network.state_dict()
    trunk = [name for name in own if name.startswith(("stem.", "features.")) and not name.endswith(COUNTER)]
    given = _weights(checkpoint)
    found = _renamed(given, own) | _trunk(given, trunk)
    wanted = trunk if parts == "trunk" else [name for name in own if not name.endswith(COUNTER)]
    for name in wanted:
        if name not in found:
            raise InputError(
                f"the checkpoint has nothing for {name} {list(own[name].shape)}; choose the network it is of"
            )
        if found[name].shape != own[name].shape:
            raise InputError(
                f"{name} has the shape {list(own[name].shape)}, that of the checkpoint {list(found[name].shape)}; choose the "
                "network it is of, or parts='trunk'"
            )
    for name in wanted:
        own[name].copy_(found[name])
    return network


def _weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefix of torch's parallel wrapper. InputError when there are none."""
    inner: Any = checkpoint
    for name in WRAPPERS:
        if isinstance(inner, Mapping) and isinstance(inner.get(name), Mapping):
            inner = inner[name]
    if not isinstance(inner, Mapping) or not any(isinstance(value, Tensor) for value in inner.values()):
        raise InputError(
            f"checkpoint {short(checkpoint)}: must be weights by name, or a mapping with a state_dict of them"
        )
    return {str(name).removeprefix("module."): value for name, value in inner.items() if isinstance(value, Tensor)}


def _renamed(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reduction and classifier under the network's names."""
    found = {}
    for name, tensor in given.items():
        for prefix, below in REDUCTION.items():
            if name.startswith(prefix):
                found[f"head.reduction.{below}{name.removeprefix(prefix)}"] = tensor
        of_classifier = next((prefix for prefix in CLASSIFIER if name.startswith(prefix)), None)
        if of_classifier is not None:
            found[f"classifier.{name.removeprefix(of_classifier)}"] = tensor
    return {name: tensor for name, tensor in found.items() if name in own}


def _trunk(given: Mapping[str, Tensor], trunk: list[str]) -> dict[str, Tensor]:
    """Stem and features under the network's names: by name where all are there, else by order."""
    others = (*REDUCTION, *CLASSIFIER)
    rest = {n: t for n, t in given.items() if not n.startswith(others) and not n.endswith(COUNTER)}
    by_name = {name: name.partition(".")[2] for name in trunk}
    if all(name in rest for name in by_name.values()):
        return {name: rest[theirs] for name, theirs in by_name.items()}
    if len(rest) != len(trunk):
        raise InputError(
            f"the checkpoint has {len(rest)} tensors of convolutions and normalisations, the network {len(trunk)}; choose the "
            "network it is of"
        )
    for name, theirs in zip(trunk, rest, strict=True):
        if name.rpartition(".")[2] != theirs.rpartition(".")[2]:
            raise InputError(f"the checkpoint has {theirs} in the place of {name}; choose the network it is of")
    return dict(zip(trunk, rest.values(), strict=True))

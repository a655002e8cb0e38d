"""Random directions whose scale is that of the network's own weights, so that planes of different networks can be compared.

H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018. A ReLU network
computes the same if one layer is multiplied by c > 0 and the next by 1/c, but a random direction of fixed length moves the two
networks by different shares of their weights. Filter normalisation makes the direction d of filter i of layer l

    d_li  <-  d_li / |d_li|  |w_li|
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secondorder.errors import check_flag, check_known, check_seed
from secondorder.landscape.checks import check_model, trainable


def _by_filter(d: Tensor, w: Tensor) -> Tensor:
    return (d.flatten(1) * (w.flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1))[:, None]).view_as(d)


def _by_layer(d: Tensor, w: Tensor) -> Tensor:
    return d * (w.norm() / d.norm())


def _unmoved(d: Tensor, w: Tensor) -> Tensor:
    return torch.zeros_like(d)


NORMALISATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"filter": _by_filter, "layer": _by_layer}
"""Name -> the direction d of a weight w, both float64 and of at least two dimensions, at its scale."""


def filter_normalised_direction(
    model: nn.Module, seed: int = 0, *, normalisation: str = "filter", vectors: bool = False
) -> dict[str, Tensor]:
    """A random Gaussian direction in which each filter is as long as the network's own filter, by parameter names.

    A filter is what a row of the first dimension of a weight is: the kernel of an output channel of a convolution, the weights of
    a neuron of a linear layer. The direction of a filter that is zero is zero. Two seeds give two directions that are nearly
    orthogonal, of many parameters (`LandscapePlane.cosine`).

    Args:
        model: whose parameters that require gradients are moved. It is only read.
        seed: of random numbers of its own, the same on every device.
        normalisation: "filter", or "layer", where a whole weight is as long as the network's.
        vectors: False leaves biases and the parameters of batch norm (all of at most one dimension) where they are, the published
            code's option `biasbn`, with which the paper's pictures were made; True moves each as if it were a single filter (the
            published code without that option moves them by themselves, without random numbers, instead).

    Returns:
        Tensors on the device and in the format of the parameters; zeros for vectors that stay.

    Raises:
        InputError: for a model without parameters that require gradients, and other arguments.
    """
    check_model(model)
    check_seed(seed)
    check_known("normalisation", normalisation, NORMALISATIONS)
    check_flag("vectors", vectors)
    source = torch.Generator().manual_seed(seed)
    direction = {}
    for name, p in trainable(model).items():
        d = torch.randn(p.shape, generator=source, dtype=torch.float64)  # for vectors too: others keep their numbers
        w = p.detach().cpu().double()
        at_scale = NORMALISATIONS[normalisation] if p.ndim > 1 else _by_layer if vectors else _unmoved
        direction[name] = at_scale(d, w).to(p.device, p.dtype)
    return direction

"""Whether the calls of a layer are all that a network does with its weight: else Kronecker factors would be of something else.

Index letters: n images of a trial, G groups, O outputs and D inputs of a layer (of a group). For random gradients u `[n, K]` at
the outputs, and scales c_n of the images,

    sum over uses of sum_n c_n s_n a_n^T = dW,    the gradient of W by autograd for c u,

with a the inputs of a layer's calls and s the gradients at their outputs for u. It holds with c = 1 if nothing but the calls uses
the weight, and with any c if the first dimension of a and s is that of the images, too.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secondorder.curvature.kronecker.layer_kinds import layer_kind
from secondorder.curvature.matrix_free.jacobian import Jacobian
from secondorder.curvature.matrix_free.layer_uses import LayerUse
from secondorder.curvature.matrix_free.linearisation import Linearisation
from secondorder.curvature.matrix_free.per_sample import without_batch
from secondorder.curvature.matrix_free.trial import sample_scales
from secondorder.errors import InputError

Layers = tuple[nn.Module, ...]
"""The layers that share one weight, most often one."""


def check_reads(part: Linearisation, layers: Mapping[str, tuple[Layers, str]]) -> None:
    """InputError for a parameter that a part of the batch uses more often than its layers are called."""
    elsewhere = part.used_elsewhere({name: shared for name, (shared, _) in layers.items()})
    if elsewhere:
        raise _refused(elsewhere[0])


def check_calls(jacobian: Jacobian, layers: Mapping[str, tuple[Layers, str]], by_image: bool) -> None:
    """InputError for a parameter whose gradient is not that of its layers' calls on a few images.

    Args:
        by_image: whether the sums over a layer's positions must be those of an image. Where images act on one another nothing
            tells.
    """
    if not jacobian.network.has_numbers:
        return
    part = jacobian.trial()
    shared_uses = {shared: [use for use in part.uses if use.layer in shared] for shared, _ in layers.values()}
    for name, (shared, _) in layers.items():
        if any(without_batch(use) for use in shared_uses[shared]):
            raise InputError(
                f"the layer of {name} is called without a batch: no Kronecker factors; give it one (x[None]), or leave it "
                "out of params"
            )
    tried = jacobian.random_pull_back(part)
    gradients = {id(use): s for use, s in zip(part.uses, tried.outputs, strict=True)}
    c = sample_scales(part.z, torch.Generator().manual_seed(1))
    scaled = dict(zip(layers, part.pull_back(c * tried.u, list(layers)), strict=True)) if by_image else {}
    for name, (shared, kind) in layers.items():
        calls = [(use, gradients[id(use)]) for use in shared_uses[shared]]
        if not _adds_up(calls, kind, tried.weights[name]):
            raise _refused(name)
        if by_image and not jacobian.coupled and not _is_by_image(calls, kind, c[:, 0], scaled[name]):
            raise InputError(
                f"the layer of {name} is called with inputs whose first dimension is not the image: what is summed over the "
                "positions of an image is wrong; use kfac_expand, which sums over all, or leave it out of params"
            )


def _adds_up(calls: Sequence[tuple[LayerUse, Tensor]], kind: str, truth: Tensor) -> bool:
    """Whether the calls' gradients are the parameter's, but for rounding: that of the sizes that cancel out, if they do."""
    tolerance = torch.finfo(truth.dtype).eps ** 0.5
    found = sum((_gradient(use, use.input, g, kind) for use, g in calls), start=torch.zeros_like(truth))
    error = (found - truth).abs().max()
    if error <= tolerance * truth.abs().max():
        return True
    size = sum((_gradient(use, use.input.abs(), g.abs(), kind) for use, g in calls), start=torch.zeros_like(truth))
    return bool(error <= tolerance * size.max())


def _is_by_image(calls: Sequence[tuple[LayerUse, Tensor]], kind: str, c: Tensor, truth: Tensor) -> bool:
    """Whether the same is true when every image has a scale."""
    if not all(len(use.input) == len(g) == len(c) for use, g in calls):
        return False
    return _adds_up([(use, g * c.view(-1, *[1] * (g.ndim - 1))) for use, g in calls], kind, truth)


def _gradient(use: LayerUse, a: Tensor, g: Tensor, kind: str) -> Tensor:
    """sum s a^T of a weight, sum s of a bias, in the parameter's shape."""
    described = layer_kind(use.layer)
    if kind == "bias":
        return described.output_vectors(g).sum((0, 2)).flatten()
    return described.weight(described.weight_gradient(a, g, bias=False))


def _refused(name: str) -> InputError:
    return InputError(
        f"the network uses {name} otherwise than by calling its layer (a weight that is tied by a function, a penalty), which "
        "Kronecker factors leave out; leave it out of params"
    )

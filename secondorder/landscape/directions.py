"""Directions in the space of a model's parameters: tensors by parameter names, in the shapes of the parameters.

A direction is a dict of parameter names, others stay where they are, or a list with a tensor for each parameter that requires
gradients, in the model's order.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from secondorder.accelerator import widest
from secondorder.curvature.matrix_free.frozen_network import chosen_names
from secondorder.errors import InputError, check_known

Direction = Mapping[str, Tensor] | Sequence[Tensor]


def parameter_directions(
    vectors: Tensor, model: nn.Module, params: Iterable[str] | None = None
) -> list[dict[str, Tensor]]:
    """Vectors over all entries of some parameters as directions, such as eigenvectors of a block of `curvature_blocks`.

    With ``top = top_eigenvalues(curvature_blocks(model, loss, batch, "hessian", params).whole, 2)`` the two directions
    ``parameter_directions(top.vectors, model, params)`` are those of the largest curvature: along one of them, of length 1, the
    second derivative of the loss is its eigenvalue. The sign of an eigenvector means nothing.

    Args:
        vectors: `[P]` or `[P, K]`, K vectors of the P entries of the parameters, in the model's order, each flattened row by row.
        model: whose parameters they are.
        params: names of these parameters, as they were given to `curvature_blocks`: one for a block of its own, None for all
            that require gradients.

    Returns:
        For each vector a dict of parameter names, in the model's order, to tensors of their shapes, views of `vectors`.

    Raises:
        InputError: where the sizes do not fit, and for names that are not in the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model {type(model).__name__}: must be a torch.nn.Module")
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or not vectors.is_floating_point():
        kind = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise InputError(f"vectors {kind}: must be a tensor [P] or [P, K] of floating-point numbers")
    named = dict(model.named_parameters())
    shapes = {name: named[name].shape for name in chosen_names(named, params)}
    size = sum(shape.numel() for shape in shapes.values())
    if len(vectors) != size:
        raise InputError(
            f"vectors of {len(vectors)} entries for {len(shapes)} parameters of {size}; name in params those that the block is of"
        )
    columns = vectors[:, None] if vectors.ndim == 1 else vectors
    parts = [column.split([shape.numel() for shape in shapes.values()]) for column in columns.unbind(1)]
    return [{name: part.reshape(shapes[name]) for name, part in zip(shapes, split, strict=True)} for split in parts]


def shifts_of(
    what: str, direction: Direction, named: Mapping[str, nn.Parameter], trainable: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """A direction by parameter names: copies in the format and on the device of the parameters.

    Args:
        what: the direction's name in messages.
        direction: by names among `named`, or a list in the order of `trainable`.
        named: parameters that may be moved.
        trainable: those that a list is of.

    Raises InputError for what is neither, and for shapes that are not those of the parameters.
    """
    if isinstance(direction, Mapping):
        for name in direction:
            check_known("parameter", name, named)
        given: dict[str, Tensor] = dict(direction)
        if not given:
            raise InputError(f"the {what} names no parameter, and moves nothing")
    elif isinstance(direction, list | tuple) and all(isinstance(d, Tensor) for d in direction):
        if len(direction) != len(trainable):
            raise _misfit(what, len(direction), len(trainable))
        given = dict(zip(trainable, direction, strict=True))
    else:
        raise InputError(
            f"{what} {type(direction).__name__}: must be a list of tensors, one for each trainable parameter, or a dict "
            "of them by parameter names"
        )
    for name, d in given.items():
        if not isinstance(d, Tensor) or d.is_complex() or d.is_meta:
            raise InputError(f"the {what} of {name} must be a tensor of real numbers")
        if d.shape != named[name].shape:
            raise _misfit(what, len(given), len(trainable), f"; {name}: {list(d.shape)} for {list(named[name].shape)}")
    return {name: d.detach().to(named[name].device, named[name].dtype, copy=True) for name, d in given.items()}


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The sum over all tensors together, a number on their device, in the longest format that it has."""
    wide = widest(left[0].device)
    zero = torch.zeros((), dtype=wide, device=left[0].device)
    return sum(((a.to(wide) * b.to(wide)).sum() for a, b in zip(left, right, strict=True)), zero)


def _misfit(what: str, tensors: int, parameters: int, where: str = "") -> InputError:
    return InputError(f"the {what} has {tensors} tensors that do not match the model's {parameters} parameters{where}")

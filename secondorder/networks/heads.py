"""The head of a network: a pooling by its name, or one of the user's own."""

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import nn

from secondorder.errors import InputError, check_number, check_whole, short
from secondorder.pooling import LAYOUTS, POOLINGS, pooling_head
from secondorder.pooling.heads import MOST_CHANNELS, check_options, check_pooling_name, output_size

Pooling = nn.Module | Callable[[int], nn.Module]
"""A head of one's own: features to vectors `[N, F]`, or what makes it from the number of channels."""

REDUCED_CHANNELS = 256  # published width of the covariance; features with no more channels are not reduced


def make_head(
    pooling: str | Pooling,
    shape: torch.Size,
    layout: str,
    reduced_channels: int | None,
    options: Mapping[str, object],
) -> tuple[nn.Module, int]:
    """The head for features of this shape `[N, ...]` and layout, and the size F of the vectors `[N, F]` that it makes.

    Raises InputError for a head for other channels or another layout, or one that does not make vectors.
    """
    channels = shape[layout.index("C")]
    if isinstance(pooling, str):
        width = choose_reduction(pooling, channels, reduced_channels)
        head = pooling_head(pooling, channels, width, **{"layout": layout, **options})  # type: ignore[arg-type]
    else:
        head = pooling if isinstance(pooling, nn.Module) else pooling(channels)  # type: ignore[assignment]
        if not isinstance(head, nn.Module):
            raise InputError(f"pooling made {type(head).__name__} of {channels} channels: must be an nn.Module")
    check_fits(head, channels, layout)
    size = getattr(head, "out_features", None)
    if not isinstance(size, int):
        parameter = next(head.parameters(), torch.empty(0))
        size = output_size(head, torch.ones(shape, dtype=parameter.dtype, device=parameter.device))
    return head, size


def check_fits(head: nn.Module, channels: int, layout: str) -> None:
    """InputError for a head whose own `in_channels` or `layout` is not that of the features."""
    expected, own = getattr(head, "in_channels", channels), getattr(head, "layout", layout)
    if own != layout:
        raise InputError(f"the head has layout {own!r}, the features have {layout!r} ({LAYOUTS[layout].meaning})")
    if expected != channels:
        raise InputError(f"the head is for {expected} channels, the features have {channels}")


def choose_reduction(pooling: str, channels: int, reduced_channels: int | None) -> int | None:
    """The width of the 1x1 reduction, None for no reduction; see `network` for the rule."""
    if reduced_channels is None:
        return REDUCED_CHANNELS if pooling != "gap" and channels > REDUCED_CHANNELS else None
    return reduced_channels or None


def check_pooling(
    name: str,
    function: Callable[..., nn.Module],
    pooling: object,
    reduced_channels: int | None,
    dropout: float | None,
    options: Mapping[str, object],
) -> None:
    """InputError for what `function`, called `name`, cannot make a head of.

    That is an unknown pooling or option, a width that is negative or no whole number, a dropout outside [0, 1); and for a head of
    one's own a width or options.
    """
    if not isinstance(pooling, str) and callable(pooling):
        if reduced_channels is not None or options:
            given = next(iter(options), "reduced_channels")
            raise InputError(
                f"{given[:40]!r} with a head of one's own, {short(pooling)}: it goes to {', '.join(POOLINGS)}; set it in the head"
            )
    else:
        check_pooling_name(pooling)
        known = {option: value for option, value in options.items() if option not in ("activation", "layout")}
        check_options(name, str(pooling), known, inspect.signature(function).parameters)
    if reduced_channels is not None and not (type(reduced_channels) is int and reduced_channels == 0):
        hint = "; or 0 (no reduction), or None (automatic)"
        check_whole("reduced_channels", reduced_channels, most=MOST_CHANNELS, hint=hint)
    if dropout is not None:
        check_number("dropout", dropout, 0, 1, hint="; or None (as published)")

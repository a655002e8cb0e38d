"""Classes and stability of a network along perturbation sequences, a few images at a time.

One call is one perturbation, so that a study can stop and go on between them. The five best classes of every frame are all that
is kept (6 MB for 10,000 images): flips and top-5 distances at any distance of frames come from them (`stability_of`), for the
whole set and image by image.

Index letters: ``N`` images, ``B`` images of a batch, ``J`` frames, ``C`` channels, ``H`` rows, ``W`` columns, ``K`` classes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondorder.data.images import Normalisation
from secondorder.errors import InputError, check_whole, short
from secondorder.robustness.checks import Indices
from secondorder.robustness.evaluation import logits_of, numbered_batches
from secondorder.robustness.sequences import comparison, perturb
from secondorder.robustness.stability import BEST, flips, ranked, top5_distances
from secondorder.robustness.streams import Batch

FRAME_VALUES = 2**23
"""Values of the frames that are made at a time, a byte each, of sequences of some 40 frames."""


@dataclass(frozen=True)
class Stability:
    """How a network's classes change along the sequences of one perturbation, float64 ``[N]`` on the CPU."""

    flips: Tensor
    """Share of the compared frames whose class is another."""
    distances: Tensor | None
    """Top-5 distance; None of a network of fewer than 6 classes."""

    @property
    def flip_probability(self) -> float:
        """FP on [0, 1]: the mean share of the compared frames whose class is another."""
        return float(self.flips.mean())

    @property
    def top5_distance(self) -> float | None:
        """T5D on [0, 15], the mean top-5 distance of the compared frames; None of a network of fewer than 6 classes."""
        return None if self.distances is None else float(self.distances.mean())


def stability_of(classes: Tensor, name: str, difficulty: int = 1) -> Stability:
    """Flips and top-5 distances along the sequences of one perturbation.

    Args:
        classes: ``[N, J, 5]``, or ``[N, J, 1]``, as of `sequence_classes` or `frame_classes`.
        name: key of `SEQUENCES`.
        difficulty: 1 to 3, which frames are compared (`comparison`).

    Raises:
        InputError: for other classes, an unknown perturbation, and a difficulty out of range.
    """
    against, distance = comparison(name, difficulty)
    if not isinstance(classes, Tensor) or classes.ndim != 3 or classes.shape[2] not in (1, BEST):
        raise InputError(
            f"classes are {short(classes)}; give those of sequence_classes or frame_classes, [N, frames, 5]"
        )
    distances = top5_distances(classes, against, distance) if classes.shape[2] == BEST else None
    return Stability(flips(classes[..., 0], against, distance), distances)


def sequence_stability(
    model: nn.Module,
    batches: Iterable[Batch],
    name: str,
    normalisation: Normalisation,
    difficulty: int = 1,
    *,
    seed: int = 0,
    indices: Indices | None = None,
    parameters: str | None = None,
    crop: int | None = None,
    batch_size: int = 256,
) -> Stability:
    """Flip probability and top-5 distance of a network along the sequences of one perturbation.

    It is `stability_of` the `sequence_classes`, whose arguments and errors it has.
    """
    classes = sequence_classes(
        *(model, batches, name, normalisation, difficulty),
        seed=seed,
        indices=indices,
        parameters=parameters,
        crop=crop,
        batch_size=batch_size,
    )
    return stability_of(classes, name, difficulty)


def frame_classes(
    model: nn.Module, frames: Iterable[Tensor], normalisation: Normalisation, *, batch_size: int = 256
) -> Tensor:
    """The five best classes of every frame in their order, int32 ``[N, J, 5]`` on the CPU; the best one alone of K < 6.

    Args:
        model: gives logits ``[B, K]``.
        frames: batches of sequences uint8 ``[B, J, C, H, W]``, white at 255, as of `read_sequence`.
        normalisation: mean and standard deviation of the network's training images; its ``maximum`` does not enter.
        batch_size: frames that the network is given at a time.

    Raises:
        InputError: for other frames or none, and a network that fails or returns no logits.
        NonFiniteError: for logits that are not finite.
    """
    check_whole("batch_size", batch_size)
    if not isinstance(frames, Iterable):
        raise InputError(f"frames are {short(frames)}; give batches of sequences, as of read_sequence")
    best: list[Tensor] = []
    with logits_of(model, normalisation) as logits:
        for sequences in frames:
            if not isinstance(sequences, Tensor) or sequences.dtype != torch.uint8 or sequences.ndim != 5:
                raise InputError(f"sequences are {short(sequences)}; give tensors uint8 [B, frames, C, H, W]")
            if best and sequences.shape[1] != best[0].shape[1]:
                raise InputError(
                    f"sequences of {sequences.shape[1]} frames after sequences of {best[0].shape[1]}; give one kind at a time"
                )
            order = torch.cat([_best(logits(part)) for part in sequences.flatten(0, 1).split(batch_size)])
            best.append(order.unflatten(0, sequences.shape[:2]))
    if not best:
        raise InputError("the batches have no sequences; at least 1 is needed")
    return torch.cat(best).cpu()


def sequence_classes(
    model: nn.Module,
    batches: Iterable[Batch],
    name: str,
    normalisation: Normalisation,
    difficulty: int = 1,
    *,
    seed: int = 0,
    indices: Indices | None = None,
    parameters: str | None = None,
    crop: int | None = None,
    batch_size: int = 256,
) -> Tensor:
    """`frame_classes` of the sequences that a perturbation makes of images, a few images at a time.

    Where difficulty is the distance of the frames that are compared, one call serves every difficulty.

    Args:
        model: gives logits ``[B, K]``.
        batches: images uint8 ``[B, C, H, W]``, white at 255, and labels ``[B]``, which do not enter.
        name: row of `SEQUENCES`.
        normalisation: mean and standard deviation of the network's training images; its ``maximum`` does not enter.
        difficulty: of a noise, 1 to 3.
        seed: of the random draws.
        indices: number of each image, on which its draws depend, in the order of the stream; None: 0, 1, ...
        parameters: set of parameters, as of `perturb`.
        crop: side of the frames, as of `perturb`.
        batch_size: frames that the network is given at a time.

    Raises:
        InputError: as `frame_classes` and `perturb`, and for indices fewer or more than images.
        NonFiniteError: for logits that are not finite.
    """

    def frames() -> Iterator[Tensor]:
        for images, _, numbers in numbered_batches(batches, indices):
            size = max(1, FRAME_VALUES // (40 * images[0].numel()))
            for part, chosen in zip(images.split(size), numbers.split(size), strict=True):
                yield perturb(part, name, difficulty, seed=seed, indices=chosen, parameters=parameters, crop=crop)

    return frame_classes(model, frames(), normalisation, batch_size=batch_size)


def _best(logits: Tensor) -> Tensor:
    """The five best classes of logits ``[B, K]`` in their order, int32 ``[B, 5]``; ``[B, 1]`` of fewer than 6 classes."""
    return ranked(logits)[:, : BEST if logits.shape[1] > BEST else 1].to(torch.int32)

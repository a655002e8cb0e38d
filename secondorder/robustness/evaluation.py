"""What a network does on corrupted and perturbed images: errors and flips of every image, a batch at a time.

One call is one corruption at its severities, or one perturbation, so that a study can stop and go on between them. Images come as
a stream of batches (`array_batches`, `split_batches`, the readers of the official sets), are corrupted when their turn comes, and
are forgotten. What is kept is a bit, or the five best classes, of each image: the means are the published quantities, and pairs
of networks can be compared image by image.

The network is evaluated in eval mode, on its own device and in its own floating-point type; every layer's mode is as before
afterwards. The device is waited for once, at the end.

Index letters: ``N`` images, ``B`` images of a batch, ``S`` severities, ``J`` frames, ``K`` classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secondorder.data.images import Normalisation
from secondorder.errors import InputError, NonFiniteError, check_whole, failures_of, short
from secondorder.robustness.corruptions import corrupt
from secondorder.robustness.metrics import SEVERITIES
from secondorder.robustness.sequences import perturb
from secondorder.robustness.stability import BEST, ranked
from secondorder.robustness.streams import Batch, checked_batches
from secondorder.training.evaluation import check_labels, checked_logits

FRAME_VALUES = 2**23
"""Values of frames, about, that are made at a time: 8 MiB as 8-bit images, some 100 MB while they are computed."""


def error_rate(model: nn.Module, batches: Iterable[Batch], normalisation: Normalisation) -> float:
    """The top-1 error on clean images or those of an official set: the mean of `mistakes`, whose arguments and errors it has."""
    return float(mistakes(model, batches, normalisation).double().mean())


def mistakes(model: nn.Module, batches: Iterable[Batch], normalisation: Normalisation) -> Tensor:
    """Whether the network misses the class of each image, bool ``[N]`` on the CPU.

    Args:
        model: gives logits ``[B, K]``.
        batches: images uint8 ``[B, C, H, W]``, white at 255, and labels ``[B]``.
        normalisation: mean and standard deviation of the network's training images; its ``maximum`` does not enter.

    Raises:
        InputError: for other batches or none, labels outside the classes, and a network that fails or returns no logits.
        NonFiniteError: for logits that are not finite.
    """
    wrong = []
    with _logits_of(model, normalisation) as logits:
        for images, labels in checked_batches(batches):
            wrong.append(_missed(logits(images), labels))
    return torch.cat(wrong).cpu()


def corruption_error_rates(
    model: nn.Module,
    batches: Iterable[Batch],
    corruption: str,
    normalisation: Normalisation,
    *,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    parameters: str | None = None,
) -> list[float]:
    """The top-1 error at each severity: means of `corruption_mistakes`, whose arguments and errors it has."""
    wrong = corruption_mistakes(
        *(model, batches, corruption, normalisation),
        severities=severities,
        seed=seed,
        indices=indices,
        parameters=parameters,
    )
    return wrong.double().mean(1).tolist()


def corruption_mistakes(
    model: nn.Module,
    batches: Iterable[Batch],
    corruption: str,
    normalisation: Normalisation,
    *,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    parameters: str | None = None,
) -> Tensor:
    """Whether the network misses the class of each image at each severity of a corruption, bool ``[S, N]`` on the CPU.

    Args:
        model: gives logits ``[B, K]``.
        batches: images uint8 ``[B, C, H, W]``, white at 255, and labels ``[B]``; read once.
        corruption: row of `CORRUPTIONS`.
        normalisation: mean and standard deviation of the network's training images; its ``maximum`` does not enter.
        severities: of the corruption; 0 leaves the images as they are.
        seed: of the random draws.
        indices: number of each image, on which its draws depend, in the order of the stream; None: 0, 1, ...
        parameters: set of parameters, as of `corrupt`.

    Raises:
        InputError: as `mistakes` and `corrupt`, for no severity, and indices fewer or more than images.
        NonFiniteError: for logits that are not finite.
    """
    severities = list(severities)
    if not severities:
        raise InputError("severities are empty; give some of 0 to 5")
    wrong: list[list[Tensor]] = [[] for _ in severities]
    with _logits_of(model, normalisation) as logits:
        for images, labels, numbers in _numbered(batches, indices):
            for row, severity in zip(wrong, severities, strict=True):
                corrupted = corrupt(images, corruption, severity, seed=seed, indices=numbers, parameters=parameters)
                row.append(_missed(logits(corrupted), labels))
    return torch.stack([torch.cat(row) for row in wrong]).cpu()


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
    best = []
    with _logits_of(model, normalisation) as logits:
        for sequences in frames:
            if not isinstance(sequences, Tensor) or sequences.dtype != torch.uint8 or sequences.ndim != 5:
                raise InputError(f"sequences are {short(sequences)}; give tensors uint8 [B, frames, C, H, W]")
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
    indices: Sequence[int] | None = None,
    parameters: str | None = None,
    crop: int | None = None,
    batch_size: int = 256,
) -> Tensor:
    """`frame_classes` of the sequences that a perturbation makes of images, a few images at a time.

    `sequence_stability` gives flips and distances of them. Where difficulty is the distance of frames, one call serves all.

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
        for images, _, numbers in _numbered(batches, indices):
            size = max(1, FRAME_VALUES // (40 * images[0].numel()))
            for part, chosen in zip(images.split(size), numbers.split(size), strict=True):
                yield perturb(part, name, difficulty, seed=seed, indices=chosen, parameters=parameters, crop=crop)

    return frame_classes(model, frames(), normalisation, batch_size=batch_size)


@contextmanager
def _logits_of(model: nn.Module, normalisation: Normalisation) -> Iterator[Callable[[Tensor], Tensor]]:
    """The network as a function of 8-bit images ``[B, C, H, W]``, in eval mode and without gradients inside.

    Raises NonFiniteError on exit where one of the logits was not finite.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {short(model)}; it must be a torch.nn.Module")
    modes = {layer: layer.training for layer in model.modules()}
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    device, dtype = parameter.device, parameter.dtype
    mean, std = (
        torch.tensor(v, dtype=dtype)[:, None, None].to(device) for v in (normalisation.mean, normalisation.std)
    )
    unordered: list[Tensor] = []

    def logits(images: Tensor) -> Tensor:
        if images.shape[1] != len(mean):
            raise InputError(
                f"images have {images.shape[1]} channels, the normalisation {len(mean)}; give the network's own"
            )
        standardised = images.to(device, non_blocking=True).to(dtype).div_(255).sub_(mean).div_(std)
        with failures_of(f"{type(model).__name__} on images {list(images.shape)}"):
            outputs = checked_logits(model(standardised), images)
        unordered.append(outputs.isfinite().all().logical_not())
        return outputs

    model.eval()
    try:
        with torch.no_grad():
            yield logits
    finally:
        for layer, training in modes.items():
            layer.training = training
    if unordered and bool(torch.stack(unordered).any()):
        raise NonFiniteError(f"logits of {type(model).__name__} are not finite: it has diverged; leave it out")


def _missed(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest of the logits ``[B, K]`` is another than the label's, bool ``[B]`` on their device."""
    check_labels(labels, logits.shape[1])
    return logits.argmax(1) != labels.to(logits.device)


def _best(logits: Tensor) -> Tensor:
    """The five best classes of logits ``[B, K]`` in their order, int32 ``[B, 5]``; ``[B, 1]`` of fewer than 6 classes."""
    return ranked(logits)[:, : BEST if logits.shape[1] > BEST else 1].to(torch.int32)


def _numbered(batches: Iterable[Batch], indices: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and numbers ``[B]`` of the images of each batch."""
    numbers = None if indices is None else torch.as_tensor(indices)
    start = 0
    for images, labels in checked_batches(batches):
        end = start + len(images)
        chosen = torch.arange(start, end) if numbers is None else numbers[start:end]
        if len(chosen) < len(images):
            raise InputError(f"{len(chosen) + start} indices for more images; give one for each")
        yield images, labels, chosen
        start = end
    if numbers is not None and len(numbers) != start:
        raise InputError(f"{len(numbers)} indices for {start} images; give one for each")

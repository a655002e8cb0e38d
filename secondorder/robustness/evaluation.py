"""Mistakes of a network on corrupted images, a batch at a time.

One call is one corruption at its severities, so that a study can stop and go on between them. Images come as a stream of batches
(`array_batches`, `split_batches`, `read_corruption`), are corrupted when their turn comes, and are forgotten. What is kept is a
bit of each image and severity: its mean is the error rate, and networks can be compared image by image.

The network is evaluated in eval mode, on its own device and in its own floating-point type; every layer's mode is as before
afterwards. The device is waited for at the end only.

Index letters: ``N`` images, ``B`` images of a batch, ``S`` severities, ``K`` classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secondorder.data.images import Normalisation
from secondorder.errors import InputError, NonFiniteError, failures_of, short
from secondorder.robustness.checks import Indices, checked_indices
from secondorder.robustness.corruptions import corrupt
from secondorder.robustness.metrics import SEVERITIES
from secondorder.robustness.streams import Batch, checked_batches
from secondorder.training.evaluation import check_labels, checked_logits


def error_rate(model: nn.Module, batches: Iterable[Batch], normalisation: Normalisation) -> float:
    """The top-1 error, a fraction, on clean images or those of an official set: the mean of `mistakes`.

    Arguments and errors are those of `mistakes`.
    """
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
    with logits_of(model, normalisation) as logits:
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
    indices: Indices | None = None,
    parameters: str | None = None,
) -> list[float]:
    """The top-1 error, a fraction, at each severity: means of `corruption_mistakes`, whose arguments and errors it has."""
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
    indices: Indices | None = None,
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
    if not isinstance(severities, Iterable) or not (severities := list(severities)):
        raise InputError(f"severities are {short(severities)}; give some of 0 to 5")
    wrong: list[list[Tensor]] = [[] for _ in severities]
    with logits_of(model, normalisation) as logits:
        for images, labels, numbers in numbered_batches(batches, indices):
            for row, severity in zip(wrong, severities, strict=True):
                corrupted = corrupt(images, corruption, severity, seed=seed, indices=numbers, parameters=parameters)
                row.append(_missed(logits(corrupted), labels))
    return torch.stack([torch.cat(row) for row in wrong]).cpu()


@contextmanager
def logits_of(model: nn.Module, normalisation: Normalisation) -> Iterator[Callable[[Tensor], Tensor]]:
    """The network as a function of 8-bit images ``[B, C, H, W]``, in eval mode and without gradients inside.

    Raises NonFiniteError on exit where one of the logits was not finite.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {short(model)}; it must be a torch.nn.Module")
    if not isinstance(normalisation, Normalisation):
        raise InputError(
            f"normalisation is {short(normalisation)}; give that of the training images, such as data.test.normalisation"
        )
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
        standardised = images.to(device, non_blocking=True).to(dtype).contiguous().div_(255).sub_(mean).div_(std)
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


def numbered_batches(batches: Iterable[Batch], indices: Indices | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and numbers ``[B]`` of the images of each batch."""
    try:
        count = 0 if indices is None else len(indices)
    except TypeError as error:  # a number, a generator, a tensor or array of one number
        raise InputError(f"indices are {short(indices)}; give a whole number for each image") from error
    numbers = None if indices is None else torch.tensor(checked_indices(indices, count), dtype=torch.int64)
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

"""What is wrong with other tasks, said before a network is trained for them: data that are missing, damaged or too few."""

from pathlib import Path

from secondorder.data import DATASETS, load_dataset
from secondorder.errors import InputError
from secondorder.transfer import CocoAnnotations
from studies.backbones import evenly_spaced
from studies.transfer.targets import OF_A_CLASS, annotations_of


def check_linear(name: str, root: Path | None, shots: int) -> None:
    """InputError unless a linear probe finds `shots` training samples of each of two classes or more, and one for its test."""
    if name in DATASETS:
        data = load_dataset(name, root)
        counts = {str(k): int((data.train.labels == k).sum()) for k in range(data.num_classes)}
    else:
        train, test = annotations_of(name, root, masks=False)
        counts = {word: min(count, OF_A_CLASS) for word, count in objects_of(train).items()}
        if not any(objects_of(test).values()):
            raise InputError(f"--linear {name}: {test.file.name} has no object but crowds to test on")
    if len(counts) < 2:
        raise InputError(f"--linear {name}: its only class is {next(iter(counts))}; a linear probe needs two")
    rarest = min(counts, key=lambda word: counts[word])
    if counts[rarest] < shots:
        raise InputError(
            f"--linear {name}: class {rarest!r} has {counts[rarest]} training samples (of a folder {OF_A_CLASS} at most, without "
            f"crowds), fewer than --shots {shots}"
        )


def check_scenes(flag: str, name: str, root: Path | None, masks: bool, test_images: int) -> None:
    """InputError unless a COCO-format folder has two training images, and objects to learn and among the test images."""
    if name in DATASETS:
        raise InputError(f"--{flag} {name}: images with a class each; a folder in COCO format is needed")
    train, test = annotations_of(name, root, masks)
    if len(train.images) < 2:
        raise InputError(f"--{flag} {name}: {train.file.name} has 1 image; 2 to train on are the least")
    shown = test.subset(evenly_spaced(len(test.images), test_images).tolist())
    for part, what in ((train, "training images"), (shown, "test images")):
        if not any(objects_of(part).values()):
            raise InputError(
                f"--{flag} {name}: none of the {len(part.images)} {what} has an object that is no crowd; correct "
                f"{part.file.name}, or use more images"
            )


def objects_of(annotations: CocoAnnotations) -> dict[str, int]:
    """How many objects, without crowds, there are of each class."""
    labels = [one.label for objects in annotations.objects for one in objects if not one.crowd]
    return {word: labels.count(label) for label, word in enumerate(annotations.classes, start=1)}

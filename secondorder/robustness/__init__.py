"""Robustness: images corrupted as in CIFAR-10-C and ImageNet-C, sequences as in CIFAR-10-P and ImageNet-P, and a network on them.

The same seed and index give an image the same pixels, in any batch or process.

    from secondorder.robustness import CORRUPTIONS, corrupt

    noisy = corrupt(images, "gaussian_noise", severity=3)  # uint8 [N, C, H, W] to the same
    for name, corruption in CORRUPTIONS.items():
        if not corruption.extra:  # the 15 of the mean corruption error
            half = corrupt(images[500:], name, 5, indices=range(500, 1000))  # equals corrupt(images, name, 5)[500:]

    frames = perturb(images, "tilt")  # uint8 [N, 31, C, H, W]

Errors of a network, one corruption or perturbation a call, and the numbers that papers give:

    rates = corruption_error_rates(model, split_batches(data.test), "fog", data.test.normalisation)
    mean_corruption_error({"fog": rates, ...}, reference_table)  # or "alexnet", or None
    sequence_stability(model, split_batches(data.test), "tilt", data.test.normalisation).flip_probability
"""

from secondorder.robustness.alexnet import ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS
from secondorder.robustness.corruptions import CORRUPTIONS, Corruption, corrupt
from secondorder.robustness.evaluation import corruption_error_rates, corruption_mistakes, error_rate, mistakes
from secondorder.robustness.metrics import (
    SEVERITIES,
    corruption_errors,
    mean_corruption_error,
    relative_corruption_errors,
    relative_mean_corruption_error,
)
from secondorder.robustness.official import corruptions_in, read_corruption, read_sequence
from secondorder.robustness.parameters import PARAMETERS, ParameterSet
from secondorder.robustness.sequences import SEQUENCES, Perturbation, comparison, perturb
from secondorder.robustness.stability import (
    flip_probabilities,
    flip_probability,
    flips,
    mean_flip_rate,
    mean_top5_distance,
    top5_distance,
    top5_distances,
)
from secondorder.robustness.streams import array_batches, split_batches
from secondorder.robustness.tracking import Stability, frame_classes, sequence_classes, sequence_stability, stability_of

__all__ = [
    "ALEXNET_CLEAN_ERROR",
    "ALEXNET_ERRORS",
    "CORRUPTIONS",
    "PARAMETERS",
    "SEQUENCES",
    "SEVERITIES",
    "Corruption",
    "ParameterSet",
    "Perturbation",
    "Stability",
    "array_batches",
    "comparison",
    "corrupt",
    "corruption_error_rates",
    "corruption_errors",
    "corruption_mistakes",
    "corruptions_in",
    "error_rate",
    "flip_probabilities",
    "flip_probability",
    "flips",
    "frame_classes",
    "mean_corruption_error",
    "mean_flip_rate",
    "mean_top5_distance",
    "mistakes",
    "perturb",
    "read_corruption",
    "read_sequence",
    "relative_corruption_errors",
    "relative_mean_corruption_error",
    "sequence_classes",
    "sequence_stability",
    "split_batches",
    "stability_of",
    "top5_distance",
    "top5_distances",
]

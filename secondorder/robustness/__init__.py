"""Robustness: images corrupted as in CIFAR-10-C and ImageNet-C, the same pixels for the same seed and index.

from secondorder.robustness import CORRUPTIONS, corrupt

noisy = corrupt(images, "gaussian_noise", severity=3)  # uint8 [N, C, H, W] to the same
for name, corruption in CORRUPTIONS.items():
    if not corruption.extra:  # the 15 of the mean corruption error
        half = corrupt(images[500:], name, 5, indices=range(500, 1000))  # equals corrupt(images, name, 5)[500:]
"""

from secondorder.robustness.corruptions import CORRUPTIONS, Corruption, corrupt
from secondorder.robustness.parameters import PARAMETERS, ParameterSet

__all__ = ["CORRUPTIONS", "PARAMETERS", "Corruption", "ParameterSet", "corrupt"]

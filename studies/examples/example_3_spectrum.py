"""
The spectrum of a curvature block
=================================

``curvature_blocks`` gives operators: products, dense matrices where they fit, and spectra by Lanczos, with errors,
where they do not.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from secondorder.curvature import curvature_blocks, spectral_density, spectral_summary
from secondorder.networks import network

torch.manual_seed(0)
batch = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
weight = "features.stage2.0.conv2.weight"
blocks = {}
for head in ("gap", "gcp"):
    model = network("cifar_resnet8", head, num_classes=10).eval()
    blocks[head] = curvature_blocks(model, nn.CrossEntropyLoss(), batch, "ggn", [weight])[weight]
summary = spectral_summary(blocks["gcp"])
print(f"largest {summary.largest.value:.3g}, trace {summary.trace.value:.3g}, condition {summary.condition.value:.3g}")

# %%
# Of the 9,216 directions of this block at most 72 have any curvature: 8 images, 9 independent outputs each.
for head, ggn in blocks.items():
    density = spectral_density(ggn)
    print(f"{head}: share of zero eigenvalues {density.zero_share.value:.4f}")
    curve = density.curve(scale="symlog")
    plt.plot(curve.position, curve.density, label=head)
plt.yscale("log")
plt.ylim(bottom=1e-6)
plt.xlabel("eigenvalue, decades from zero")
plt.ylabel("density")
plt.legend()

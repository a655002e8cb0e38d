"""
BackPACK through covariance pooling
===================================

BackPACK has no rule for a covariance or its root. ``backpack_quantity`` gives its extensions the missing ones for the
time of a call. Here the exact diagonal of the Gauss-Newton matrix is compared with the one that this package computes
without BackPACK.
"""

import matplotlib.pyplot as plt
import torch
from backpack.extensions import DiagGGNExact
from torch import nn

from secondorder.curvature import curvature_blocks
from secondorder.curvature.backpack import backpack_quantity, supports
from secondorder.networks import network

torch.manual_seed(0)
model = network("cifar_resnet8", "gcp", num_classes=10).double().eval()
batch = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))
loss, weight = nn.CrossEntropyLoss(), "features.stage2.0.conv1.weight"

print(supports(model, "DiagGGNExact"))
theirs = backpack_quantity(model, loss, batch, DiagGGNExact())[weight].flatten()
ours = curvature_blocks(model, loss, batch, "diagonal", [weight])[weight].diagonal()
print(f"largest difference: {(theirs - ours).abs().max() / ours.max():.1e} of the largest entry")
plt.loglog(ours, theirs, ".")
plt.xlabel("diagonal of the GGN, secondorder")
plt.ylabel("BackPACK")

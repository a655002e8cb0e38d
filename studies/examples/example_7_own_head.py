"""
A pooling head of your own, through everything
==============================================

A function from channels to a module is a pooling head: networks, curvature, landscapes and K-FAC take it as it is.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secondorder.curvature import curvature_blocks, top_eigenvalues
from secondorder.kfac import KFAC
from secondorder.landscape import feature_landscape
from secondorder.networks import network


class MeanAndSpread(nn.Module):
    """The mean and the standard deviation of each channel: [N, C, H, W] -> [N, 2 C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_features = 2 * channels

    def forward(self, x: Tensor) -> Tensor:
        """Pool a batch of maps."""
        return torch.cat([x.mean((2, 3)), (x.var((2, 3)) + 1e-5).sqrt()], 1)


model = network("cifar_resnet8", MeanAndSpread, num_classes=10).eval()
images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
weight = "features.stage2.0.conv2.weight"
hessian = curvature_blocks(model, nn.CrossEntropyLoss(), (images, labels), "hessian", [weight])[weight]
print("largest eigenvalue:", top_eigenvalues(hessian, 1).values)
print(feature_landscape(model, cross_entropy, images, labels, torch.logspace(-3, 0, 4), "descent").loss)
optimizer = KFAC(model)
optimizer.update_curvature(logits := model(images))
cross_entropy(logits, labels).backward()
optimizer.step()

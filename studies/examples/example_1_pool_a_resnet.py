"""
A ResNet with covariance pooling
================================

``replace_pooling`` puts a pooling head on a network that you have and keeps its weights. Here it is torchvision's
ResNet-18, fine-tuned for a moment on scikit-learn's digits; give it ``weights="DEFAULT"`` to start from ImageNet.
"""

import matplotlib.pyplot as plt
import torch
import torchvision
from torch.nn.functional import cross_entropy, interpolate

from secondorder.data import load_dataset
from secondorder.networks import replace_pooling

torch.manual_seed(0)
pretrained = torchvision.models.resnet18(weights=None)
model = replace_pooling(pretrained, "gcp", num_classes=10, reduced_channels=32, image_size=48)
print(model.head)  # 1x1 reduction, covariance, its square root, the upper triangle

# %%
# The classifier is new, so it learns faster than the layers below it.
images, labels = load_dataset("digits").train.plain(torch.arange(240))
images = interpolate(images.expand(-1, 3, -1, -1), size=48)
below = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
groups = [{"params": below, "lr": 0.01}, {"params": model.classifier.parameters(), "lr": 0.1}]
optimizer = torch.optim.SGD(groups, momentum=0.9)
losses = []
for batch in torch.randperm(len(images)).split(24):
    loss = cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
plt.plot(losses)
plt.xlabel("step")
plt.ylabel("training loss")

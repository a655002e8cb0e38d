"""
K-FAC in ten lines
==================

``KFAC`` is an optimiser as any other, with one line more: it is told the logits before the backward pass.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from secondorder.data import load_dataset
from secondorder.kfac import KFAC
from secondorder.networks import network

images, labels = load_dataset("digits").train.plain(torch.arange(1024))

for name in ("K-FAC", "AdamW"):
    torch.manual_seed(0)
    model = network("digits_tiny", "gcp", num_classes=10, in_channels=1)
    optimizer = KFAC(model) if name == "K-FAC" else torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
    losses = []
    for _ in range(4):
        for batch in torch.randperm(1024).split(64):
            optimizer.zero_grad()
            logits = model(images[batch])
            if isinstance(optimizer, KFAC):
                optimizer.update_curvature(logits)
            loss = cross_entropy(logits, labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    plt.semilogy(losses, label=name)
plt.xlabel("step")
plt.ylabel("training loss")
plt.legend()

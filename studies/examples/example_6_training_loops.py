"""
K-FAC in training loops of other libraries
==========================================

Wherever a loss is computed, ``update_curvature`` goes before it is returned: in ``training_step`` of a
LightningModule, or in ``compute_loss`` of a Hugging Face Trainer. The loop around it is the library's, and stays as
it is.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secondorder.data import load_dataset
from secondorder.kfac import KFAC, KFACPreconditioner
from secondorder.networks import network

images, labels = load_dataset("digits").train.plain(torch.arange(256))


def step(model: nn.Module, curvature: KFAC | KFACPreconditioner, batch: Tensor) -> Tensor:
    """The body of ``training_step`` or ``compute_loss``."""
    curvature.update_curvature(logits := model(images[batch]))
    return cross_entropy(logits, labels[batch])


# %%
# A LightningModule returns ``KFAC`` from ``configure_optimizers``. A Trainer makes its own optimiser: there
# ``KFACPreconditioner`` changes the gradients before its step, in the callback ``on_pre_optimizer_step``.
for trainer in (False, True):
    model = network("digits_tiny", "gcp", num_classes=10, in_channels=1)
    curvature = KFACPreconditioner(model) if trainer else KFAC(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01) if isinstance(curvature, KFACPreconditioner) else curvature
    for batch in torch.randperm(256).split(64):
        optimizer.zero_grad()
        (loss := step(model, curvature, batch)).backward()
        if trainer:
            curvature.step()
        optimizer.step()
    print(f"{type(curvature).__name__}: last loss {loss.item():.3f}")

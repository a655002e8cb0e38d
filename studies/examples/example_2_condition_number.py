"""
A square root is an isometry, nearly
====================================

The Jacobian of the covariance S of features X has the condition number sqrt(l_max / l_min) of its eigenvalues l. That
of the square root of S is at most sqrt(2), whatever the features: among all powers of S only the root does this. Five
Newton-Schulz steps, which is what is trained with in practice, are far from it where eigenvalues are small.
"""

import matplotlib.pyplot as plt
import torch

from secondorder.preconditioning import head_spectrum

torch.manual_seed(0)
decays = torch.linspace(0, 3, 13, dtype=torch.float64)  # decades between the largest and the smallest feature
scales = 10 ** (-decays[:, None] * torch.linspace(0, 1, 16, dtype=torch.float64))
maps = scales[:, :, None, None] * torch.randn(16, 8, 8, dtype=torch.float64)  # [13, 16, 8, 8]

for head, name in (("covariance", "covariance"), ("gcp", "root, 5 steps"), ("gcp_exact", "root, exact")):
    plt.loglog(10**decays, head_spectrum(maps, head).condition, marker="o", label=name)
plt.axhline(2**0.5, color="grey", linestyle=":", label="sqrt(2)")
plt.xlabel("largest / smallest feature")
plt.ylabel("condition number of the Jacobian")
plt.legend()

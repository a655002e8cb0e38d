"""Which way of computing Newton-Schulz is faster, from measurements.

CPU: forward + backward of the fused head, float32, one thread (AMD EPYC with AVX-512, MKL; medians of interleaved runs), as
time by matrix products / time through eigenvalues for n x n matrices, n = min(channels, positions):

    steps    n = 16    36      49      64      81      128     196
    1        0.49      0.41    0.47    0.56    0.53    0.64    1.17
    2        0.63      0.54    0.60    0.86    0.78    0.87    0.72
    3        0.73      0.68    0.86    1.04    1.16    1.09    1.32
    4        0.76      0.76    0.96    1.04    1.06    1.33    2.34
    5        0.88      0.87    1.06    1.22    1.56    1.65    1.99
    7        1.03      1.2     1.4     1.32    1.79    2.05    2.49
    10       1.20      1.46    1.81    2.27    2.59    2.81    3.28

CUDA (not measured): matrix products, for which the published iteration was designed, as long as they are stable
(`newton_schulz.STABLE_STEPS`).
The space of positions instead of channels pays exactly when there are fewer of them: at M / C = 0.9, 1.0, 1.1 it is 1.1-1.2
times faster, level and 1.2 times slower, for products, eigenvalues and C = 16..256 alike.
"""

import torch

EIGENVALUES_FROM = {1: 10**9, 2: 10**9, 3: 64, 4: 56, 5: 48, 6: 32}
"""Steps of Newton-Schulz -> size n from which eigenvalues are faster on the CPU; from any size for more steps."""


def eigenvalues_are_faster(size: int, num_iter: int, device: torch.device) -> bool:
    """Whether K steps on `size` x `size` matrices are faster through eigenvalues than by products."""
    return device.type == "cpu" and size >= EIGENVALUES_FROM.get(num_iter, 0)


def gram_is_faster(channels: int, positions: int) -> bool:
    """Whether to work on the Gram matrix of the positions instead of the covariance of the channels."""
    return isinstance(positions, int) and positions < channels  # a number that a traced program leaves open is neither

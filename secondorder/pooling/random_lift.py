"""The dimension control of covariance pooling: a fixed random second-order lift of a pooled vector."""

import math

import torch
from torch import Tensor, nn

from secondorder.errors import InputError, check_whole
from secondorder.matrix_power.transforms import full_precision, known_shape, result_dtype, widened
from secondorder.pooling.layout import check_numbers

MOST_CHANNELS = 2**11
"""Channels of a lift: a bound on the rotation, which takes O(C^3) to make."""
MOST_SEED = 2**63 - 1


class RandomLift(nn.Module):
    """y = (z, s u_i u_j for i < j) with u = Q z: `[N, C] -> [N, C (C + 1) / 2]`, Q a fixed random rotation.

    A control for the size of the classifier: of the mean of the positions it makes as many features as the upper triangle of a
    covariance has, and knows nothing of the covariance. The products (q_i . z)(q_j . z) of orthonormal directions, the rows of Q,
    are uncorrelated for normal isotropic z, where those of independent directions are not and train less stably; with z itself
    beside them the classifier can do what it could of z alone. They need one matrix C x C, and O(C^2) operations a sample.

    The scale makes the lift as large as GCP on typical features, unit normal numbers after a ReLU, of which each channel has mean
    1 / sqrt(2 pi) and variance 1/2 - 1 / (2 pi). There |z|^2 = C / (2 pi), GCP has |S^(1/2)|^2 = tr S = C (pi - 1) / (2 pi), and
    |y|^2 = |z|^2 + s^2 |z|^4 / 2 for generic Q, so that

        s^2 = 2 (tr S - |z|^2) / |z|^4 = 4 pi (pi - 2) / C.

    Q is drawn from a generator of its own: it depends on C and `seed` alone, whatever the state and default type of torch, and is
    rounded to float32. It is a buffer of the state_dict, because a decomposition differs in the last bits between machines.
    Computed in float32 under autocast. Raises InputError for sizes and seeds that are no whole numbers, or too large.

    Args:
        channels: C of the vectors, at most MOST_CHANNELS.
        seed: of the rotation.
    """

    rotation: Tensor
    pairs: Tensor

    def __init__(self, channels: int, seed: int = 0) -> None:
        super().__init__()
        check_whole("channels", channels, most=MOST_CHANNELS)
        check_whole("seed", seed, least=0, most=MOST_SEED)
        self.channels = channels
        self.out_features = channels * (channels + 1) // 2
        self.seed = seed
        self.scale = math.sqrt(4 * math.pi * (math.pi - 2) / channels)
        self.register_buffer("rotation", random_rotation(channels, seed))
        row, column = torch.triu_indices(channels, channels, offset=1).unbind()
        self.register_buffer("pairs", row * channels + column, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """The features `[N, C (C + 1) / 2]`. Raises InputError unless z is `[N, C]`."""
        return lifted(z, self.rotation, self.pairs, self.scale)

    def extra_repr(self) -> str:
        """The sizes and the seed, as text."""
        return f"channels={self.channels}, out_features={self.out_features}, seed={self.seed}"


def random_rotation(channels: int, seed: int) -> Tensor:
    """An orthogonal matrix `[C, C]`, uniformly distributed, the same for the same seed up to rounding to float32."""
    generator = torch.Generator("cpu").manual_seed(seed)
    normal = torch.empty(channels, channels, dtype=torch.float64, device="cpu")
    Q = nn.init.orthogonal_(normal, generator=generator).float()
    return torch.empty(channels, channels).copy_(Q)  # of the default type, on the default device


def lifted(z: Tensor, Q: Tensor, pairs: Tensor, scale: float) -> Tensor:
    """(z, s u_i u_j) of vectors z `[N, C]`; `pairs` are the places i C + j of a flattened matrix. One node of a traced graph."""
    check_numbers(z, "the random lift")
    shape, channels = known_shape(z), known_shape(Q)[1]
    if len(shape) != 2 or shape[1] != channels:
        raise InputError(f"the random lift needs vectors [N, {channels}], got shape {list(z.shape)}")
    dtype = result_dtype(z)
    with full_precision(z):
        z = widened(z)
        u = z @ Q.to(z.dtype).mT
        # by way of u u^T, because the gradient of a gather would be a sum in no fixed order on accelerators
        products = (u[:, :, None] * u[:, None, :]).flatten(1).index_select(1, pairs)
        return torch.cat([z, scale * products], 1).to(dtype)


torch.fx.wrap("lifted")

"""The input factor of a 3x3 convolution without im2col: sum_nt a a^T is an autocorrelation of the input.

Entry ((c, i, j), (d, k, m)), where i, k are rows and j, m columns of the kernel, is sum_t x_c(t + (i, j) - 1) x_d(t + (k, m) - 1)
over the positions t. It depends on the shift s = (k - i, m - j) but for the window of t: R(s) = sum_p x_c(p) x_d(p + s) over
all p of the map, less the last row of p for i = 0 and the first for i = 2. These rows meet anything only where i = k, because
otherwise their partners lie outside of the map. Columns likewise; a corner, taken off twice, is put back.

One weight gradient of a 3x5 convolution of x with itself gives R for all shifts that do not go up, and the others are their
transposes: 15 C^2 products a position instead of the 81 C^2 of im2col.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

SMALLEST_SAMPLE = 128
"""Numbers of a sample, C H W, from which it is faster than im2col."""
SHIFT = torch.tensor([[2, 3, 4], [1, 2, 3], [0, 1, 2]])
"""k - i + 2 for i, k = 0, 1, 2."""


def autocorrelation_applies(layer: nn.Conv2d) -> bool:
    """Whether the layer is a 3x3 convolution of stride 1 with one row of zeros around, ungrouped and undilated."""
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == layer.dilation == (1, 1)
        and layer.padding in ((1, 1), "same")
        and layer.padding_mode == "zeros"
        and layer.groups == 1
    )


def autocorrelation_factor(x: Tensor) -> Tensor:
    """sum_nt a a^T `[9 C, 9 C]` for the 3x3 patches a of x `[N, C, H, W]` with one row of zeros around."""
    C, H, W = x.shape[1:]
    R = conv2d_weight(F.pad(x, (0, 0, 0, 2)), (C, C, 3, 5), x, padding=(0, 2)).permute(2, 3, 0, 1)
    # R[k - i + 2, m - j + 2]; a shift upwards is the transpose of one downwards.
    R = torch.cat([R[1:].flip(0, 1).mT, R])
    A = R[SHIFT[:, None, :, None], SHIFT[None, :, None, :]]  # [i, j, k, m, C, C]
    rows, columns = x[:, :, [H - 1, 0]], x[..., [W - 1, 0]]
    same_row, same_column = A.diagonal(0, 0, 2), A.diagonal(0, 1, 3)  # [j, m, C, C, i], [i, k, C, C, j]
    same_row[..., ::2] -= _lags(rows.movedim(2, 0)).movedim(2, -1)
    same_column[..., ::2] -= _lags(columns.movedim(3, 0)).movedim(2, -1)
    corners = rows[..., [W - 1, 0]].flatten(2).permute(2, 1, 0)
    same_row.diagonal(0, 0, 1)[..., ::2, ::2] += (corners @ corners.mT).unflatten(0, (2, 2)).permute(2, 3, 0, 1)
    return A.permute(4, 0, 1, 5, 2, 3).reshape(9 * C, 9 * C)


def _lags(edges: Tensor) -> Tensor:
    """sum_np x_c(p) x_d(p + m - j) `[j, m, 2, C, C]` along two edges `[2, N, C, L]` of the map."""
    x = F.pad(edges.transpose(1, 2), (0, 2)).flatten(2)
    ahead = torch.stack([x[..., : x.shape[-1] - k] @ x[..., k:].mT for k in range(3)])
    return torch.cat([ahead[1:].flip(0).mT, ahead])[SHIFT]  # lags from -2 to 2


def autocorrelation_is_faster(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether the autocorrelation applies and beats im2col: measured on a CPU, one thread, float32, as its share of the time.

        side of the map     2       3       4       5       6       7       8       16
        3 channels          1.4     1.3     1.3     1.1     0.92    0.85    1.1     0.40
        16 channels         1.25    0.86    0.63    0.44    0.21    0.16    0.14    0.14
        64 channels         0.25    0.26    0.21    0.31    0.21    0.19    0.22    0.15
        256 channels        0.20    0.26    0.31    0.33    0.25    0.26    0.25    -
        512 channels        0.51    0.48    0.58    0.49    0.42    0.39    0.29    -

    128 samples, 32 of them from 256 channels. CUDA: not measured, im2col.
    """
    return autocorrelation_applies(layer) and x.device.type == "cpu" and x[0].numel() >= SMALLEST_SAMPLE

"""The input factor of a 3x3 convolution without im2col: sum_nt a a^T is an autocorrelation of the input.

Entry ((c, i, j), (d, k, m)), where i, k are rows and j, m columns of the kernel, is sum_t x_c(t + (i, j) - 1) x_d(t + (k, m) - 1)
over the positions t. It depends on the shift s = (k - i, m - j) but for the window of t: R(s) = sum_p x_c(p) x_d(p + s) over
all p of the map, less the last row of p for i = 0 and the first for i = 2. These rows meet anything only where i = k, because
otherwise their partners lie outside of the map. Columns likewise; a corner, taken off twice, is put back.

One weight gradient of a 3x5 convolution of x with itself gives R for all shifts that do not go up, and the others are their
transposes: 15 C^2 products a position instead of the 81 C^2 of im2col.
"""

import itertools

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

SMALLEST_SAMPLE = 128
"""Numbers of a sample, C H W, from which it is faster than im2col."""


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
    # R[..., k - i, m - j + 2]; a shift upwards is the transpose of one downwards.
    R = conv2d_weight(F.pad(x, (0, 0, 0, 2)), (C, C, 3, 5), x, padding=(0, 2))
    rows, columns = {0: H - 1, 2: 0}, {0: W - 1, 2: 0}
    row = {i: _lags(x[:, :, r]) for i, r in rows.items()}
    column = {j: _lags(x[..., c]) for j, c in columns.items()}
    A = x.new_empty(C, 3, 3, C, 3, 3)
    for i, k, j, m in itertools.product(range(3), repeat=4):
        if i > k:
            continue
        block = R[:, :, k - i, m - j + 2]
        if i == k and i in rows:
            block = block - (row[i][m - j] if m >= j else row[i][j - m].mT)
        if j == m and j in columns:
            block = block - column[j][k - i]
        if i == k and j == m and i in rows and j in columns:
            corner = x[:, :, rows[i], columns[j]]
            block = block + corner.mT @ corner
        A[:, i, j, :, k, m] = block
        if k > i:
            A[:, k, m, :, i, j] = block.mT
    return A.view(9 * C, 9 * C)


def _lags(edge: Tensor) -> list[Tensor]:
    """sum_np x_c(p) x_d(p + k) `[C, C]` for the shifts k = 0, 1, 2 along an edge `[N, C, L]` of the map."""
    x = F.pad(edge.transpose(0, 1), (0, 2)).flatten(1)
    return [x[:, : x.shape[1] - k] @ x[:, k:].mT for k in range(3)]


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

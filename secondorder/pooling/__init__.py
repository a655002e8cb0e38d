"""Pooling heads: global average pooling and global covariance pooling (GCP), and the leaf modules they are made of."""

from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout
from secondorder.pooling.covariance import Covariance
from secondorder.pooling.heads import POOLINGS, PoolingHead, pooling_head
from secondorder.pooling.matrix_function import MatrixLogarithm, MatrixPower, MatrixSquareRoot
from secondorder.pooling.upper_triangle import UpperTriangle

__all__ = [
    "POOLINGS",
    "AdaptiveChannelDropout",
    "Covariance",
    "MatrixLogarithm",
    "MatrixPower",
    "MatrixSquareRoot",
    "PoolingHead",
    "UpperTriangle",
    "pooling_head",
]

"""Pooling heads: global average pooling and global covariance pooling (GCP), and the leaf modules they are made of."""

from secondorder.pooling.adaptive_channel_dropout import AdaptiveChannelDropout
from secondorder.pooling.covariance import Covariance
from secondorder.pooling.head import PoolingHead
from secondorder.pooling.heads import POOLINGS, pooling_head
from secondorder.pooling.layout import LAYOUTS, AsMaps
from secondorder.pooling.matrix_function import MatrixLogarithm, MatrixPower, MatrixSquareRoot
from secondorder.pooling.random_lift import RandomLift
from secondorder.pooling.upper_triangle import UpperTriangle

__all__ = [
    "LAYOUTS",
    "POOLINGS",
    "AdaptiveChannelDropout",
    "AsMaps",
    "Covariance",
    "MatrixLogarithm",
    "MatrixPower",
    "MatrixSquareRoot",
    "PoolingHead",
    "RandomLift",
    "UpperTriangle",
    "pooling_head",
]

"""The segmentation head's convolution, batch norm and ReLU."""

from dpt.kernels.conv_norm_relu import conv_norm_relu, conv_norm_relu_ref, conv_norm_relu_training, conv_norm_relu_training_ref

from ..shapes import EPS, Map, feature_map, norm, weight
from . import Op, both

OPS = (
    Op(
        "conv_norm_relu",
        lambda s: [
            *(feature_map(s.batch, s.channels, s.side, s.side), weight(s.out_channels, s.channels, 3, 3)),
            *norm(s.out_channels),
        ],
        **both(conv_norm_relu, conv_norm_relu_ref, lambda f, s, x, w, *n: f(x, w, norm=(*n, EPS))),
        shapes=(Map(1, 256, 256, 256), Map(1, 256, 192, 128), Map(16, 256, 256, 256)),
        toy=Map(2, 32, 6, 16),
    ),
    Op(
        "conv_norm_relu, batch statistics",
        lambda s: [
            *(feature_map(s.batch, s.channels, s.side, s.side), weight(s.out_channels, s.channels, 3, 3)),
            *norm(s.out_channels)[:2],
        ],
        **both(conv_norm_relu_training, conv_norm_relu_training_ref, lambda f, s, x, w, *n: f(x, w, norm=(*n, EPS))[0]),
        shapes=(Map(2, 256, 256, 256),),
        toy=Map(2, 32, 6, 16),
    ),
)

"""The depth head behind its first convolution's input: resize, convolutions and activation."""

from dpt.kernels.depth_head import depth_head, depth_head_ref

from ..shapes import Map, bias, feature_map, gain, weight
from . import Op, both

OPS = (
    Op(
        "depth_head",
        lambda s: [
            *(feature_map(s.batch, s.channels, s.side, s.side), weight(32, s.channels, 3, 3), bias(32)),
            *(weight(1, 32, 1, 1), gain(1)),
        ],
        **both(depth_head, depth_head_ref, lambda f, s, *t: f(*t, (s.out_side, s.out_side))),
        shapes=(Map(1, 128, 192, 0, 384), Map(1, 128, 296, 0, 518), Map(1, 32, 296, 0, 518), Map(16, 128, 192, 0, 384)),
        toy=Map(2, 32, 6, 0, 12),
    ),
)

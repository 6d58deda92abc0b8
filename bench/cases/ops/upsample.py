"""The decoder's bilinear upsampling, alone and behind the 1x1 convolution of a fusion block."""

import torch.nn.functional as F

from dpt.kernels.upsample import conv1x1, upsample_bilinear, upsample_bilinear_ref

from ..shapes import Map, bias, feature_map, weight
from . import Op, both

OPS = (
    Op(
        "upsample_bilinear",
        lambda s: [feature_map(s.batch, s.channels, s.side, s.side)],
        **both(upsample_bilinear, upsample_bilinear_ref, lambda f, s, x: f(x, (s.out_side, s.out_side), True)),
        shapes=(Map(1, 256, 64, 0, 128), Map(1, 256, 128, 0, 256), Map(16, 256, 64, 0, 128)),
        toy=Map(2, 32, 6, 0, 12),
    ),
    Op(
        "conv1x1_upsample",
        lambda s: [
            *(feature_map(s.batch, s.channels, s.side, s.side), weight(s.out_channels, s.channels, 1, 1), bias(s.out_channels)),
        ],
        call=lambda s, x, w, b: upsample_bilinear(conv1x1(x, w, b), (s.out_side, s.out_side), True),
        # In the plain model's order.
        plain=lambda s, x, w, b: F.conv2d(F.interpolate(x, size=(s.out_side, s.out_side), mode="bilinear", align_corners=True), w, b),
        shapes=(Map(1, 256, 128, 256, 256), Map(16, 256, 128, 256, 256)),
        toy=Map(2, 32, 6, 32, 12),
    ),
)

"""Reassemble's readout projection and transposed convolution."""

from dpt.kernels.reassemble import readout_project, readout_project_ref, transposed_conv, transposed_conv_ref

from ..shapes import ENCODERS, Argument, Map, Tokens, bias, feature_map, tokens, weight
from . import Op, both

OPS = (
    Op(
        "readout_project",
        lambda s: [tokens(s.batch, s.tokens, s.width), weight(s.width, 2 * s.width), bias(s.width)],
        **both(readout_project, readout_project_ref, lambda f, s, *t: f(*t)),
        shapes=ENCODERS[:3],
        toy=Tokens(2, 17, 64, 2),
    ),
    Op(
        "transposed_conv",
        lambda s: [
            *(feature_map(s.batch, s.channels, s.side, s.side), bias(s.channels)),
            Argument((s.channels, s.channels, *(s.out_side // s.side,) * 2), scale=s.channels**-0.5),
        ],
        **both(transposed_conv, transposed_conv_ref, lambda f, s, x, b, w: f(x, w, b)),
        shapes=(Map(1, 96, 32, 0, 128), Map(1, 192, 32, 0, 64), Map(1, 256, 24, 0, 96), Map(16, 96, 32, 0, 128)),
        toy=Map(2, 16, 3, 0, 12),
    ),
)

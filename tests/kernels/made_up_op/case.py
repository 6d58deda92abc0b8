"""LayerScale's factors, by themselves."""

from dpt.kernels.channel_scale import channel_scale, channel_scale_ref

from ..shapes import Tokens, gain, tokens
from . import Op, both

OPS = (
    Op(
        "channel_scale",
        lambda s: [tokens(s.batch, s.tokens, s.width), gain(s.width)],
        **both(channel_scale, channel_scale_ref, lambda f, s, x, gamma: f(x, gamma)),
        shapes=(Tokens(1, 1025, 768, 12),),
        toy=Tokens(2, 5, 32, 2),
    ),
)

"""LayerNorm and the projection to queries, keys and values."""

from dpt.kernels.layernorm_linear import layernorm_linear, layernorm_linear_ref

from ..shapes import ENCODERS, EPS, Tokens, bias, gain, tokens, weight
from . import Op, both

OPS = (
    Op(
        "layernorm_linear",
        lambda s: [tokens(s.batch, s.tokens, s.width), gain(s.width), bias(s.width), weight(3 * s.width, s.width), bias(3 * s.width)],
        **both(layernorm_linear, layernorm_linear_ref, lambda f, s, *t: f(*t, EPS)),
        shapes=ENCODERS,
        toy=Tokens(2, 17, 64, 2),
    ),
)

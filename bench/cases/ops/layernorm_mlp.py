"""LayerNorm, MLP and residual of an encoder block."""

from dpt.kernels.layernorm_mlp import layernorm_mlp, layernorm_mlp_ref

from ..shapes import ENCODERS, EPS, Tokens, bias, gain, tokens, weight
from . import Op, both

OPS = (
    Op(
        "layernorm_mlp",
        lambda s: [
            *(tokens(s.batch, s.tokens, s.width), gain(s.width), bias(s.width)),
            *(weight(4 * s.width, s.width), bias(4 * s.width), weight(s.width, 4 * s.width), bias(s.width)),
        ],
        **both(layernorm_mlp, layernorm_mlp_ref, lambda f, s, *t: f(*t, EPS)),
        shapes=ENCODERS,
        toy=Tokens(2, 17, 64, 2),
    ),
)

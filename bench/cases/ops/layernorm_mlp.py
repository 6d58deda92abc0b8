"""LayerNorm, MLP and residual of an encoder block, with each activation."""

from dpt.kernels.layernorm_mlp import layernorm_mlp, layernorm_mlp_ref

from ..shapes import ENCODERS, EPS, Argument, Tokens, bias, gain, tokens, weight
from . import Op, both


def _arguments(s: Tokens, hidden: int, matrices: int = 1) -> list[Argument]:
    return [
        *(tokens(s.batch, s.tokens, s.width), gain(s.width), bias(s.width)),
        *(weight(matrices * hidden, s.width), bias(matrices * hidden), weight(s.width, hidden), bias(s.width)),
    ]


TOY = Tokens(2, 17, 64, 2)

OPS = (
    Op(
        "layernorm_mlp",
        lambda s: _arguments(s, 4 * s.width),
        **both(layernorm_mlp, layernorm_mlp_ref, lambda f, s, *t: f(*t, EPS)),
        shapes=ENCODERS,
        toy=TOY,
    ),
    Op(
        "layernorm_mlp, tanh GELU",
        lambda s: _arguments(s, 269 * s.width // 72 // 8 * 8),  # 4304 of 1152, as the SO400m has
        **both(layernorm_mlp, layernorm_mlp_ref, lambda f, s, *t: f(*t, EPS, activation="gelu_tanh")),
        shapes=(Tokens(1, 1025, 1152, 16),),
        toy=TOY,
    ),
    Op(
        "layernorm_mlp, SwiGLU",
        lambda s: _arguments(s, 8 * s.width // 3 // 8 * 8, matrices=2),  # 4096 of 1536, as DINOv2's g has
        **both(layernorm_mlp, layernorm_mlp_ref, lambda f, s, *t: f(*t, EPS, activation="swiglu")),
        shapes=(Tokens(1, 1025, 1536, 24),),
        toy=TOY,
    ),
)

"""LayerNorm and the projection to queries, keys and values; and with the rotation of the first two."""

from dpt.kernels.layernorm_linear import layernorm_linear, layernorm_linear_ref

from ..shapes import DINOV3, ENCODERS, EPS, Argument, Tokens, bias, gain, rotation, tokens, weight
from . import Op, both


def _arguments(s: Tokens) -> list[Argument]:
    return [tokens(s.batch, s.tokens, s.width), gain(s.width), bias(s.width), weight(3 * s.width, s.width), bias(3 * s.width)]


OPS = (
    Op(
        "layernorm_linear",
        _arguments,
        **both(layernorm_linear, layernorm_linear_ref, lambda f, s, *t: f(*t, EPS)),
        shapes=ENCODERS,
        toy=Tokens(2, 17, 64, 2),
    ),
    Op(
        "layernorm_linear, rotated",
        lambda s: [*_arguments(s), rotation(s)],
        **both(layernorm_linear, layernorm_linear_ref, lambda f, s, *t: f(*t[:-1], EPS, rotation=t[-1].float())),
        shapes=DINOV3,
        toy=Tokens(2, 17, 128, 2),
    ),
)

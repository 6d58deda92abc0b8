"""Attention's projection with the residual added."""

from dpt.kernels.linear_residual import linear_residual, linear_residual_ref

from ..shapes import ENCODERS, Tokens, bias, tokens, weight
from . import Op, both

OPS = (
    Op(
        "linear_residual",
        lambda s: [tokens(s.batch, s.tokens, s.width), weight(s.width, s.width), bias(s.width), tokens(s.batch, s.tokens, s.width)],
        **both(linear_residual, linear_residual_ref, lambda f, s, *t: f(*t)),
        shapes=ENCODERS,
        toy=Tokens(2, 17, 64, 2),
    ),
)

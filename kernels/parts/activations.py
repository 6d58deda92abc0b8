"""The activations, of values in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(values):
    # The zero has the values' dtype: a maximum with 0.0 would promote half precision to float32. NaN stays NaN.
    return tl.maximum(values, tl.full([], 0, values.dtype), propagate_nan=tl.PropagateNan.ALL).to(values.dtype)


INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _reciprocal(values):
    """Of what is at least 1: two instructions, where a division is five."""
    return tl.rsqrt(values * values)


@triton.jit
def _normal(x):
    """(exp(-x^2 / 2), the standard normal distribution's tail beyond |x|).

    The tail by a polynomial in 1 / (1 + p |x|) (Abramowitz and Stegun 7.1.26): fewer than half of erf's instructions, and nothing is
    cancelled as in 1 + erf. GELU is exact to 3.3e-7; by erf in float32 to 4.5e-7.
    """
    t = _reciprocal(1.0 + 0.2316418883 * tl.abs(x))
    bell = tl.exp2(x * x * (-0.5 * LOG2_E))
    polynomial = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    return bell, t * polynomial * bell


@triton.jit
def gelu(x):
    """x times the normal distribution's function of x, the exact GELU."""
    _, tail = _normal(x)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail


@triton.jit
def gelu_slope(x):
    bell, tail = _normal(x)
    return tl.where(x < 0, tail, 1.0 - tail) + x * bell * INVERSE_SQRT_TWO_PI


@triton.jit
def sigmoid(x):
    return _reciprocal(1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    share = sigmoid(x)
    return share + x * share * (1.0 - share)


@triton.jit
def gelu_tanh(x):
    """GELU with tanh in place of erf: x * (1 + tanh(u)) / 2 = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    return x * sigmoid(x * (1.5957691216057308 + 0.07135481282663443 * x * x))


@triton.jit
def gelu_tanh_slope(x):
    """sigmoid(2 u) + x * sigmoid(2 u) * sigmoid(-2 u) * (2 u)', of |x|, at which nothing cancels; from 20 on 1, or of -|x| 0."""
    size = tl.minimum(tl.abs(x), 20.0)
    other = tl.exp2((size * (1.5957691216057308 + 0.07135481282663443 * size * size)) * -LOG2_E)
    share = _reciprocal(1.0 + other)
    bend = size * share * share * other * (1.5957691216057308 + 0.21406443847990328 * size * size)
    return tl.where(x < 0, other * share - bend, share + bend)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """GELU of x, for "gelu" and "gelu_tanh"; x itself for "none"."""
    if ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    return x


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The derivative of "gelu" or "gelu_tanh" at x."""
    if ACTIVATION == "gelu":
        x = gelu_slope(x)
    else:
        x = gelu_tanh_slope(x)
    return x

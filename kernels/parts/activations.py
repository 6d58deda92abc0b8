"""The activations, of values in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(values):
    # The zero has the values' dtype: a maximum with 0.0 would promote half precision to float32. NaN stays NaN.
    return tl.maximum(values, tl.full([], 0, values.dtype), propagate_nan=tl.PropagateNan.ALL).to(values.dtype)


SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * INVERSE_SQRT_TWO_PI

"""Where a pixel of a resized map lies in its source, and what it is there: align_corners or not, as in ``upsample``.

Coordinates are divided as integers, so that they are exact: the sides are at most ``launch.MAX_SIDE``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bilinear_source(position, source_side, target_side, ALIGN_CORNERS: tl.constexpr):
    """(lower index, upper index, weight of the upper) in a source of ``source_side``, for target positions >= 0."""
    if ALIGN_CORNERS:
        numerator = position * (source_side - 1)
        denominator = tl.maximum(target_side - 1, 1)
    else:
        numerator = tl.maximum((2 * position + 1) * source_side - target_side, 0)
        denominator = 2 * target_side
    lower = numerator // denominator
    weight = (numerator - lower * denominator).to(tl.float32) / (denominator * 1.0)
    return lower, tl.minimum(lower + 1, source_side - 1), weight


@triton.jit
def first_target(source, source_side, target_side, ALIGN_CORNERS: tl.constexpr):
    """The first target position whose lower index is at least ``source``, 0 for ``source`` <= 0; of a source of side 1, at most 0."""
    if ALIGN_CORNERS:
        denominator = tl.maximum(source_side - 1, 1)
        numerator = source * (target_side - 1)
    else:
        denominator = 2 * source_side
        numerator = (2 * source + 1) * target_side - source_side
    return tl.maximum(numerator + denominator - 1, 0) // denominator


@triton.jit
def gather_bilinear(x_ptr, source_y, source_x, stride_y, stride_x, channel_offset, mask):
    """The interpolated (pixels, channels) tile, float32; ``source_y`` and ``source_x`` are triples of bilinear_source, a pixel an entry.

    A neighbour whose weight is 0 is not read: were it infinite, its product would be NaN.
    """
    top, bottom, weight_y = source_y
    left, right, weight_x = source_x
    top = x_ptr + top.to(tl.int64)[:, None] * stride_y + channel_offset[None, :]
    bottom = x_ptr + bottom.to(tl.int64)[:, None] * stride_y + channel_offset[None, :]
    left = left.to(tl.int64)[:, None] * stride_x
    right = right.to(tl.int64)[:, None] * stride_x
    weight_x = weight_x[:, None]
    weight_y = weight_y[:, None]
    on_right = mask & (weight_x != 0)
    below = mask & (weight_y != 0)
    upper = (1 - weight_x) * tl.load(top + left, mask, 0.0).to(tl.float32)
    upper += weight_x * tl.load(top + right, on_right, 0.0).to(tl.float32)
    lower = (1 - weight_x) * tl.load(bottom + left, below, 0.0).to(tl.float32)
    lower += weight_x * tl.load(bottom + right, below & on_right, 0.0).to(tl.float32)
    return (1 - weight_y) * upper + weight_y * lower

"""Bilinear resize of channels-last maps to any size, and the 1x1 convolution before it.

    y[b, c, i, j] = sum over the four source pixels around (s(i), s(j)) of weight * x[b, c, ., .]
    align_corners:      s(i) = i (H - 1) / (H' - 1), and 0 if H' = 1
    not align_corners:  s(i) = max((i + 1/2) H / H' - 1/2, 0)

x (B, C, H, W) -> (B, C, H', W'), both channels_last; another layout is copied once. Pixels that lie a multiple of 16 channels apart
(``parts.maps``), as those of logits do, lie so in y too: what is between them is resized with them, by wide loads and stores. Coordinates
are divided as integers, so that they are exact and the backward kernel gives every target pixel the neighbours that the forward kernel gave
it; interpolation is in float32. Moves B*C*(H*W + H'*W') elements, once each from DRAM; 7 FLOPs a target element. The backward gathers, over
the target pixels that touched a source pixel, instead of adding atomically: its sums come in a fixed order, and it writes B*C*H*W elements
once, without zeroing them first. Nothing is saved for it.

The 1x1 convolution commutes with the resize, whose weights sum to 1, so it goes first, on the smaller map: for x2, a quarter of the
work. It stays a GEMM of the library on the (B*H*W, C) view, and is not fused: a fused kernel would either repeat the product for every
target pixel (4 times the work, 6.4 GFLOP more for 256 channels at 256x256 than the 17 MB it saves take to move), or interpolate a tile
that a kernel cannot index on the chip except by a second product. The smaller map is a fifth of the traffic and fits the L2 cache.

All fusion levels but the last need no kernel of this file: residual_conv gathers their map where it is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .cpu.convolution import resized
from .parts.bilinear import bilinear_source, first_target, gather_bilinear
from .parts.maps import channels_last, channels_last_or_padded, empty_channels_last, is_padded, padded_channels, with_padding
from .parts.pointwise import pointwise


def upsample_bilinear_ref(x: torch.Tensor, size: Sequence[int], align_corners: bool) -> torch.Tensor:
    """The resize in plain PyTorch. Same arguments and result as :func:`upsample_bilinear`."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


SIDES = ["source_height", "source_width", "target_height", "target_width"]


@triton.jit(do_not_specialize=SIDES)
def _upsample_kernel(
    x_ptr,  # (B, H, W, C)
    out_ptr,  # (B, H', W', C)
    source_height,
    source_width,
    target_height,
    target_width,
    CHANNELS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pixels = target_height * target_width
    blocks = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    nearest = tl.minimum(pixel, pixels - 1)  # keeps the integers of the padding in range
    source_y = bilinear_source(nearest // target_width, source_height, target_height, ALIGN_CORNERS)
    source_x = bilinear_source(nearest % target_width, source_width, target_width, ALIGN_CORNERS)
    x_ptr += image * source_height * source_width * CHANNELS
    value = gather_bilinear(x_ptr, source_y, source_x, source_width * CHANNELS, CHANNELS, channel, mask)
    out_ptr += image * pixels * CHANNELS
    tl.store(out_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_of(source, target, source_side, target_side, ALIGN_CORNERS: tl.constexpr):
    """The weight of source position ``source`` in target position ``target``; 0 where there is no such target."""
    lower, upper, weight = bilinear_source(target, source_side, target_side, ALIGN_CORNERS)
    found = tl.where(lower == source, 1 - weight, 0.0) + tl.where(upper == source, weight, 0.0)
    return tl.where(target < target_side, found, 0.0)


@triton.jit(do_not_specialize=[*SIDES, "window_y", "window_x"])
def _upsample_backward_kernel(
    grad_ptr,  # (B, H', W', C): with respect to the resized map
    out_ptr,  # (B, H, W, TAPS * TAPS, C)
    source_height,
    source_width,
    target_height,
    target_width,
    window_y,  # the most target rows that touch a source row
    window_x,
    CHANNELS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    TAPS: tl.constexpr,  # 1, or the side of a zero-padded convolution's window: then the gradient is shifted by each tap
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pixels = source_height * source_width
    blocks = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.program_id(2)
    shift_y = tap // TAPS - TAPS // 2
    shift_x = tap % TAPS - TAPS // 2
    row = pixel // source_width
    column = pixel % source_width
    first_row = first_target(row - 1, source_height, target_height, ALIGN_CORNERS)
    first_column = first_target(column - 1, source_width, target_width, ALIGN_CORNERS)
    inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    grad_ptr += image * target_height * target_width * CHANNELS
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for y in range(window_y):
        target_row = first_row + y
        weight_y = _weight_of(row, target_row, source_height, target_height, ALIGN_CORNERS)
        grad_row = target_row - shift_y
        weight_y = tl.where((grad_row >= 0) & (grad_row < target_height), weight_y, 0.0)
        for x in range(window_x):
            target_column = first_column + x
            weight_x = _weight_of(column, target_column, source_width, target_width, ALIGN_CORNERS)
            grad_column = target_column - shift_x
            weight = tl.where((grad_column >= 0) & (grad_column < target_width), weight_y * weight_x, 0.0)
            offset = (grad_row * target_width + grad_column).to(tl.int64)[:, None] * CHANNELS + channel[None, :]
            touched = inside & (weight != 0)[:, None]
            total += weight[:, None] * tl.load(grad_ptr + offset, mask=touched, other=0.0).to(tl.float32)
    out_ptr += ((image * pixels + pixel) * TAPS * TAPS + tap)[:, None] * CHANNELS + channel[None, :]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=inside)


def _partial(channels: int) -> bool:
    """Whether the last block of 64 channels would be half empty."""
    return 0 < channels % 64 <= 32


def _forward(x: torch.Tensor, height: int, width: int, align_corners: bool) -> torch.Tensor:
    seen, x = x.shape[1], with_padding(x)
    batch, channels, source_height, source_width = x.shape
    out = empty_channels_last(x, channels, height, width)
    options = launch.config("upsample_bilinear", launch.device_family(x.device), x.dtype, partial=_partial(channels))
    grid = (batch * triton.cdiv(height * width, options["BLOCK_P"]), triton.cdiv(channels, options["BLOCK_C"]))
    sides = (source_height, source_width, height, width)
    launch.launch(_upsample_kernel, grid, x, out, *sides, CHANNELS=channels, ALIGN_CORNERS=align_corners, **options)
    return out[:, :seen]


def _window(source_side: int, target_side: int, align_corners: bool) -> int:
    """The most target positions whose lower or upper neighbour is one source position."""
    if source_side == 1:
        return target_side
    numerator, denominator = (target_side - 1, source_side - 1) if align_corners else (target_side, source_side)
    return max(triton.cdiv(2 * numerator, denominator), 1)


def upsample_backward(grad: torch.Tensor, source_size: tuple[int, int], align_corners: bool, taps: int = 1) -> torch.Tensor:
    """The gradient of the map that was resized to ``grad``'s size, (B, taps*taps*C, H, W) channels-last.

    With ``taps=3``, for each of the nine taps of a convolution with zero padding that follows the resize, tap by tap along the channels:
    the gradient of what that tap saw, had it been resized by itself.
    """
    seen, grad = grad.shape[1], channels_last(grad) if taps > 1 else with_padding(channels_last_or_padded(grad))
    batch, channels, height, width = grad.shape
    source_height, source_width = source_size
    out = empty_channels_last(grad, taps * taps * channels, source_height, source_width)
    options = launch.config("upsample_bilinear_backward", launch.device_family(grad.device), grad.dtype, partial=_partial(channels))
    grid = (
        batch * triton.cdiv(source_height * source_width, options["BLOCK_P"]),
        triton.cdiv(channels, options["BLOCK_C"]),
        taps * taps,
    )
    windows = (_window(source_height, height, align_corners), _window(source_width, width, align_corners))
    sides = (source_height, source_width, height, width, *windows)
    launch.launch(_upsample_backward_kernel, grid, grad, out, *sides, CHANNELS=channels, ALIGN_CORNERS=align_corners, TAPS=taps, **options)
    return out[:, : taps * taps * seen]


@torch.library.custom_op("dpt::upsample_bilinear", mutates_args=())
def _upsample(x: torch.Tensor, height: int, width: int, align_corners: bool) -> torch.Tensor:
    return _forward(x, height, width, align_corners)


def _empty(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What a map is resized to: padded, if it is."""
    channels = padded_channels(x.shape[1]) if is_padded(x) else x.shape[1]
    return empty_channels_last(x, channels, height, width)[:, : x.shape[1]]


@_upsample.register_fake
def _(x, height, width, align_corners):
    return _empty(x, height, width)


@torch.library.custom_op("dpt::upsample_bilinear_backward", mutates_args=())
def upsample_bilinear_backward(grad: torch.Tensor, height: int, width: int, align_corners: bool) -> torch.Tensor:
    """The gradient of the map (B, C, height, width) that :func:`upsample_bilinear` resized, from that of its result."""
    return upsample_backward(grad, (height, width), align_corners)


@upsample_bilinear_backward.register_fake
def _(grad, height, width, align_corners):
    return _empty(channels_last_or_padded(grad), height, width)


def _save(ctx, inputs, output) -> None:
    x, _, _, ctx.align_corners = inputs
    ctx.source_size = x.shape[2:]


def _differentiate(ctx, grad):
    return upsample_bilinear_backward(grad, *ctx.source_size, ctx.align_corners), None, None, None


_upsample.register_autograd(_differentiate, setup_context=_save)


@launch.planned
def upsample_bilinear(x: torch.Tensor, size: Sequence[int], align_corners: bool) -> torch.Tensor:
    """``x`` (B, C, H, W) resized bilinearly to ``size`` = (H', W'): larger, smaller or the same. Channels-last, in ``x``'s dtype.

    Source coordinates as in ``torch.nn.functional.interpolate``. A layout other than channels-last is copied once. Differentiable, with
    gradients that are the same in every run.

    Raises:
        TypeError: ``x`` is not float32, float16 or bfloat16, or ``size`` not of integers.
        ValueError: ``x`` is not (B, C, H, W), or a side is not from 1 to 32767.
    """
    launch.check_map("x", x)
    height, width = launch.check_size("size", size)
    if not launch.runs_kernels(x, "upsample"):
        return resized(x, (height, width), align_corners)
    return _upsample(x, height, width, align_corners)


@launch.planned
def conv1x1(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, padded: bool = False) -> torch.Tensor:
    """The 1x1 convolution of ``x`` (B, C, H, W) by ``weight`` (O, C, 1, 1) and ``bias`` (O,) or None: (B, O, H, W), channels-last.

    A product of matrices on the channels-last memory, which the library ends with the bias: no convolution is planned. ``padded``: the
    result's pixels are a multiple of 16 channels apart, if O is 16 or more, for wide loads of what reads it. Differentiable. Under autocast
    x is taken in autocast's dtype, and the parameters are as they are.
    """
    return pointwise(channels_last(x).permute(0, 2, 3, 1), weight.flatten(1), bias, padded=padded).permute(0, 3, 1, 2)

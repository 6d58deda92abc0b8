"""Bilinear resize of channels-last maps to any size, and the 1x1 convolution before it.

    y[b, c, i, j] = sum over the four source pixels around (s(i), s(j)) of weight * x[b, c, ., .]
    align_corners:      s(i) = i (H - 1) / (H' - 1), and 0 if H' = 1
    not align_corners:  s(i) = max((i + 1/2) H / H' - 1/2, 0)

x (B, C, H, W) -> (B, C, H', W'), both channels_last; another layout is copied once. Coordinates are divided as integers, so that they are
exact and the backward kernel gives every target pixel the neighbours that the forward kernel gave it; interpolation is in float32.
Moves B*C*(H*W + H'*W') elements, once each from DRAM; 7 FLOPs a target element. The backward gathers, over the target pixels that
touched a source pixel, instead of adding atomically: its sums come in a fixed order, and it writes B*C*H*W elements once, without
zeroing them first. Nothing is saved for it.

The 1x1 convolution commutes with the resize, whose weights sum to 1, so it goes first, on the smaller map: for x2, a quarter of the
work. It stays a GEMM of the library on the (B*H*W, C) view, and is not fused: a fused kernel would either repeat the product for every
target pixel (4 times the work, 6.4 GFLOP more for 256 channels at 256x256 than the 17 MB it saves take to move), or interpolate a tile
that a kernel cannot index on the chip except by a second product. The smaller map is a fifth of the traffic and fits the L2 cache.

All fusion levels but the last need no kernel of this file: residual_conv gathers their map where it is added.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .tools.workload import BACKWARD, FORWARD, RARE, Inputs, Workload, by_autograd, combinations

MAX_SIDE = 32767  # 2 * side * side stays below 2^31, in which the kernels compute source coordinates


def upsample_bilinear_ref(x: torch.Tensor, size: Sequence[int], align_corners: bool) -> torch.Tensor:
    """The resize in plain PyTorch. Same arguments and result as :func:`upsample_bilinear`."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


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


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its memory is dense and channels-last, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """An uninitialised (B, channels, height, width) map, channels-last, of the batch, dtype and device of ``like``."""
    return torch.empty((like.shape[0], channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def check_size(name: str, size: Sequence[int]) -> tuple[int, int]:
    """``size`` as (height, width); TypeError unless it holds integers, ValueError unless it is two sides of 1 to 32767."""
    if not all(isinstance(side, (int, torch.SymInt)) for side in size):  # not converted: an exported graph keeps its sides open
        raise TypeError(f"{name}={tuple(size)}: must be two integers")
    if len(size) != 2 or not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"{name}={tuple(size)}: must be (height, width), each from 1 to {MAX_SIDE}")
    return size[0], size[1]


def check_map(name: str, x: torch.Tensor) -> None:
    """TypeError unless ``x`` has a dtype of the kernels, ValueError unless it is (B, C, H, W) with C >= 1 and sides of 1 to 32767."""
    if x.dtype not in launch.DTYPES:
        raise TypeError(f"{name} is {x.dtype}: must be one of {', '.join(map(str, launch.DTYPES))}")
    # Compared, not converted to int: an exported graph keeps its sides open.
    if x.dim() != 4 or x.shape[1] == 0 or not all(1 <= side <= MAX_SIDE for side in x.shape[2:]):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be (B, C, H, W), C at least 1, H and W from 1 to {MAX_SIDE}")


def _forward(x: torch.Tensor, height: int, width: int, align_corners: bool) -> torch.Tensor:
    x = channels_last(x)
    batch, channels, source_height, source_width = x.shape
    out = empty_channels_last(x, channels, height, width)
    options = launch.config("upsample_bilinear", launch.device_family(x.device), x.dtype, C=channels)
    grid = (batch * triton.cdiv(height * width, options["BLOCK_P"]), triton.cdiv(channels, options["BLOCK_C"]))
    sides = (source_height, source_width, height, width)
    launch.launch(_upsample_kernel, grid, x, out, *sides, CHANNELS=channels, ALIGN_CORNERS=align_corners, **options)
    return out


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
    grad = channels_last(grad)
    batch, channels, height, width = grad.shape
    source_height, source_width = source_size
    out = empty_channels_last(grad, taps * taps * channels, source_height, source_width)
    options = launch.config("upsample_bilinear_backward", launch.device_family(grad.device), grad.dtype, C=channels)
    grid = (
        batch * triton.cdiv(source_height * source_width, options["BLOCK_P"]),
        triton.cdiv(channels, options["BLOCK_C"]),
        taps * taps,
    )
    windows = (_window(source_height, height, align_corners), _window(source_width, width, align_corners))
    sides = (source_height, source_width, height, width, *windows)
    launch.launch(_upsample_backward_kernel, grid, grad, out, *sides, CHANNELS=channels, ALIGN_CORNERS=align_corners, TAPS=taps, **options)
    return out


@torch.library.custom_op("dpt::upsample_bilinear", mutates_args=())
def _upsample(x: torch.Tensor, height: int, width: int, align_corners: bool) -> torch.Tensor:
    return _forward(x, height, width, align_corners)


@_upsample.register_fake
def _(x, height, width, align_corners):
    return empty_channels_last(x, x.shape[1], height, width)


@torch.library.custom_op("dpt::upsample_bilinear_backward", mutates_args=())
def _upsample_backward(grad: torch.Tensor, height: int, width: int, align_corners: bool) -> torch.Tensor:
    return upsample_backward(grad, (height, width), align_corners)


@_upsample_backward.register_fake
def _(grad, height, width, align_corners):
    return empty_channels_last(grad, grad.shape[1], height, width)


def _save(ctx, inputs, output) -> None:
    x, _, _, ctx.align_corners = inputs
    ctx.source_size = x.shape[2:]


def _differentiate(ctx, grad):
    return _upsample_backward(grad, *ctx.source_size, ctx.align_corners), None, None, None


_upsample.register_autograd(_differentiate, setup_context=_save)


def upsample_bilinear(x: torch.Tensor, size: Sequence[int], align_corners: bool) -> torch.Tensor:
    """``x`` (B, C, H, W) resized bilinearly to ``size`` = (H', W'): larger, smaller or the same. Channels-last, in ``x``'s dtype.

    Source coordinates as in ``torch.nn.functional.interpolate``. A layout other than channels-last is copied once. Differentiable, with
    gradients that are the same in every run.

    Raises:
        TypeError: ``x`` is not float32, float16 or bfloat16, or ``size`` not of integers.
        ValueError: ``x`` is not (B, C, H, W), or a side is not from 1 to 32767.
    """
    check_map("x", x)
    height, width = check_size("size", size)
    if not launch.runs_kernels(x, "upsample"):
        return upsample_bilinear_ref(x, (height, width), align_corners)
    return _upsample(x, height, width, align_corners)


def conv1x1(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The 1x1 convolution of ``x`` (B, C, H, W) by ``weight`` (O, C, 1, 1) and ``bias`` (O,) or None: (B, O, H, W), channels-last.

    A product of matrices on the channels-last memory, which the library ends with the bias: no convolution is planned. Differentiable.
    """
    return F.linear(channels_last(x).permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def conv1x1_upsample(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: Sequence[int], align_corners: bool
) -> torch.Tensor:
    """The 1x1 convolution of ``x`` (B, C, H, W) by ``weight`` (O, C, 1, 1) and ``bias`` (O,), resized to ``size``: (B, O, H', W').

    Equal to the convolution of the resized map, at the work of the smaller one. Errors as of :func:`upsample_bilinear`.
    """
    check_map("x", x)
    return upsample_bilinear(conv1x1(x, weight, bias), size, align_corners)


# (dtype, C, align_corners, passes) that are compiled. Left out, for CI's time: the other products of these. Either width is one block of
# the table, coordinates are integers that no dtype enters, and a dtype is a conversion at the loads and the store; nine taps are the
# depth head's, which aligns corners and has few channels.
COMPILED = (
    (torch.bfloat16, 256, True, ("forward", "gradient")),
    (torch.bfloat16, 256, False, ("forward", "gradient")),
    (torch.bfloat16, 32, True, ("forward", "gradient", "nine taps")),
    (torch.float16, 256, True, ("forward",)),
    (torch.float16, 32, True, ("nine taps",)),
    (torch.float32, 256, False, ("forward", "gradient")),
    (torch.float32, 32, True, ("nine taps",)),
)


def compile_cases(family: str) -> Iterable[launch.CompileCase]:
    """Every shipped configuration, forward and backward, at the sizes of a fusion level and of the head's nine taps."""
    for dtype, channels, align_corners, passes in COMPILED:
        x = torch.empty(2, channels, 24, 32, dtype=dtype, device="meta", memory_format=torch.channels_last)
        launchers = {
            "forward": (_forward, 48, 64, align_corners),
            "gradient": (upsample_backward, (12, 16), align_corners),
            "nine taps": (upsample_backward, (12, 16), align_corners, 3),
        }
        for name in passes:
            launcher, *arguments = launchers[name]
            variant = f"{name} C={channels} align_corners={align_corners} {str(dtype).removeprefix('torch.')}"
            yield from launch.record(family, variant, launcher, x, *arguments, tensor_cores=False, async_copies=False)


def _resize_arguments(inputs: Inputs, batch: int, channels: int, side: int, size: int) -> dict[str, Any]:
    return {"x": inputs.map(batch, channels, side, side), "height": size, "width": size, "align_corners": True}


def _gradient_arguments(inputs: Inputs, batch: int, channels: int, side: int, size: int, taps: int) -> dict[str, Any]:
    return {"grad": inputs.map(batch, channels, size, size), "source_size": (side, side), "align_corners": True, "taps": taps}


def _forward_ref(x: torch.Tensor, height: int, width: int, align_corners: bool) -> torch.Tensor:
    return upsample_bilinear_ref(x, (height, width), align_corners)


def _upsample_backward_ref(grad: torch.Tensor, source_size: tuple[int, int], align_corners: bool, taps: int) -> torch.Tensor:
    """:func:`upsample_backward` by autograd: each tap is resized by itself, and sees the gradient moved by its place in the window."""
    (batch, channels, height, width), reach = grad.shape, taps // 2
    padded = F.pad(grad, (reach,) * 4)
    parts = []
    for dy, dx in itertools.product(range(taps), repeat=2):
        moved = padded[:, :, 2 * reach - dy :][:, :, :height, 2 * reach - dx :][..., :width]
        source = grad.new_zeros((batch, channels, *source_size))
        parts += by_autograd(functools.partial(upsample_bilinear_ref, size=(height, width), align_corners=align_corners), [source], moved)
    return torch.cat(parts, dim=1)


# 4 to 32 elements a thread.
CANDIDATES = [
    candidate
    for candidate in combinations([{}], BLOCK_P=(16, 32, 64, 128, 256), BLOCK_C=(32, 64, 128, 256), num_warps=(4, 8), num_stages=(1,))
    if 4 <= candidate["BLOCK_P"] * candidate["BLOCK_C"] // (32 * candidate["num_warps"]) <= 32
]
NARROW_CANDIDATES = [candidate for candidate in CANDIDATES if candidate["BLOCK_C"] == 32]


def tuning_space() -> Iterator[Workload]:
    """The last level of the neck at 512 and 518 pixels, batch 1 and 16; few channels; and what training adds: both gradients."""
    shows = {"tensor_cores": False, "async_copies": False}
    wide = [candidate for candidate in CANDIDATES if candidate["BLOCK_C"] > 32]
    small = {"batch": 1, "channels": 5, "side": 3, "size": 5}
    for batch, channels, side, size in ((1, 256, 128, 256), (16, 256, 128, 256), (1, 128, 148, 296), (1, 32, 96, 192)):
        yield Workload(
            "upsample", _forward, _resize_arguments, _forward_ref, {"upsample_bilinear": NARROW_CANDIDATES if channels == 32 else wide},
            sizes={"batch": batch, "channels": channels, "side": side, "size": size},
            small=small, stage=RARE if channels == 32 else FORWARD, shows=shows,
        )  # fmt: skip
    for channels, taps in ((256, 1), (32, 3)):
        yield Workload(
            "upsample gradient", upsample_backward, _gradient_arguments, _upsample_backward_ref,
            {"upsample_bilinear_backward": NARROW_CANDIDATES if channels == 32 else wide},
            sizes={"batch": 2, "channels": channels, "side": 128, "size": 256, "taps": taps},
            small=small, stage=BACKWARD, shows=shows,
        )  # fmt: skip

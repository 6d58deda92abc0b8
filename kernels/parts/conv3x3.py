"""3x3 convolution (stride 1, padding 1) of channels-last maps with what stands around it in a decoder, as an implicit GEMM.

    y = mask(relu(norm(conv(relu(x)) + bias))) + skip + resize(add)

Every part but the convolution may be left out. norm is batch norm with given statistics, applied as scale and shift; a batch's own come
from ``convolved``, and ``normalised`` applies them afterwards. mask keeps the values where another map is positive (the gradient of a
ReLU); resize is bilinear, align_corners=True, from any size, gathered pixel by pixel.

A tile of pixels times a tile of output channels is accumulated in float32 over 9 taps times the input channels, in one flat loop: nested
loops would drain the pipeline at each tap. The unfolded input is never written. Padding is exact: relu(0) = 0, and the norm is applied to
the output. FLOPs: 18 * C_in * C_out * B * H * W. Moves x, y, and each of mask, skip and add once (x and the weights again from the L2
cache, for the taps and the tiles).

Two ways of loading the same tiles: by pointers and masks, or (sm_90 and newer) by descriptors, with which TMA fills the padding with zeros.
PIXELS_FIRST forms the product as X W^T: a warpgroup may read the left operand from registers, so that the input's ReLU happens on the way
from shared memory to them, with no second trip and no barrier. Without it, the product is W X^T: where every warp reads its operands
through registers (sm_120), fewer of them hold the same pixels, and the ReLU is computed fewer times.

The epilogue runs on the tile in parts of channels: at once, its operands and the accumulator do not fit the registers.

The backend "cudnn" of the configuration table computes the bare convolution with PyTorch's and everything after it in one further kernel.
In half precision the bare convolution is then rounded once more, before the epilogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launch
from .activations import relu
from .batch_norm import BatchNorm, batch_moments, store_moments
from .bilinear import bilinear_source, gather_bilinear
from .maps import channels_last, empty_channels_last


@triton.jit
def _load(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish(
    values,  # (pixels, BLOCK_N) float32
    epilogue,  # (out, partials or None), written; (bias, norm, mask, skip, add, resized), each or None, as _operands gives them
    pixels,  # (image, int64; row, column and whether it is inside, (pixels,) each; the tile's number)
    first_channel,
    sides,  # height and width of out, and of resized
    CHANNELS: tl.constexpr,
    RELU_OUTPUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Everything after the convolution, and the store, for ``PARTS`` equal parts of the channels one after the other."""
    if PARTS > 1:
        PART: tl.constexpr = BLOCK_N // 2
        lower, upper = values.reshape(values.shape[0], 2, PART).permute(0, 2, 1).split()
        _finish(lower, epilogue, pixels, first_channel, sides, CHANNELS, RELU_OUTPUT, PART, PARTS // 2)
        _finish(upper, epilogue, pixels, first_channel + PART, sides, CHANNELS, RELU_OUTPUT, PART, PARTS // 2)
    else:
        written, operands = epilogue
        out_ptr, partials_ptr = written
        bias_ptr, norm, mask_ptr, skip_ptr, add_ptr, resized_ptr = operands
        image, row, column, inside, tile = pixels
        height, width, source_height, source_width = sides
        channel = first_channel + tl.arange(0, BLOCK_N)
        exists = channel < CHANNELS
        mask = inside[:, None] & exists[None, :]
        offsets = (image * height * width + row * width + column)[:, None] * CHANNELS + channel[None, :]
        if bias_ptr is not None:
            values += _load(bias_ptr, channel, exists)[None, :]
        if norm is not None:
            weight_ptr, shift_ptr, mean_ptr, variance_ptr, eps = norm
            scale = _load(weight_ptr, channel, exists) * tl.rsqrt(_load(variance_ptr, channel, exists) + eps)
            values = (values - _load(mean_ptr, channel, exists)[None, :]) * scale[None, :] + _load(shift_ptr, channel, exists)[None, :]
        if RELU_OUTPUT:
            values = relu(values)
        if mask_ptr is not None:
            values = tl.where(_load(mask_ptr, offsets, mask) > 0, values, 0.0)
        if skip_ptr is not None:
            values += _load(skip_ptr, offsets, mask)
        if add_ptr is not None:
            values += _load(add_ptr, offsets, mask)
        if resized_ptr is not None:
            source_y = bilinear_source(row, source_height, height, True)
            source_x = bilinear_source(column, source_width, width, True)
            resized_ptr += image * source_height * source_width * CHANNELS
            values += gather_bilinear(resized_ptr, source_y, source_x, source_width * CHANNELS, CHANNELS, channel, mask)
        values = values.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, values, mask=mask)
        if partials_ptr is not None:
            partials_ptr += tile.to(tl.int64) * (3 * CHANNELS) + channel
            store_moments(partials_ptr, values.to(tl.float32), mask, inside, exists, CHANNELS)


SIDES = ["height", "width", "source_height", "source_width"]  # not a tuple to the kernels: Triton would specialise on its members


@triton.jit(do_not_specialize=SIDES)
def conv3x3_kernel(
    x,  # (B, height, width, C_IN): a pointer; if DESCRIPTOR, a descriptor of blocks of (1, BLOCK_H, BLOCK_W, BLOCK_K)
    weight,  # (C_OUT, 9, C_IN): a pointer; if DESCRIPTOR, a descriptor of blocks of (BLOCK_N, 1, BLOCK_K)
    epilogue,  # what is written, (B, height, width, C_OUT), and the operands, as of _finish
    height,
    width,
    source_height,
    source_width,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    RELU_INPUT: tl.constexpr,
    RELU_OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
):
    """A program computes ``BLOCK_N`` output channels of a tile of pixels of one image: by descriptors ``BLOCK_H`` by ``BLOCK_W`` of them,
    by pointers as many consecutive ones, over the ends of rows."""
    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    COLUMNS: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    # The channel tiles of one pixel tile are neighbours in time, so that they find it in the L2 cache.
    first_channel = (tl.program_id(0) % COLUMNS) * BLOCK_N
    block = tl.program_id(0) // COLUMNS
    position = tl.arange(0, BLOCK_M)
    if DESCRIPTOR:
        block_columns = tl.cdiv(width, BLOCK_W)
        blocks = tl.cdiv(height, BLOCK_H) * block_columns
        image = block // blocks
        first_row = (block % blocks) // block_columns * BLOCK_H
        first_column = (block % blocks) % block_columns * BLOCK_W
        row = first_row + position // BLOCK_W
        column = first_column + position % BLOCK_W
        inside = (row < height) & (column < width)
    else:
        blocks = tl.cdiv(height * width, BLOCK_M)
        image = (block // blocks).to(tl.int64)
        pixel = (block % blocks) * BLOCK_M + position
        row = pixel // width
        column = pixel % width
        inside = pixel < height * width
        channel = first_channel + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_ptrs = x + (image * height * width + pixel)[:, None] * C_IN + k[None, :]
        weight_ptrs = weight + channel[None, :].to(tl.int64) * (9 * C_IN) + k[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N) if PIXELS_FIRST else (BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, 9 * CHUNKS):
        tap = step // CHUNKS
        first = (step - tap * CHUNKS) * BLOCK_K
        down = tap // 3 - 1
        across = tap % 3 - 1
        if DESCRIPTOR:
            # Coordinates outside the map, negative ones too, read as zeros: the padding.
            pixels = x.load([image, first_row + down, first_column + across, first]).reshape(BLOCK_M, BLOCK_K)
            weights = weight.load([first_channel, tap, first]).reshape(BLOCK_N, BLOCK_K).T
        else:
            seen_y = row + down
            seen_x = column + across
            x_mask = (inside & (seen_y >= 0) & (seen_y < height) & (seen_x >= 0) & (seen_x < width))[:, None]
            weight_mask = (channel < C_OUT)[None, :]
            if C_IN % BLOCK_K != 0:
                x_mask = x_mask & (first + k < C_IN)[None, :]
                weight_mask = weight_mask & (first + k < C_IN)[:, None]
            pixels = tl.load(x_ptrs + ((down * width + across) * C_IN + first), mask=x_mask, other=0.0)
            weights = tl.load(weight_ptrs + (tap * C_IN + first), mask=weight_mask, other=0.0)
        if RELU_INPUT:
            pixels = relu(pixels)
        if PIXELS_FIRST:
            accumulator = tl.dot(pixels, weights, accumulator, input_precision=PRECISION)
        else:
            accumulator = tl.dot(weights.T, pixels.T, accumulator, input_precision=PRECISION)
    if not PIXELS_FIRST:
        accumulator = accumulator.T
    tile = (image.to(tl.int64), row, column, inside, block)
    sides = (height, width, source_height, source_width)
    _finish(accumulator, epilogue, tile, first_channel, sides, C_OUT, RELU_OUTPUT, BLOCK_N, EPILOGUE_PARTS)


@triton.jit(do_not_specialize=SIDES)
def conv3x3_epilogue(
    conv_ptr,  # (B, height, width, CHANNELS), the bare convolution; what is written may be the same
    epilogue,
    height,
    width,
    source_height,
    source_width,
    CHANNELS: tl.constexpr,
    RELU_OUTPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue alone, for a convolution that another library computed, or whose statistics had to be known first."""
    blocks = tl.cdiv(height * width, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_channel = tl.program_id(1) * BLOCK_N
    channel = first_channel + tl.arange(0, BLOCK_N)
    inside = pixel < height * width
    offsets = (image * height * width + pixel)[:, None] * CHANNELS + channel[None, :]
    values = _load(conv_ptr, offsets, inside[:, None] & (channel < CHANNELS)[None, :])
    tile = (image, pixel // width, pixel % width, inside, tl.program_id(0))
    sides = (height, width, source_height, source_width)
    _finish(values, epilogue, tile, first_channel, sides, CHANNELS, RELU_OUTPUT, BLOCK_N, 1)


def input_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s ``input_precision``: "ieee", or "tf32" for float32 where PyTorch's switch for convolutions allows it (its default)."""
    allowed = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: BatchNorm | None = None,
    relu_input: bool = False,
    relu_output: bool = False,
    mask: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    gradient: bool = False,
    precision: str | None = None,
) -> torch.Tensor:
    """The convolution with the parts around it that are given: see the head of this file. No autograd: ops are made of it.

    x (B, C_in, H, W), weight (C_out, C_in, 3, 3), mask and skip (B, C_out, H, W), add (B, C_out, h, w): one dtype (float32, float16 or
    bfloat16) and channels_last memory. Vectors (C_out,) in any floating-point dtype. ``gradient``: whether a backward asks, for the table.
    ``precision``: :func:`input_precision`'s, or another to compile for.
    Returns (B, C_out, H, W), channels_last.
    """
    parts = {"bias": bias, "norm": norm, "mask": mask, "skip": skip, "add": add}
    return _conv3x3(x, weight, parts, relu_input, relu_output, gradient, precision)[0]


def convolved(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, relu_input: bool = False, precision: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """conv(relu(x)) + bias as :func:`conv3x3` gives it, and the mean and variance (2, C_out), float32, of each of its channels: a tile's
    count, mean and sum of squares about it come from the epilogue, so that the map is not read for them."""
    out, partials = _conv3x3(x, weight, {"bias": bias}, relu_input, False, True, precision, statistics=True)
    return out, batch_moments(partials)


def normalised(
    convolution: torch.Tensor, norm: BatchNorm, *, relu: bool = False, skip: torch.Tensor | None = None, add: torch.Tensor | None = None
) -> torch.Tensor:
    """relu(norm(convolution)) + skip + resize(add), (B, C, H, W), in one pass over a convolution that is kept."""
    operands = _operands(tuple(convolution.shape[2:]), None, norm, None, skip, add)
    return _finished(convolution, torch.empty_like(convolution), *operands, relu)[0]


def _conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    parts: Mapping[str, Any],
    relu_input: bool,
    relu_output: bool,
    gradient: bool,
    precision: str | None,
    statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The convolution and, if asked for, its tiles' moments (tiles, 3, C_out), float32: see ``store_moments``."""
    batch, c_in, height, width = x.shape
    c_out = weight.shape[0]
    family = launch.device_family(x.device)
    image, taps = _views(x, weight)
    precision = precision or input_precision(x.dtype)
    config = launch.config("conv3x3", family, x.dtype, **_shape(image, taps, precision, gradient))
    epilogue, sides = _operands((height, width), **parts)
    if config.pop("backend") == "cudnn":
        return _with_cudnn(x.relu() if relu_input else x, weight, epilogue, sides, relu_output, statistics)
    out = empty_channels_last(x, c_out, height, width)
    descriptor = config.pop("descriptor")
    if descriptor:
        blocks = triton.cdiv(height, config["BLOCK_H"]) * triton.cdiv(width, config["BLOCK_W"])
        operands = _descriptors(image, taps, config)
    else:
        config |= {"BLOCK_H": 1, "BLOCK_W": config.pop("BLOCK_M"), "PIXELS_FIRST": True}
        blocks = triton.cdiv(height * width, config["BLOCK_W"])
        operands = (x, weight)
    grid = (batch * blocks * triton.cdiv(c_out, config["BLOCK_N"]),)
    partials = _partials(batch * blocks, out) if statistics else None
    flags = {"RELU_INPUT": relu_input, "RELU_OUTPUT": relu_output, "PRECISION": precision, "DESCRIPTOR": descriptor}
    launch.launch(conv3x3_kernel, grid, *operands, ((out, partials), epilogue), *sides, C_IN=c_in, C_OUT=c_out, **flags, **config)
    return out, partials


def _partials(tiles: int, out: torch.Tensor) -> torch.Tensor:
    return torch.empty((tiles, 3, out.shape[1]), dtype=torch.float32, device=out.device)


def _operands(
    size: tuple[int, int],
    bias: torch.Tensor | None,
    norm: BatchNorm | None = None,
    mask: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
) -> tuple[tuple[Any, ...], tuple[int, int, int, int]]:
    """The kernels' ``epilogue`` for a result of ``size``, but for the tiles' moments; and the sides of it and of the map resized to it."""
    source = size if add is None else tuple(add.shape[-2:])
    vectors = None if norm is None else (*(vector.contiguous() for vector in norm[:4]), norm.eps)
    added = (add, None) if source == size else (None, add)
    return (None if bias is None else bias.contiguous(), vectors, mask, skip, *added), (*size, *source)


def _shape(image: torch.Tensor, taps: torch.Tensor, precision: str, gradient: bool) -> dict[str, Any]:
    """What the table's conditions may name."""
    batch, height, width, c_in = image.shape
    describable = launch.describable(image, taps)
    sizes = {"C_in": c_in, "C_out": taps.shape[0], "pixels": batch * height * width}
    return {**sizes, "precision": precision, "gradient": gradient, "describable": describable}


def _views(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as (B, H, W, C_in) and the weight as (C_out, 9, C_in), with the strides of their memory in every dimension of size 1 too."""
    batch, c_in, height, width = x.shape
    return x.permute(0, 2, 3, 1).view(-1).view(batch, height, width, c_in), weight.permute(0, 2, 3, 1).reshape(-1, 9, c_in)


def _descriptors(image: torch.Tensor, taps: torch.Tensor, config: Mapping[str, Any]) -> tuple[TensorDescriptor, TensorDescriptor]:
    pixels = [1, config["BLOCK_H"], config["BLOCK_W"], config["BLOCK_K"]]
    return TensorDescriptor.from_tensor(image, pixels), TensorDescriptor.from_tensor(taps, [config["BLOCK_N"], 1, config["BLOCK_K"]])


def _with_cudnn(
    x: torch.Tensor, weight: torch.Tensor, epilogue: tuple[Any, ...], sides: tuple[int, ...], relu_output: bool, statistics: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = channels_last(F.conv2d(x, weight, padding=1))
    return _finished(out, out, epilogue, sides, relu_output, statistics)


def _finished(
    convolution: torch.Tensor,
    out: torch.Tensor,
    epilogue: tuple[Any, ...],
    sides: tuple[int, ...],
    relu_output: bool,
    statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A convolution that is there, (B, C, H, W), channels-last, with the epilogue, in ``out``, which may be it; and tiles' moments."""
    batch, channels, height, width = out.shape
    config = launch.config("conv3x3_epilogue", launch.device_family(out.device), out.dtype, C=channels, pixels=batch * height * width)
    tiles = batch * triton.cdiv(height * width, config["BLOCK_M"])
    partials = _partials(tiles, out) if statistics else None
    grid = (tiles, triton.cdiv(channels, config["BLOCK_N"]))
    flags = {"CHANNELS": channels, "RELU_OUTPUT": relu_output}
    launch.launch(conv3x3_epilogue, grid, convolution, ((out, partials), epilogue), *sides, **flags, **config)
    return out, partials


def add_bias(convolution: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What another library convolved, (B, C, H, W), with a bias (C,) alone; in place where it is channels-last."""
    out = channels_last(convolution)
    return _finished(out, out, *_operands(tuple(out.shape[2:]), bias), False)[0]


def conv3x3_weight_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient (C_out, C_in, 3, 3) of the weight, by PyTorch's own convolution: cuDNN on a GPU, as deterministic as it is set to be.

    grad (B, C_out, H, W); x (B, C_in, H, W), as the convolution saw it; weight gives shape and layout.
    """
    needed = [False, True, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, needed)[1]


def conv3x3_input_weight(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The weight (C_in, C_out, 3, 3) of the convolution that gives the gradient of the input, with the norm's ``scale`` (C_out,) in it."""
    turned = weight if scale is None else (weight.float() * scale[:, None, None, None]).to(weight.dtype)
    return turned.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def parameter_gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of a convolution's weight, channels-last, and bias, float32, from that of its output."""
    return channels_last(conv3x3_weight_gradient(grad, x, weight)), grad.sum((0, 2, 3), dtype=torch.float32)

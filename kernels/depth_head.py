"""The depth head after its first convolution: bilinear resize, 3x3 convolution, ReLU, 1x1 convolution to one channel, activation.

    u = resize(x), align_corners=True                                     (B, C, H', W'), never written
    y = act(w2 . relu(conv3x3(u, w1) + b1) + b2)                          (B, H', W')

x (B, C, H, W) channels_last, w1 (F, C, 3, 3), w2 (1, F, 1, 1); act is ReLU, max_depth * sigmoid (metric models), or nothing, for what
PyTorch computes afterwards (exp). Resize and convolution are linear, so the products with the nine taps of w1 are taken at the pixels of x,
before the resize, by the library: a 1x1 convolution to 9 F channels, tap by tap, for x2 a quarter of the convolution's work. A pixel of y
then sums, over the taps, the product resized at its neighbour there, if that is no padding. A kernel does that in two steps, for a strip of
BLOCK_H rows and BLOCK_W columns of y. It walks down the rows of x, and of each row and each of the three taps along y makes

    t = sum over dx of resize along x of the product with tap (dy, dx), moved by dx             (BLOCK_W, F)

from six neighbours in float32, and mixes the t of two rows of x, with the weights along y, into the rows of y between them.

The backend "cudnn" of the configuration table writes the resized map, convolves it with PyTorch's, and does the rest in one further kernel.
In half precision the products with the taps, or the resized map and the convolution, are rounded once.

FLOPs at x2: 18 C F a pixel of x, and 36 F for the resize along x and 48 F for that along y, a quarter of the 72 C F of the convolution at
full size for C = 128 and a little more. Moves x once, the products twice and y, C/4 + 9 F/2 + 1 elements a pixel of y; eager PyTorch moves
2 (C + F) + C/4 + 2.

Backward: the hidden map is recomputed; its gradient (B, F, H', W') is written, and gathered, tap by tap and in a fixed order, to the
pixels of x (upsample.upsample_backward). The gradients of x and w1 are then two plain GEMMs of the library, those of w2 and b2 sums of one
row a program. Saved: x and the parameters as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .cpu import convolution
from .parts.activations import relu
from .parts.bilinear import bilinear_source, first_target
from .parts.maps import channels_last, empty_channels_last
from .upsample import upsample_backward, upsample_bilinear

ACTIVATIONS = ("relu", "sigmoid", "linear")
HIDDEN_CHANNELS = (16, 32)


def depth_head_ref(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    size: Sequence[int],
    activation: str = "relu",
    max_depth: float = 1.0,
) -> torch.Tensor:
    """The head in plain PyTorch. Same arguments and result as :func:`depth_head`."""
    upsampled = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)
    y = F.conv2d(*(t.to(_depth_dtype(x)) for t in (F.conv2d(upsampled, w1, b1, padding=1).relu_(), w2, b2)))[:, 0]
    return _activated(y, activation, max_depth)


def _activated(y: torch.Tensor, activation: str, max_depth: float) -> torch.Tensor:
    return {"relu": F.relu, "sigmoid": lambda y: y.sigmoid() * max_depth, "linear": lambda y: y}[activation](y)


def _rewritten(x, w1, b1, w2, b2, size, activation, max_depth) -> torch.Tensor:
    """What runs without kernels."""
    last = (w2, b2) if x.dtype == _depth_dtype(x) else None
    y = convolution.conv3x3(convolution.resized(x, size, True), w1, b1, relu=True, then=last)
    if last is None:
        y = F.conv2d(*(t.to(_depth_dtype(x)) for t in (y, w2, b2)))
    return _activated(y[:, 0], activation, max_depth)


@triton.jit
def _resized_row(taps_ptr, row, column, source_width, target_width, HIDDEN: tl.constexpr, BLOCK_W: tl.constexpr):
    """Three (BLOCK_W, HIDDEN) tiles, a tap along y each: row ``row`` of the products, resized, moved by the taps along x, summed."""
    taps_ptr += row.to(tl.int64) * source_width * (9 * HIDDEN)
    channel = tl.arange(0, HIDDEN)[None, :]
    above = tl.zeros((BLOCK_W, HIDDEN), dtype=tl.float32)
    centre = tl.zeros((BLOCK_W, HIDDEN), dtype=tl.float32)
    below = tl.zeros((BLOCK_W, HIDDEN), dtype=tl.float32)
    for dx in tl.static_range(3):
        target = column + (dx - 1)
        nearest = tl.minimum(tl.maximum(target, 0), target_width - 1)  # what is padding has weights of 0
        lower, upper, weight = bilinear_source(nearest, source_width, target_width, True)
        of_lower = tl.where(target == nearest, 1 - weight, 0.0)[:, None]
        of_upper = tl.where(target == nearest, weight, 0.0)[:, None]  # it is 0 there anyway, but float32 then spills on sm_90
        lower = (lower * 9 + dx)[:, None] * HIDDEN + channel
        upper = (upper * 9 + dx)[:, None] * HIDDEN + channel
        above += of_lower * tl.load(taps_ptr + lower).to(tl.float32)
        above += of_upper * tl.load(taps_ptr + upper).to(tl.float32)
        centre += of_lower * tl.load(taps_ptr + 3 * HIDDEN + lower).to(tl.float32)
        centre += of_upper * tl.load(taps_ptr + 3 * HIDDEN + upper).to(tl.float32)
        below += of_lower * tl.load(taps_ptr + 6 * HIDDEN + lower).to(tl.float32)
        below += of_upper * tl.load(taps_ptr + 6 * HIDDEN + upper).to(tl.float32)
    return above, centre, below


@triton.jit
def _own_strip(height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(image, int64; first row, columns, which of them are there) of y that this program makes: rows in turn, columns at once."""
    columns = tl.cdiv(width, BLOCK_W)
    strips = tl.cdiv(height, BLOCK_H)
    program = tl.program_id(0)
    image = (program // (columns * strips)).to(tl.int64)
    first_row = program // columns % strips * BLOCK_H
    column = program % columns * BLOCK_W + tl.arange(0, BLOCK_W)
    return image, first_row, column, column < width


@triton.jit
def _no_shares(grad_ptr, HIDDEN: tl.constexpr, BLOCK_W: tl.constexpr):
    """A program's shares of the gradients of w2 and b2 before its first row; without a gradient, as small as may be."""
    w2_total = tl.zeros((BLOCK_W, HIDDEN) if grad_ptr is not None else (1, 1), dtype=tl.float32)
    b2_total = tl.zeros((BLOCK_W,) if grad_ptr is not None else (1,), dtype=tl.float32)
    return w2_total, b2_total


@triton.jit
def _finish_row(
    convolved, row, strip, head, results, shares, height, width, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store a row of y; or, given its gradient, that of the hidden map, and add to those of w2 and b2. Nothing for rows of other strips."""
    image, first_row, column, inside = strip
    b1_ptr, w2_ptr, b2_ptr, max_depth = head
    out_ptr, grad_ptr, _ = results
    w2_total, b2_total = shares
    inside = inside & (row >= first_row) & (row < tl.minimum(first_row + BLOCK_H, height))
    channel = tl.arange(0, HIDDEN)
    w2 = tl.load(w2_ptr + channel).to(tl.float32)[None, :]
    hidden = relu(convolved + tl.load(b1_ptr + channel).to(tl.float32)[None, :])
    y = tl.sum(hidden * w2, axis=1) + tl.load(b2_ptr).to(tl.float32)
    position = (image * height + row) * width + column
    if grad_ptr is None:
        if ACTIVATION == "sigmoid":
            y = max_depth * tl.sigmoid(y)
        elif ACTIVATION == "relu":
            y = relu(y)
        tl.store(out_ptr + position, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        grad = tl.load(grad_ptr + position, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "sigmoid":
            share = tl.sigmoid(y)
            grad = grad * max_depth * share * (1 - share)
        elif ACTIVATION == "relu":
            grad = tl.where(y > 0, grad, 0.0)
        grad_hidden = tl.where(hidden > 0, grad[:, None] * w2, 0.0)
        tl.store(out_ptr + position[:, None] * HIDDEN + channel[None, :], grad_hidden.to(out_ptr.dtype.element_ty), mask=inside[:, None])
        w2_total += grad[:, None] * hidden
        b2_total += grad
    return w2_total, b2_total


@triton.jit(do_not_specialize=["source_height", "source_width", "target_height", "target_width"])
def _depth_head_kernel(
    taps_ptr,  # (B, H, W, 9, HIDDEN): the product of x with each tap of the convolution
    head,  # (b1 (HIDDEN,), w2 (HIDDEN,), b2 (1,), max_depth)
    # (y (B, H', W'), None, None); or, given the gradient of y, (that of the hidden map (B, H', W', HIDDEN), that of y, and each program's
    # share of those of w2 and b2 (programs, HIDDEN + 1) float32):
    results,
    source_height,
    source_width,
    target_height,
    target_width,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    strip = _own_strip(target_height, target_width, BLOCK_H, BLOCK_W)
    image, first_row, column, _ = strip
    taps_ptr += image * source_height * source_width * (9 * HIDDEN)

    # The rows of the resized map that this strip's convolution sees, to the one after it: at the border that is padding, and adds nothing.
    begin = tl.maximum(first_row - 1, 0)
    end = tl.minimum(first_row + BLOCK_H, target_height)
    first = bilinear_source(begin, source_height, target_height, True)[0]
    last = bilinear_source(tl.minimum(end, target_height - 1), source_height, target_height, True)[0]
    # What the rows of y above the current one, and at it, have so far; and the taps of the current row of x.
    previous = tl.zeros((BLOCK_W, HIDDEN), dtype=tl.float32)
    current = tl.zeros((BLOCK_W, HIDDEN), dtype=tl.float32)
    above = tl.zeros((BLOCK_W, HIDDEN), dtype=tl.float32)
    centre = tl.zeros((BLOCK_W, HIDDEN), dtype=tl.float32)
    below = tl.zeros((BLOCK_W, HIDDEN), dtype=tl.float32)
    shares = _no_shares(results[1], HIDDEN, BLOCK_W)
    for source_row in range(first - 1, last + 1):  # the first turn only computes row `first`
        following = tl.minimum(source_row + 1, source_height - 1)
        next_above, next_centre, next_below = _resized_row(taps_ptr, following, column, source_width, target_width, HIDDEN, BLOCK_W)
        start = tl.maximum(first_target(source_row, source_height, target_height, True), begin)
        stop = tl.minimum(first_target(source_row + 1, source_height, target_height, True), end + 1)
        stop = tl.where(source_row == last, end + 1, stop)
        for row in range(start, stop):
            weight = bilinear_source(row, source_height, target_height, True)[2]
            weight = tl.where(row < target_height, weight, 0.0)
            rest = tl.where(row < target_height, 1 - weight, 0.0)
            # Row `row` of the resized map is what tap `below` of the row above it sees, and tap `above` of the row below it.
            seen = previous + rest * below + weight * next_below
            shares = _finish_row(seen, row - 1, strip, head, results, shares, target_height, target_width, HIDDEN, ACTIVATION, BLOCK_H)
            previous = current + rest * centre + weight * next_centre
            current = rest * above + weight * next_above
        above, centre, below = next_above, next_centre, next_below
    _store_shares(results, shares, HIDDEN)


@triton.jit
def _store_shares(results, shares, HIDDEN: tl.constexpr):
    """A program's shares of the gradients of w2 and b2, where they are asked for."""
    _, _, partial_ptr = results
    w2_total, b2_total = shares
    if partial_ptr is not None:
        partial_ptr += tl.program_id(0).to(tl.int64) * (HIDDEN + 1)
        tl.store(partial_ptr + tl.arange(0, HIDDEN), tl.sum(w2_total, axis=0))
        tl.store(partial_ptr + HIDDEN, tl.sum(b2_total, axis=0))


@triton.jit(do_not_specialize=["height", "width"])
def _depth_head_epilogue(
    conv_ptr,  # (B, height, width, HIDDEN), the bare convolution
    head,  # this and the next as of _depth_head_kernel; the hidden map's gradient is written over the convolution
    results,
    height,
    width,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """What follows the 3x3 convolution, where another library computed that: a program takes a strip as in `_depth_head_kernel`."""
    strip = _own_strip(height, width, BLOCK_H, BLOCK_W)
    image, first_row, column, inside = strip
    channel = tl.arange(0, HIDDEN)
    shares = _no_shares(results[1], HIDDEN, BLOCK_W)
    for row in range(first_row, tl.minimum(first_row + BLOCK_H, height)):
        position = (image * height + row) * width + column
        convolved = tl.load(conv_ptr + position[:, None] * HIDDEN + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        shares = _finish_row(convolved, row, strip, head, results, shares, height, width, HIDDEN, ACTIVATION, BLOCK_H)
    _store_shares(results, shares, HIDDEN)


def _weight_matrix(w1: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(F, C, 3, 3) as (9 F, C) in ``dtype``: tap by tap, as upsample_backward orders its channels."""
    return w1.to(dtype).permute(2, 3, 0, 1).reshape(-1, w1.shape[1])


def _tap_products(x: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """(B, 9 F, H, W), channels-last: the products of x with the taps of w1, as a 1x1 convolution of the library."""
    return channels_last(F.conv2d(x, _weight_matrix(w1, x.dtype)[..., None, None]))


def _depth_dtype(x: torch.Tensor) -> torch.dtype:
    """Of the result: float32, for half precision would round what the sums and the activation have not."""
    return torch.promote_types(x.dtype, torch.float32)


def _launch(x, w1, b1, w2, b2, size, activation, max_depth, grad) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and None; or, given its gradient, that of the hidden map and the (programs, F + 1) shares of those of w2 and b2."""
    x = channels_last(x)
    b1, w2, b2 = (parameter.to(x.dtype).contiguous() for parameter in (b1, w2, b2))
    batch, channels, *source = x.shape
    height, width = size
    hidden = w1.shape[0]
    backward = grad is not None
    name = "depth_head_backward" if backward else "depth_head"
    options = launch.config(name, launch.device_family(x.device), x.dtype, C=channels, pixels=batch * height * width)
    cudnn = options.pop("backend") == "cudnn"
    programs = batch * triton.cdiv(height, options["BLOCK_H"]) * triton.cdiv(width, options["BLOCK_W"])
    partial = torch.empty((programs, hidden + 1), dtype=torch.float32, device=x.device) if backward else None
    head, constants = (b1, w2, b2, max_depth), {"HIDDEN": hidden, "ACTIVATION": activation, **options}
    # Convolutions of the library, both: it takes float32 products in TF32 where PyTorch's switch for convolutions says so.
    if cudnn:
        convolved = channels_last(F.conv2d(upsample_bilinear(x, size, True), w1.to(x.dtype), padding=1))
    else:
        taps = _tap_products(x, w1)
    if not backward:
        out = torch.empty((batch, height, width), dtype=_depth_dtype(x), device=x.device)
    else:
        out = convolved if cudnn else empty_channels_last(x, hidden, height, width)
    if cudnn:
        launch.launch(_depth_head_epilogue, (programs,), convolved, head, (out, grad, partial), height, width, **constants)
    else:
        launch.launch(_depth_head_kernel, (programs,), taps, head, (out, grad, partial), *source, height, width, **constants)
    return out, partial


def _backward(grad, x, w1, b1, w2, b2, activation, max_depth) -> tuple[torch.Tensor, ...]:
    x = channels_last(x)
    hidden, channels = w1.shape[:2]
    grad_hidden, partial = _launch(x, w1, b1, w2, b2, grad.shape[1:], activation, max_depth, grad.contiguous())
    grad_w2, grad_b2 = partial[:, :-1].sum(0).view(w2.shape), partial[:, -1:].sum(0)
    taps = upsample_backward(grad_hidden, x.shape[2:], True, taps=3).permute(0, 2, 3, 1).reshape(-1, 9 * hidden)  # (B*H*W, 9*F)
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
    grad_x = (taps @ _weight_matrix(w1, x.dtype)).view(x.shape[0], *x.shape[2:], channels).permute(0, 3, 1, 2)
    grad_w1 = (taps.T @ pixels).view(3, 3, hidden, channels).permute(2, 3, 0, 1)
    grad_b1 = grad_hidden.sum((0, 2, 3), dtype=torch.float32)
    return grad_x, grad_w1.to(w1.dtype).contiguous(), grad_b1.to(b1.dtype), grad_w2.to(w2.dtype), grad_b2.to(b2.dtype)


@torch.library.custom_op("dpt::depth_head", mutates_args=())
def _depth_head(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    height: int,
    width: int,
    activation: str,
    max_depth: float,
) -> torch.Tensor:
    return _launch(x, w1, b1, w2, b2, (height, width), activation, max_depth, None)[0]


@_depth_head.register_fake
def _(x, w1, b1, w2, b2, height, width, activation, max_depth):
    return x.new_empty((x.shape[0], height, width), dtype=_depth_dtype(x))


@torch.library.custom_op("dpt::depth_head_backward", mutates_args=())
def _depth_head_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    activation: str,
    max_depth: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(grad, x, w1, b1, w2, b2, activation, max_depth)


@_depth_head_backward.register_fake
def _(grad, x, w1, b1, w2, b2, activation, max_depth):
    parameters = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (w1, b1, w2, b2))
    return empty_channels_last(x, *x.shape[1:]), *parameters


def _save(ctx, inputs, output) -> None:
    *tensors, _, _, ctx.activation, ctx.max_depth = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    return *_depth_head_backward(grad, *ctx.saved_tensors, ctx.activation, ctx.max_depth), None, None, None, None


_depth_head.register_autograd(_differentiate, setup_context=_save)


def _check_hidden(w1: torch.Tensor) -> int:
    hidden = w1.shape[0] if w1.dim() == 4 else 0
    if hidden not in HIDDEN_CHANNELS:
        raise ValueError(f"w1 is {tuple(w1.shape)}: must be (F, C, 3, 3) with F one of {', '.join(map(str, HIDDEN_CHANNELS))}")
    return hidden


@launch.planned
def depth_head(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    size: Sequence[int],
    activation: str = "relu",
    max_depth: float = 1.0,
) -> torch.Tensor:
    """Depth (B, H', W') of ``size``, float32 whatever ``x`` is: resize, 3x3 convolution, ReLU, 1x1 convolution, activation. Differentiable.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16. Channels-last is read as it is; another layout is copied once.
        w1, b1: (F, C, 3, 3) and (F,), F 16 or 32; w2, b2: (1, F, 1, 1) and (1,). In x's dtype, or under autocast in any.
        size: (H', W'). Where a side is smaller than x's, x is first resized, in memory: the head then runs on the smaller map.
        activation: "relu"; "sigmoid", which is multiplied by ``max_depth`` (metres, as the model was trained); or "linear", which is none.

    Under autocast x and, inside, the parameters are taken in autocast's dtype. Accumulation in float32; float32 products in TF32 where
    PyTorch's switch for convolutions says so (its default). NaN or infinity in ``x`` reaches the pixels that see it, and may reach
    pixels beside them: a neighbour counts though its weight is 0, and 0 * inf is NaN.

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: a shape, device or activation that is not as above, or a side over 32767.
    """
    (x,) = launch.autocast(x)
    launch.check_map("x", x)
    height, width = launch.check_size("size", size)
    hidden = _check_hidden(w1)
    launch.check_tensor("w1", w1, (hidden, x.shape[1], 3, 3), x, weight=True)
    launch.check_tensor("b1", b1, (hidden,), x, weight=True)
    launch.check_tensor("w2", w2, (1, hidden, 1, 1), x, weight=True)
    launch.check_tensor("b2", b2, (1,), x, weight=True)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    if not launch.runs_kernels(x, "depth_head"):
        return _rewritten(x, w1, b1, w2, b2, (height, width), activation, max_depth)
    if height < x.shape[2] or width < x.shape[3]:
        x = upsample_bilinear(x, (height, width), True)
    return _depth_head(x, w1, b1, w2, b2, height, width, activation, float(max_depth))

"""Reassemble: the readout projection and the transposed convolution, each a product of matrices whose epilogue does the rest.

    readout_project(tokens, W, b)   y[b, n] = GELU(W [patch[b, n]; cls[b]] + b)      tokens (B, 1+N, D), W (D, 2D) -> (B, N, D)
    transposed_conv(x, w, b)        y[b, :, s*i+p, s*j+q] = w[:, :, p, q]^T x[b, :, i, j] + b      stride = kernel = s

(DPT paper, section 3.1 and supplement.) The readout splits, W [patch; cls] = W1 patch + W2 cls: the second product is a vector an image, so
half of the work and the concatenated tokens go, and W2 cls + b becomes a bias an image, added with the GELU in the epilogue of the first:
2*B*N*D^2 FLOPs; moves tokens, W and y once. The class token is skipped by address, so the patches are not copied. The pixels of a
transposed convolution whose stride is its kernel do not overlap: it is the product of the (B*H*W, C) map with s*s matrices (C, O), whose
tiles are stored where they belong in the channels-last result: 2*B*H*W*C*O*s*s FLOPs, x and y moved once, no pixel shuffle.

One kernel serves both; the operands are read by pointers on every architecture, for the rows of a tile may belong to two images. Other
backends of the configuration table: "cublas" leaves the readout's product to PyTorch's, with its epilogue in one further kernel; "cudnn"
the transposed convolution, and then the bias. In half precision the bare product is then rounded once more.

Backward, readout: the pre-activation is computed again, in the same kernel, whose epilogue multiplies the incoming gradient with GELU'.
That gradient is written in the layout of the tokens, with zeros for the class token, so that the products for tokens and W run on all
tokens at once. All further products and sums are PyTorch's own, in a fixed order; those of the transposed convolution, which copy no
gradient, where PyTorch asks cuDNN for that. Saved: the inputs; under autocast the parameters as they are, which both passes convert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .cpu import convolution
from .layernorm_linear import check_activation
from .parts.activations import activate, activation_slope
from .parts.conv3x3 import add_bias
from .parts.conv3x3 import input_precision as conv_precision
from .parts.maps import channels_last, empty_channels_last

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # and PyTorch's name of how exact they are


def readout_project_ref(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "gelu"
) -> torch.Tensor:
    """:func:`readout_project` in plain PyTorch, as the paper has it: every patch token with the class token appended."""
    patches = tokens[:, 1:]
    pre = F.linear(torch.cat([patches, tokens[:, :1].expand_as(patches)], dim=-1), weight, bias)
    return F.gelu(pre, approximate=ACTIVATIONS[activation])


def _split_readout(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """What runs without kernels: the split in PyTorch."""
    features = tokens.shape[-1]
    pre = F.linear(tokens[:, 1:], weight[:, :features]) + F.linear(tokens[:, :1], weight[:, features:], bias)
    return F.gelu(pre, approximate=ACTIVATIONS[activation])


def transposed_conv_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`transposed_conv` in plain PyTorch."""
    return F.conv_transpose2d(x, weight, bias, stride=weight.shape[-1])


@triton.jit(do_not_specialize=["images", "positions", "width", "x_rows", "out_rows"])
def _project_kernel(
    x_ptr,  # (images, positions, DEPTH), images x_rows rows apart: so the compiler sees what divides their distance
    weight,  # (STRIDE * STRIDE, COLUMNS, DEPTH), and how far its rows are apart
    bias,  # (images, COLUMNS), and how far its images are apart; or None
    grad_ptr,  # (images, positions, COLUMNS): what the activation's slope is multiplied with, instead of storing it; or None
    out_ptr,  # (images, height * STRIDE, width * STRIDE, COLUMNS), images out_rows pixels apart; positions = height * width
    images,
    positions,
    width,
    x_rows,
    out_rows,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: a (BLOCK_M, BLOCK_N) tile of one of the STRIDE * STRIDE products; neighbouring programs share the rows of x."""
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    product = tl.program_id(0) % (column_blocks * STRIDE * STRIDE)
    tap = product // column_blocks
    row = tl.program_id(0) // (column_blocks * STRIDE * STRIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = product % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row_exists = row < images * positions
    column_exists = column < COLUMNS
    image = (row // positions).to(tl.int64)
    position = row % positions
    x_row = x_ptr + image * (x_rows.to(tl.int64) * DEPTH) + position.to(tl.int64) * DEPTH
    weight_ptr, weight_stride = weight
    weight_row = weight_ptr + (tap * COLUMNS + column).to(tl.int64) * weight_stride
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_row[:, None] + depth[None, :], mask=row_exists[:, None] & (depth < DEPTH)[None, :], other=0.0)
        weights = tl.load(weight_row[None, :] + depth[:, None], mask=column_exists[None, :] & (depth < DEPTH)[:, None], other=0.0)
        accumulator = tl.dot(x, weights, accumulator, input_precision=PRECISION)
    mask = row_exists[:, None] & column_exists[None, :]
    _finish(accumulator, bias, grad_ptr, out_ptr, row, image, position, column, mask, tap, width, out_rows, COLUMNS, STRIDE, ACTIVATION)


@triton.jit
def _finish(
    accumulator, bias, grad_ptr, out_ptr, row, image, position, column, mask, tap, width, out_rows,
    COLUMNS: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Everything after the product, and the store."""
    if bias is not None:
        bias_ptr, bias_stride = bias
        accumulator += tl.load(bias_ptr + (image * bias_stride)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0)
        accumulator = grad.to(tl.float32) * activation_slope(accumulator, ACTIVATION)
    else:
        accumulator = activate(accumulator, ACTIVATION)
    target = ((position // width) * STRIDE + tap // STRIDE).to(tl.int64) * (width * STRIDE) + position % width * STRIDE + tap % STRIDE
    out_ptr += image[:, None] * (out_rows.to(tl.int64) * COLUMNS) + target[:, None] * COLUMNS + column[None, :]
    tl.store(out_ptr, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images", "positions", "product_rows", "out_rows"])
def _readout_epilogue(
    product_ptr,  # (images, positions, COLUMNS), images product_rows rows apart
    bias,  # this and the rest as of _project_kernel
    grad_ptr,
    out_ptr,
    images,
    positions,
    product_rows,
    out_rows,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What follows the readout's product, where another library computed that."""
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    image = (row // positions).to(tl.int64)
    position = row % positions
    mask = (row < images * positions)[:, None] & (column < COLUMNS)[None, :]
    product_ptr += image[:, None] * (product_rows.to(tl.int64) * COLUMNS) + position.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    product = tl.load(product_ptr, mask=mask, other=0.0).to(tl.float32)
    _finish(product, bias, grad_ptr, out_ptr, row, image, position, column, mask, 0, positions, out_rows, COLUMNS, 1, ACTIVATION)


def _config(name: str, x: torch.Tensor, rows: int, columns: int, depth: int, precision: str) -> tuple[str, dict[str, Any]]:
    """The backend, and the rest of the configuration, of the product of ``rows`` rows of x with (columns, depth) weights."""
    family = launch.device_family(x.device)
    config = launch.config(name, family, x.dtype, rows=rows, columns=columns, depth=depth, precision=precision)
    return config.pop("backend"), config


def _launch(x, weight, bias, out, *, width, stride, precision, config, activation="none", grad=None) -> None:
    """x (B, positions, K), weight (s*s, N, K) or (N, K), bias (N,), (B, N) or None, out (B, positions * s*s, N): last dimensions dense."""
    (images, positions, depth), columns = x.shape, weight.shape[-2]
    blocks = triton.cdiv(images * positions, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
    launch.launch(
        _project_kernel,
        (blocks * stride * stride,),
        x,
        (weight, weight.stride(-2)),
        None if bias is None else (bias, bias.stride(0) if bias.dim() == 2 else 0),
        grad,
        out,
        images,
        positions,
        width,
        x.stride(0) // depth,
        out.stride(0) // columns,
        DEPTH=depth,
        COLUMNS=columns,
        STRIDE=stride,
        ACTIVATION=activation,
        PRECISION=precision,
        **config,
    )


def _readout(tokens, weight, bias, precision, activation, grad=None) -> torch.Tensor:
    """(B, N, D); or, given its gradient, that of the pre-activation in the layout of the tokens, (B, 1+N, D), zero for the class token."""
    tokens = tokens.contiguous()
    images, positions, features = tokens.shape[0], tokens.shape[1] - 1, tokens.shape[-1]
    weight, bias = weight.to(tokens.dtype).contiguous(), None if bias is None else bias.to(tokens.dtype)
    weight, of_class = weight[:, :features], weight[:, features:]
    image_bias = F.linear(tokens[:, 0], of_class, bias)  # (B, D)
    name = "readout_project" if grad is None else "readout_project_backward"
    backend, config = _config(name, tokens, images * positions, features, features, precision)
    out = result = torch.empty((images, positions + (grad is not None), features), dtype=tokens.dtype, device=tokens.device)
    if grad is not None:
        result[:, 0] = 0
        out, grad = result[:, 1:], grad.contiguous()
    if backend == "triton":
        shape = {"width": positions, "stride": 1, "precision": precision}
        _launch(tokens[:, 1:], weight, image_bias, out, activation=activation, grad=grad, config=config, **shape)
        return result
    product = F.linear(tokens, weight)[:, 1:]  # the class token's row too: without it, PyTorch would copy the tokens
    blocks = triton.cdiv(images * positions, config["BLOCK_M"]) * triton.cdiv(features, config["BLOCK_N"])
    launch.launch(
        _readout_epilogue, (blocks,), product, (image_bias, image_bias.stride(0)), grad, out, images, positions,
        product.stride(0) // features, out.stride(0) // features, COLUMNS=features, ACTIVATION=activation, **config,
    )  # fmt: skip
    return result


@torch.library.custom_op("dpt::readout_project", mutates_args=())
def _readout_op(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    return _readout(tokens, weight, bias, launch.input_precision(tokens.dtype), activation)


@_readout_op.register_fake
def _(tokens, weight, bias, activation):
    batch, count, features = tokens.shape
    return tokens.new_empty((batch, count - 1, features))


@torch.library.custom_op("dpt::readout_project_backward", mutates_args=())
def _readout_backward(
    grad: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of tokens, weight and bias."""
    features = tokens.shape[-1]
    tokens, taken = tokens.contiguous(), weight.to(tokens.dtype)
    grad_pre = _readout(tokens, taken, bias, launch.input_precision(tokens.dtype), activation, grad)
    grad_image = grad_pre.sum(1, dtype=torch.float32)  # (B, D): of W2 cls + b
    grad_vector = grad_image.to(tokens.dtype)
    rows = grad_pre.view(-1, features)
    grad_tokens = (rows @ taken[:, :features]).view(tokens.shape)
    grad_tokens[:, 0] = grad_vector @ taken[:, features:]
    grad_weight = torch.cat([rows.T @ tokens.view(-1, features), grad_vector.T @ tokens[:, 0]], dim=1)
    return grad_tokens, grad_weight.to(weight.dtype), grad_image.sum(0).to(tokens.dtype if bias is None else bias.dtype)


@_readout_backward.register_fake
def _(grad, tokens, weight, bias, activation):
    dtype = tokens.dtype if bias is None else bias.dtype
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape), tokens.new_empty(tokens.shape[-1], dtype=dtype)


def _save_readout(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_readout(ctx, grad):
    tokens, weight, bias = ctx.saved_tensors
    grad_tokens, grad_weight, grad_bias = _readout_backward(grad, tokens, weight, bias, ctx.activation)
    return grad_tokens, grad_weight, None if bias is None else grad_bias, None


_readout_op.register_autograd(_differentiate_readout, setup_context=_save_readout)


@launch.planned
def readout_project(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "gelu") -> torch.Tensor:
    """GELU of the projection of each patch token together with the class token: (B, N, D), contiguous, in the tokens' dtype.

    tokens: (B, 1+N, D), the class token first; float32, float16 or bfloat16; under autocast, autocast's dtype. Dense memory is read as it
    is, another layout is copied once. weight: (D, 2D), for [patch, class]; bias: (D,) or None; both in tokens' dtype. Differentiable.
    activation: "gelu" (the exact one) or "gelu_tanh".
    float32 products are exact unless PyTorch's own switch for matmuls allows tf32.
    Raises TypeError for a dtype, ValueError for a shape, device or activation, naming it and the rule.
    """
    (tokens,) = launch.autocast(tokens)
    launch.check_input("tokens", tokens)
    if tokens.dim() != 3 or tokens.shape[1] < 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: it must be (B, 1+N, D), the class token first, with N at least 1")
    features = tokens.shape[-1]
    launch.check_operand("weight", weight, (features, 2 * features), tokens, weight=True)
    if bias is not None:
        launch.check_operand("bias", bias, (features,), tokens, weight=True)
    check_activation(activation, features, *ACTIVATIONS)
    if not launch.runs_kernels(tokens, "reassemble"):
        return _split_readout(tokens, weight, bias, activation)
    return _readout_op(tokens, weight, bias, activation)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """A channels-last map (B, C, H, W) as (B, H*W, C), without a copy."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


def _tap_matrices(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(C, O, s, s) as (s*s, O, C) in ``dtype``: copied unless it lies in memory so, for neighbouring channels to be neighbours."""
    channels, columns, stride, _ = weight.shape
    flat = weight.to(dtype).permute(2, 3, 1, 0).reshape(-1).contiguous()
    return flat.view(stride * stride, columns, channels)  # flat first: the strides that the kernel is given must hold for O = 1 too


def _transposed_conv(x, weight, bias, precision) -> torch.Tensor:
    x = channels_last(x)
    channels, stride = weight.shape[1], weight.shape[-1]
    height, width = x.shape[2:]
    backend, config = _config("transposed_conv", x, x.shape[0] * height * width, channels, x.shape[1], precision)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if backend == "cudnn":
        return add_bias(F.conv_transpose2d(x, weight.to(x.dtype), stride=stride), bias)
    out = empty_channels_last(x, channels, height * stride, width * stride)
    _launch(_pixels(x), _tap_matrices(weight, x.dtype), bias, _pixels(out), width=width, stride=stride, precision=precision, config=config)
    return out


@torch.library.custom_op("dpt::transposed_conv", mutates_args=())
def _transposed_conv_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _transposed_conv(x, weight, bias, conv_precision(x.dtype))


@_transposed_conv_op.register_fake
def _(x, weight, bias):
    stride = weight.shape[-1]
    return empty_channels_last(x, weight.shape[1], x.shape[2] * stride, x.shape[3] * stride)


def _save_transposed_conv(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_transposed_conv(ctx, grad):
    """PyTorch's own, so that their products follow its switch for convolutions, as the forward's do."""
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        channels_last(grad), channels_last(x), weight.to(x.dtype), None, list(weight.shape[2:]), [0, 0], [1, 1], True, [0, 0], 1,
        [*ctx.needs_input_grad[:2], False],
    )  # fmt: skip
    wants_bias = bias is not None and ctx.needs_input_grad[2]
    return grad_x, grad_weight, grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype) if wants_bias else None


_transposed_conv_op.register_autograd(_differentiate_transposed_conv, setup_context=_save_transposed_conv)


@launch.planned
def transposed_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Transposed convolution whose stride is its kernel: (B, O, s*H, s*W), channels-last, in x's dtype.

    x: (B, C, H, W), float32, float16 or bfloat16; under autocast, autocast's dtype. Channels-last is read as it is, another layout is
    copied once. weight: (C, O, s, s); bias: (O,) or None; both in x's dtype, or under autocast in any. Differentiable. float32 products in
    TF32 where PyTorch's switch for convolutions says so (its default).
    Raises TypeError for a dtype, ValueError for a shape or device, naming it and the rule.
    """
    (x,) = launch.autocast(x)
    launch.check_map("x", x)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be (C, O, s, s)")
    launch.check_operand("weight", weight, (x.shape[1], *weight.shape[1:]), x, weight=True)
    if bias is not None:
        launch.check_operand("bias", bias, (weight.shape[1],), x, weight=True)
    if not launch.runs_kernels(x, "reassemble"):
        return convolution.spread(x, weight, bias)
    return _transposed_conv_op(x, weight, bias)

"""Residual convolution unit of the fusion blocks, with the previous level's map added: two launches of the implicit GEMM of conv3x3.

    hidden = relu(norm1(conv3x3(relu(x)) + b1))
    y = norm2(conv3x3(hidden) + b2) + x + resize(add)

(RefineNet's unit in the form of the DPT paper, section 3.2 and isl-org/DPT, dpt/blocks.py.) The residual is x itself, not relu(x). Norms
and biases may be left out; resize is bilinear with align_corners=True, so the upsampled map of a coarser level is never written.
FLOPs: 36 * C^2 * B * H * W. Moves five maps of B*C*H*W elements (x twice, hidden twice, y) and add.

Saved for backward: x, hidden and the parameters. hidden is the map after the ReLU, which is enough: its sign is the ReLU's mask, it is the
second convolution's input, and the gradients of the norms need no map before them, for the sum over all pixels of (gradient * convolution)
is the inner product of each output channel's weights with their gradient. The gradients of the maps are two more launches of the same
kernel with turned weights; those of the weights are PyTorch's own convolution (cuDNN on a GPU, deterministic if PyTorch is told to be),
that of add is gathered in a fixed order.

With the statistics of the batch each norm is a pass of its own behind its convolution, whose epilogue gives the tiles' statistics. Saved
then are x and the two convolutions; hidden is made again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import launch
from .cpu import convolution
from .parts.batch_norm import (
    BatchNorm,
    BatchNormArguments,
    BatchStatisticsNorm,
    batch_norm_backward,
    batch_norm_ref,
    check_batch_norm,
    check_batch_statistics_norm,
    norm_or_none,
    norm_scale,
    through_norm,
)
from .parts.conv3x3 import conv3x3, conv3x3_input_weight, conv3x3_weight_gradient, convolved, normalised, parameter_gradients
from .parts.maps import channels_last, empty_channels_last
from .upsample import upsample_bilinear_backward


def residual_conv_unit_ref(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    norm1: BatchNormArguments | None = None,
    norm2: BatchNormArguments | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """The unit in plain PyTorch. Same arguments and result as :func:`residual_conv_unit`."""

    def normalise(y: torch.Tensor, norm: BatchNormArguments | None) -> torch.Tensor:
        if norm is None:
            return y
        weight, bias, mean, variance, eps = norm
        return F.batch_norm(y, mean, variance, weight, bias, training=False, eps=eps)

    hidden = F.relu(normalise(F.conv2d(F.relu(x), w1, b1, padding=1), norm1))
    y = normalise(F.conv2d(hidden, w2, b2, padding=1), norm2) + x
    return y if add is None else y + _resized(add, x.shape[2:])


def _resized(add: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``add`` at ``size``: bilinear, align_corners=True."""
    return add if add.shape[2:] == size else convolution.resized(add, size, True)


def _rewritten(x, w1, b1, w2, b2, norm1, norm2, add) -> torch.Tensor:
    """What runs without kernels: each norm is folded into its convolution, and what follows one happens in its result's memory."""
    hidden = convolution.conv3x3(x, w1, b1, norm=norm1, relu_input=True, relu=True)
    y = convolution.conv3x3(hidden, w2, b2, norm=norm2, skip=x)
    return y if add is None else y.add_(_resized(add, x.shape[2:]))


@torch.library.custom_op("dpt::residual_conv_unit", mutates_args=())
def _unit(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    norm1_weight: torch.Tensor | None,
    norm1_bias: torch.Tensor | None,
    norm1_mean: torch.Tensor | None,
    norm1_variance: torch.Tensor | None,
    eps1: float,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    norm2_weight: torch.Tensor | None,
    norm2_bias: torch.Tensor | None,
    norm2_mean: torch.Tensor | None,
    norm2_variance: torch.Tensor | None,
    eps2: float,
    add: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, hidden)."""
    x = channels_last(x)
    norm1 = norm_or_none(norm1_weight, norm1_bias, norm1_mean, norm1_variance, eps1)
    norm2 = norm_or_none(norm2_weight, norm2_bias, norm2_mean, norm2_variance, eps2)
    hidden = conv3x3(x, channels_last(w1.to(x.dtype)), bias=b1, norm=norm1, relu_input=True, relu_output=True)
    add = None if add is None else channels_last(add)
    return conv3x3(hidden, channels_last(w2.to(x.dtype)), bias=b2, norm=norm2, skip=x, add=add), hidden


@_unit.register_fake
def _(x, w1, *_):
    return empty_channels_last(x, *x.shape[1:]), empty_channels_last(x, *x.shape[1:])


@torch.library.custom_op("dpt::residual_conv_unit_backward", mutates_args=())
def _unit_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    w1: torch.Tensor,
    scale1: torch.Tensor | None,
    w2: torch.Tensor,
    scale2: torch.Tensor | None,
    needs_x: bool,
    needs_first: bool,
    needs_second: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, then of each convolution's weight and bias as if no norm followed it (bias: float32); empty where not needed."""
    grad, x, hidden = channels_last(grad), channels_last(x), channels_last(hidden)
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    found = [grad.new_empty(0) for _ in range(5)]
    if needs_second:
        found[3], found[4] = parameter_gradients(grad, hidden, w2)
    if needs_first or needs_x:
        grad_hidden = conv3x3(grad, conv3x3_input_weight(w2, scale2), mask=hidden, gradient=True)
    if needs_first:
        found[1], found[2] = parameter_gradients(grad_hidden, x.relu(), w1)
    if needs_x:
        found[0] = conv3x3(grad_hidden, conv3x3_input_weight(w1, scale1), mask=x, skip=grad, gradient=True)
    return tuple(found)


@_unit_backward.register_fake
def _(grad, x, hidden, w1, scale1, w2, scale2, needs_x, needs_first, needs_second):
    def parameters(weight: torch.Tensor, needed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not needed:
            return grad.new_empty(0), grad.new_empty(0)
        like = torch.empty_like(weight, dtype=grad.dtype, memory_format=torch.channels_last)
        return like, torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)

    grad_x = empty_channels_last(x, *x.shape[1:]) if needs_x else grad.new_empty(0)
    return grad_x, *parameters(w1, needs_first), *parameters(w2, needs_second)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, *first_and_second, add = inputs
    _, hidden = output
    first, second = first_and_second[:7], first_and_second[7:]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.eps = first[-1], second[-1]
    ctx.add_size = None if add is None else add.shape[2:]
    ctx.save_for_backward(x, hidden, *first[:-1], *second[:-1])


def _differentiate(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    x, hidden, *saved = ctx.saved_tensors
    first, second = saved[:6], saved[6:]
    needs = ctx.needs_input_grad
    needs_x, needs_first, needs_second, needs_add = needs[0], any(needs[1:8]), any(needs[8:15]), needs[15]
    scales = [norm_scale(parameters[2], parameters[5], eps) for parameters, eps in zip((first, second), ctx.eps, strict=True)]
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2 = _unit_backward(
        grad, x, hidden, first[0], scales[0], second[0], scales[1], needs_x, needs_first, needs_second
    )
    nothing = (None,) * 4
    first = through_norm(grad_w1, grad_b1, first, ctx.eps[0]) if needs_first else nothing
    second = through_norm(grad_w2, grad_b2, second, ctx.eps[1]) if needs_second else nothing
    constants = (None,) * 3  # mean, variance, eps
    return grad_x if needs_x else None, *first, *constants, *second, *constants, _grad_add(ctx, grad) if needs_add else None


def _grad_add(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return grad if ctx.add_size == grad.shape[2:] else upsample_bilinear_backward(grad, *ctx.add_size, True)


_unit.register_autograd(_differentiate, setup_context=_save)


def _checked(x, w1, b1, w2, b2, add) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and add in the dtype in which they are taken; an error where these do not fit."""
    x, add = launch.autocast(x, add)
    launch.check_map("x", x)
    channels = x.shape[1]
    launch.check_tensor("w1", w1, (channels, channels, 3, 3), x, weight=True)
    launch.check_tensor("w2", w2, (channels, channels, 3, 3), x, weight=True)
    launch.check_vector("b1", b1, w1)
    launch.check_vector("b2", b2, w2)
    if add is not None:
        launch.check_map("add", add)
        launch.check_tensor("add", add, (x.shape[0], channels, None, None), x)
    return x, add


@launch.planned
def residual_conv_unit(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    norm1: BatchNormArguments | None = None,
    norm2: BatchNormArguments | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv3x3(relu(conv3x3(relu(x)))) + x, plus ``add`` resized to x's size: (B, C, H, W), channels_last, in x's dtype.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16. channels_last is read as it is; another layout is copied once.
        w1, w2: (C, C, 3, 3) in x's dtype; channels_last is read as it is, another layout is copied at each call.
        b1, b2: (C,), or None.
        norm1, norm2: batch norm in evaluation form after each convolution: (weight, bias, mean, variance, eps), four (C,) and a number, or
            None. Mean and variance are constants: they get no gradient.
        add: (B, C, h, w) in x's dtype, of any size: where it is not x's, resized bilinearly with align_corners=True. Or None.

    Under autocast the maps and the weights are taken in autocast's dtype, and so is the result; the weights are converted within, so that
    what is kept for the backward is the parameters themselves. Accumulation in float32; float32 products
    in TF32 where ``torch.backends.cudnn.conv.fp32_precision`` says so, as for PyTorch's convolutions (its default).

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: a shape or device that is not as above, or a side over 32767.
    """
    x, add = _checked(x, w1, b1, w2, b2, add)
    check_batch_norm("norm1", norm1, w1)
    check_batch_norm("norm2", norm2, w2)
    if not launch.runs_kernels(x, "residual_conv"):
        return _rewritten(x, w1, b1, w2, b2, norm1, norm2, add)
    nothing = (None, None, None, None, 0.0)
    return _unit(channels_last(x), w1, b1, *(norm1 or nothing), w2, b2, *(norm2 or nothing), add)[0]


def residual_conv_unit_training_ref(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    norm1: BatchStatisticsNorm,
    norm2: BatchStatisticsNorm,
    add: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`residual_conv_unit_training` in plain PyTorch. Same arguments and results."""
    y, moments1 = batch_norm_ref(F.conv2d(F.relu(x), w1, b1, padding=1), norm1)
    y, moments2 = batch_norm_ref(F.conv2d(F.relu(y), w2, b2, padding=1), norm2)
    y = y + x
    return y if add is None else y + _resized(add, x.shape[2:]), torch.cat((moments1, moments2))


@torch.library.custom_op("dpt::residual_conv_unit_training", mutates_args=())
def _training(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    eps1: float,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    eps2: float,
    add: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, moments, the first convolution, the second)."""
    x = channels_last(x)
    first, moments1 = convolved(x, channels_last(w1.to(x.dtype)), b1, relu_input=True)
    hidden = normalised(first, BatchNorm(norm1_weight, norm1_bias, *moments1, eps1), relu=True)
    second, moments2 = convolved(hidden, channels_last(w2.to(x.dtype)), b2)
    add = None if add is None else channels_last(add)
    y = normalised(second, BatchNorm(norm2_weight, norm2_bias, *moments2, eps2), skip=x, add=add)
    return y, torch.cat((moments1, moments2)), first, second


@_training.register_fake
def _(x, *_):
    y, first, second = (empty_channels_last(x, *x.shape[1:]) for _ in range(3))
    return y, torch.empty((4, x.shape[1]), dtype=torch.float32, device=x.device), first, second


@torch.library.custom_op("dpt::residual_conv_unit_training_backward", mutates_args=())
def _training_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    eps1: float,
    w2: torch.Tensor,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    eps2: float,
    moments: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x (empty where not needed), of both weights (in x's dtype), and of each norm's bias and weight (2, C), float32."""
    grad, x, w1, w2 = channels_last(grad), channels_last(x), w1.to(x.dtype), w2.to(x.dtype)
    norm1, norm2 = BatchNorm(norm1_weight, norm1_bias, *moments[:2], eps1), BatchNorm(norm2_weight, norm2_bias, *moments[2:], eps2)
    grad_second, grad_norm2 = batch_norm_backward(grad, second, norm2, relu=False)
    grad_w2 = channels_last(conv3x3_weight_gradient(grad_second, normalised(first, norm1, relu=True), w2))
    grad_hidden = conv3x3(grad_second, conv3x3_input_weight(w2, None), gradient=True)
    grad_first, grad_norm1 = batch_norm_backward(grad_hidden, first, norm1, relu=True)
    grad_w1 = channels_last(conv3x3_weight_gradient(grad_first, x.relu(), w1))
    grad_x = grad.new_empty(0)
    if needs_x:
        grad_x = conv3x3(grad_first, conv3x3_input_weight(w1, None), mask=x, skip=grad, gradient=True)
    return grad_x, grad_w1, grad_w2, grad_norm1, grad_norm2


@_training_backward.register_fake
def _(grad, x, w1, norm1_weight, norm1_bias, eps1, w2, norm2_weight, norm2_bias, eps2, moments, first, second, needs_x):
    grad_x = empty_channels_last(x, *x.shape[1:]) if needs_x else grad.new_empty(0)
    weights = [torch.empty_like(weight, dtype=x.dtype, memory_format=torch.channels_last) for weight in (w1, w2)]
    return grad_x, *weights, torch.empty_like(moments[:2]), torch.empty_like(moments[2:])


def _save_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, w1, b1, *norm1, ctx.eps1, w2, b2, norm2_weight, norm2_bias, ctx.eps2, add = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.add_size = None if add is None else add.shape[2:]
    ctx.save_for_backward(b1, b2, x, w1, *norm1, w2, norm2_weight, norm2_bias, *kept)


def _differentiate_training(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    b1, b2, x, *parameters, moments, first, second = ctx.saved_tensors
    needs_x, needs_add = ctx.needs_input_grad[0], ctx.needs_input_grad[-1]
    maps = (moments, first, second, needs_x)
    grad_x, grad_w1, grad_w2, (grad_norm1_bias, grad_norm1_weight), (grad_norm2_bias, grad_norm2_weight) = _training_backward(
        grad, x, *parameters[:3], ctx.eps1, *parameters[3:], ctx.eps2, *maps
    )
    found = (grad_w1, grad_norm1_weight, grad_norm1_bias, grad_w2, grad_norm2_weight, grad_norm2_bias)
    found = [gradient.to(parameter.dtype) for gradient, parameter in zip(found, parameters, strict=True)]
    # The norm takes away again what a bias in front of it adds.
    b1, b2 = (None if bias is None else torch.zeros_like(bias) for bias in (b1, b2))
    grad_add = _grad_add(ctx, grad) if needs_add else None
    return grad_x if needs_x else None, found[0], b1, *found[1:3], None, found[3], b2, *found[4:], None, grad_add


_training.register_autograd(_differentiate_training, setup_context=_save_training)


def residual_conv_unit_training(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    norm1: BatchStatisticsNorm,
    norm2: BatchStatisticsNorm,
    add: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`residual_conv_unit` with norms that take the statistics of this batch, and these. Differentiable in all but them.

    Args:
        x, w1, b1, w2, b2, add: as :func:`residual_conv_unit`.
        norm1, norm2: (weight, bias, eps): two (C,) in any floating-point dtype, and a number.

    Returns:
        (B, C, H, W), channels_last, in x's dtype; and (4, C) float32: mean and (biased) variance of each channel of the first convolution,
        then of the second.

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: a shape or device that is not as above, a side over 32767, or a single value in a channel.
    """
    x, add = _checked(x, w1, b1, w2, b2, add)
    check_batch_statistics_norm("norm1", norm1, w1, x)
    check_batch_statistics_norm("norm2", norm2, w2, x)
    if not launch.runs_kernels(x, "residual_conv"):
        return residual_conv_unit_training_ref(x, w1, b1, w2, b2, norm1=norm1, norm2=norm2, add=add)
    return _training(x, w1, b1, *norm1, w2, b2, *norm2, add)[:2]

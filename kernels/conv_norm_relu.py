"""3x3 convolution with its batch norm and ReLU in the epilogue: the first layer of both heads, one launch of conv3x3's implicit GEMM.

    y = relu(norm(conv3x3(x) + b))

Bias, norm (in evaluation form) and ReLU may be left out; the numbers of channels may differ. FLOPs: 18 * C * O * B * H * W. Moves x and y
once, where PyTorch moves y twice more for the norm and twice more for the ReLU.

Saved for backward: x, y and the parameters: the sign of y is the ReLU's mask. The gradient of x is another launch of the same kernel, with
turned weights; that of the weight is PyTorch's own convolution, as in residual_conv.

With the statistics of the batch, of which the convolution's epilogue gives the tiles', a second kernel applies norm and ReLU. Saved then
are x and the convolution, not y.
"""

from __future__ import annotations

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
from .upsample import conv1x1


def conv_norm_relu_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, norm: BatchNormArguments | None = None, relu: bool = True
) -> torch.Tensor:
    """:func:`conv_norm_relu` in plain PyTorch. Same arguments and result."""
    y = F.conv2d(x, weight, bias, padding=1)
    if norm is not None:
        norm_weight, norm_bias, mean, variance, eps = norm
        y = F.batch_norm(y, mean, variance, norm_weight, norm_bias, training=False, eps=eps)
    return F.relu(y) if relu else y


@torch.library.custom_op("dpt::conv_norm_relu", mutates_args=())
def _op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_mean: torch.Tensor | None,
    norm_variance: torch.Tensor | None,
    eps: float,
    relu: bool,
) -> torch.Tensor:
    norm = norm_or_none(norm_weight, norm_bias, norm_mean, norm_variance, eps)
    return conv3x3(channels_last(x), channels_last(weight.to(x.dtype)), bias=bias, norm=norm, relu_output=relu)


@_op.register_fake
def _(x, weight, *_):
    return empty_channels_last(x, weight.shape[0], *x.shape[2:])


@torch.library.custom_op("dpt::conv_norm_relu_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, needs_x: bool, needs_parameters: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, and of the weight and bias as if no norm followed them (bias: float32); empty where not needed."""
    grad, x, weight = channels_last(grad), channels_last(x), weight.to(x.dtype)
    grad_x = conv3x3(grad, conv3x3_input_weight(weight, scale), gradient=True) if needs_x else grad.new_empty(0)
    return grad_x, *(parameter_gradients(grad, x, weight) if needs_parameters else (grad.new_empty(0), grad.new_empty(0)))


@_backward.register_fake
def _(grad, x, weight, scale, needs_x, needs_parameters):
    grad_x = empty_channels_last(x, *x.shape[1:]) if needs_x else grad.new_empty(0)
    if not needs_parameters:
        return grad_x, grad.new_empty(0), grad.new_empty(0)
    like = torch.empty_like(weight, dtype=grad.dtype, memory_format=torch.channels_last)
    return grad_x, like, torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, *parameters, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(x, output if ctx.relu else None, *parameters)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, y, *parameters = ctx.saved_tensors
    needs_x, needs_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    scale = norm_scale(parameters[2], parameters[5], ctx.eps)
    grad_x, grad_weight, grad_bias = _backward(grad, x, parameters[0], scale, needs_x, needs_parameters)
    found = through_norm(grad_weight, grad_bias, parameters, ctx.eps) if needs_parameters else (None,) * 4
    return grad_x if needs_x else None, *found, None, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)


def _checked(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm: BatchNormArguments | None = None
) -> torch.Tensor:
    """x in the dtype in which it is taken; an error where these do not fit."""
    (x,) = launch.autocast(x)
    launch.check_map("x", x)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: must be (O, C, 3, 3)")
    launch.check_tensor("weight", weight, (weight.shape[0], x.shape[1], 3, 3), x, weight=True)
    launch.check_vector("bias", bias, weight)
    check_batch_norm("norm", norm, weight)
    return x


@launch.planned
def conv_norm_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, norm: BatchNormArguments | None = None, relu: bool = True
) -> torch.Tensor:
    """relu(norm(conv3x3(x) + bias)), stride 1 and padding 1: (B, O, H, W), channels_last, in x's dtype. Differentiable.

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16. channels_last is read as it is; another layout is copied once.
        weight: (O, C, 3, 3) in x's dtype; bias: (O,) or None, in any floating-point dtype.
        norm: batch norm in evaluation form: (weight, bias, mean, variance, eps), four (O,) and a number, or None. Mean and variance are
            constants: they get no gradient.
        relu: whether a ReLU ends it.

    Under autocast x and the weight are taken in autocast's dtype, and so is the result; the weight is converted within, so that what is
    kept for the backward is the parameter itself. Accumulation in float32; float32 products in TF32 where
    ``torch.backends.cudnn.conv.fp32_precision`` says so, as for PyTorch's convolutions (its default).

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: a shape or device that is not as above, or a side over 32767.
    """
    x = _checked(x, weight, bias, norm)
    if not launch.runs_kernels(x, "conv_norm_relu"):
        return convolution.conv3x3(x, weight, bias, norm=norm, relu=relu)
    return _op(x, weight, bias, *(norm or (None, None, None, None, 0.0)), relu)


def conv_norm_relu_conv1x1_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    last_weight: torch.Tensor,
    last_bias: torch.Tensor | None,
    *,
    norm: BatchNormArguments | None = None,
) -> torch.Tensor:
    """:func:`conv_norm_relu_conv1x1` in plain PyTorch. Same arguments and result."""
    return F.conv2d(conv_norm_relu_ref(x, weight, bias, norm=norm), last_weight, last_bias)


@launch.planned
def conv_norm_relu_conv1x1(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    last_weight: torch.Tensor,
    last_bias: torch.Tensor | None,
    *,
    norm: BatchNormArguments | None = None,
    padded: bool = False,
) -> torch.Tensor:
    """conv1x1(relu(norm(conv3x3(x) + bias))): (B, K, H, W), channels-last, in x's dtype. Differentiable.

    Two ops one after the other, ``conv_norm_relu`` and ``upsample.conv1x1``, with their arguments and errors; but on a CPU the map between
    them need not be written. last_weight: (K, O, 1, 1) in x's dtype; last_bias: (K,) or None.
    """
    (taken,) = launch.autocast(x)
    launch.check_tensor("last_weight", last_weight, (None, weight.shape[0], 1, 1), taken, weight=True)
    launch.check_vector("last_bias", last_bias, last_weight)
    if launch.has_kernels(x):
        return conv1x1(conv_norm_relu(x, weight, bias, norm=norm), last_weight, last_bias, padded=padded)
    x = _checked(x, weight, bias, norm)
    return convolution.conv3x3(x, weight, bias, norm=norm, relu=True, then=(last_weight, last_bias))


def conv_norm_relu_training_ref(x: torch.Tensor, weight: torch.Tensor, *, norm: BatchStatisticsNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`conv_norm_relu_training` in plain PyTorch. Same arguments and results."""
    y, moments = batch_norm_ref(F.conv2d(x, weight, padding=1), norm)
    return F.relu(y), moments


@torch.library.custom_op("dpt::conv_norm_relu_training", mutates_args=())
def _training(
    x: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, moments, convolution)."""
    convolution, moments = convolved(channels_last(x), channels_last(weight.to(x.dtype)), None)
    return normalised(convolution, BatchNorm(norm_weight, norm_bias, *moments, eps), relu=True), moments, convolution


@_training.register_fake
def _(x, weight, *_):
    channels = weight.shape[0]
    y, convolution = (empty_channels_last(x, channels, *x.shape[2:]) for _ in range(2))
    return y, torch.empty((2, channels), dtype=torch.float32, device=x.device), convolution


@torch.library.custom_op("dpt::conv_norm_relu_training_backward", mutates_args=())
def _training_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    moments: torch.Tensor,
    convolution: torch.Tensor,
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x (empty where not needed), of the weight (in x's dtype), and of the norm's bias and weight (2, O), float32."""
    x, weight, norm = channels_last(x), weight.to(x.dtype), BatchNorm(norm_weight, norm_bias, *moments, eps)
    grad, grad_norm = batch_norm_backward(channels_last(grad), convolution, norm, relu=True)
    grad_x = conv3x3(grad, conv3x3_input_weight(weight, None), gradient=True) if needs_x else grad.new_empty(0)
    return grad_x, channels_last(conv3x3_weight_gradient(grad, x, weight)), grad_norm


@_training_backward.register_fake
def _(grad, x, weight, norm_weight, norm_bias, eps, moments, convolution, needs_x):
    grad_x = empty_channels_last(x, *x.shape[1:]) if needs_x else grad.new_empty(0)
    like = torch.empty_like(weight, dtype=x.dtype, memory_format=torch.channels_last)
    return grad_x, like, torch.empty_like(moments)


def _save_training(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    _, moments, convolution = output
    ctx.mark_non_differentiable(moments, convolution)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, moments, convolution)


def _differentiate_training(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    x, *parameters, moments, convolution = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_weight, (grad_norm_bias, grad_norm_weight) = _training_backward(
        grad, x, *parameters, ctx.eps, moments, convolution, needs_x
    )
    found = (grad_weight, grad_norm_weight, grad_norm_bias)
    found = [gradient.to(parameter.dtype) for gradient, parameter in zip(found, parameters, strict=True)]
    return grad_x if needs_x else None, *found, None


_training.register_autograd(_differentiate_training, setup_context=_save_training)


def conv_norm_relu_training(x: torch.Tensor, weight: torch.Tensor, *, norm: BatchStatisticsNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """relu(norm(conv3x3(x))), the norm with the statistics of this batch, and these. Differentiable in all but them.

    Args:
        x, weight: as :func:`conv_norm_relu`.
        norm: (weight, bias, eps), two (O,) in any floating-point dtype, and a number.

    Returns:
        (B, O, H, W), channels_last, in x's dtype; and (2, O) float32: mean and (biased) variance of each channel of the convolution.

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: a shape or device that is not as above, a side over 32767, or a single value in a channel.
    """
    x = _checked(x, weight)
    check_batch_statistics_norm("norm", norm, weight, x)
    if not launch.runs_kernels(x, "conv_norm_relu"):
        return conv_norm_relu_training_ref(x, weight, norm=norm)
    return _training(x, weight, *norm)[:2]

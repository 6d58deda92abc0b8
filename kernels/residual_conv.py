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
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import launch
from .conv3x3 import Norm, conv3x3, conv3x3_input_weight, conv3x3_weight_gradient
from .upsample import MAX_SIDE, channels_last, empty_channels_last

NormArguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]


def residual_conv_unit_ref(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    norm1: NormArguments | None = None,
    norm2: NormArguments | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """The unit in plain PyTorch. Same arguments and result as :func:`residual_conv_unit`."""

    def normalise(y: torch.Tensor, norm: NormArguments | None) -> torch.Tensor:
        if norm is None:
            return y
        weight, bias, mean, variance, eps = norm
        return F.batch_norm(y, mean, variance, weight, bias, training=False, eps=eps)

    hidden = F.relu(normalise(F.conv2d(F.relu(x), w1, b1, padding=1), norm1))
    y = normalise(F.conv2d(hidden, w2, b2, padding=1), norm2) + x
    if add is None:
        return y
    return y + (add if add.shape == x.shape else F.interpolate(add, size=x.shape[2:], mode="bilinear", align_corners=True))


def _norm(weight: torch.Tensor | None, bias: Any, mean: Any, variance: Any, eps: float) -> Norm | None:
    return None if weight is None else Norm(weight, bias, mean, variance, eps)


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
    norm1 = _norm(norm1_weight, norm1_bias, norm1_mean, norm1_variance, eps1)
    norm2 = _norm(norm2_weight, norm2_bias, norm2_mean, norm2_variance, eps2)
    hidden = conv3x3(x, channels_last(w1), bias=b1, norm=norm1, relu_input=True, relu_output=True)
    add = None if add is None else channels_last(add)
    return conv3x3(hidden, channels_last(w2), bias=b2, norm=norm2, skip=x, add=add), hidden


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
    found = [grad.new_empty(0) for _ in range(5)]
    if needs_second:
        found[3], found[4] = _parameter_gradients(grad, hidden, w2)
    if needs_first or needs_x:
        grad_hidden = conv3x3(grad, conv3x3_input_weight(w2, scale2), mask=hidden, gradient=True)
    if needs_first:
        found[1], found[2] = _parameter_gradients(grad_hidden, x.relu(), w1)
    if needs_x:
        found[0] = conv3x3(grad_hidden, conv3x3_input_weight(w1, scale1), mask=x, skip=grad, gradient=True)
    return tuple(found)


def _parameter_gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return channels_last(conv3x3_weight_gradient(grad, x, weight)), grad.sum((0, 2, 3), dtype=torch.float32)


@_unit_backward.register_fake
def _(grad, x, hidden, w1, scale1, w2, scale2, needs_x, needs_first, needs_second):
    def parameters(weight: torch.Tensor, needed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not needed:
            return grad.new_empty(0), grad.new_empty(0)
        like = torch.empty_like(weight, memory_format=torch.channels_last)
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


def _scale(weight: torch.Tensor | None, variance: torch.Tensor | None, eps: float) -> torch.Tensor | None:
    return None if weight is None else weight.float() * torch.rsqrt(variance.float() + eps)


def _through_norm(
    grad_weight: torch.Tensor, grad_bias: torch.Tensor, parameters: tuple[torch.Tensor | None, ...], eps: float
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of (weight, bias, norm's weight, norm's bias), in their dtypes, from those of a convolution without a norm."""
    weight, bias, norm_weight, norm_bias, mean, variance = parameters
    if norm_weight is None:
        return grad_weight, None if bias is None else grad_bias.to(bias.dtype), None, None
    deviation = torch.rsqrt(variance.float() + eps)
    scale = norm_weight.float() * deviation
    centre = -mean.float() if bias is None else bias.float() - mean.float()
    product = (weight.float() * grad_weight.float()).sum((1, 2, 3))
    return (
        (grad_weight.float() * scale[:, None, None, None]).to(weight.dtype),
        None if bias is None else (grad_bias * scale).to(bias.dtype),
        (deviation * (product + centre * grad_bias)).to(norm_weight.dtype),
        grad_bias.to(norm_bias.dtype),
    )


def _differentiate(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    x, hidden, *saved = ctx.saved_tensors
    first, second = saved[:6], saved[6:]
    needs = ctx.needs_input_grad
    needs_x, needs_first, needs_second, needs_add = needs[0], any(needs[1:8]), any(needs[8:15]), needs[15]
    scales = [_scale(parameters[2], parameters[5], eps) for parameters, eps in zip((first, second), ctx.eps, strict=True)]
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2 = _unit_backward(
        grad, x, hidden, first[0], scales[0], second[0], scales[1], needs_x, needs_first, needs_second
    )
    nothing = (None,) * 4
    first = _through_norm(grad_w1, grad_b1, first, ctx.eps[0]) if needs_first else nothing
    second = _through_norm(grad_w2, grad_b2, second, ctx.eps[1]) if needs_second else nothing
    constants = (None,) * 3  # mean, variance, eps
    grad_add = None
    if needs_add:
        same = ctx.add_size == x.shape[2:]
        grad_add = grad if same else torch.ops.dpt.upsample_bilinear_backward(grad, *ctx.add_size, True)
    return grad_x if needs_x else None, *first, *constants, *second, *constants, grad_add


_unit.register_autograd(_differentiate, setup_context=_save)


def _check_map(name: str, x: torch.Tensor) -> None:
    if x.dtype not in launch.DTYPES:
        raise TypeError(f"{name} is {x.dtype}: must be one of {', '.join(map(str, launch.DTYPES))}")
    # Compared, not converted to int: an exported graph keeps its sides open.
    if x.dim() != 4 or x.shape[1] == 0 or not all(1 <= side <= MAX_SIDE for side in x.shape[2:]):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be (B, C, H, W), C at least 1, H and W from 1 to {MAX_SIDE}")


def _check_vector(name: str, vector: torch.Tensor | None, x: torch.Tensor) -> None:
    if vector is None:
        return
    if not vector.is_floating_point():
        raise TypeError(f"{name} is {vector.dtype}: must be floating-point")
    if tuple(vector.shape) != (x.shape[1],) or vector.device != x.device:
        raise ValueError(f"{name} is {tuple(vector.shape)} on {vector.device}: must be ({x.shape[1]},) on {x.device}, as x has it")


def _check_norm(name: str, norm: NormArguments | None, x: torch.Tensor) -> None:
    if norm is None:
        return
    if len(norm) != 5 or any(part is None for part in norm):
        raise ValueError(f"{name} must be (weight, bias, mean, variance, eps), none of them None")
    for part, vector in zip(("weight", "bias", "mean", "variance"), norm, strict=False):
        _check_vector(f"{name}'s {part}", vector, x)
    if norm[4] < 0:
        raise ValueError(f"{name}'s eps is {norm[4]}: must not be negative")


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], x: torch.Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} is {tensor.dtype}: must be {x.dtype}, as x is")
    fits = tensor.dim() == len(shape) and all(want in (None, side) for want, side in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.device != x.device:
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}: must be ({wanted}) on {x.device}")


def residual_conv_unit(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    norm1: NormArguments | None = None,
    norm2: NormArguments | None = None,
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

    Under autocast the maps and the weights are taken in autocast's dtype, and so is the result. Accumulation in float32; float32 products
    in TF32 where ``torch.backends.cudnn.conv.fp32_precision`` says so, as for PyTorch's convolutions (its default).

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: a shape or device that is not as above, or a side over 32767.
    """
    x, w1, w2, add = launch.autocast(x, w1, w2, add)
    _check_map("x", x)
    channels = x.shape[1]
    _check_tensor("w1", w1, (channels, channels, 3, 3), x)
    _check_tensor("w2", w2, (channels, channels, 3, 3), x)
    _check_vector("b1", b1, x)
    _check_vector("b2", b2, x)
    _check_norm("norm1", norm1, x)
    _check_norm("norm2", norm2, x)
    if add is not None:
        _check_map("add", add)
        _check_tensor("add", add, (x.shape[0], channels, None, None), x)
    if not launch.runs_kernels(x, "residual_conv"):
        return residual_conv_unit_ref(x, w1, b1, w2, b2, norm1=norm1, norm2=norm2, add=add)
    nothing = (None, None, None, None, 0.0)
    return _unit(channels_last(x), w1, b1, *(norm1 or nothing), w2, b2, *(norm2 or nothing), add)[0]

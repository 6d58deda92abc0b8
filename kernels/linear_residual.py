"""A linear layer, its LayerScale and the residual, in one launch.

    out = residual + layer_scale * (x @ weight.T + bias)

x (..., K), weight (N, K), residual and out (..., N). 2*M*N*K FLOPs for M rows; (M*K + N*K + 2*M*N) elements moved, where PyTorch moves
2*M*N more for the sum and 2*M*N more for the scale. The kernel is ``products``'s, scale and residual its epilogue.

Saved for the backward: x, weight, bias and layer_scale. With s = sum(dout) over the rows:

    dresidual = dout        dx = dout @ (layer_scale * weight)        dweight = layer_scale * dout.T @ x        dbias = layer_scale * s
    dlayer_scale = sum(dout * (x @ weight.T + bias)) = sum_k(weight * dout.T @ x) + bias * s: read off the accumulator of dweight

Products with nothing beside them (dx, and dweight without a scale) are left to PyTorch's matmul. No sum depends on a schedule: gradients
are reproducible bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import launch
from .cpu.linear import linear
from .parts import products
from .parts.products import rows_of


def linear_residual_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`linear_residual` in plain PyTorch, any device and floating dtype."""
    out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return residual + (out if layer_scale is None else out * layer_scale.to(x.dtype))


@launch.planned
def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer, scaled by ``layer_scale`` where it is given, added to ``residual``.

    x: (..., K), any number of rows (none gives an empty result), any strides (copied first unless contiguous), float32, float16 or
    bfloat16. weight: (N, K) and residual: (..., N), of x's leading sizes, in x's dtype. bias, layer_scale: (N,) or None, in x's dtype or
    float32. Returns (..., N) in x's dtype, contiguous; differentiable once. Products accumulate in float32, and those of float32 are exact
    unless PyTorch's own switch allows tf32. Under autocast x, weight and residual are taken in autocast's dtype, so the sum is of that
    dtype.
    Raises TypeError for a dtype or argument type, ValueError for a shape or value, naming it and the rule.
    """
    launch.check_input("x", x)
    x, residual = launch.autocast(x, residual)
    columns = products.check_linear("the", weight, bias, x.shape[-1], x)
    launch.check_operand("residual", residual, (*x.shape[:-1], columns), x)
    launch.check_operand("layer_scale", layer_scale, (columns,), x, vector=True)
    if not launch.runs_kernels(x, "linear_residual"):
        bias, layer_scale = (None if vector is None else vector.to(x.dtype) for vector in (bias, layer_scale))
        return linear(x, weight.to(x.dtype), bias, scale=layer_scale, residual=residual)
    return torch.ops.dpt.linear_residual(x, weight, bias, residual, layer_scale)


def scaled(grad: torch.Tensor, weight: torch.Tensor, layer_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad (M, N), weight (N, K)), both in grad's dtype, one of them with LayerScale in it, whose product is the gradient of the layer's
    input.

    The weight is the smaller, but in float16 its product with 1e-5, where LayerScale begins, is subnormal; a gradient is in range there,
    for the loss is scaled.
    """
    if layer_scale is None:
        return grad, weight.to(grad.dtype)
    if grad.dtype == torch.float16:
        return (grad * layer_scale).to(grad.dtype), weight.to(grad.dtype)
    return grad, (weight * layer_scale[:, None]).to(grad.dtype)


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    activation: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (weight, bias, layer_scale), each if needed, from the output's, (M, N). The layer's input is activation(x), (M, K)."""
    weight_grad = bias_grad = scale_grad = sums = None
    if needs[1] or (needs[2] and bias is not None):
        sums = grad.sum(0, dtype=torch.float32)
    if activation == "none" and layer_scale is None:
        weight_grad = grad.T @ x if needs[0] else None
    elif needs[0] or needs[2]:
        scale_operands = (None, None) if layer_scale is None else (layer_scale, weight)
        weight_grad, scale_grad = torch.ops.dpt.linear_weight_gradient(grad, x, activation, *scale_operands)
    if needs[2]:
        scale_grad = (scale_grad if bias is None else scale_grad + bias * sums).to(layer_scale.dtype)
    if needs[1]:
        bias_grad = (sums if layer_scale is None else sums * layer_scale).to(bias.dtype)
    return weight_grad.to(weight.dtype) if needs[0] else None, bias_grad, scale_grad if needs[2] else None


@torch.library.custom_op("dpt::linear_residual", mutates_args=())
def _linear_residual_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    layer_scale: torch.Tensor | None,
) -> torch.Tensor:
    options = {"epilogue": "residual", "bias": bias, "scale": layer_scale, "extra": rows_of(residual)}
    out, _ = products.linear("linear_residual", rows_of(x), weight, launch.input_precision(x.dtype), **options)
    return out.reshape(residual.shape)


@_linear_residual_op.register_fake
def _(x, weight, bias, residual, layer_scale):
    return residual.new_empty(residual.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, layer_scale = inputs
    ctx.save_for_backward(x, weight, bias, layer_scale)


def _backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, layer_scale = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual, needs_scale = ctx.needs_input_grad
    grad_rows = rows_of(grad)
    x_grad = torch.mm(*scaled(grad_rows, weight, layer_scale)).reshape(x.shape) if needs_x else None
    needs = (needs_weight, needs_bias, needs_scale)
    weight_grad, bias_grad, scale_grad = gradients(grad_rows, rows_of(x), "none", weight, bias, layer_scale, needs)
    return x_grad, weight_grad, bias_grad, grad if needs_residual else None, scale_grad


_linear_residual_op.register_autograd(_backward, setup_context=_setup_context)

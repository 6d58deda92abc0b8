"""The MLP half of an encoder block, with its LayerNorm, LayerScale and residual, in three launches.

    out = x + layer_scale * (activation(LN(x) @ w1.T + b1) @ w2.T + b2)

x and out (..., D), w1 (H, D), w2 (D, H); with "swiglu" w1 (2 * H, D), the gate's rows first. The first two launches are
``layernorm_linear``'s, the third ``linear_residual``'s. 4*M*D*H FLOPs for M rows, with "swiglu" 6*M*D*H; (5*M*D + 2*D*H + 2*M*H) elements
moved. One kernel for both products is not to be had: the float32 accumulator of a row block, BLOCK_M x D, does not fit beside the hidden
block, and the traffic of the hidden activation hides under the products.

Saved for the backward: the inputs, mean and rstd (M,) float32 and the pre-activation (M, H), with "swiglu" (M, 2 * H), the only large
tensor; the normalised rows and the activation are computed again where they are used:

    dw2 = layer_scale * dout.T @ activation(pre)        dpre = (dout @ (layer_scale * w2)) * activation'(pre), in the product's epilogue
    dw1 = dpre.T @ LN(x)        dx = dout + LN'(dpre @ w1)

and the biases, the scale and the norm as in the two ops. Gradients are reproducible bit for bit.
"""

from __future__ import annotations

import torch

from . import launch
from .layernorm_linear import check_activation, layernorm_linear, layernorm_linear_ref, normalised_linear
from .layernorm_linear import gradients as layernorm_linear_gradients
from .linear_residual import gradients as linear_residual_gradients
from .linear_residual import linear_residual, linear_residual_ref, scaled
from .parts import products
from .parts.layernorm import LayerNorm, Statistics, check_layer_norm
from .parts.products import ACTIVATIONS, activated_columns, rows_of

__all__ = ["layernorm_linear", "layernorm_linear_ref", "layernorm_mlp", "layernorm_mlp_ref", "linear_residual", "linear_residual_ref"]


def layernorm_mlp_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    eps: float,
    layer_scale: torch.Tensor | None = None,
    activation: str = "gelu",
) -> torch.Tensor:
    """:func:`layernorm_mlp` in plain PyTorch, any device and floating dtype."""
    hidden = layernorm_linear_ref(x, norm_weight, norm_bias, w1, b1, eps, activation)
    return linear_residual_ref(hidden, w2, b2, x, layer_scale)


@launch.planned
def layernorm_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    eps: float,
    layer_scale: torch.Tensor | None = None,
    activation: str = "gelu",
) -> torch.Tensor:
    """x + layer_scale * MLP(LN(x)), with ``activation`` between the MLP's two linear layers.

    x: (..., D), any number of rows (none gives an empty result), any strides (copied first unless contiguous), float32, float16 or
    bfloat16. activation: "gelu" (the exact one), "gelu_tanh", or "swiglu", SiLU of the first half of the first layer's features times the
    second. w1: (H, D), with "swiglu" (2 * H, D), w2: (D, H), in x's dtype. norm_weight, norm_bias, b2, layer_scale: (D,), b1: as w1 has
    rows, in x's dtype or float32; b1, b2 and layer_scale may be None. eps: positive. Returns (..., D) in x's dtype, contiguous;
    differentiable once. Products accumulate in float32, and those of float32 are exact unless PyTorch's own switch allows tf32. Under
    autocast x, w1 and w2 are taken in autocast's dtype, so LayerNorm and the residual sum are of that dtype too. D and H whose rows are no
    multiple of 16 bytes are right, but slow.
    Raises TypeError for a dtype or argument type, ValueError for a shape or value, naming it and the rule.
    """
    launch.check_input("x", x)
    (x,) = launch.autocast(x)
    check_layer_norm(norm_weight, norm_bias, eps, x)
    columns = products.check_linear("w1, b1:", w1, b1, x.shape[-1], x)
    check_activation(activation, columns, *ACTIVATIONS)
    hidden = activated_columns(activation, columns)
    if products.check_linear("w2, b2:", w2, b2, hidden, x) != x.shape[-1]:
        raise ValueError(f"w2 has shape {tuple(w2.shape)}: it must be {(x.shape[-1], hidden)}, for its output is added to x")
    launch.check_operand("layer_scale", layer_scale, x.shape[-1:], x, vector=True)
    if not launch.runs_kernels(x, "layernorm_mlp"):
        hidden = layernorm_linear(x, norm_weight, norm_bias, w1, b1, eps, activation)
        return linear_residual(hidden, w2, b2, x, layer_scale)
    save = products.needs_gradient(x, norm_weight, norm_bias, w1, b1, w2, b2, layer_scale)
    return torch.ops.dpt.layernorm_mlp(x, norm_weight, norm_bias, w1, b1, w2, b2, eps, layer_scale, activation, save)[0]


@torch.library.custom_op("dpt::activation_input_gradient", mutates_args=())
def _activation_input_gradient_op(grad: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor, activation: str) -> torch.Tensor:
    """(grad (M, N) @ weight (N, K)) * activation'(pre), as large as pre, which is (M, K), of "swiglu" (M, 2 * K)."""
    options = {"epilogue": "gradient", "activation": activation, "extra": pre}
    return products.linear("activation_input_gradient", grad, weight, launch.input_precision(grad.dtype), **options)[0]


@_activation_input_gradient_op.register_fake
def _(grad, weight, pre, activation):
    return grad.new_empty(pre.shape)


@torch.library.custom_op("dpt::layernorm_mlp", mutates_args=())
def _layernorm_mlp_op(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    eps: float,
    layer_scale: torch.Tensor | None,
    activation: str,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, norm, precision = rows_of(x), LayerNorm(norm_weight, norm_bias), launch.input_precision(x.dtype)
    hidden, pre, statistics = normalised_linear(rows, norm, eps, w1, b1, activation, precision, save)
    out, _ = products.linear("linear_residual", hidden, w2, precision, epilogue="residual", bias=b2, scale=layer_scale, extra=rows)
    return out.reshape(x.shape), x.new_empty(0) if pre is None else pre, *statistics


@_layernorm_mlp_op.register_fake
def _(x, norm_weight, norm_bias, w1, b1, w2, b2, eps, layer_scale, activation, save):
    rows = x.numel() // x.shape[-1]
    pre = x.new_empty((rows, w1.shape[0]) if save else 0)
    return x.new_empty(x.shape), pre, *(x.new_empty(rows if save else 0, dtype=torch.float32) for _ in range(2))


def _setup_context(ctx, inputs, output) -> None:
    x, norm_weight, norm_bias, w1, b1, w2, b2, _, layer_scale, ctx.activation, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, norm_bias, w1, b1, w2, b2, layer_scale, *output[1:])


def _backward(ctx, grad: torch.Tensor | None, *_) -> tuple[torch.Tensor | None, ...]:
    """Only ``out`` leaves :func:`layernorm_mlp`; the other outputs have no gradient."""
    if grad is None:
        return (None,) * 11
    x, norm_weight, norm_bias, w1, b1, w2, b2, layer_scale, pre, mean, rstd = ctx.saved_tensors
    first, (needs_w2, needs_b2, _, needs_scale) = ctx.needs_input_grad[:5], ctx.needs_input_grad[5:9]
    grad = rows_of(grad)
    second_grads = linear_residual_gradients(grad, pre, ctx.activation, w2, b2, layer_scale, (needs_w2, needs_b2, needs_scale))
    first_grads = (None,) * 5
    if any(first):
        pre_grad = torch.ops.dpt.activation_input_gradient(*scaled(grad, w2, layer_scale), pre, ctx.activation)
        norm, statistics = LayerNorm(norm_weight, norm_bias), Statistics(mean, rstd)
        first_grads = layernorm_linear_gradients(pre_grad, x, norm, statistics, w1, b1, first, skip=grad)
    return *first_grads, *second_grads[:2], None, second_grads[2], None, None


_layernorm_mlp_op.register_autograd(_backward, setup_context=_setup_context)

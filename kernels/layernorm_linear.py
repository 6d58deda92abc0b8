"""LayerNorm and a linear layer, with or without an activation or a rotation, in two launches.

    out = activation(LN(x) @ weight.T + bias)        LN(x) = (x - mean) * rstd * norm_weight + norm_bias, over the last dimension

x (..., D), weight (N, D), out (..., N), with "swiglu" (..., N / 2). 2*M*N*D FLOPs for M rows; (3*M*D + N*D + M*N) elements moved, as by
PyTorch, which moves 2*M*N more for the activation. The first launch is ``layernorm``'s, the second ``products``'s.

LayerNorm within the product's launch was no gain (counted, sm_90, bfloat16, D = 768: with the statistics in a first pass over the rows
9500 issue cycles before a product of 6100 tensor cycles; with them given, the rows normalised on their way to the tensor core 341
instructions a step against 83), for what it saves is written and read once, and what it costs comes again for each tile of columns.
Folded, with norm_weight in the weight and rstd * (product - mean * column sums) behind, whose sums over a row the product's own loop finds,
it would be one, for few rows: predicted for fc1 of one picture of ViT-B 17.2 us against 20.9, 2.5 % of a forward. It is left out, for it
takes a second copy of the weight, a quarter more memory than the model has at batch 1, which is stale when a training or a CUDA graph
writes where it was made from; with norm_weight multiplied on the way, without the copy, it takes 21.2 us.

Saved for the backward: the inputs, mean and rstd (M,) float32, and with an activation what it is applied to; the normalised rows are
computed again, by the launch that reads x for its gradient:

    dpre = dout * activation'(pre)        dweight = dpre.T @ LN(x)
    g = dpre @ weight        dx, dnorm_weight, dnorm_bias of g: ``layernorm``'s

With a rotation (``parts.rotation``) out is queries, keys and values, the first two turned, and dpre is dout turned back.

The products are plain, left to PyTorch's matmul, as the sum of dpre that is the bias's gradient is. All gradients are reproducible bit for
bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import launch
from .cpu.linear import activated, linear
from .parts import products
from .parts.attention import UNIT
from .parts.layernorm import LayerNorm, Statistics, check_layer_norm, layer_norm
from .parts.products import ACTIVATIONS, activated_columns, rows_of
from .parts.rotation import check_rotation, packed_rotated_ref, rotate


def check_activation(activation: str | None, columns: int, *names: str | None) -> None:
    """ValueError unless it is one of ``names`` and goes with a layer of so many columns."""
    if activation not in names:
        known = " or ".join(map(repr, names))
        raise ValueError(f"activation={activation!r}: it must be {known}")
    if activation == "swiglu" and columns % 2:
        raise ValueError(f"activation='swiglu' of {columns} features: they must be even, half of them the gate")


def layernorm_linear_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None = None,
    rotation: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`layernorm_linear` in plain PyTorch, any device and floating dtype."""
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
    found = F.linear(normalised, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return activated(found, activation) if rotation is None else packed_rotated_ref(found, rotation)


@launch.planned
def layernorm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None = None,
    rotation: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm over the last dimension, then a linear layer, then ``activation`` if there is one, or a ``rotation``.

    x: (..., D), any number of rows (none gives an empty result), any strides (copied first unless contiguous), float32, float16 or
    bfloat16. weight: (N, D) in x's dtype. norm_weight, norm_bias: (D,), bias: (N,) or None; in x's dtype or float32. eps: positive.
    activation: "gelu" (the exact one), "gelu_tanh", or "swiglu", SiLU of the first half of the N features times the second. rotation: (2,
    T, D') float32, without gradient: x is (B, T, D), N = 3 * H * 2 * D' is queries, keys and values of H heads of 2 * D' channels, and the
    first two are turned by token, channel d with d + D', by the angles whose cosine and sine it holds. Returns (..., N), with "swiglu"
    (..., N / 2), in x's dtype, contiguous, but for rows that may lie apart on a CPU; differentiable once. Products accumulate in float32,
    and those of float32 are exact unless PyTorch's own switch allows tf32. Under autocast x and weight are taken in autocast's dtype,
    LayerNorm included; the vectors are used as they are. D and N whose rows are no multiple of 16 bytes are right, but slow: they cannot be
    copied in wide pieces.
    Raises TypeError for a dtype or argument type, ValueError for a shape or value, naming it and the rule.
    """
    launch.check_input("x", x)
    (x,) = launch.autocast(x)
    check_layer_norm(norm_weight, norm_bias, eps, x)
    columns = products.check_linear("the", weight, bias, x.shape[-1], x)
    check_activation(activation, columns, None, *ACTIVATIONS)
    _check_rotation(rotation, activation, columns, x)
    if not launch.runs_kernels(x, "layernorm_linear"):
        scale, shift, bias = (None if vector is None else vector.to(x.dtype) for vector in (norm_weight, norm_bias, bias))
        normalised = F.layer_norm(x, x.shape[-1:], scale, shift, eps)
        found = linear(normalised, weight.to(x.dtype), bias, activation, apart=activation is None)
        return found if rotation is None else packed_rotated_ref(found, rotation)
    save = products.needs_gradient(x, norm_weight, norm_bias, weight, bias)
    return torch.ops.dpt.layernorm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation or "none", rotation, save)[0]


def _check_rotation(rotation: torch.Tensor | None, activation: str | None, columns: int, x: torch.Tensor) -> None:
    if rotation is None:
        return
    if activation is not None:
        raise ValueError(f"activation={activation!r} and a rotation: only one of them may be")
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}: with a rotation it must be (B, T, D)")
    check_rotation(rotation, x.shape[1], None, x)
    head = 2 * rotation.shape[2]
    if head % UNIT.value or columns % (3 * head):
        rule = f"they must be a multiple of {UNIT.value}, and the weight's {columns} rows 3 * H * that"
        raise ValueError(f"rotation turns heads of {head} channels: {rule}")


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm: LayerNorm,
    statistics: Statistics,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],
    skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x, norm_weight, norm_bias, weight, bias), each if needed, from that of the pre-activation, (M, N).

    ``skip`` (M, D), if given, is added to the gradient of x.
    """
    needs_x, needs_norm, needs_weight = needs[0], needs[1] or needs[2], needs[3]
    rows = rows_of(x)
    weight_grad = bias_grad = x_grad = None
    sums = (None, None)
    if needs_x or needs_norm or needs_weight:
        upstream = grad @ weight.to(grad.dtype) if needs_x or needs_norm else None
        of_norm = (*statistics, *norm, skip, needs_x, needs_norm, needs_weight)
        x_grad, sums, normalised = torch.ops.dpt.layernorm_backward(upstream, rows, *of_norm)
        weight_grad = (grad.T @ normalised).to(weight.dtype) if needs_weight else None
    if needs[4]:
        bias_grad = grad.sum(0, dtype=torch.float32).to(bias.dtype)
    return (
        x_grad.reshape(x.shape) if needs_x else None,
        sums[0].to(norm.weight.dtype) if needs[1] else None,
        sums[1].to(norm.bias.dtype) if needs[2] else None,
        weight_grad,
        bias_grad,
    )


def normalised_linear(
    x: torch.Tensor,
    norm: LayerNorm,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    precision: str,
    save: bool,
    rotation: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, Statistics]:
    """The two launches, of rows x (M, D): (out, with ``save`` what is activated, the statistics, empty without)."""
    normalised, statistics = layer_norm(x, norm, eps, save)
    options = {"activation": activation, "bias": bias, "save_pre": save and activation != "none", "rotation": rotation}
    return *products.linear("layernorm_linear", normalised, weight, precision, **options), statistics


@torch.library.custom_op("dpt::layernorm_linear", mutates_args=())
def _layernorm_linear_op(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    rotation: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    norm, precision = LayerNorm(norm_weight, norm_bias), launch.input_precision(x.dtype)
    out, pre, statistics = normalised_linear(rows_of(x), norm, eps, weight, bias, activation, precision, save, rotation)
    return out.reshape(*x.shape[:-1], out.shape[1]), x.new_empty(0) if pre is None else pre, *statistics


@_layernorm_linear_op.register_fake
def _(x, norm_weight, norm_bias, weight, bias, eps, activation, rotation, save):
    rows, columns = x.numel() // x.shape[-1], weight.shape[0]
    pre = x.new_empty((rows, columns) if save and activation != "none" else 0)
    statistics = (x.new_empty(rows if save else 0, dtype=torch.float32) for _ in range(2))
    return x.new_empty((*x.shape[:-1], activated_columns(activation, columns))), pre, *statistics


@torch.library.custom_op("dpt::activation_gradient", mutates_args=())
def _activation_gradient_op(grad: torch.Tensor, pre: torch.Tensor, activation: str) -> torch.Tensor:
    """grad * activation'(pre), in plain PyTorch. aten's own have derivatives, and so a second one would silently lose what goes through
    ``pre``."""
    if activation == "swiglu":
        gate, value = pre.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grad * value, gate), grad * F.silu(gate)], dim=-1)
    return torch.ops.aten.gelu_backward(grad, pre, approximate="tanh" if activation == "gelu_tanh" else "none")


@_activation_gradient_op.register_fake
def _(grad, pre, activation):
    return torch.empty_like(pre)


@torch.library.custom_op("dpt::packed_rotation_gradient", mutates_args=())
def _packed_rotation_gradient_op(grad: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """The gradient (B, T, 3*H*D) of queries, keys and values before they were turned."""
    back = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if grad.numel():
        read, written = (t.unflatten(2, (3, -1, 2 * rotation.shape[2])).unbind(2) for t in (grad.contiguous(), back))
        rotate(*read[:2], *written[:2], rotation, inverse=True)
        written[2].copy_(read[2])
    return back


@_packed_rotation_gradient_op.register_fake
def _(grad, rotation):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    x, norm_weight, norm_bias, weight, bias, _, ctx.activation, rotation, _ = inputs
    _, pre, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, rotation, pre, mean, rstd)


def _backward(ctx, grad: torch.Tensor | None, *_) -> tuple[torch.Tensor | None, ...]:
    """Only ``out`` leaves :func:`layernorm_linear`; the other outputs have no gradient."""
    if grad is None:
        return (None,) * 9
    x, norm_weight, norm_bias, weight, bias, rotation, pre, mean, rstd = ctx.saved_tensors
    grad = rows_of(grad if rotation is None else torch.ops.dpt.packed_rotation_gradient(grad, rotation))
    if ctx.activation != "none":
        grad = torch.ops.dpt.activation_gradient(grad, pre, ctx.activation)
    found = gradients(grad, x, LayerNorm(norm_weight, norm_bias), Statistics(mean, rstd), weight, bias, ctx.needs_input_grad[:5])
    return *found, None, None, None, None


_layernorm_linear_op.register_autograd(_backward, setup_context=_setup_context)

"""LayerNorm and a linear layer, with or without GELU, in one launch.

    out = activation(LN(x) @ weight.T + bias)        LN(x) = (x - mean) * rstd * norm_weight + norm_bias, over the last dimension

x (..., D), weight (N, D), out (..., N). 2*M*N*D FLOPs for M rows; (M*D + N*D + M*N) elements moved, where PyTorch moves 2*M*D more for the
normalised copy, and 2*M*N more for GELU. The kernel is ``products``'s, LayerNorm its prologue.

Saved for the backward: the inputs, mean and rstd (M,) float32, and with GELU the pre-activation; the normalised rows are computed again:

    dpre = dout * GELU'(pre)        dweight = dpre.T @ LN(x)        g = dpre @ weight
    dx = rstd * (g' - mean(g') - xhat * mean(g' * xhat)), g' = g * norm_weight
    dnorm_weight = sum(g * xhat)        dnorm_bias = sum(g)

g is a plain product, left to PyTorch's matmul, as the sum of dpre that is the bias's gradient is. The sums over rows that give the norm's
gradients are taken in two stages in float32, in a fixed order, so all gradients are reproducible bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .parts import products
from .parts.norms import LayerNorm, Statistics, check_layer_norm
from .parts.products import rows_of


def layernorm_linear_ref(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None = None,
) -> torch.Tensor:
    """:func:`layernorm_linear` in plain PyTorch, any device and floating dtype."""
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
    out = F.linear(normalised, weight, None if bias is None else bias.to(x.dtype))
    return F.gelu(out) if activation == "gelu" else out


def layernorm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None = None,
) -> torch.Tensor:
    """LayerNorm over the last dimension, then a linear layer, then GELU (the exact one) if ``activation`` is "gelu".

    x: (..., D), any number of rows (none gives an empty result), any strides (copied first unless contiguous), float32, float16 or
    bfloat16. weight: (N, D) in x's dtype. norm_weight, norm_bias: (D,), bias: (N,) or None; in x's dtype or float32. eps: positive.
    Returns (..., N) in x's dtype, contiguous; differentiable once. Products accumulate in float32, and those of float32 are exact unless
    PyTorch's own switch allows tf32. Under autocast x and weight are cast to autocast's dtype first, LayerNorm included; the vectors are
    used as they are. D and N whose rows are no multiple of 16 bytes are right, but slow: they cannot be copied in wide pieces.
    Raises TypeError for a dtype or argument type, ValueError for a shape or value, naming it and the rule.
    """
    launch.check_input("x", x)
    x, weight = launch.autocast(x, weight)
    check_layer_norm(norm_weight, norm_bias, eps, x)
    products.check_linear("the", weight, bias, x.shape[-1], x)
    if activation not in (None, "gelu"):
        raise ValueError(f"activation={activation!r}: it must be None or 'gelu'")
    if not launch.runs_kernels(x, "layernorm_linear"):
        return layernorm_linear_ref(x, norm_weight, norm_bias, weight, bias, eps, activation)
    save = products.needs_gradient(x, norm_weight, norm_bias, weight, bias)
    return torch.ops.dpt.layernorm_linear(x, norm_weight, norm_bias, weight, bias, eps, activation == "gelu", save)[0]


@triton.jit(do_not_specialize=["rows"])
def layernorm_backward_kernel(
    grad,  # (rows, depth): the gradient of the normalised, scaled and shifted rows
    x,  # (rows, depth)
    mean_ptr,  # (rows,) float32
    rstd_ptr,  # (rows,) float32
    norm_weight,  # (depth,)
    skip,  # (rows, depth): added to the gradient of x; or None
    out,  # (rows, depth): the gradient of x; or None
    partial,  # (2, programs, depth) float32: this program's rows' share in the gradients of norm_weight and norm_bias; or None
    rows,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program: STEPS blocks of BLOCK_M whole rows."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < depth
    gamma = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK_D], tl.float32)
    bias_sum = tl.zeros([BLOCK_D], tl.float32)
    for step in range(STEPS):
        i = (tl.program_id(0) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (i < rows)[:, None] & inside[None, :]
        offsets = i.to(tl.int64)[:, None] * depth + columns[None, :]
        mean = tl.load(mean_ptr + i, mask=i < rows, other=0.0)
        rstd = tl.load(rstd_ptr + i, mask=i < rows, other=0.0)
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        normalised = tl.where(mask, centred * rstd[:, None], 0.0)
        if partial is not None:
            weight_sum += tl.sum(g * normalised, 0)
            bias_sum += tl.sum(g, 0)
        if out is not None:
            g *= gamma[None, :]
            average = tl.sum(g, 1) / depth
            slope = tl.sum(g * normalised, 1) / depth
            gradient = (g - average[:, None] - normalised * slope[:, None]) * rstd[:, None]
            if skip is not None:
                gradient += tl.load(skip + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + offsets, gradient.to(out.dtype.element_ty), mask=mask)
    if partial is not None:
        share = partial + tl.program_id(0).to(tl.int64) * depth + columns
        tl.store(share, weight_sum, mask=inside)
        tl.store(share + tl.num_programs(0).to(tl.int64) * depth, bias_sum, mask=inside)


def _layernorm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    norm_weight: torch.Tensor,
    skip: torch.Tensor | None,
    needs_input: bool,
    needs_norm: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(gradient of x (M, D), gradients of norm_weight and norm_bias (2, D) float32), each if needed. All matrices (M, D), contiguous."""
    rows, depth = x.shape
    config = launch.config("layernorm_backward", launch.device_family(x.device), x.dtype, rows=rows, depth=depth)
    programs = triton.cdiv(rows, config["BLOCK_M"] * config["STEPS"])
    out = torch.empty_like(x) if needs_input else None
    partial = torch.empty((2, programs, depth), dtype=torch.float32, device=x.device) if needs_norm else None
    arguments = (grad, x, *statistics, norm_weight.contiguous(), skip, out, partial, rows, depth)
    launch.launch(layernorm_backward_kernel, (programs,), *arguments, BLOCK_D=triton.next_power_of_2(depth), **config)
    return out, None if partial is None else partial.sum(1)


@torch.library.custom_op("dpt::layernorm_backward", mutates_args=())
def _layernorm_backward_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    norm_weight: torch.Tensor,
    skip: torch.Tensor | None,
    needs_input: bool,
    needs_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, sums = _layernorm_backward(grad, x, Statistics(mean, rstd), norm_weight, skip, needs_input, needs_norm)
    return x.new_empty(0) if out is None else out, x.new_empty(0, dtype=torch.float32) if sums is None else sums


@_layernorm_backward_op.register_fake
def _(grad, x, mean, rstd, norm_weight, skip, needs_input, needs_norm):
    sums = (2, x.shape[1]) if needs_norm else 0
    return x.new_empty(x.shape if needs_input else 0), x.new_empty(sums, dtype=torch.float32)


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
    needs_x, needs_norm = needs[0], needs[1] or needs[2]
    rows = rows_of(x)
    weight_grad = bias_grad = x_grad = None
    sums = (None, None)
    if needs[3]:
        weight_grad = torch.ops.dpt.linear_weight_gradient(grad, rows, "layernorm", *norm, *statistics, None, None)[0]
    if needs[4]:
        bias_grad = grad.sum(0, dtype=torch.float32).to(bias.dtype)
    if needs_x or needs_norm:
        upstream = grad @ weight
        x_grad, sums = torch.ops.dpt.layernorm_backward(upstream, rows, *statistics, norm.weight, skip, needs_x, needs_norm)
    return (
        x_grad.reshape(x.shape) if needs_x else None,
        sums[0].to(norm.weight.dtype) if needs[1] else None,
        sums[1].to(norm.bias.dtype) if needs[2] else None,
        weight_grad,
        bias_grad,
    )


@torch.library.custom_op("dpt::layernorm_linear", mutates_args=())
def _layernorm_linear_op(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    gelu: bool,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, epilogue = rows_of(x), "gelu" if gelu else "none"
    out, pre, statistics = products.linear(
        "layernorm_linear",
        rows,
        weight.contiguous(),
        launch.input_precision(x.dtype),
        epilogue=epilogue,
        bias=bias,
        norm=LayerNorm(norm_weight, norm_bias),
        eps=eps,
        save_pre=gelu and save,
    )
    return out.reshape(*x.shape[:-1], weight.shape[0]), x.new_empty(0) if pre is None else pre, *statistics


@_layernorm_linear_op.register_fake
def _(x, norm_weight, norm_bias, weight, bias, eps, gelu, save):
    rows = x.numel() // x.shape[-1]
    pre = x.new_empty((rows, weight.shape[0]) if gelu and save else 0)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), pre, *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("dpt::gelu_gradient", mutates_args=())
def _gelu_gradient_op(grad: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """grad * GELU'(pre). aten's own has a derivative, and so a second one would silently lose what goes through ``pre``."""
    return torch.ops.aten.gelu_backward(grad, pre)


@_gelu_gradient_op.register_fake
def _(grad, pre):
    return torch.empty_like(grad)


def _setup_context(ctx, inputs, output) -> None:
    x, norm_weight, norm_bias, weight, bias, _, ctx.gelu, _ = inputs
    _, pre, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, pre, mean, rstd)


def _backward(ctx, grad: torch.Tensor | None, *_) -> tuple[torch.Tensor | None, ...]:
    """Only ``out`` leaves :func:`layernorm_linear`; the other outputs have no gradient."""
    if grad is None:
        return (None,) * 8
    x, norm_weight, norm_bias, weight, bias, pre, mean, rstd = ctx.saved_tensors
    grad = rows_of(grad)
    if ctx.gelu:
        grad = torch.ops.dpt.gelu_gradient(grad, pre)
    found = gradients(grad, x, LayerNorm(norm_weight, norm_bias), Statistics(mean, rstd), weight, bias, ctx.needs_input_grad[:5])
    return *found, None, None, None


_layernorm_linear_op.register_autograd(_backward, setup_context=_setup_context)

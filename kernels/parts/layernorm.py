"""LayerNorm of rows, and its gradients: one launch each, whole rows in registers.

    out = (x - mean) * rstd * weight + bias        rstd = 1 / sqrt(variance + eps), over the last dimension

Not an op by itself: ``layernorm_linear`` and ``layernorm_mlp`` put it before a product, on whose way in it would have to be computed again
for every tile of columns, at more instructions than the product has. x is read once, out written once. Kept for the backward are mean
and rstd (M,) float32; it computes the normalised rows again where it reads x:

    dx = rstd * (g' - mean(g') - xhat * mean(g' * xhat)), g' = g * weight        dweight = sum(g * xhat)        dbias = sum(g)

The sums over rows are taken in two stages in float32, in a fixed order: gradients are reproducible bit for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch


class LayerNorm(NamedTuple):
    """A LayerNorm's parameters, (K,) each, in x's dtype or float32."""

    weight: torch.Tensor
    bias: torch.Tensor


class Statistics(NamedTuple):
    """Of every row of x: its mean and 1 / sqrt(variance + eps), (M,) float32."""

    mean: torch.Tensor
    rstd: torch.Tensor


def check_layer_norm(norm_weight: torch.Tensor, norm_bias: torch.Tensor, eps: float, x: torch.Tensor) -> None:
    """TypeError or ValueError unless these are a LayerNorm's parameters for x (..., C)."""
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is None:
            raise TypeError(f"{name} is None: it must be a tensor")
        launch.check_operand(name, tensor, x.shape[-1:], x, vector=True)
    if not 0 < eps < math.inf:  # not by isfinite, at which a graph breaks
        raise ValueError(f"eps={eps}: it must be finite and positive")


@triton.jit(do_not_specialize=["rows"])
def layernorm_kernel(
    x,  # (rows, depth)
    norm_weight,  # (depth,), and norm_bias
    norm_bias,
    out,  # (rows, depth)
    statistics,  # (mean, 1 / deviation), (rows,) float32, which are written; or None
    eps,
    rows,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_M whole rows."""
    columns = tl.arange(0, BLOCK_D)
    inside = columns < depth
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (i < rows)[:, None] & inside[None, :]
    offsets = i.to(tl.int64)[:, None] * depth + columns[None, :]
    tile = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tile, 1) / depth
    missed = tl.where(mask, tile - mean[:, None], 0.0)  # by the rounded mean: of a constant row an ulp, which 1 / sqrt(eps) would show
    mean += tl.sum(missed, 1) / depth
    centred = tl.where(mask, tile - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / depth + eps)
    if statistics is not None:
        mean_ptr, rstd_ptr = statistics
        tl.store(mean_ptr + i, mean, mask=i < rows)
        tl.store(rstd_ptr + i, rstd, mask=i < rows)
    gamma = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
    normalised = centred * rstd[:, None] * gamma[None, :] + beta[None, :]
    tl.store(out + offsets, normalised.to(out.dtype.element_ty), mask=mask)


def layer_norm(x: torch.Tensor, norm: LayerNorm, eps: float, save: bool) -> tuple[torch.Tensor, Statistics]:
    """One launch of :func:`layernorm_kernel`: (LN(x) (M, D), the statistics, empty unless ``save``). x (M, D), contiguous."""
    rows, depth = x.shape
    out = torch.empty_like(x)
    statistics = Statistics(*(torch.empty(rows if save else 0, dtype=torch.float32, device=x.device) for _ in range(2)))
    config = launch.config("layernorm", launch.device_family(x.device), x.dtype, rows=rows, depth=depth)
    vectors = (vector.contiguous() for vector in norm)
    arguments = (x, *vectors, out, tuple(statistics) if save else None, eps, rows, depth)
    programs = triton.cdiv(rows, config["BLOCK_M"])
    launch.launch(layernorm_kernel, (programs,), *arguments, BLOCK_D=triton.next_power_of_2(depth), **config)
    return out, statistics


@triton.jit(do_not_specialize=["rows"])
def layernorm_backward_kernel(
    grad,  # (rows, depth): the gradient of the normalised, scaled and shifted rows; or None, with out and partial
    x,  # (rows, depth)
    mean_ptr,  # (rows,) float32
    rstd_ptr,  # (rows,) float32
    norm_weight,  # (depth,), and norm_bias
    norm_bias,
    skip,  # (rows, depth): added to the gradient of x; or None
    out,  # (rows, depth): the gradient of x; or None
    partial,  # (2, programs, depth) float32: this program's rows' share in the gradients of norm_weight and norm_bias; or None
    again,  # (rows, depth): the normalised, scaled and shifted rows once more; or None
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
        centred = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        normalised = tl.where(mask, centred * rstd[:, None], 0.0)
        if again is not None:
            beta = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(again + offsets, (normalised * gamma[None, :] + beta[None, :]).to(again.dtype.element_ty), mask=mask)
        if grad is not None:
            g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
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


def layernorm_backward(
    grad: torch.Tensor | None,
    x: torch.Tensor,
    statistics: Statistics,
    norm: LayerNorm,
    skip: torch.Tensor | None,
    needs_input: bool,
    needs_norm: bool,
    needs_again: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(gradient of x (M, D), gradients of norm.weight and norm.bias (2, D) float32, LN(x) (M, D)), each if needed.

    ``grad``: that of LN(x), for the first two. ``skip``: what is added to the first; or None. All matrices (M, D), contiguous.
    """
    rows, depth = x.shape
    config = launch.config("layernorm_backward", launch.device_family(x.device), x.dtype, rows=rows, depth=depth)
    programs = triton.cdiv(rows, config["BLOCK_M"] * config["STEPS"])
    out = torch.empty_like(x) if needs_input else None
    partial = torch.empty((2, programs, depth), dtype=torch.float32, device=x.device) if needs_norm else None
    again = torch.empty_like(x) if needs_again else None
    vectors = (vector.contiguous() for vector in norm)
    arguments = (grad, x, *statistics, *vectors, skip, out, partial, again, rows, depth)
    launch.launch(layernorm_backward_kernel, (programs,), *arguments, BLOCK_D=triton.next_power_of_2(depth), **config)
    return out, None if partial is None else partial.sum(1), again


@torch.library.custom_op("dpt::layernorm_backward", mutates_args=())
def _layernorm_backward_op(
    grad: torch.Tensor | None,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    skip: torch.Tensor | None,
    needs_input: bool,
    needs_norm: bool,
    needs_again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    norm, needs = LayerNorm(norm_weight, norm_bias), (needs_input, needs_norm, needs_again)
    out, sums, again = layernorm_backward(grad, x, Statistics(mean, rstd), norm, skip, *needs)
    return (
        x.new_empty(0) if out is None else out,
        x.new_empty(0, dtype=torch.float32) if sums is None else sums,
        x.new_empty(0) if again is None else again,
    )


@_layernorm_backward_op.register_fake
def _(grad, x, mean, rstd, norm_weight, norm_bias, skip, needs_input, needs_norm, needs_again):
    sums = x.new_empty((2, x.shape[1]) if needs_norm else 0, dtype=torch.float32)
    return x.new_empty(x.shape if needs_input else 0), sums, x.new_empty(x.shape if needs_again else 0)

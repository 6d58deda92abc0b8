"""LayerNorm on the way into a product, and batch norm in evaluation form around a convolution."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch
from .matrices import load_tile


@triton.jit
def row_statistics(
    x, row, rows, depth, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DESCRIPTOR: tl.constexpr
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of BLOCK_M rows, float32, with STAGES tiles under way."""
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        tile = load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR).to(tl.float32)
        count = tl.minimum(depth - k, BLOCK_K).to(tl.float32)
        share = tl.div_rn(count, k + count)  # of the first tile 1, exactly; a plain division is approximate on a GPU
        tile_mean = tl.sum(tile, 1) / count
        inside = k + tl.arange(0, BLOCK_K) < depth
        deviation = tl.where(inside[None, :], tile - tile_mean[:, None], 0.0)
        missed = tl.sum(deviation, 1) / count  # by the rounded mean: of a constant row an ulp, which 1 / sqrt(eps) would make visible
        step = tile_mean + missed - mean
        mean += step * share
        squares += tl.maximum(tl.sum(deviation * deviation, 1) - missed * missed * count, 0.0) + step * step * (k * share)
    return mean, tl.rsqrt(squares / depth + eps)


@triton.jit
def normalise(tile, mean, rstd, gamma, beta):
    """LayerNorm of a tile, in its dtype. Columns beyond the edge give 0: their gamma and beta are."""
    normalised = (tile.to(tl.float32) - mean[:, None]) * rstd[:, None]
    return (normalised * gamma[None, :] + beta[None, :]).to(tile.dtype)


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


class BatchNorm(NamedTuple):
    """Batch norm in evaluation form: four vectors (C,) and the number added to the variance."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    eps: float


BatchNormArguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]  # as BatchNorm


def norm_or_none(weight: torch.Tensor | None, bias: Any, mean: Any, variance: Any, eps: float) -> BatchNorm | None:
    return None if weight is None else BatchNorm(weight, bias, mean, variance, eps)


def norm_scale(weight: torch.Tensor | None, variance: torch.Tensor | None, eps: float) -> torch.Tensor | None:
    """What the norm multiplies with, (C,) float32."""
    return None if weight is None else weight.float() * torch.rsqrt(variance.float() + eps)


def through_norm(
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


def folded(weight: torch.Tensor, bias: torch.Tensor | None, norm: BatchNormArguments | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias of the one convolution that a convolution and its norm are; as they are where there is no norm."""
    if norm is None:
        return weight, None if bias is None else bias.to(weight.dtype)
    norm_weight, norm_bias, mean, variance, eps = (part.float() if isinstance(part, torch.Tensor) else part for part in norm)
    scale = norm_weight * torch.rsqrt(variance + eps)
    shift = norm_bias + ((0 if bias is None else bias.float()) - mean) * scale
    return (weight.float() * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def check_batch_norm(name: str, norm: BatchNormArguments | None, weight: torch.Tensor) -> None:
    """TypeError or ValueError unless ``norm`` is None or fits the output channels of ``weight``."""
    if norm is None:
        return
    if len(norm) != 5 or any(part is None for part in norm):
        raise ValueError(f"{name} must be (weight, bias, mean, variance, eps), none of them None")
    for part, vector in zip(("weight", "bias", "mean", "variance"), norm, strict=False):
        launch.check_vector(f"{name}'s {part}", vector, weight)
    if norm[4] < 0:
        raise ValueError(f"{name}'s eps is {norm[4]}: must not be negative")

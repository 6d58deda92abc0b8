"""LayerNorm on the way into a product."""

from __future__ import annotations

import math
from typing import NamedTuple

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

"""Batch norm behind a convolution: with given statistics as part of its epilogue; or with the batch's own, whose parts the epilogue gives.

    y = relu((x - mean) * rstd * weight + bias),  rstd = 1 / sqrt(variance + eps),  over all pixels of a channel

With the batch's statistics, the gradient of x is weight * rstd * (g - mean(g) - standard * mean(g * standard)), where g is the gradient of
y where the ReLU lets it pass, and standard = (x - mean) * rstd. Every sum is made in a fixed order, in float32: mean and variance of tiles
about their own means, so that nothing cancels where a mean is large beside its deviation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .. import launch


@triton.jit
def store_moments(
    ptr,  # of a tile: (3, CHANNELS) float32, from the first of these channels on: count, mean, sum of squares about that mean
    values,  # (pixels, channels) float32
    mask,
    inside,
    exists,
    CHANNELS: tl.constexpr,
):
    count = tl.sum(inside.to(tl.float32), 0)  # of pixels: every tile has some
    mean = tl.sum(tl.where(mask, values, 0.0), 0) / count
    deviation = tl.where(mask, values - mean[None, :], 0.0)
    tl.store(ptr, tl.zeros_like(mean) + count, mask=exists)
    tl.store(ptr + CHANNELS, mean, mask=exists)
    tl.store(ptr + 2 * CHANNELS, tl.sum(deviation * deviation, 0), mask=exists)


@triton.jit(do_not_specialize=["tiles"])
def batch_moments_kernel(
    partials_ptr,  # (tiles, 3, CHANNELS)
    moments_ptr,  # (2, CHANNELS): mean, variance
    tiles,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The tiles of ``BLOCK_N`` channels, ``BLOCK_M`` at a time, in one order: first their mean, then the squares about it."""
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = channel < CHANNELS
    count = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, tiles, BLOCK_M):
        tile = first + tl.arange(0, BLOCK_M)
        mask = (tile < tiles)[:, None] & exists[None, :]
        ptrs = partials_ptr + tile.to(tl.int64)[:, None] * (3 * CHANNELS) + channel[None, :]
        counts = tl.load(ptrs, mask=mask, other=0.0)
        count += tl.sum(counts, 0)
        # Of what was counted so far, not a sum to be divided: its rounding would be that of the largest partial sum.
        step = tl.sum(counts * (tl.load(ptrs + CHANNELS, mask=mask, other=0.0) - mean[None, :]), 0)
        mean += step / tl.maximum(count, 1.0)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, tiles, BLOCK_M):
        tile = first + tl.arange(0, BLOCK_M)
        mask = (tile < tiles)[:, None] & exists[None, :]
        ptrs = partials_ptr + tile.to(tl.int64)[:, None] * (3 * CHANNELS) + channel[None, :]
        distance = tl.load(ptrs + CHANNELS, mask=mask, other=0.0) - mean[None, :]
        squares += tl.sum(tl.load(ptrs, mask=mask, other=0.0) * distance * distance, 0)
        squares += tl.sum(tl.load(ptrs + 2 * CHANNELS, mask=mask, other=0.0), 0)
    tl.store(moments_ptr + channel, mean, mask=exists)
    tl.store(moments_ptr + CHANNELS + channel, squares / count, mask=exists)


@triton.jit
def _gradient_and_standard(grad_ptr, x_ptr, norm, offsets, mask, channel, exists, RELU: tl.constexpr):
    """(g, standard, weight * rstd) of a tile: see the head of this file."""
    weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps = norm
    rstd = tl.rsqrt(tl.load(variance_ptr + channel, mask=exists, other=1.0) + eps)
    scale = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32) * rstd
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + channel, mask=exists, other=0.0)[None, :]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        grad = tl.where(centred * scale[None, :] + bias[None, :] > 0, grad, 0.0)
    return grad, centred * rstd[None, :], scale


@triton.jit(do_not_specialize=["pixels"])
def batch_norm_sums(
    grad_ptr,  # (pixels, CHANNELS)
    x_ptr,  # (pixels, CHANNELS)
    norm,  # weight, bias, mean and variance, (CHANNELS,) each, and eps
    sums_ptr,  # (blocks of pixels, 2, CHANNELS) float32: of g, of g * standard
    pixels,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    pixel = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = channel < CHANNELS
    mask = (pixel < pixels)[:, None] & exists[None, :]
    offsets = pixel[:, None] * CHANNELS + channel[None, :]
    grad, standard, _ = _gradient_and_standard(grad_ptr, x_ptr, norm, offsets, mask, channel, exists, RELU)
    sums_ptr += block * (2 * CHANNELS) + channel
    tl.store(sums_ptr, tl.sum(grad, 0), mask=exists)
    tl.store(sums_ptr + CHANNELS, tl.sum(grad * standard, 0), mask=exists)


@triton.jit(do_not_specialize=["pixels"])
def batch_norm_gradient(
    grad_ptr,  # (pixels, CHANNELS)
    x_ptr,  # (pixels, CHANNELS)
    norm,  # as batch_norm_sums
    sums_ptr,  # (2, CHANNELS)
    out_ptr,  # (pixels, CHANNELS)
    pixels,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = channel < CHANNELS
    mask = (pixel < pixels)[:, None] & exists[None, :]
    offsets = pixel[:, None] * CHANNELS + channel[None, :]
    grad, standard, scale = _gradient_and_standard(grad_ptr, x_ptr, norm, offsets, mask, channel, exists, RELU)
    share = 1.0 / pixels
    mean_grad = tl.load(sums_ptr + channel, mask=exists, other=0.0) * share
    mean_product = tl.load(sums_ptr + CHANNELS + channel, mask=exists, other=0.0) * share
    found = scale[None, :] * (grad - mean_grad[None, :] - standard * mean_product[None, :])
    tl.store(out_ptr + offsets, found.to(out_ptr.dtype.element_ty), mask=mask)


def batch_moments(partials: torch.Tensor) -> torch.Tensor:
    """Mean and variance (biased) of each channel, (2, C) float32, from the moments of tiles, (tiles, 3, C)."""
    tiles, _, channels = partials.shape
    moments = torch.empty((2, channels), dtype=torch.float32, device=partials.device)
    config = launch.config("batch_moments", launch.device_family(partials.device), partials.dtype, C=channels, tiles=tiles)
    grid = (triton.cdiv(channels, config["BLOCK_N"]),)
    launch.launch(batch_moments_kernel, grid, partials, moments, tiles, CHANNELS=channels, **config)
    return moments


def batch_norm_backward(grad: torch.Tensor, x: torch.Tensor, norm: BatchNorm, *, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x, and of the norm's bias and weight, (2, C) float32, from that of relu(norm(x)), the statistics being those of x.

    grad and x: (B, C, H, W), channels-last, of one dtype.
    """
    batch, channels, height, width = x.shape
    pixels, family = batch * height * width, launch.device_family(x.device)
    vectors = (*(vector.contiguous() for vector in norm[:4]), norm.eps)
    flags = {"CHANNELS": channels, "RELU": relu}

    def tiled(kernel: str) -> tuple[dict[str, Any], tuple[int, int]]:
        config = launch.config(kernel, family, x.dtype, C=channels, pixels=pixels)
        return config, (triton.cdiv(pixels, config["BLOCK_M"]), triton.cdiv(channels, config["BLOCK_N"]))

    config, grid = tiled("batch_norm_sums")
    parts = torch.empty((grid[0], 2, channels), dtype=torch.float32, device=x.device)
    launch.launch(batch_norm_sums, grid, grad, x, vectors, parts, pixels, **flags, **config)
    sums = parts.sum(0)
    out = torch.empty_like(x)
    config, grid = tiled("batch_norm_gradient")
    launch.launch(batch_norm_gradient, grid, grad, x, vectors, sums, out, pixels, **flags, **config)
    return out, sums


class BatchNorm(NamedTuple):
    """Batch norm in evaluation form: four vectors (C,) and the number added to the variance."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    eps: float


BatchStatisticsNorm = tuple[torch.Tensor, torch.Tensor, float]  # weight, bias and eps of a norm that takes the batch's statistics
BatchNormArguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]  # as BatchNorm


def norm_or_none(weight: torch.Tensor | None, bias: Any, mean: Any, variance: Any, eps: float) -> BatchNorm | None:
    return None if weight is None else BatchNorm(weight, bias, mean, variance, eps)


def norm_scale(weight: torch.Tensor | None, variance: torch.Tensor | None, eps: float) -> torch.Tensor | None:
    """What the norm multiplies with, (C,) float32."""
    return None if weight is None else weight.float() * torch.rsqrt(variance.float() + eps)


def through_norm(
    grad_weight: torch.Tensor, grad_bias: torch.Tensor, parameters: tuple[torch.Tensor | None, ...], eps: float
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of (weight, bias, norm's weight, norm's bias), in their dtypes, from those of a convolution without a norm; grad_weight
    has the dtype in which the convolution took the weight."""
    weight, bias, norm_weight, norm_bias, mean, variance = parameters
    if norm_weight is None:
        return grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None, None
    deviation = torch.rsqrt(variance.float() + eps)
    scale = norm_weight.float() * deviation
    centre = -mean.float() if bias is None else bias.float() - mean.float()
    product = (weight.to(grad_weight.dtype).float() * grad_weight.float()).sum((1, 2, 3))
    return (
        (grad_weight.float() * scale[:, None, None, None]).to(weight.dtype),
        None if bias is None else (grad_bias * scale).to(bias.dtype),
        (deviation * (product + centre * grad_bias)).to(norm_weight.dtype),
        grad_bias.to(norm_bias.dtype),
    )


def as_convolution(bias: torch.Tensor | None, norm: BatchNormArguments | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(scale, shift), float32, that a convolution's bias and its norm are together; (None, the bias) where there is no norm."""
    if norm is None:
        return None, bias
    norm_weight, norm_bias, mean, variance, eps = (part.float() if isinstance(part, torch.Tensor) else part for part in norm)
    scale = norm_weight * torch.rsqrt(variance + eps)
    return scale, norm_bias + ((0 if bias is None else bias.float()) - mean) * scale


def folded(weight: torch.Tensor, bias: torch.Tensor | None, norm: BatchNormArguments | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias of the one convolution that a convolution and its norm are; as they are where there is no norm."""
    scale, shift = as_convolution(bias, norm)
    if scale is not None:
        weight = (weight.float() * scale[:, None, None, None]).to(weight.dtype)
    return weight, None if shift is None else shift.to(weight.dtype)


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


def check_batch_statistics_norm(name: str, norm: BatchStatisticsNorm, weight: torch.Tensor, x: torch.Tensor) -> None:
    """TypeError or ValueError unless ``norm`` fits the output channels of ``weight``, and a channel of x has more than one value."""
    if len(norm) != 3 or any(part is None for part in norm):
        raise ValueError(f"{name} must be (weight, bias, eps), none of them None")
    for part, vector in zip(("weight", "bias"), norm, strict=False):
        launch.check_vector(f"{name}'s {part}", vector, weight)
    if norm[2] < 0:
        raise ValueError(f"{name}'s eps is {norm[2]}: must not be negative")
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: the batch's statistics need more than one value in a channel")


def batch_norm_ref(y: torch.Tensor, norm: BatchStatisticsNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch norm with the batch's statistics in plain PyTorch, and these: mean and variance (2, C), without a gradient."""
    weight, bias, eps = norm
    wide = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return F.batch_norm(y, None, None, weight, bias, training=True, eps=eps), torch.stack((mean, variance))

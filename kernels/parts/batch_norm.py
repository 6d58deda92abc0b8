"""Batch norm around a convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import launch


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

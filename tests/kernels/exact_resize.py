"""Bilinear resize in float64 from coordinates that are divided as whole numbers, once: the oracle where F.interpolate is not exact enough.

In float64 too, F.interpolate keeps the ratio of the sides in float32 where a map becomes smaller: 3e-3 off at a side of 32767.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def neighbours(source: int, target: int, align_corners: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(lower, upper, weight of the upper) for every target position of one axis."""
    position = torch.arange(target)
    numerator = position * (source - 1) if align_corners else ((2 * position + 1) * source - target).clamp(min=0)
    denominator = max(target - 1, 1) if align_corners else 2 * target
    lower = numerator // denominator
    return lower, (lower + 1).clamp(max=source - 1), (numerator % denominator).double() / denominator


def matrix(source: int, target: int, align_corners: bool) -> torch.Tensor:
    """(target, source) float64: the weights of one axis."""
    lower, upper, weight = neighbours(source, target, align_corners)
    weights = torch.zeros(target, source, dtype=torch.float64)
    weights[torch.arange(target), lower] += 1 - weight
    weights[torch.arange(target), upper] += weight
    return weights


def resize(x: torch.Tensor, size: Sequence[int], align_corners: bool) -> torch.Tensor:
    """``x`` (B, C, H, W), finite, resized in float64; differentiable."""
    rows, columns = (matrix(*sides, align_corners).to(x.device) for sides in zip(x.shape[2:], size, strict=True))
    return torch.einsum("yh,bchw,xw->bcyx", rows, x.double(), columns)


def resize_infinite(x: torch.Tensor, size: Sequence[int], align_corners: bool) -> torch.Tensor:
    """As :func:`resize`, of infinite and NaN values too; those whose weight is 0 do not count."""
    reached = [resize(is_such.double(), size, align_corners) > 0 for is_such in (x.isnan(), x.isposinf(), x.isneginf())]
    values = resize(x.double().nan_to_num(0.0, 0.0, 0.0), size, align_corners)
    for there, value in zip(reached, (float("nan"), float("inf"), float("-inf")), strict=True):
        values = values + torch.where(there, value, 0.0)
    return values

"""The scale and shift that bring one map nearest to another, by least squares: of relative depth, which is known up to both."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_SIDES = (-2, -1)


def align(prediction: Tensor, target: Tensor) -> Tensor:
    """`scale * prediction + shift` nearest to `target` (..., H, W), map by map, with a scale that is not negative."""
    scale, centre, level = _fit(prediction, target, None)
    return scale.clamp_min(0) * (prediction - centre) + level


def scale_to(prediction: Tensor, target: Tensor) -> Tensor:
    """The scale alone of `align`, (..., 1, 1)."""
    return _fit(prediction, target, None)[0].clamp_min(0)


def align_least_squares(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, each (B,), that minimise sum(mask * (scale * prediction + shift - target)^2) a picture.

    Args:
        prediction, target: (B, H, W), float.
        mask: (B, H, W), bool: where the target is known.

    A picture whose system is singular (constant prediction, or no valid pixel) gets scale 0 and the mean target (or 0).
    """
    scale, centre, level = (part[:, 0, 0] for part in _fit(prediction, target, mask))
    return scale, level - scale * centre


def _fit(prediction: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, and the means of prediction and target, each (..., 1, 1): the fit is `scale * (prediction - mean) + mean of target`."""
    count: Tensor | int
    if mask is None:  # means serve as well as sums, for only their ratio counts
        total = functools.partial(torch.mean, dim=_SIDES, keepdim=True)
        centre, level, count = total(prediction), total(target), 1
        centred = prediction - centre
    else:
        total = functools.partial(torch.sum, dim=_SIDES, keepdim=True)
        target = torch.where(mask, target, 0)
        centre, level = mean_per_picture(prediction, mask), mean_per_picture(target, mask)
        weight = mask.to(prediction.dtype)
        centred, count = weight * (prediction - centre), total(weight)
    variance, covariance = total(centred * centred), total(centred * (target - level))
    tiny, eps = torch.finfo(variance.dtype).tiny, torch.finfo(variance.dtype).eps
    rounding = (eps * centre).square() * count  # what a constant prediction leaves of itself
    scale = torch.where(variance > rounding + tiny, covariance / variance.clamp_min(tiny), 0)
    return scale, centre, level


def mean_per_picture(value: Tensor, mask: Tensor) -> Tensor:
    """The mean (B, 1, 1) of value (B, H, W) over each picture's valid pixels; 0 where there are none."""
    return (value * mask).sum(_SIDES, keepdim=True) / mask.sum(_SIDES, keepdim=True).clamp_min(1)

"""Depth as the mean of bins: each pixel weighs fixed depths (Bhat et al. 2021, AdaBins, with bins that do not adapt; DINOv2, DINOv3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import HeadConfig


def linear(near: float, far: float, count: int, device: torch.device) -> Tensor:
    """Depths at even steps."""
    return torch.linspace(near, far, count, device=device, dtype=torch.float32)


def mixed_log(near: float, far: float, count: int, device: torch.device) -> Tensor:
    """Depths at even ratios fading into depths at even steps (CHMv2, https://github.com/facebookresearch/dinov3)."""
    far_weight = linear(0, 1, count, device)
    ratios = linear(math.log(near), math.log(far), count, device).exp()
    return (1 - far_weight) * ratios + far_weight * linear(near, far, count, device)


SPACING: dict[str, Callable[[float, float, int, torch.device], Tensor]] = {"linear": linear, "mixed_log": mixed_log}


def depth_of_bins(x: Tensor, config: HeadConfig) -> Tensor:
    """(B, bins, H, W) -> depth (B, H, W): the mean of the bins' depths, each weighing relu(x) + `config.bin_floor`.

    In float32 at least, and so is the result: the smallest floor, 1e-8, is nothing in half precision. No product of matrices, which
    autocast would take in half precision.
    """
    depths = SPACING[config.bin_spacing](*config.bin_range, config.bins, x.device)
    return mean_depth(x.to(torch.promote_types(x.dtype, torch.float32)), depths, config.bin_floor)


def mean_depth(x: Tensor, depths: Tensor, floor: float) -> Tensor:
    """(B, bins, H, W) and (bins,) -> (B, H, W): the mean of the depths, each weighing relu(x) + floor; one map of x's size is made."""
    weights = x.relu()
    total = weights.sum(1) + floor * len(depths)
    weights = weights * depths[:, None, None] if torch.is_grad_enabled() and x.requires_grad else weights.mul_(depths[:, None, None])
    return (weights.sum(1) + floor * depths.sum()) / total

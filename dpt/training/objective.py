"""What a recipe trains, and the loss that it lowers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DPTConfig, HeadConfig
from ..data.datasets import classes_of
from ..data.targets import IGNORE
from ..evaluation.metrics import depth_limit
from ..zoo import config_of
from .losses import scale_invariant_log_loss, scale_shift_invariant_loss
from .recipes import Recipe


def trained_config(recipe: Recipe, folder: str | Path) -> DPTConfig:
    """The model that a recipe trains, on data whose folder may state its classes; ValueError for models that no loss here is for."""
    config = config_of(recipe.model)
    head = config.head
    if config.further:
        tasks = ", ".join(each.task for each in config.heads)
        raise ValueError(f"{recipe.model} cannot be trained: its tasks are {tasks}, and a training has one")
    if config.decoder.prompt:
        raise ValueError(f"{recipe.model} cannot be trained: it needs a sensor's depth beside each picture, which data sets have not")
    if head.relative or head.focal is not None:
        raise ValueError(f"{recipe.model} cannot be trained: there are losses for inverse depth and for metres without a focal length")
    if recipe.classes == "model":
        return config
    if head.task != "segmentation":
        raise ValueError(f"classes='data': {recipe.model} predicts {head.task}, which has no classes")
    names, colours = classes_of(recipe.data, folder)
    if not names:
        raise ValueError(f"classes='data': {folder} states none; a dataset.json there does")
    return replace(config.with_("head", classes=names, palette=colours), name=recipe.name, source=None)


def objective(head: HeadConfig, recipe: Recipe, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
    """The loss of a batch, a scalar.

    Args:
        outputs: of the head, logits (B, K, H, W) or depth (B, H', W'), and then of the auxiliary head, if there is one.
        targets: (B, H, W), class indices or metres as `dpt.data.targets` reads them; depth of another size is resized to it.
    """
    if head.task == "segmentation":
        losses = [_cross_entropy(output, targets, recipe.averaged_over == "all") for output in outputs]
        return losses[0] + sum(recipe.auxiliary_weight * loss for loss in losses[1:])
    (output,) = outputs
    if output.shape != targets.shape:  # of a head with a size of its own
        output = F.interpolate(output[:, None], size=targets.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    mask = (targets > 0) & (targets <= depth_limit(head, recipe.max_depth)) & targets.isfinite()
    if not head.inverse:
        return scale_invariant_log_loss(output, targets, mask, recipe.variance_focus)
    if recipe.sky:
        mask |= targets.isinf()
    inverse = normalised_inverse(targets, mask)
    return scale_shift_invariant_loss(output, inverse, mask, recipe.gradient_weight, data_term=recipe.data_term)


def normalised_inverse(depth: Tensor, mask: Tensor) -> Tensor:
    """Metres (B, H, W) -> inverse depth scaled to 0..1 over each picture's valid pixels, so that near and far scenes weigh alike."""
    inverse = torch.where(mask, 1 / depth.clamp_min(1e-6), 0)
    low = torch.where(mask, inverse, torch.inf).amin((1, 2), keepdim=True)
    high = inverse.amax((1, 2), keepdim=True)
    return torch.where(mask, (inverse - low) / (high - low).clamp_min(1e-6), 0)


def _cross_entropy(logits: Tensor, labels: Tensor, over_all: bool) -> Tensor:
    """The sum over labelled pixels divided by their number, or by that of all pixels; 0 where a batch has none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels.numel() if over_all else (labels != IGNORE).sum().clamp_min(1))

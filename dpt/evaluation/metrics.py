"""What `dpt evaluate` reports: depth in metres, or after least-squares alignment in inverse depth; segmentation from a confusion matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import HeadConfig
from .alignment import align_least_squares

MIN_DEPTH = 1e-3  # metres; a metric estimate below counts as this
MAX_DEPTH = 80.0  # metres; what is farther counts as unknown, where nothing else is said


def depth_limit(head: HeadConfig, given: float | None = None) -> float:
    """Metres beyond which truth counts as unknown: those given, or what a model of bounded metres can say, or `MAX_DEPTH`."""
    if given is not None:
        return given
    if head.inverse:
        return MAX_DEPTH
    return head.bounds[1] if head.bounds else head.max_depth if head.activation == "sigmoid" else MAX_DEPTH


class DepthMetrics:
    """AbsRel, RMSE and delta < 1.25, each averaged over a picture's valid pixels and then over pictures; and of the sky, of which nothing
    is averaged there, the share that is predicted far.

    A prediction of metres is taken as it is, between `MIN_DEPTH` and `max_depth`. Inverse depth is known up to scale and shift: both are
    fitted to the true inverse depth of each picture by least squares, as MiDaS evaluates, then inverted; what then lies beyond
    `max_depth` metres, or is not positive, is set to `max_depth`. Depth that is known up to both, and not inverse, is fitted to the depth.

    A pixel of the sky is predicted far if it is farther than the median of the farthest tenth, as predicted, of its picture's other
    pixels whose depth is known. The share is of all pixels of all pictures that have both.

    Args:
        max_depth: metres; truth beyond it counts as unknown.
        inverse: the predictions are inverse depth up to scale and shift, and not metres.
        relative: they are depth up to scale and shift.
    """

    def __init__(self, max_depth: float, inverse: bool = True, relative: bool = False):
        if not max_depth > MIN_DEPTH:
            raise ValueError(f"max_depth={max_depth}: it must be above {MIN_DEPTH}, in metres")
        self.max_depth, self.inverse, self.relative = max_depth, inverse, relative
        self.rows: list[tuple[float, float, float]] = []
        self.sky = torch.zeros(2, dtype=torch.int64)  # pixels: those predicted far enough, all

    def update(self, prediction: Tensor, depth: Tensor) -> None:
        """Add pictures: prediction (B, H, W), as `inverse` says; depth (B, H, W) in metres, 0 where unknown, infinite for the sky."""
        prediction, depth = prediction.double(), depth.double()
        mask = (depth > 0) & (depth <= self.max_depth)
        aligned = self.inverse or self.relative
        estimates = self._aligned(prediction, depth, mask) if aligned else prediction.clamp(MIN_DEPTH, self.max_depth)
        for estimate, truth, valid in zip(estimates, depth, mask, strict=True):
            if valid.any():
                estimate, truth = estimate[valid], truth[valid]
                ratio = torch.maximum(estimate / truth, truth / estimate)
                absrel = ((estimate - truth).abs() / truth).mean()
                self.rows.append((absrel.item(), (estimate - truth).square().mean().sqrt().item(), (ratio < 1.25).double().mean().item()))
        self._count_sky(prediction if self.inverse else -prediction, depth)

    def _count_sky(self, nearness: Tensor, depth: Tensor) -> None:
        """Both (B, H, W); nearness in any unit."""
        for near, truth in zip(nearness, depth, strict=True):
            sky, known = near[truth.isinf()], near[(truth > 0) & truth.isfinite()]
            if len(sky) and len(known):
                farthest = known.sort().values[: math.ceil(len(known) / 10)].median()
                self.sky += torch.tensor([(sky < farthest).sum(), len(sky)])

    def _aligned(self, prediction: Tensor, depth: Tensor, mask: Tensor) -> Tensor:
        target = torch.where(mask, depth if self.relative else 1 / depth, 0)
        scale, shift = (part[:, None, None] for part in align_least_squares(prediction, target, mask))
        fitted = scale * prediction + shift
        return fitted.clamp(MIN_DEPTH, self.max_depth) if self.relative else 1 / fitted.clamp_min(1 / self.max_depth)

    def compute(self) -> dict[str, float]:
        """{"absrel", "rmse" in metres, "delta1"}, and "sky" if any was seen; ValueError before any valid picture."""
        if not self.rows:
            raise ValueError("no picture with a valid depth was seen: there is nothing to average")
        absrel, rmse, delta1 = torch.tensor(self.rows, dtype=torch.float64).mean(0).tolist()
        figures = {"absrel": absrel, "rmse": rmse, "delta1": delta1}
        return figures | {"sky": (self.sky[0] / self.sky[1]).item()} if self.sky[1] else figures


class SegmentationMetrics:
    """Mean intersection over union (over classes that occur in truth or prediction) and pixel accuracy; 255 is ignored."""

    def __init__(self, num_classes: int):
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # (truth, prediction)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add pictures: class indices (B, H, W), both."""
        count = len(self.confusion)
        valid = labels != 255
        pairs = labels[valid].long() * count + prediction[valid].long()
        self.confusion += torch.bincount(pairs, minlength=count * count).view(count, count)

    def compute(self) -> dict[str, float]:
        """{"miou", "accuracy"}; ValueError before any valid pixel."""
        total = self.confusion.sum()
        if not total:
            raise ValueError("no labelled pixel was seen: there is nothing to average")
        iou = self.iou()
        return {"miou": iou[~iou.isnan()].mean().item(), "accuracy": (self.confusion.diagonal().sum() / total).item()}

    def iou(self) -> Tensor:
        """Intersection over union a class, (K,), NaN for a class that never occurs."""
        hits = self.confusion.diagonal().double()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

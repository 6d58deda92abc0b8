"""What `dpt evaluate` reports. A scorer makes a row of each picture, and figures of all rows, so that rows may come from any process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor

from ..config import HeadConfig
from .alignment import align_least_squares
from .crops import rectangle
from .protocols import MIN_DEPTH, DepthProtocol, LabelProtocol, PairProtocol, Protocol, form_of

MAX_DEPTH = 80.0  # metres; what is farther counts as unknown, where nothing else is said

Figures = dict[str, float]


def depth_limit(head: HeadConfig, given: float | None = None) -> float:
    """Metres beyond which truth counts as unknown: those given, or what a model of bounded metres can say, or `MAX_DEPTH`."""
    if given is not None:
        return given
    if head.inverse:
        return MAX_DEPTH
    return head.bounds[1] if head.bounds else head.max_depth if head.activation == "sigmoid" else MAX_DEPTH


def _ratio(estimate: Tensor, truth: Tensor) -> Tensor:
    return torch.maximum(estimate / truth, truth / estimate)


def _within(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda estimate, truth: (_ratio(estimate, truth) < factor).double().mean()


def _silog(estimate: Tensor, truth: Tensor) -> Tensor:
    error = estimate.log() - truth.log()
    return 100 * (error.square().mean() - error.mean().square()).clamp_min(0).sqrt()  # rounding leaves less than 0 of a constant


DEPTH_FIGURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of a picture's estimates and truth, float64 (N,) both
    "absrel": lambda estimate, truth: ((estimate - truth).abs() / truth).mean(),
    "sqrel": lambda estimate, truth: ((estimate - truth).square() / truth).mean(),
    "rmse": lambda estimate, truth: (estimate - truth).square().mean().sqrt(),
    "rmselog": lambda estimate, truth: (estimate.log() - truth.log()).square().mean().sqrt(),
    "log10": lambda estimate, truth: (estimate.log10() - truth.log10()).abs().mean(),
    "silog": _silog,
    "delta1": _within(1.25),
    "delta2": _within(1.25**2),
    "delta3": _within(1.25**3),
    "bad1": lambda estimate, truth: 100 * (_ratio(estimate, truth) > 1.25).double().mean(),  # MiDaS' delta > 1.25, in percent
}


class Scorer(Interface):
    """Of one protocol and one model's head."""

    def row(self, prediction: Tensor, truth: Tensor) -> Any:
        """What a picture adds, plain data; prediction (H, W), truth as the protocol's data set has it."""

    def figures(self, rows: Sequence[Any]) -> Figures:
        """The figures of pictures, in their order. ValueError where there is nothing to average."""


class DepthScorer:
    """Depth, by a `DepthProtocol`: each figure is averaged over a picture's known pixels and then over pictures. "sky" is the share of the
    sky, of which nothing is averaged, that is predicted far.

    A pixel of the sky is predicted far if it is farther than the median of the farthest tenth, as predicted, of its picture's other
    pixels whose depth is known. The share is of all pixels of all pictures that have both.

    Args:
        max_depth: metres, as `depth_limit` takes them, of protocols that do not say how far they look.

    Raises:
        ValueError: a limit that leaves nothing, or given where the protocol has its own.
    """

    def __init__(self, protocol: DepthProtocol, head: HeadConfig, max_depth: float | None = None):
        self.protocol, self.form = protocol, form_of(head)
        self.alignment = protocol.alignments[self.form]
        if protocol.farthest is not None and max_depth is not None:
            raise ValueError(f"max_depth={max_depth}: {protocol.name} says itself that depth counts to {protocol.farthest:g} m")
        self.farthest = depth_limit(head, max_depth) if protocol.farthest is None else protocol.farthest
        if not self.farthest > max(protocol.nearest, MIN_DEPTH):
            raise ValueError(f"max_depth={self.farthest}: it must be above {max(protocol.nearest, MIN_DEPTH)}, in metres")

    def row(self, prediction: Tensor, truth: Tensor) -> tuple[list[float] | None, int, int]:
        """The figures of one picture, None if none of its depth counts; pixels of the sky that are predicted far; pixels of the sky.

        Args:
            prediction: (H, W), float: metres, or what the head predicts; of the protocol's `cut`.
            truth: (H, W), metres, of the whole picture: 0 where unknown, infinite for the sky.
        """
        counted = self._counted((truth.shape[0], truth.shape[1]))
        truth = truth[rectangle(self.protocol.cut, (truth.shape[0], truth.shape[1]))].double()
        if prediction.shape != truth.shape:
            raise ValueError(f"a prediction of {tuple(prediction.shape)} for a truth of {tuple(truth.shape)}: they must be of one size")
        prediction = prediction.double()
        near = truth <= self.farthest if self.protocol.inclusive else truth < self.farthest
        valid = counted & near & (truth > self.protocol.nearest) & truth.isfinite()
        values = None
        if valid.any():
            estimate = self._estimate(prediction, truth, valid)[valid]
            known = 1 / truth[valid] if self.protocol.disparity else truth[valid]
            values = [DEPTH_FIGURES[name](estimate, known).item() for name in self._averaged]
        far, sky = _sky(prediction if self.form == "inverse" else -prediction, truth) if "sky" in self.protocol.figures else (0, 0)
        return values, far, sky

    @property
    def _averaged(self) -> tuple[str, ...]:
        return tuple(name for name in self.protocol.figures if name != "sky")

    def _counted(self, size: tuple[int, int]) -> Tensor:
        """Which pixels of what `cut` leaves of a truth of this size are in the crop."""
        counted = torch.zeros(size, dtype=torch.bool)
        seen = counted[rectangle(self.protocol.cut, size)]  # a view
        within = counted if self.protocol.crop_of_whole else seen
        within[rectangle(self.protocol.crop, (within.shape[0], within.shape[1]))] = True
        return seen

    def _estimate(self, prediction: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        """Metres (H, W) or, of a protocol of disparity, their inverse, brought to the truth's scale."""
        nearest, farthest = self.protocol.nearest, self.farthest
        if self.alignment == "none":
            return prediction.nan_to_num(nearest, farthest, nearest).clamp(nearest, farthest)
        if self.alignment == "depth":
            return self._fitted(prediction, truth, valid).clamp(nearest, farthest)
        disparity = prediction if self.form == "inverse" else 1 / prediction.clamp_min(MIN_DEPTH)
        least = self.protocol.least_disparity
        floor = (1 / truth[valid].max()).item() if least is None else max(least, 1 / farthest)
        fitted = self._fitted(disparity, 1 / truth, valid).clamp_min(floor)
        return fitted if self.protocol.disparity else (1 / fitted).clamp_min(nearest)

    def _fitted(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        mask = valid & (prediction > 0) if self.protocol.positive else valid
        scale, shift = align_least_squares(prediction[None], torch.where(valid, target, 0)[None], mask[None])
        return scale * prediction + shift

    def figures(self, rows: Sequence[tuple[list[float] | None, int, int]]) -> Figures:
        """Means over pictures of the protocol's figures, and "sky" if any was seen; ValueError without a picture whose depth counts."""
        values = [row[0] for row in rows if row[0] is not None]
        if not values:
            raise ValueError("no picture with a valid depth was seen: there is nothing to average")
        figures = dict(zip(self._averaged, torch.tensor(values, dtype=torch.float64).mean(0).tolist(), strict=True))
        sky = sum(row[2] for row in rows)
        return figures | {"sky": sum(row[1] for row in rows) / sky} if sky else figures


def _sky(nearness: Tensor, truth: Tensor) -> tuple[int, int]:
    """Pixels of the sky that are predicted far, and all; both (H, W), nearness in any unit."""
    sky, known = nearness[truth.isinf()], nearness[(truth > 0) & truth.isfinite()]
    if not len(sky) or not len(known):
        return 0, 0
    farthest = known.sort().values[: math.ceil(len(known) / 10)].median()
    return int((sky < farthest).sum()), len(sky)


class LabelScorer:
    """Segmentation, by a `LabelProtocol`; 255 is ignored.

    "miou" and "accuracy" are shares, exact. "mIoU", "mAcc" and "aAcc" are percent, as mmsegmentation's IoUMetric has them to the last
    digit: its sums, over pictures in their order, and quotients are float32, and it rounds to two decimals. Means are over the classes
    that occur, in truth or prediction, and for mAcc in truth.
    """

    def __init__(self, protocol: LabelProtocol, head: HeadConfig, max_depth: float | None = None):
        if max_depth is not None:
            raise ValueError(f"max_depth={max_depth}: {protocol.name} measures {protocol.task}, which has none")
        self.protocol, self.classes = protocol, head.classes

    def row(self, prediction: Tensor, truth: Tensor) -> np.ndarray:
        """Of each class the pixels of the intersection, of the prediction and of the truth, int64 (3, K); both maps (H, W)."""
        valid, count = truth != 255, len(self.classes)
        found, labels = prediction[valid].long(), truth[valid].long()
        parts = (found[found == labels], found, labels)
        return torch.stack([torch.bincount(part, minlength=count) for part in parts]).numpy()

    def figures(self, rows: Sequence[np.ndarray]) -> Figures:
        """ValueError before any valid pixel."""
        hits, found, truth = (total.astype(np.float64) for total in sum(rows, np.zeros((3, len(self.classes)), np.int64)))
        if not truth.sum():
            raise ValueError("no labelled pixel was seen: there is nothing to average")
        table = self.table(rows)
        with np.errstate(invalid="ignore"):
            figures = {
                "miou": float(np.nanmean(hits / (found + truth - hits))),
                "accuracy": float(hits.sum() / truth.sum()),
                "mIoU": _percent(_nan_mean(table[0])),
                "mAcc": _percent(_nan_mean(table[1])),
                "aAcc": _percent(table[2]),
            }
        return {name: figures[name] for name in self.protocol.figures}

    def table(self, rows: Iterable[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """IoU and accuracy of each class, float32 (K,), and of all pixels, (), as IoUMetric computes them."""
        total = torch.zeros(3, len(self.classes))
        for row in rows:
            hits, found, truth = torch.from_numpy(row).float()
            total += torch.stack([hits, found + truth - hits, truth])
        hits, union, truth = total
        return hits / union, hits / truth, hits.sum() / truth.sum()

    def per_class(self, rows: Iterable[np.ndarray]) -> dict[str, tuple[float, float]]:
        """IoU and accuracy of each class in percent, rounded alike; NaN for one that never occurs."""
        iou, accuracy, _ = self.table(rows)
        return {name: (_percent(iou[index]), _percent(accuracy[index])) for index, name in enumerate(self.classes)}


def _nan_mean(values: Tensor) -> Any:
    return np.nanmean(values.numpy())


def _percent(share: Any) -> float:
    return round(float(np.round(np.float32(share) * 100, 2)), 2)  # the second makes of float32 the number it stands for


class PairScorer:
    """WHDR: the share of pairs of points whose order, which of the two is nearer, is predicted wrong (Chen et al. 2016)."""

    def __init__(self, protocol: PairProtocol, head: HeadConfig, max_depth: float | None = None):
        if max_depth is not None:
            raise ValueError(f"max_depth={max_depth}: {protocol.name} knows the order of points alone")
        self.protocol, self.sign = protocol, 1 if form_of(head) == "inverse" else -1

    def row(self, prediction: Tensor, truth: Tensor) -> tuple[int, int]:
        """Pairs that are wrong, equal values among them, and all.

        Args:
            prediction: (H, W).
            truth: (N, 4), int: row and column of the nearer point, and of the other one.
        """
        nearer, other = (prediction[truth[:, part], truth[:, part + 1]] * self.sign for part in (0, 2))
        return int((~(nearer > other)).sum()), len(truth)

    def figures(self, rows: Sequence[tuple[int, int]]) -> Figures:
        """ValueError without a pair."""
        wrong, count = (sum(row[part] for row in rows) for part in (0, 1))
        if not count:
            raise ValueError("no pair of points was seen: there is nothing to average")
        return {"whdr": wrong / count}


SCORERS: dict[type[Protocol], Callable[..., Any]] = {DepthProtocol: DepthScorer, LabelProtocol: LabelScorer, PairProtocol: PairScorer}


def scorer_of(protocol: Protocol, head: HeadConfig, max_depth: float | None = None) -> Scorer:
    """The scorer of a protocol's kind; ValueError where `max_depth` is not the user's to say."""
    scorer: Scorer = SCORERS[type(protocol)](protocol, head, max_depth)
    return scorer

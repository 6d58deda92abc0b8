"""The metrics of a model on a data set, by a protocol, beside those of trivial predictors; by one process or by several.

The model sees what `dpt predict` shows it, and its maps are scored at the size of the ground truth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from typing import Protocol as Interface

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..config import HeadConfig
from ..data.datasets import FolderDataset
from ..data.targets import IGNORE, TargetError
from ..distributed import gathered
from ..inference.options import Choices
from ..inference.prediction import Prediction, predict_iter
from ..inference.windows import Network
from ..system.processes import Place
from .crops import rectangle
from .metrics import LabelScorer, scorer_of
from .protocols import PROTOCOLS, Protocol

if TYPE_CHECKING:
    from typing_extensions import Unpack

COUNTED = 500  # pictures that trivial predictors learn from
ALONE = Place()

Predictor = Callable[[np.ndarray], np.ndarray]  # a picture, uint8 (H, W, 3) -> its depth or labels, (H, W)


class Measured(Interface):
    """What is needed of a data set."""

    head: HeadConfig
    images: list[Path]
    crop: tuple[int, int] | None  # height and width that it cuts pictures and targets to by itself

    def __len__(self) -> int: ...

    def picture(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3)."""

    def target(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """The truth of a picture, as the protocol's scorer takes it; ValueError if it is not of the picture's `size`, if that is given."""


@dataclass(frozen=True)
class Scored:
    """What was measured: the figures by their names, of how many pictures, and of segmentation IoU and accuracy of each class, percent."""

    figures: dict[str, float]
    pictures: int
    per_class: dict[str, tuple[float, float]]


def evaluate(
    model: Network | Predictor,
    dataset: Measured,
    batch_size: int = 1,
    max_depth: float | None = None,
    progress: bool = True,
    protocol: Protocol | None = None,
    own: Place = ALONE,
    graph: bool = True,
    **options: Unpack[Choices],
) -> dict[str, float]:
    """The figures of `scored`; without a protocol "folder"'s, depth: {"absrel", "rmse", "delta1"}, and "sky" where the data tells it;
    segmentation: {"miou", "accuracy"}."""
    return scored(model, dataset, batch_size, max_depth, progress, protocol, own, graph, **options).figures


def scored(
    model: Network | Predictor,
    dataset: Measured,
    batch_size: int = 1,
    max_depth: float | None = None,
    progress: bool = True,
    protocol: Protocol | None = None,
    own: Place = ALONE,
    graph: bool = True,
    **options: Unpack[Choices],
) -> Scored:
    """A model's figures, at the truth's own size.

    Args:
        model: a DPT, predicting as `dpt.inference.prediction.predict` does; or a function from a picture to its map.
        dataset: made for the head that is measured, which says whether depth is metres or inverse depth.
        batch_size: pictures whose network sizes are equal run together, so many at a time: `predict`.
        max_depth: metres; what is farther counts as unknown. None is `dpt.evaluation.metrics.depth_limit`.
        protocol: one of `dpt.evaluation.protocols` that measures the head; None: "folder".
        own: this process among those that share the pictures. All of them call this and get the figures of one process alone, bit for bit:
            a picture's map is the same in whatever batch, and rows are put in the pictures' order.
        graph: as of `dpt.inference.prediction.predict`; without it no memory stays taken afterwards.
        options: test-time augmentation, windows and the focal length, those of `dpt.inference.prediction.predict`.

    Raises:
        ValueError: a picture or a target that cannot be used, by name; a protocol that does not measure the head.
    """
    protocol = protocol or next(found for found in PROTOCOLS["folder"] if found.refusal(dataset.head) is None)
    if protocol.whole:
        dataset = copy.copy(dataset)
        dataset.crop = None
    scorer = scorer_of(protocol, dataset.head, max_depth)
    batches = [range(start, min(start + batch_size, len(dataset))) for start in range(0, len(dataset), batch_size)]
    share = [index for batch in own.share(batches) for index in batch]
    rows, error = {}, None
    try:
        bar = tqdm(share, "evaluate", unit="picture", disable=not (progress and own.first))
        with _seen_by(model, protocol), bar:
            maps = _maps(model, dataset, share, protocol, {"batch_size": batch_size, "graph": graph, **options})
            for index, (found, size) in zip(bar, maps, strict=True):
                rows[index] = scorer.row(torch.from_numpy(found), torch.from_numpy(dataset.target(index, size)))
    except (ValueError, OSError, MemoryError, FloatingPointError) as raised:
        if own.world == 1:
            raise
        error = raised  # told to all, which would wait for this one's rows otherwise
    everything: dict[int, Any] = {}
    for other, failure in gathered((rows, error)) if own.world > 1 else [(rows, error)]:
        if failure is not None:
            raise failure
        everything |= other
    ordered = [everything[index] for index in range(len(dataset))]
    per_class = scorer.per_class(ordered) if isinstance(scorer, LabelScorer) else {}
    return Scored(scorer.figures(ordered), len(dataset), per_class)


@contextmanager
def _seen_by(model: Network | Predictor, protocol: Protocol) -> Iterator[None]:
    """The model with the protocol's resizes."""
    if not isinstance(model, nn.Module):
        yield
        return
    network = cast(Network, model)
    config = network.config
    network.config = protocol.seen_by(config)
    try:
        yield
    finally:
        network.config = config


def _maps(
    model: Network | Predictor, dataset: Measured, share: Sequence[int], protocol: Protocol, options: dict[str, Any]
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Of each picture of a share, in its order, the depth or the labels (h, w) of what the protocol cuts out, and the size of all of it."""
    sizes: list[tuple[int, int]] = []

    def seen() -> Iterator[np.ndarray]:
        for index in share:
            picture = dataset.picture(index)
            height, width = picture.shape[:2]
            sizes.append((height, width))
            try:
                yield np.ascontiguousarray(picture[rectangle(protocol.cut, (height, width))])
            except ValueError as error:
                raise TargetError(f"{dataset.images[index]}: {error}") from None

    if not isinstance(model, nn.Module):
        for picture in seen():
            yield cast(Predictor, model)(picture), sizes.pop()
        return
    whole = protocol.cut is None and dataset.crop is None
    pictures: Any = [dataset.images[index] for index in share] if whole else seen()  # files are read ahead, in threads
    for result in predict_iter(cast(Network, model), pictures, **options):
        if result.error is not None:
            raise result.error
        prediction = cast(Prediction, result.prediction)
        found = cast(np.ndarray, prediction.depth if dataset.head.task == "depth" else prediction.labels)
        yield found, (found.shape[0], found.shape[1]) if whole else sizes.pop(0)


def trivial_predictors(dataset: FolderDataset, train: FolderDataset | None) -> dict[str, Predictor]:
    """The predictors a model must beat: of labels the commonest class, of metres the median, of relative depth a constant and the row
    (the lower, the nearer).

    What is learnt is learnt from the first pictures of the training set, or of `dataset` itself where there is none (which only helps).
    """
    head, source = dataset.head, train or dataset
    if head.task == "depth" and not head.metric:
        return {"constant": _constant(np.float32(1)), "row": lambda image: np.indices(image.shape[:2], dtype=np.float32)[0]}
    targets = (source.target(index) for index in range(min(len(source), COUNTED)))
    if head.task == "depth":
        return {"median": _constant(np.median(np.concatenate([target[(target > 0) & np.isfinite(target)] for target in targets])))}
    counts: Any = sum(np.bincount(target[target != IGNORE], minlength=len(head.classes)) for target in targets)
    return {"commonest class": _constant(counts.argmax())}


def _constant(value: np.generic) -> Predictor:
    return lambda image: np.full(image.shape[:2], value)

"""The metrics of a model on a folder of pictures with depth or labels, beside those of trivial predictors.

The model sees what `dpt predict` shows it, and its maps are scored at the size of the ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..data.datasets import FolderDataset
from ..data.targets import IGNORE
from ..inference.images import load_image
from ..inference.prediction import Choices, Prediction, predict_iter
from ..inference.windows import Network
from .metrics import DepthMetrics, SegmentationMetrics, depth_limit

if TYPE_CHECKING:
    from typing_extensions import Unpack

COUNTED = 500  # pictures that trivial predictors learn from

Predictor = Callable[[np.ndarray], np.ndarray]  # a picture, uint8 (H, W, 3) -> its depth or labels, (H, W)


def evaluate(
    model: Network | Predictor,
    dataset: FolderDataset,
    batch_size: int = 1,
    max_depth: float | None = None,
    progress: bool = True,
    **options: Unpack[Choices],
) -> dict[str, float]:
    """Depth: {"absrel", "rmse", "delta1"}, and "sky" where the data tells it; segmentation: {"miou", "accuracy"}; at the truth's own size.

    Args:
        model: a DPT, predicting as `dpt.inference.prediction.predict` does; or a function from a picture to its map.
        dataset: made for the model's head, which says whether depth is metres or inverse depth.
        batch_size: pictures whose network sizes are equal run together, up to this many.
        max_depth: metres; what is farther counts as unknown. None is `dpt.evaluation.metrics.depth_limit`.
        options: test-time augmentation, windows and the focal length, those of `dpt.inference.prediction.predict`.

    Raises:
        ValueError: a picture or a target that cannot be used, by name.
    """
    head = dataset.head
    if head.task == "depth":
        metrics: DepthMetrics | SegmentationMetrics = DepthMetrics(depth_limit(head, max_depth), head.inverse, head.relative)
    else:
        metrics = SegmentationMetrics(len(head.classes))
    maps = _maps(model, dataset, batch_size, options)
    for index, found in enumerate(tqdm(maps, "evaluate", len(dataset), unit="picture", disable=not progress)):
        truth = dataset.target(index, found.shape)
        metrics.update(torch.from_numpy(found)[None], torch.from_numpy(truth)[None])
    return metrics.compute()


def _maps(model: Network | Predictor, dataset: FolderDataset, batch_size: int, options: Choices) -> Iterator[np.ndarray]:
    """The depth or the labels (H, W) of each picture, in order."""
    if not isinstance(model, nn.Module):
        yield from (cast(Predictor, model)(load_image(path)) for path in dataset.images)
        return
    for result in predict_iter(cast(Network, model), dataset.images, batch_size=batch_size, **options):
        if result.error is not None:
            raise result.error
        prediction = cast(Prediction, result.prediction)
        yield cast(np.ndarray, prediction.depth if dataset.head.task == "depth" else prediction.labels)


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

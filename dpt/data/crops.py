"""What a training sees of a data set: `Crops`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import InputConfig
from .augmentation import Augmentation
from .pairs import PairDataset
from .targets import IGNORE

Key = tuple[int, int, tuple[int, int]]  # of a sample: epoch, index, (height, width)


class _Drawn(random.Random):
    """Python's generator for those transforms that draw from one, over NumPy's, so that all draw from the same."""

    def __init__(self, source: np.random.Generator):
        super().__init__(0)
        self.source = source

    def random(self) -> float:
        return float(self.source.random())


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """What a training sees of a data set: item (epoch, index, (height, width)) is a picture (3, height, width) float32, normalised, and
    its target (height, width), metres float32 or class indices int64. It depends on its key and the seed alone, so that a training
    that is resumed sees what an unbroken one would.

    Raises:
        ValueError: `augmentation.cat_max_ratio` is below 1 and the data has no classes. ImportError: albumentations is not installed.
    """

    def __init__(self, data: PairDataset, config: InputConfig, augmentation: Augmentation, seed: int = 0):
        if augmentation.cat_max_ratio < 1 and data.head.task != "segmentation":
            raise ValueError(f"cat_max_ratio={augmentation.cat_max_ratio}: it is of classes, and {data.root} is read for {data.head.task}")
        try:
            from . import transforms  # albumentations and OpenCV, which only a training needs
        except ModuleNotFoundError as error:
            raise ImportError(f"{error}: training needs albumentations: pip install 'dense-prediction-transformers[train]'") from error

        self._made = transforms.pipeline
        self.data, self.config, self.augmentation, self.seed = data, config, augmentation, seed
        self._pipelines: dict[tuple[int, int], Any] = {}  # of albumentations, by size

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's processes, which make their own pipelines."""
        return {**self.__dict__, "_pipelines": {}}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, index, size = key
        picture, target = self.data[index]
        labels = self.data.head.task == "segmentation"
        if size not in self._pipelines:
            self._pipelines[size] = self._made(self.augmentation, size, self.config, IGNORE if labels else 0)
        steps, rng = self._pipelines[size], np.random.default_rng((self.seed, epoch, index))
        steps.set_random_state(rng, _Drawn(rng))
        seen = steps(force_apply=True, image=picture, mask=target.astype(np.uint8) if labels else target)
        x, y = torch.from_numpy(seen["image"]).permute(2, 0, 1).contiguous(), torch.from_numpy(seen["mask"])
        return x, y.long() if labels else y

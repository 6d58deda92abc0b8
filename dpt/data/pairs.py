"""Pictures with their targets, whatever way they lie on the disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from ..config import HeadConfig
from ..inference.images import load_image
from ..system.endings import printable
from .targets import DEPTH_SCALE, MAX_CLASSES, TargetError, class_labels, read_depth, read_labels

UNNAMED = re.compile(r"(class |LABEL_)\d+")  # what classes are called whose file gives no names: by us, and by transformers
CHECKERS = 4  # threads that read files ahead

Result = TypeVar("Result")


class PairDataset:
    """Pictures with their targets as they lie on the disk: an item is (picture, target).

    The picture is uint8 (H, W, 3) as `dpt.inference.images.load_image` reads it for predictions. The target is (H, W): metres float32, 0
    where unknown and infinite for the sky; or class indices int64, `IGNORE` where there is none. `dpt.data.targets` says what files they
    are.

    Args:
        root: the folder that it lies in.
        name: what it is called.
        head: of the model that the data is for.
        names: of the pictures, as they are told to people; `images` and `targets` are their files and those of their targets.
        classes: the data's own, in the order of its labels; () where they are not known.
        depth_scale: units a metre of integer depth.
        reduce_zero_label: label 0 is "other" and k is class k - 1.
        sky: the value in depth files that stands for the sky.
        crop: height and width that pictures and targets are cut to, at the bottom and the middle; KITTI's benchmark crop.

    Raises:
        ValueError: a scale that is none, or classes that are not the model's. A file that cannot be used is named when it is read.
    """

    def __init__(
        self,
        root: str | Path,
        name: str,
        head: HeadConfig,
        names: Sequence[str],
        images: Sequence[Path],
        targets: Sequence[Path],
        *,
        classes: tuple[str, ...] = (),
        depth_scale: float = DEPTH_SCALE,
        reduce_zero_label: bool = False,
        sky: float | None = None,
        crop: tuple[int, int] | None = None,
    ) -> None:
        self.root, self.name, self.head = Path(root), name, head
        self.names, self.images, self.targets = list(names), list(images), list(targets)
        self.depth_scale, self.reduce_zero_label, self.sky, self.crop = depth_scale, reduce_zero_label, sky, crop
        self.named = bool(classes)  # whether the data itself says what its classes are
        if not 0 < depth_scale < float("inf"):
            raise ValueError(f"depth_scale={depth_scale}: it is a positive number, of units a metre")
        if head.task == "segmentation":
            self._check_classes(classes)

    def _check_classes(self, names: tuple[str, ...]) -> None:
        own = self.head.classes
        if len(own) > MAX_CLASSES:
            raise ValueError(f"the model has {len(own)} classes: label files tell at most {MAX_CLASSES} apart")
        if names and len(names) != len(own):
            raise ValueError(f"{self.root} has {len(names)} classes, the model {len(own)}: they must be the same")
        if names and names != own and not all(map(UNNAMED.fullmatch, own)):
            index = next(index for index, pair in enumerate(zip(names, own, strict=True)) if pair[0] != pair[1])
            raise ValueError(f"class {index} of {self.root} is {names[index]!r}, the model's {own[index]!r}: they must be the same")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        picture = load_image(self.images[index])
        target = self._read(index)
        self._must_be(target, picture.shape[:2], index)
        return self._cut(picture, self.images[index]), self._cut(target, self.targets[index])

    def picture(self, index: int) -> np.ndarray:
        """The picture alone; ValueError where it cannot be used, by name."""
        return self._cut(load_image(self.images[index]), self.images[index])

    def target(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """The target alone; `dpt.data.targets.TargetError` where it cannot be used, or is not of `size`, if that is given: `picture`'s."""
        target = self._cut(self._read(index), self.targets[index])
        self._must_be(target, size, index)
        return target

    def _read(self, index: int) -> np.ndarray:
        path = self.targets[index]
        if self.head.task == "depth":
            return read_depth(path, self.depth_scale, self.sky)
        return class_labels(read_labels(path), len(self.head.classes), self.reduce_zero_label, path)

    def _must_be(self, target: np.ndarray, size: tuple[int, ...] | None, index: int) -> None:
        if size is not None and size != target.shape:
            raise TargetError(f"{self.targets[index]} is {target.shape}, its picture {tuple(size)}: they must be the same size")

    def _cut(self, values: np.ndarray, path: Path) -> np.ndarray:
        if self.crop is None:
            return values
        (height, width), (rows, columns) = values.shape[:2], self.crop
        if height < rows or width < columns:
            raise TargetError(f"{path} is {(height, width)}: it is cut to {self.crop}, and must not be smaller")
        left = (width - columns) // 2
        return values[height - rows :, left : left + columns]

    def check(self, progress: bool = True) -> None:
        """Read every target, so that one that cannot be used is an error now and not in the middle of a training."""
        for _ in self.mapped(lambda index: self.target(index) is None, progress):
            pass

    def mapped(self, work: Callable[[int], Result], progress: bool = True) -> Iterator[Result]:
        """What `work` makes of each index, in order; several at a time, and the rest left undone where one raises."""
        pool = ThreadPoolExecutor(CHECKERS)
        try:
            results = pool.map(work, range(len(self)))
            yield from tqdm(results, printable(f"check {self.root}"), len(self), unit="file", disable=not progress, delay=2)
        finally:
            pool.shutdown(cancel_futures=True)

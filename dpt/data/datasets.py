"""Folders of pictures with depth or labels, and what training does to them before the network sees them."""

from __future__ import annotations

import os
import re
import reprlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import HeadConfig, InputConfig
from ..inference.images import EXTENSIONS, load_image
from ..system.disk import read_object
from ..system.endings import printable
from .targets import DEPTH_READERS, DEPTH_SCALE, LABEL_READERS, MAX_CLASSES, TargetError, class_labels, read_depth, read_labels

TARGETS = {"depth": ("depth", DEPTH_READERS), "segmentation": ("labels", LABEL_READERS)}  # task -> folder, and its files' readers
UNNAMED = re.compile(r"(class |LABEL_)\d+")  # what classes are called whose file gives no names: by us, and by transformers
CHECKERS = 4  # threads that read label files ahead


class FolderDataset:
    """`images/NAME.*` with `depth/NAME.*` or `labels/NAME.png`, as they lie on the disk: an item is (picture, target).

    The picture is uint8 (H, W, 3) as `dpt.inference.images.load_image` reads it for predictions. The target is (H, W): metres float32, 0
    where unknown and infinite for the sky; or class indices int64, `IGNORE` where there is none. `dpt.data.targets` says what files they
    are.

    Args:
        root: the folder. Its `dataset.json`, if there is one, may state "classes" (their names), "depth_scale", "reduce_zero_label", and as
            "sky" the value in depth files that stands for the sky.
        head: of the model that the data is for.
        depth_scale: units a metre of integer depth; None is what dataset.json says, or 1000.
        reduce_zero_label: label 0 is "other" and k is class k - 1; None is what dataset.json says, or False.

    Raises:
        ValueError: no pictures, a picture without its target or with two, two pictures of one name, a malformed dataset.json, or
            classes that are not the model's. A file that cannot be used is named when it is read.
    """

    def __init__(
        self, root: str | Path, head: HeadConfig, *, depth_scale: float | None = None, reduce_zero_label: bool | None = None
    ) -> None:
        self.root, self.head = Path(root), head
        stated = _description(self.root / "dataset.json")
        self.depth_scale = depth_scale if depth_scale is not None else stated.get("depth_scale", DEPTH_SCALE)
        self.reduce_zero_label = reduce_zero_label if reduce_zero_label is not None else stated.get("reduce_zero_label", False)
        self.sky = stated.get("sky")
        if not 0 < self.depth_scale < float("inf"):
            raise ValueError(f"depth_scale={self.depth_scale}: it is a positive number, of units a metre")
        if head.task == "segmentation":
            self._check_classes(tuple(stated.get("classes", ())))
        folder, readers = TARGETS[head.task]
        pictures, targets = _by_name(self.root / "images", EXTENSIONS), _by_name(self.root / folder, readers)
        if not pictures:
            raise ValueError(f"{self.root / 'images'} holds no picture: a data set is images/ beside depth/ or labels/")
        missing = sorted(name for name in pictures if name not in targets)
        if missing:
            rule = f"a picture NAME.* has {folder}/NAME with {' or '.join(readers)}"
            raise ValueError(f"{len(missing)} pictures have no target, the first: {pictures[missing[0]]}; {rule}")
        self.names = sorted(pictures)
        self.images, self.targets = [pictures[name] for name in self.names], [targets[name] for name in self.names]

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
        return picture, self.target(index, picture.shape[:2])

    def target(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """The target alone; `dpt.data.targets.TargetError` where it cannot be used, or is not of the picture's `size`, if that is given."""
        path = self.targets[index]
        if self.head.task == "depth":
            target = read_depth(path, self.depth_scale, self.sky)
        else:
            target = class_labels(read_labels(path), len(self.head.classes), self.reduce_zero_label, path)
        if size not in (None, target.shape):
            raise TargetError(f"{path} is {target.shape}, its picture {tuple(size)}: they must be the same size")
        return target

    def check(self, progress: bool = True) -> None:
        """Read every target, so that one that cannot be used is an error now and not in the middle of a training."""
        pool = ThreadPoolExecutor(CHECKERS)
        try:
            checks = pool.map(lambda index: self.target(index) is None, range(len(self)))
            for _ in tqdm(checks, printable(f"check {self.root}"), len(self), unit="file", disable=not progress, delay=2):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _description(path: Path) -> dict[str, Any]:
    """What a dataset.json states, checked; {} if there is none."""
    if not os.path.lexists(path):
        return {}
    stated = read_object(path)
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "classes": (lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of names"),
        "depth_scale": (
            lambda value: type(value) in (int, float) and 0 < value <= sys.float_info.max,
            "a positive number, of units a metre",
        ),
        "sky": (lambda value: type(value) in (int, float), "a number, the value in depth files that stands for the sky"),
        "reduce_zero_label": (lambda value: isinstance(value, bool), "true or false"),
    }
    for key, (holds, what) in rules.items():
        if key in stated and not holds(stated[key]):
            raise ValueError(f"{path}: {key} is {reprlib.repr(stated[key])}: it is {what}")
    return stated


def _by_name(folder: Path, extensions: Collection[str]) -> dict[str, Path]:
    """The visible files of a folder by name without extension; ValueError where two have one name. Files of other kinds are warned of."""
    found, others = defaultdict(list), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and not path.name.startswith("."):
            if path.suffix.lower() in extensions:
                found[path.stem].append(path)
            else:
                others.append(path.name)
    for paths in found.values():
        if len(paths) > 1:
            raise ValueError(f"{' and '.join(map(str, paths))}: names without extension must differ, for picture and target share it")
    if others:
        known = ", ".join(sorted(extensions))
        warnings.warn(f"{folder}: {len(others)} files are left out, the first {others[0]}; known are {known}", stacklevel=3)
    return {name: paths[0] for name, paths in found.items()}


@dataclass(frozen=True)
class Augmentation:
    """Random crop (of `smallest` to 1 of the area), horizontal flip, and colour, each drawn anew for every sample."""

    smallest: float = 0.35
    aspect: float = 4 / 3  # largest factor between the crop's aspect and that of what the network sees
    flip: float = 0.5
    colour: float = 0.3  # largest relative change of brightness, contrast and saturation


Key = tuple[int, int, tuple[int, int]]  # of a sample: epoch, index, (height, width)


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """What a training sees of a data set: item (epoch, index, (height, width)) is a picture (3, height, width) float32, normalised, and
    its target (height, width), metres float32 or class indices int64. It depends on its key and the seed alone, so that a training
    that is resumed sees what an unbroken one would."""

    def __init__(self, data: FolderDataset, config: InputConfig, augmentation: Augmentation, seed: int = 0):
        self.data, self.config, self.augmentation, self.seed = data, config, augmentation, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, index, size = key
        image, target = self.data[index]
        x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        rng = np.random.default_rng((self.seed, epoch, index))
        x, y = augment(x, torch.from_numpy(target), size, self.augmentation, rng, self.config)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.config.mean, self.config.std))
        return (x - mean) / std, y


def augment(
    image: Tensor, target: Tensor, size: tuple[int, int], how: Augmentation, rng: np.random.Generator, config: InputConfig
) -> tuple[Tensor, Tensor]:
    """A random crop of about `size`'s aspect, resized to it, flipped and recoloured; the target is cropped and flipped alike.

    Args:
        image: (3, H, W), 0..1; resized as `config` says that the network's pictures are.
        target: (H, W); the nearest pixel is taken.
    """
    height, width = target.shape
    area = rng.uniform(how.smallest, 1) * height * width
    aspect = size[1] / size[0] * how.aspect ** rng.uniform(-1, 1)
    shrink = min(1, height / (area / aspect) ** 0.5, width / (area * aspect) ** 0.5)  # to fit inside, as it is
    h, w = (min(side, max(1, round(shrink * part**0.5))) for side, part in ((height, area / aspect), (width, area * aspect)))
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    image, target = image[:, top : top + h, left : left + w], target[top : top + h, left : left + w]
    image = F.interpolate(image[None], size=size, mode=config.mode, align_corners=False, antialias=config.antialias)[0]
    target = F.interpolate(target[None, None].double(), size=size, mode="nearest-exact")[0, 0].to(target.dtype)
    if rng.random() < how.flip:
        image, target = image.flip(2), target.flip(1)
    brightness, contrast, saturation = (1 + rng.uniform(-how.colour, how.colour, 3)).tolist()
    grey = image.mean(0, keepdim=True)
    image = grey + saturation * (image - grey)
    middle = image.mean()
    image = brightness * (middle + contrast * (image - middle))
    return image.clamp(0, 1), target.contiguous()

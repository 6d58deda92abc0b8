"""Folders of pictures with depth and labels, and what training does to them before the network sees them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .config import InputConfig

IGNORE = 255  # the label of a pixel without a class
TARGETS = {"depth": "depth", "segmentation": "labels"}  # task -> folder


@dataclass(frozen=True)
class Augmentation:
    """Random crop (of `smallest` to 1 of the area), horizontal flip, and colour, each drawn anew for every sample."""

    smallest: float = 0.35
    aspect: float = 4 / 3
    flip: float = 0.5
    colour: float = 0.3  # largest relative change of brightness, contrast and saturation


class FolderDataset(Dataset):
    """`images/NAME.*` with `depth/NAME.png` (16-bit millimetres, 0 unknown) or `labels/NAME.png` (8-bit, 255 ignored).

    An item is (picture (3, H, W) float32, normalised; target (H, W): metres float32 or labels int64). With an augmentation,
    item `i` of epoch `e` is a function of (seed, e, i) and the size alone, so a resumed training sees what an unbroken one would.

    Raises:
        ValueError: the folder holds no picture, or a picture without its target.
    """

    def __init__(self, root: str | Path, task: str, config: InputConfig, augmentation: Augmentation | None = None, seed: int = 0):
        self.root, self.task, self.config, self.augmentation, self.seed = Path(root), task, config, augmentation, seed
        self.images = sorted(path for path in (self.root / "images").glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not self.images:
            raise ValueError(f"{self.root / 'images'} holds no .png or .jpg: a data set is images/ beside depth/ or labels/")
        folder = self.root / TARGETS[task]
        self.targets = [folder / f"{path.stem}.png" for path in self.images]
        missing = [str(path) for path in self.targets if not path.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} pictures have no target, the first: {missing[0]}")

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in `dataset.json`, if there is one."""
        path = self.root / "dataset.json"
        return tuple(json.loads(path.read_text()).get("classes", ())) if path.is_file() else ()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The picture (3, H, W) float32 in 0..1 and its target (H, W) as stored."""
        with Image.open(self.images[index]) as picture:
            image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
        with Image.open(self.targets[index]) as picture:
            target = torch.from_numpy(np.array(picture).astype(np.int32))
        if image.shape[1:] != target.shape:
            raise ValueError(
                f"{self.targets[index]} is {tuple(target.shape)}, its picture {tuple(image.shape[1:])}: they must be the same size"
            )
        return image, target

    def __getitem__(self, key: int | tuple[int, int, tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The sample `index`, or `(epoch, index, (height, width))` in a training."""
        epoch, index, size = key if isinstance(key, tuple) else (0, key, self.config.size)
        image, target = self.read(index)
        if self.augmentation is not None:
            image, target = augment(image, target, size, self.augmentation, np.random.default_rng((self.seed, epoch, index)))
        else:
            image, target = _resize(image, target, size)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.config.mean, self.config.std))
        return (image - mean) / std, target.float() / 1000 if self.task == "depth" else target.long()


def _resize(image: Tensor, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Both to (height, width): the picture bilinear and antialiased, the target to the nearest pixel."""
    if tuple(image.shape[1:]) == tuple(size):
        return image, target
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    target = F.interpolate(target[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(target.dtype)
    return image.clamp(0, 1), target


def augment(image: Tensor, target: Tensor, size: tuple[int, int], how: Augmentation, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random crop resized to `size`, flipped and recoloured; the target is cropped and flipped alike."""
    height, width = target.shape
    area = rng.uniform(how.smallest, 1)
    ratio = how.aspect ** rng.uniform(-1, 1)
    h = min(height, max(1, round(height * (area / ratio) ** 0.5)))
    w = min(width, max(1, round(width * (area * ratio) ** 0.5)))
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    image, target = image[:, top : top + h, left : left + w], target[top : top + h, left : left + w]
    image, target = _resize(image, target, size)
    if rng.random() < how.flip:
        image, target = image.flip(2), target.flip(1)
    brightness, contrast, saturation = (1 + rng.uniform(-how.colour, how.colour, 3)).tolist()
    grey = image.mean(0, keepdim=True)
    image = grey + saturation * (image - grey)
    middle = image.mean()
    image = brightness * (middle + contrast * (image - middle))
    return image.clamp(0, 1), target.contiguous()

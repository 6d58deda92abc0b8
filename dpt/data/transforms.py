"""`Augmentation` as transforms of albumentations: its own where it has them, and for what it has not the ones of this file.

Pictures are (H, W, 3), uint8 until they are floats in 0..1; targets, its masks, are (H, W): classes uint8, or metres float32. Random
decisions are drawn apart from what they do: `get_params` and `get_params_dependent_on_data`, and `apply`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..config import InputConfig
from ..inference.resizing import resized
from .augmentation import Augmentation
from .targets import IGNORE

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network for a newer version

import albumentations as A  # noqa: E402
import cv2  # noqa: E402

cv2.setNumThreads(0)  # a loader's processes each have a core, and OpenCV's threads do not outlive the fork that makes them

Window = tuple[slice, slice]  # rows, columns

TRIES = 10  # windows of which one is to have no class above the largest share


def pipeline(how: Augmentation, size: tuple[int, int], config: InputConfig, no_target: int) -> A.Compose:
    """A function of `image`, uint8 (H, W, 3), and `mask`, (H, W), that gives both at `size`, the image float32 and normalised.

    Args:
        config: of the model; how its pictures are resized and normalised.
        no_target: what a target has where the picture has no pixel.
    """
    if how.crop == "share":
        steps: list[Any] = [ShareCrop(how, size, config), A.HorizontalFlip(p=how.flip)]
    else:
        steps = [
            *_if(how.rotate, A.Rotate, limit=how.rotate, border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=no_target, p=1),
            *_if(how.scale, RandomResize, how.scale, how.ratio, config),
            RandomWindow(size, how.cat_max_ratio),
            A.HorizontalFlip(p=how.flip),
            *_if(how.distortion, PhotometricDistortion),
            A.ToFloat(255, p=1),
        ]
    exposure = [
        *_if(how.gamma, A.RandomGamma, (100 * (1 - how.gamma), 100 * (1 + how.gamma)), p=1),
        *_if(how.brightness, A.MultiplicativeNoise, (1 - how.brightness, 1 + how.brightness), p=1),
        *_if(how.tint, A.MultiplicativeNoise, (1 - how.tint, 1 + how.tint), per_channel=True, p=1),
    ]
    steps += [
        *_if(how.colour, Jitter, how.colour),
        *_if(exposure, A.Sequential, exposure, p=0.5),
        A.Normalize(config.mean, config.std, max_pixel_value=1, p=1),
        A.PadIfNeeded(*size, position="top_left", border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=no_target, p=1),
    ]
    return A.Compose(steps)


def _if(wanted: object, transform: Any, *arguments: Any, **options: Any) -> list[Any]:
    return [transform(*arguments, **options)] if wanted else []


class ShareCrop(A.DualTransform):  # type: ignore[misc]  # albumentations' classes have no types that mypy reads
    """A crop of a random share of the area and about `size`'s aspect, resized to `size` as the model's pictures are; floats in 0..1.

    The target has the nearest pixel.
    """

    def __init__(self, how: Augmentation, size: tuple[int, int], config: InputConfig):
        super().__init__(p=1)
        self.how, self.size, self.config = how, size, config

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        rng, (height, width) = self.random_generator, params["shape"][:2]
        area = rng.uniform(self.how.smallest, 1) * height * width
        aspect = self.size[1] / self.size[0] * self.how.aspect ** rng.uniform(-1, 1)
        shrink = min(1, height / (area / aspect) ** 0.5, width / (area * aspect) ** 0.5)  # to fit inside, as it is
        h, w = (min(side, max(1, round(shrink * part**0.5))) for side, part in ((height, area / aspect), (width, area * aspect)))
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        return {"window": (slice(top, top + h), slice(left, left + w))}

    def apply(self, img: np.ndarray, window: Window, **params: Any) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(img[window])).permute(2, 0, 1)[None].float()
        return np.ascontiguousarray(resized(x, self.size, self.config)[0].permute(1, 2, 0).numpy() / 255)

    def apply_to_mask(self, mask: np.ndarray, window: Window, **params: Any) -> np.ndarray:
        mask = mask[window]
        rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(self.size, mask.shape, strict=True))
        return np.asarray(mask[rows[:, None], columns])


class RandomResize(A.DualTransform):  # type: ignore[misc]
    """As large as fits into `scale`'s longer and shorter side, both times a random factor: mmcv's RandomResize with keep_ratio=True."""

    def __init__(self, scale: tuple[int, int], ratio: tuple[float, float], config: InputConfig):
        super().__init__(p=1)
        self.scale, self.ratio, self.config = scale, ratio, config

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        ratio = self.random_generator.uniform(*self.ratio)
        return {"size": rescaled(params["shape"][:2], (int(self.scale[0] * ratio), int(self.scale[1] * ratio)))}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        averages = self.config.antialias or self.config.mode.startswith("area")
        flag = cv2.INTER_LINEAR if self.config.mode == "bilinear" else cv2.INTER_CUBIC
        flag = cv2.INTER_AREA if averages and size < img.shape[:2] else flag
        return np.asarray(cv2.resize(img, size[::-1], interpolation=flag))

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        return np.asarray(cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST))


def rescaled(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """A picture's height and width made as large as fits: the longer side into the longer of `scale`, the shorter into the shorter."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


class RandomWindow(A.DualTransform):  # type: ignore[misc]
    """A window of `size`, or of as much of it as the picture has; mmsegmentation's RandomCrop.

    Ten windows at most are tried for one of two classes or more, of which none has `cat_max_ratio` of the labelled pixels or more; what
    is drawn after the tenth is taken as it is.
    """

    def __init__(self, size: tuple[int, int], cat_max_ratio: float):
        super().__init__(p=1)
        self.size, self.cat_max_ratio = size, cat_max_ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        window = self._draw(params["shape"])
        if self.cat_max_ratio < 1:
            for _ in range(TRIES):
                if self.is_varied(data["mask"][window]):
                    break
                window = self._draw(params["shape"])
        return {"window": window}

    def _draw(self, shape: tuple[int, ...]) -> Window:
        top, left = (int(self.random_generator.integers(max(side - own, 0) + 1)) for side, own in zip(shape, self.size, strict=False))
        return slice(top, top + self.size[0]), slice(left, left + self.size[1])

    def is_varied(self, labels: np.ndarray) -> bool:
        """Whether labels, uint8, have two classes or more, and none of them too many of the pixels."""
        counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)[:IGNORE]
        return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio)

    def apply(self, img: np.ndarray, window: Window, **params: Any) -> np.ndarray:
        return np.ascontiguousarray(img[window])


def _linear(values: np.ndarray, factor: float, added: float = 0.0) -> np.ndarray:
    linear: np.ndarray = np.clip(values.astype(np.float32) * factor + added, 0, 255)
    return linear.astype(np.uint8)


def _in_hsv(img: np.ndarray, channel: int, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Hue (OpenCV's, of 180 parts), saturation or value changed."""
    hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = change(hsv[..., channel])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


class PhotometricDistortion(A.ImageOnlyTransform):  # type: ignore[misc]
    """mmsegmentation's: brightness, then contrast before or after saturation and hue, each of even odds; in 8 bits, rounded down."""

    RANGES = {"brightness": (-32.0, 32.0), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-18, 18)}
    CHANGES: Mapping[str, Callable[[np.ndarray, float], np.ndarray]] = {
        "brightness": lambda img, value: _linear(img, 1.0, value),
        "contrast": lambda img, value: _linear(img, value),
        "saturation": lambda img, value: _in_hsv(img, 1, lambda channel: _linear(channel, value)),
        "hue": lambda img, value: _in_hsv(img, 0, lambda channel: (channel.astype(int) + value) % 180),
    }

    def __init__(self) -> None:
        super().__init__(p=1)

    def get_params(self) -> dict[str, Any]:
        steps = self._drawn("brightness")
        order = ("contrast", "saturation", "hue") if self.random_generator.integers(2) else ("saturation", "hue", "contrast")
        return {"steps": steps + [step for name in order for step in self._drawn(name)]}

    def _drawn(self, name: str) -> list[tuple[str, float]]:
        if not self.random_generator.integers(2):
            return []
        low, high = self.RANGES[name]
        whole = isinstance(low, int)
        return [(name, int(self.random_generator.integers(low, high)) if whole else float(self.random_generator.uniform(low, high)))]

    def apply(self, img: np.ndarray, steps: list[tuple[str, float]], **params: Any) -> np.ndarray:
        for name, value in steps:
            img = self.CHANGES[name](img, value)
        return img


class Jitter(A.ImageOnlyTransform):  # type: ignore[misc]
    """Brightness, contrast around the picture's mean and saturation around each pixel's, each by up to `most`; of floats in 0..1."""

    def __init__(self, most: float):
        super().__init__(p=1)
        self.most = most

    def get_params(self) -> dict[str, Any]:
        factors = 1 + self.random_generator.uniform(-self.most, self.most, 3)
        return dict(zip(("brightness", "contrast", "saturation"), factors.tolist(), strict=True))

    def apply(self, img: np.ndarray, brightness: float, contrast: float, saturation: float, **params: Any) -> np.ndarray:
        grey = img.mean(2, keepdims=True)
        img = grey + saturation * (img - grey)
        middle = img.mean()
        return np.asarray(np.clip(brightness * (middle + contrast * (img - middle)), 0, 1), np.float32)

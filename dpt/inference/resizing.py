"""Pictures to the network's input and maps back to the picture's size: the resize, normalisation and padding of each upstream.

On the way in, without antialiasing and aligned corners, it is OpenCV's INTER_CUBIC or INTER_LINEAR of floats (`taps.resized`),
which runs on the model's device; all others are `torch.nn.functional.interpolate`. Floats are what MiDaS and Depth Anything
resize, unclipped. mmsegmentation resizes 8-bit pictures, in OpenCV's fixed point; floats come nearer to its result (0.32 of a
grey level r.m.s., 0.76 at most, measured on a blurred random picture) than floats rounded to 8 bits (0.36 and 1). Depth
Anything 3 resizes 8 bits, and twice: `taps.area_or_cubic`. Pictures of more bits are resized so, and nothing is rounded on the way, where
all upstreams would make 8 bits of them first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import InputConfig
from . import taps
from .images import ImageError
from .transfer import constant, to_device

STRIP_ELEMENTS = 1 << 24  # float32 logits at the picture's size that are held at once: 64 MB
MAX_ASPECT = 32  # the network's longer side over the nominal one: beyond it memory runs out before anything is seen


def _border(side: int, config: InputConfig) -> int:
    """By how many pixels a picture is reflected beyond either end of a side: at most to its other end."""
    return min(int(math.sqrt(side / 2) * config.border), side - 1)


def _bordered(height: int, width: int, config: InputConfig) -> tuple[int, int]:
    return height + 2 * _border(height, config), width + 2 * _border(width, config)


def network_size(height: int, width: int, config: InputConfig, ratio: float = 1.0) -> tuple[int, int]:
    """Height and width that a picture, with its border, is resized to, before any padding.

    The rules, of which each side's scale is `config.size` over the picture's:
        minimal: the scale nearest to 1 for both sides, to the nearest multiple (isl-org DPT, MiDaS).
        lower_bound: the larger scale; no side ends below `size` (Depth Anything).
        upper_bound: the smaller scale; no side ends above `size`.
        short_side: the shorter side becomes min(size).
        short_and_long_side: as large as fits with the shorter side <= min(size) and the longer <= max(size);
            mmsegmentation's keep_ratio.
        longest_side: the longer side becomes max(size), both whole pixels; then each goes to the nearest multiple, of two as near to the
            larger (Depth Anything 3).
        at_most: the picture's own size, or, where its longer side is above max(size), the scale that makes it that; then down to a multiple
            (Prompt Depth Anything).
        square: `size` itself, whatever the aspect (transformers' processors).
        none: the picture's own size, whatever `size` is (DINOv2's depth models).

    Args:
        ratio: of test-time augmentation; multiplies the scale, and never changes which side decides it.

    Raises:
        ImageError: no pixels, or so elongated that a side would pass MAX_ASPECT times `size`. ValueError: another rule.
    """
    if height < 1 or width < 1:
        raise ImageError(f"zero-sized, {width}x{height} pixels")
    height, width = _bordered(height, width, config)
    scales = config.size[0] / height, config.size[1] / width
    rules = {
        "minimal": lambda: (scales[1] if abs(1 - scales[1]) < abs(1 - scales[0]) else scales[0],) * 2,
        "lower_bound": lambda: (max(scales),) * 2,
        "upper_bound": lambda: (min(scales),) * 2,
        "short_side": lambda: (min(config.size) / min(height, width),) * 2,
        "short_and_long_side": lambda: (min(max(config.size) / max(height, width), min(config.size) / min(height, width)),) * 2,
        "longest_side": lambda: (max(config.size) / max(height, width),) * 2,
        "at_most": lambda: (min(max(config.size) / max(height, width), 1.0),) * 2,
        "square": lambda: scales,
        "none": lambda: (1.0, 1.0),
    }
    if config.rule not in rules:
        raise ValueError(f"the resize rule is one of {', '.join(rules)}, not {config.rule!r}")
    sides = [side * scale * ratio for side, scale in zip((height, width), rules[config.rule](), strict=True)]
    if max(sides) > MAX_ASPECT * max(config.size) * ratio:
        raise ImageError(f"{width}x{height} pixels are too elongated: the network would see {sides[1]:.0f}x{sides[0]:.0f}")
    bounds = [size * ratio for size in config.size]
    return _rounded(sides[0], bounds[0], config), _rounded(sides[1], bounds[1], config)


def _rounded(side: float, bound: float, config: InputConfig) -> int:
    if config.pad != "none":  # mmcv rounds half up, to whole pixels; the padding makes the multiple
        return max(int(side + 0.5), 1)
    multiple = config.multiple
    if config.rule == "longest_side":
        return max(math.floor(_whole(side) / multiple + 0.5), 1) * multiple
    if config.rule == "at_most":
        return max(int(side // multiple), 1) * multiple
    count = round(side / multiple)
    if config.rule == "upper_bound" and count * multiple > bound:
        count = math.floor(side / multiple)
    if config.rule == "lower_bound" and count * multiple < bound:
        count = math.ceil(side / multiple)
    return max(count, 1) * multiple


def _whole(side: float) -> int:
    return max(round(side), 1)


def _steps(height: int, width: int, config: InputConfig, ratio: float) -> list[tuple[int, int]]:
    """The sizes of the resizes, one after the other; the last is `network_size`."""
    last = network_size(height, width, config, ratio)
    height, width = _bordered(height, width, config)
    if config.grey_levels:
        return [(height, last[1]), last]  # Pillow goes along the rows first
    if config.rule != "longest_side":
        return [last]
    scale = max(config.size) * ratio / max(height, width)
    return [(_whole(height * scale), _whole(width * scale)), last]


def resized(x: Tensor, size: tuple[int, int], config: InputConfig, whole: bool = True) -> Tensor:
    """Float pictures (B, C, H, W) at `size`, as `config` says that they are resized on the way in. `whole`: whose levels are whole
    numbers, and stay so where `config.mode` rounds them."""
    if config.mode == "area_cubic":
        return taps.area_or_cubic(x, size, whole)
    if config.mode == "area":
        return taps.averaged(x, size)
    if config.antialias or config.align_corners:
        return F.interpolate(x, size=size, mode=config.mode, align_corners=config.align_corners, antialias=config.antialias)
    return taps.resized(x, size, config.mode)


def resize_and_normalise(
    image: np.ndarray | Tensor,
    config: InputConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ratio: float = 1.0,
) -> Tensor:
    """uint8, uint16 or floats in 0..1, (H, W, 3), of a tensor on the device itself -> (1, 3, h, w) of `network_size`, not padded; computed
    in float32, returned in `dtype`. 257 v of uint16 is v of uint8, but for the rounding to whole levels, which is of uint8 alone."""
    height, width = image.shape[:2]
    pixels = image if isinstance(image, Tensor) else to_device(torch.from_numpy(np.ascontiguousarray(image)), device)
    whole = pixels.dtype == torch.uint8
    x = _grey_levels(pixels.permute(2, 0, 1)[None])
    y_border, x_border = (_border(side, config) for side in (height, width))
    if y_border or x_border:
        x = F.pad(x, (x_border, x_border, y_border, y_border), mode="reflect")
    for size in _steps(height, width, config, ratio):
        x = resized(x, size, config, whole)
        if config.grey_levels:
            x = (x.round() if whole else x).clamp(0, 255)
    mean, std = (constant(tuple(values), x.device).mul(255).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return ((x - mean) / std).to(dtype)


def _grey_levels(pixels: Tensor) -> Tensor:
    """Pixels as floats from 0 to 255."""
    if pixels.is_floating_point():
        return pixels.float() * 255
    return pixels.float() / 257 if pixels.dtype == torch.uint16 else pixels.float()


def padded(x: Tensor, config: InputConfig) -> Tensor:
    """(..., h, w) with zeros up to the next multiple of both sides.

    "corner": at the bottom and the right, and the map of them is cut off (mmsegmentation). "centre": as many at either end, or one more at
    the bottom and the right; the map is left whole and resized to the picture, which is how DINOv2's depth models were trained.
    """
    down, right = (-side % config.multiple for side in x.shape[-2:])
    top, left = (down // 2, right // 2) if config.pad == "centre" else (0, 0)
    return F.pad(x, (left, right - left, top, down - top))


def without_padding(output: Tensor, x: Tensor, config: InputConfig) -> Tensor:
    """The map (..., h', w') that a network gives for `padded(x)`, of the same size or a proportional one, without what was cut off."""
    if config.pad != "corner":
        return output
    kept = [side * own // (own + -own % config.multiple) for side, own in zip(output.shape[-2:], x.shape[-2:], strict=True)]
    return output[..., : kept[0], : kept[1]]


def preprocess(
    image: np.ndarray, config: InputConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, tuple[int, int]]:
    """uint8, uint16 or floats in 0..1, (H, W, 3) -> the model's input (1, 3, h', w') and the (h, w) of it that is resized to the picture:
    with zeros in the corner the rest of it."""
    x = resize_and_normalise(image, config, device, dtype)
    whole = padded(x, config)
    height, width = without_padding(whole, x, config).shape[2:]
    return whole, (height, width)


def postprocess(output: Tensor, content: tuple[int, int], size: tuple[int, int], config: InputConfig) -> Tensor:
    """A model's output (..., h', w') -> float32 (..., H, W) at the picture's `size`, padding beyond `content` and border cut off."""
    output = output[..., : content[0], : content[1]].float()
    maps = output.reshape(1, -1, *content)
    top, left = (_border(side, config) for side in size)
    maps = F.interpolate(maps, size=_bordered(*size, config), mode=config.output_mode, align_corners=config.output_align_corners)
    return maps[..., top : top + size[0], left : left + size[1]].reshape(*output.shape[:-2], *size)


def labels_from_logits(
    logits: Tensor, size: tuple[int, int], config: InputConfig, probability: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits (K, h, w) -> labels (H, W) at `size`, uint8 or beyond 256 classes int16, and if asked the winner's softmax, float32.

    The logits are upsampled a strip of rows at a time: the K maps never exist at the picture's size.
    """
    labels = torch.empty(size, dtype=torch.uint8 if len(logits) <= 256 else torch.int16, device=logits.device)
    winner = torch.empty(size, device=logits.device) if probability else None
    for rows, strip in resized_strips(logits, size, config):
        if winner is None:
            labels[rows] = strip.max(0).indices.to(labels.dtype)  # on a CPU many times as fast as argmax
        else:
            winner[rows], best = strip.softmax(0).max(0)
            labels[rows] = best.to(labels.dtype)
    return labels, winner


def resized_strips(maps: Tensor, size: tuple[int, int], config: InputConfig) -> Iterator[tuple[slice, Tensor]]:
    """(K, h, w) resized to (K, *size) in float32, as `F.interpolate` would, in strips of rows: (rows, (K, rows, W))."""
    height, width = size
    index, weight = taps.interpolated(maps.shape[1], height, config.output_mode, config.output_align_corners)
    index, weight = to_device(index, maps.device), to_device(weight, maps.device)
    count = max(STRIP_ELEMENTS // (len(maps) * width), 1)
    for start in range(0, height, count):
        rows = slice(start, min(start + count, height))
        pairs = zip(index[rows].unbind(1), weight[rows].unbind(1), strict=True)
        strip = cast(Tensor, sum(maps[:, i].float() * w[:, None] for i, w in pairs))  # (K, rows, w)
        strip = F.interpolate(strip[None], size=(strip.shape[1], width), mode=config.output_mode, align_corners=config.output_align_corners)
        yield rows, strip[0]

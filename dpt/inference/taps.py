"""Resizes by taps: for each target row or column the source rows it is made of, and their weights. And OpenCV's resizes by them.

Between 8 bits and floats there is a grey level and, behind a network, more than a level of a 16-bit map: so what a model expects of OpenCV
is rounded where OpenCV rounds. So are the places of floats, which PyTorch rounds otherwise: that made three such levels.
Source: https://github.com/opencv/opencv, modules/imgproc/src/resize.cpp
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .transfer import to_device

LEAST_EDGE = 1e-3  # of a pixel: INTER_AREA leaves a smaller part of one out
KEPT = 64  # taps that are kept on the host, for training too, wherever they were made: pictures of a folder are mostly of few sizes
Taps = tuple[Tensor, Tensor]  # source rows, int64, and float32 weights, (target, taps) each


@functools.lru_cache(maxsize=KEPT)
@torch.inference_mode(False)
def interpolated(source: int, target: int, mode: str, align_corners: bool = False, places: torch.dtype = torch.float64) -> Taps:
    """Of a bilinear (2 taps) or bicubic resize (4), as `torch.nn.functional.interpolate` without antialiasing; the places between the
    source's rows are rounded to a dtype."""
    row = torch.arange(target, dtype=torch.float64)
    position = row * ((source - 1) / max(target - 1, 1)) if align_corners else (row + 0.5) * (source / target) - 0.5
    position = position.to(places).double()
    floor = position.floor()
    t = position - floor
    offsets: tuple[int, ...]
    weights: tuple[Tensor, ...]
    if mode == "bilinear":
        offsets, weights = (0, 1), (1 - t, t)
    else:
        offsets, weights = (-1, 0, 1, 2), (_cubic(t + 1), _cubic(t), _cubic(1 - t), _cubic(2 - t))
    index = (floor[:, None].long() + torch.tensor(offsets)).clamp(0, source - 1)
    return index, torch.stack(weights, dim=1).float()


def _cubic(x: Tensor, a: float = -0.75) -> Tensor:
    """Keys' cubic convolution kernel at 0 <= x <= 2, with the coefficient of PyTorch and OpenCV."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, far)


def resized(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Floats (B, C, H, W) to `size`, unclipped: OpenCV's INTER_LINEAR ("bilinear") or INTER_CUBIC ("bicubic"), whose places are float32."""
    down, across = (interpolated(*sides, mode, places=torch.float32) for sides in zip(image.shape[-2:], size, strict=True))
    x = _rows(image.movedim((-2, -1), (0, 1)), down)  # (h, W, B, C): channels last, as pictures lie in memory
    x = _rows(x.transpose(0, 1), across)  # (w, h, B, C)
    return x.movedim((0, 1), (-1, -2)).contiguous()


def _rows(image: Tensor, taps: Taps) -> Tensor:
    """(N, ...) resized along its first dimension: sums of whole rows, many times as fast on a CPU as picking each pixel."""
    index, weight = (to_device(part, image.device) for part in taps)
    found: Tensor = F.embedding_bag(index, image.flatten(1), per_sample_weights=weight, mode="sum")
    return found.view(-1, *image.shape[1:])


@functools.lru_cache(maxsize=KEPT)
@torch.inference_mode(False)
def area(source: int, target: int) -> Taps:
    """Of INTER_AREA to a smaller target: the part that each source row has in a target row. Taps that are too many weigh nothing."""
    scale = 1 / (target / source)
    rows: list[list[tuple[int, float]]] = []
    for start in (row * scale for row in range(target)):
        end, cell = start + scale, min(scale, source - start)
        last = min(math.floor(end), source - 1)
        first = min(math.ceil(start), last)
        row = [(first - 1, (first - start) / cell)] if first - start > LEAST_EDGE else []
        row += [(index, 1 / cell) for index in range(first, last)]
        rows.append(row + ([(last, min(end - last, 1, cell) / cell)] if end - last > LEAST_EDGE else []))
    count = max(map(len, rows))
    table = torch.tensor([row + [(0, 0.0)] * (count - len(row)) for row in rows], dtype=torch.float64)
    return table[..., 0].long(), table[..., 1].float()


def averaged(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Floats (..., H, W) to `size`, no larger: OpenCV's INTER_AREA. A side that grows, of fewer pixels than a patch, is bilinear."""
    height, width = image.shape[-2:]
    across, down = (
        area(source, target) if target <= source else interpolated(source, target, "bilinear")
        for source, target in ((width, size[1]), (height, size[0]))
    )
    return _summed(_summed(image, across, -1), down, -2)


def area_or_cubic(image: Tensor, size: tuple[int, int], whole: bool = True) -> Tensor:
    """Grey levels 0..255, float32 (..., H, W), to the same at `size`: OpenCV's INTER_CUBIC where a side grows, else its INTER_AREA.
    `whole`: they are whole numbers, and become so; else nothing is rounded.

    INTER_AREA level by level. INTER_CUBIC as x86 builds compute it, by Intel's library, in floats (one level off in 1 of 80 000 values);
    OpenCV's own code, in fixed point, is one level off that in 1 of 20.
    """
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    larger = size[0] > height or size[1] > width
    if not larger and height % size[0] == 0 and width % size[1] == 0:
        rows, columns = height // size[0], width // size[1]
        total: Tensor = image.unflatten(-1, (size[1], columns)).sum(-1).unflatten(-2, (size[0], rows)).sum(-2)
        if not whole:
            return total / (rows * columns)
        if rows == columns == 2:
            return torch.floor((total + 2) / 4)  # half a level up, where all others are rounded to even
        return torch.round(total * image.new_full((), 1 / (rows * columns)))
    if larger:
        across, down = interpolated(width, size[1], "bicubic"), interpolated(height, size[0], "bicubic")
    else:
        across, down = area(width, size[1]), area(height, size[0])
    found = _summed(_summed(image, across, -1), down, -2)
    return (found.round() if whole else found).clamp(0, 255)


def _summed(image: Tensor, taps: Taps, dim: int) -> Tensor:
    """One axis resized, tap after tap: INTER_AREA's order, in which what lies between two levels falls to the same."""
    index, weight = (to_device(part, image.device) for part in taps)
    total = image.new_zeros(())
    for k in range(index.shape[1]):
        total = total + image.index_select(dim, index[:, k]) * weight[:, k].view((-1,) + (1,) * (-1 - dim))
    return total

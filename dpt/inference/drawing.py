"""Maps as the pixels and colours of files, on the device that they are on.

Depths are spread in float64 wherever they are, so that a file's bytes are the same from every device. On cards for games it runs at a 64th
of float32's rate, and costs nothing all the same: these are a dozen passes through memory, which is what they wait for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import HeadConfig
from .transfer import constant

COLOR_MAP = "inferno"
# Elements that are worked on at once: what is made of them stays in a processor's cache, and is below the 32 768 that PyTorch shares among
# threads, for it is a thread already that draws, beside others; a GPU wants as many as its memory has room for.
STRIP_ELEMENTS = {"cpu": 32_000}
STRIP_ELEMENTS_ELSEWHERE = 1 << 24
_UNKNOWN = (128, 128, 128)  # colour of depths that are not finite
OPACITY = 0.55  # of the labels' colours over the picture


Ends = tuple[float, float] | None  # the lowest and highest value of a spread; None for those of the map


def depth_to_uint16(depth: Tensor, relative: bool, scale: float = 1000.0, ends: Ends = None) -> Tensor:
    """(H, W) for a 16-bit PNG: relative depth, inverse or not, spread over 0..65535, or metres times `scale` clipped to that range.

    What is not finite becomes 0, and so does a constant relative depth, which has no range to spread.
    """
    result = torch.empty(depth.shape, dtype=torch.uint16, device=depth.device)
    for rows, values in _spread(depth, ends) if relative else _strips(depth):
        values = (values * (65535 if relative else scale)).nan_to_num_(nan=0, posinf=0, neginf=0)
        result[rows] = _rounded(values.clamp_(0, 65535)).to(torch.int32)  # which more devices make of floats than uint16
    return result


def colored(depth: Tensor, inverse: bool, ends: Ends = None) -> Tensor:
    """uint8 RGB (H, W, 3), near bright and far dark by matplotlib's inferno; grey where depth is not finite."""
    colours = constant(_colours(), depth.device, torch.uint8)
    result = torch.empty((*depth.shape, 3), dtype=torch.uint8, device=depth.device)
    for rows, values in _spread(depth, ends):
        near = values if inverse else 1 - values
        index = _rounded((near * 255).nan_to_num_(nan=256, posinf=256, neginf=256)).to(torch.int32)
        _look_up(colours, index, result[rows])
    return result


@functools.cache
def _colours() -> tuple[tuple[int, ...], ...]:
    """Those of 256 steps from far to near, and after them that of the unknown."""
    from matplotlib import colormaps  # half a second that segmentation does not need

    table = np.rint(colormaps[COLOR_MAP](np.arange(256))[:, :3] * 255).astype(int).tolist()
    return (*map(tuple, table), _UNKNOWN)


def _strips(depth: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Depth (H, W) in float64, a few rows at a time."""
    for rows in _rows(depth):
        yield rows, depth[rows].double()


def _rows(found: Tensor) -> Iterator[slice]:
    """The strips of a map (H, ...)."""
    count = max(STRIP_ELEMENTS.get(found.device.type, STRIP_ELEMENTS_ELSEWHERE) // found[0].numel(), 1)
    for start in range(0, len(found), count):
        yield slice(start, start + count)


def _look_up(table: Tensor, index: Tensor, colours: Tensor) -> None:
    """`colours` (h, w, 3), contiguous, become those of the table's rows (N, 3) that an index (h, w) names."""
    index, colours = index.reshape(-1), colours.view(-1, 3)
    for part in _rows(colours):
        torch.index_select(table, 0, index[part], out=colours[part])


def _spread(depth: Tensor, ends: Ends) -> Iterator[tuple[slice, Tensor]]:
    """`_strips` with the finite depths moved to 0..1, all 0 if they are equal, and cut to it where ends are given; the others are still not
    finite."""
    inf = math.inf
    if ends is None:
        low = torch.stack([depth[rows].nan_to_num(inf, inf, inf).amin() for rows in _rows(depth)]).amin().double()
        high = torch.stack([depth[rows].nan_to_num(-inf, -inf, -inf).amax() for rows in _rows(depth)]).amax().double()
        extent = torch.where(high > low, high - low, 1.0)
        for rows, values in _strips(depth):
            yield rows, values.sub_(low).div_(extent)
        return
    for rows, values in _strips(depth):
        finite = values.isfinite()
        spread = ((values - ends[0]) / ((ends[1] - ends[0]) or 1.0)).clamp_(0, 1)
        yield rows, torch.where(finite, spread, values)


def _rounded(values: Tensor) -> Tensor:
    """Floats below 4 million, in place, to whole numbers, halves to the even one: by adding so much that no bit is left behind the point.
    `torch.round` does the same, but shares even a few numbers among threads, which are at work on the next picture."""
    large = 1.5 / torch.finfo(values.dtype).eps
    return values.add_(large).sub_(large)


def normals_to_uint8(normals: Tensor) -> Tensor:
    """Unit vectors (H, W, 3) as the colours of a PNG: -1..1 spread over 0..255; grey where they are not finite."""
    result = torch.empty(normals.shape, dtype=torch.uint8, device=normals.device)
    for rows in _rows(normals):
        values = ((normals[rows].float() + 1) / 2).nan_to_num_(nan=0.5, posinf=0.5, neginf=0.5)
        result[rows] = _rounded(values.clamp_(0, 1).mul_(255)).to(torch.uint8)
    return result


def tinted(image: Tensor, labels: Tensor, palette: Sequence[tuple[int, int, int]], opacity: float = OPACITY) -> Tensor:
    """The picture, uint8 (H, W, 3), under the colours of its labels (H, W): as `PIL.Image.blend`, which cuts what is behind the point."""
    colours = constant(tuple(palette), image.device, torch.uint8)
    result = torch.empty_like(image)
    for rows in _rows(image):
        _look_up(colours, labels[rows].int(), result[rows])
        over, under = result[rows].float(), image[rows].float()
        result[rows] = over.sub_(under).mul_(opacity).add_(under).to(torch.uint8)
    return result


# What is drawn of a map, by task, from (map, picture, head, ends of depth): the pixels of its PNG where they are not the map's own or its
# colours, and its colours for people, uint8 (H, W, 3).
DRAW: dict[str, dict[str, Callable[[Tensor, Tensor, HeadConfig, Ends], Tensor]]] = {
    "pixels": {"depth": lambda depth, image, head, ends: depth_to_uint16(depth, not head.metric, head.depth_scale, ends)},
    "colours": {
        "depth": lambda depth, image, head, ends: colored(depth, head.inverse, ends),
        "segmentation": lambda labels, image, head, ends: tinted(image, labels, head.palette),
        "normals": lambda normals, image, head, ends: normals_to_uint8(normals),
    },
}


def drawn(found: Tensor, image: Tensor, head: HeadConfig, ends: Ends = None) -> dict[str, Tensor]:
    """All of `DRAW` of a map, by the head's task depth or labels (H, W) or normals (H, W, 3), and its picture, uint8 (H, W, 3)."""
    return {what: of[head.task](found, image, head, ends) for what, of in DRAW.items() if head.task in of}

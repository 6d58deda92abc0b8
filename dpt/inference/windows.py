"""A network run on a whole map or in overlapping windows, which are merged.

Logits are averaged where windows overlap, as mmsegmentation does, and so are normals. Depth, relative or in metres, is aligned to the map
of the whole, and the windows fade into each other. Tiles are windows of a picture that is finer than the network sees the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DPTConfig
from ..evaluation.alignment import align, scale_to
from .resizing import padded, without_padding


class Network(Protocol):
    """What predicting asks of a `dpt.DPT`, or of what runs in its place; a module of PyTorch's."""

    config: DPTConfig

    @property
    def head(self) -> nn.Module: ...

    def __call__(self, x: Tensor, /) -> Tensor | dict[str, Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


COARSE = 16  # parts of a tile's side: what is as large as one is the whole's to say
Maps = dict[str, Tensor]  # by task, (B, K, h, w); depth with K = 1


def infer(model: Network, x: Tensor, window: tuple[int, int] | None, stride: tuple[int, int] | None, prompt: Tensor | None = None) -> Maps:
    """Normalised pictures (B, 3, h, w), not padded -> maps (B, K, h, w) by task, whole (None) or in windows of that size.

    A whole map is as the network gives it, of another size where its head has one of its own. `prompt` (B, h, w): of models that take one;
    then in no windows.
    """
    if window is None or (x.shape[2] <= window[0] and x.shape[3] <= window[1]):
        return _forward(model, x, prompt)
    tasks = [head.task for head in model.config.heads]
    whole = _of_size(_forward(model, x)["depth"], x.shape[2:]) if "depth" in tasks else None
    totals: Maps = {}
    weights, steps = {task: x.new_zeros(x.shape[2:], dtype=torch.float32) for task in tasks}, cast("tuple[int, int]", stride)
    for top in _starts(x.shape[2], window[0], steps[0]):
        for left in _starts(x.shape[3], window[1], steps[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            for task, found in _forward(model, x[place]).items():
                maps = _of_size(found, x[place].shape[2:])
                weight = maps.new_ones(maps.shape[2:])
                if whole is not None and task == "depth":
                    maps, weight = align(maps, whole[place]), _fade(maps.shape[2:], maps.device)
                total = totals.setdefault(task, maps.new_zeros(*maps.shape[:2], *x.shape[2:]))
                total[place] += weight * maps
                weights[task][place] += weight
    return {task: total / weights[task] for task, total in totals.items()}


def refine(model: Network, x: Tensor, whole: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The depth of the whole, with what tiles of a finer picture add to it.

    Of a tile, which does not see what is around it, the edges are believed and not how deep its parts lie: what is coarser than a
    sixteenth of it is the whole's, and by that the tile's own scale is found. So tiles agree where they overlap, and fade into each other.

    Args:
        x: the normalised picture (B, 3, h, w), not padded, finer than the network sees it.
        whole: depth (B, 1, h', w') of the same picture as the network sees it.
        window, stride: the tiles' sides and steps, in pixels of `x`.

    Returns:
        Depth (B, 1, h, w), float32.
    """
    whole = F.interpolate(whole.float(), size=x.shape[2:], mode="bicubic", align_corners=False)
    total, weights = torch.zeros_like(whole), x.new_zeros(x.shape[2:], dtype=torch.float32)
    for top in _starts(x.shape[2], window[0], stride[0]):
        for left in _starts(x.shape[3], window[1], stride[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            target = whole[place]
            tile = _of_size(_forward(model, x[place])["depth"], target.shape[2:])
            tile = scale_to(_cells(tile), _cells(target)) * tile
            coarse = F.interpolate(_cells(tile - target), size=target.shape[2:], mode="bicubic", align_corners=False)
            weight = _fade(target.shape[2:], target.device) ** 2  # whose end is none in its slope either
            total[place] += weight * (tile - coarse)
            weights[place] += weight
    return total / weights


def _cells(maps: Tensor) -> Tensor:
    """Maps (B, K, h, w) as means of at most `COARSE` parts of a side."""
    return F.adaptive_avg_pool2d(maps, (min(COARSE, maps.shape[2]), min(COARSE, maps.shape[3])))


def _fade(size: Sequence[int], device: torch.device) -> Tensor:
    """Weights (h, w) of a window's map, which fall in a straight line from its middle to its edges."""
    rows, columns = (1 - (2 * torch.arange(side, device=device) + 1 - side).abs() / side for side in size)
    return rows[:, None] * columns


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin: every `stride`, the last one moved back inside."""
    last = max(length - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]


def _forward(model: Network, x: Tensor, prompt: Tensor | None = None) -> Maps:
    config, whole = model.config, padded(x, model.config.input)
    found = model(whole) if prompt is None else cast(Any, model)(whole, prompt)
    maps = found if isinstance(found, dict) else {config.head.task: found}
    return {task: _channels(without_padding(y, x, config.input)) for task, y in maps.items()}


def _channels(maps: Tensor) -> Tensor:
    """Depth (B, h, w) as a map of one channel; others have theirs."""
    return maps[:, None] if maps.dim() == 3 else maps


def _of_size(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, K, ...) in float32 at a size, which most have already."""
    maps = maps.float()
    return maps if tuple(maps.shape[2:]) == tuple(size) else F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)

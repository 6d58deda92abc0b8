"""A network run on a whole map or in overlapping windows, which are merged.

Logits are averaged where windows overlap, as mmsegmentation does, and so are normals. Depth, relative or in metres, is aligned to the map
of the whole, and the windows fade into each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DPTConfig
from ..evaluation.alignment import align
from .resizing import padded, without_padding


class Network(Protocol):
    """What predicting asks of a `dpt.DPT`, or of what runs in its place; a module of PyTorch's."""

    config: DPTConfig

    @property
    def head(self) -> nn.Module: ...

    def __call__(self, x: Tensor, /) -> Tensor | dict[str, Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


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

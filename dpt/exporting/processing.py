"""A network with what is before and behind it, as one module of tensors: from pictures of 8 bits and any size to maps of their size.

The network sees one size, which is the graph's: the sizes that `dpt.inference.resizing.network_size` rounds to would have to be known
while the graph is made. On the way in a resize is two products with matrices of weights, made in the graph from the picture's size: the
taps of `dpt.inference.taps`, antialiasing, INTER_AREA, aligned corners and ZoeDepth's border are all rows of such a matrix, and every
runtime has products. Places are whole numbers over whole numbers until the last division, so that no runtime rounds them another way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DPTConfig, HeadConfig, InputConfig
from ..inference.resizing import padded, without_padding
from ..inference.taps import LEAST_EDGE

FIELDS = {"depth": "depth", "segmentation": "labels", "normals": "normals"}  # of `Prediction`, by task
CUBIC = -0.75
UPWARDS = 2.0**-10  # of a grey level: what lies between two is the upper one in every runtime, whatever the order of its sums


def nominal_size(config: DPTConfig) -> tuple[int, int]:
    """Height and width that the network sees unless another size is asked for: what the rule aims at; of bounds of a shorter and a longer
    side the shorter one's square."""
    height, width = config.input.size
    return (min(height, width),) * 2 if config.input.rule == "short_and_long_side" else (height, width)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel at 0 <= x <= 2."""
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    return torch.where(x <= 1, near, far)


class Side(NamedTuple):
    """Rows or columns of a map: their places 0, 1, 2, ... (int64), and how many of those there are (1,): the others are not looked at."""

    places: Tensor
    length: Tensor

    @classmethod
    def of(cls, count: int, device: torch.device) -> Side:
        places = torch.arange(count, device=device)
        return cls(places, places[-1:] + 1)


Sides = tuple[Side, Side]  # rows and columns


def border(length: Tensor, config: InputConfig) -> Tensor:
    """By how many pixels a picture is reflected beyond either end of a side, as `resizing` has it."""
    beyond = torch.floor((length.float() / 2).sqrt() * config.border).long()
    return torch.minimum(beyond, length - 1)


def between(target: Side, source: Side, mode: str, align_corners: bool, beyond: Tensor | None = None) -> Tensor:
    """Weights (rows, sources) of a bilinear or bicubic resize; `beyond`: how many rows of the source are reflected beyond either end."""
    length = source.length if beyond is None else source.length + 2 * beyond
    if align_corners:
        above, below = target.places * (length - 1), (target.length - 1).clamp(min=1)
    else:
        above, below = (2 * target.places + 1) * length - target.length, 2 * target.length
    above = above + below  # a row more, that division is of no negative numbers
    whole = torch.div(above, below, rounding_mode="floor")
    place = (whole - 1).float() + (above - whole * below).float() / below.float()  # rounded to float32, as OpenCV's
    first = place.floor()
    t = place - first
    taps: list[tuple[int, Tensor]]
    if mode == "bilinear":
        taps = [(0, 1 - t), (1, t)]
    else:
        taps = [(-1, _cubic(t + 1)), (0, _cubic(t)), (1, _cubic(1 - t)), (2, _cubic(2 - t))]
    total = torch.zeros_like(t)[:, None] * torch.zeros_like(source.places, dtype=torch.float32)
    for offset, weight in taps:
        index = torch.minimum((first.long() + offset).clamp(min=0), length - 1)
        if beyond is not None:
            last = source.length - 1
            index = last - (last - (index - beyond).abs()).abs()
        total = total + weight[:, None] * (index[:, None] == source.places).float()
    return total


def averaged(target: Side, source: Side) -> Tensor:
    """Weights (rows, sources) of a bilinear resize with antialiasing, as `torch.nn.functional.interpolate`'s and Pillow's."""
    apart = ((2 * source.places + 1) * target.length - (2 * target.places[:, None] + 1) * source.length).abs()
    weights = F.relu(1 - apart.float() / (2 * torch.maximum(source.length, target.length)).float())
    return weights / weights.sum(1, keepdim=True)


def covered(target: Side, source: Side) -> Tensor:
    """Weights (rows, sources) of INTER_AREA to fewer rows: the part that each source has in a target."""
    count, length, place = target.length, source.length, target.places[:, None]
    low = torch.maximum(source.places * count, place * length)
    high = torch.minimum((source.places + 1) * count, torch.minimum((place + 1), count) * length)
    part = F.relu((high - low).float() / count.float())
    part = torch.where(part > LEAST_EDGE, part, torch.zeros_like(part))
    return part / part.sum(1, keepdim=True).clamp(min=LEAST_EDGE)


def _weights(config: InputConfig, targets: Sides, sources: Sides) -> list[Tensor]:
    """The matrices of a resize on the way in: of rows, and of columns."""
    pairs = list(zip(targets, sources, strict=True))
    if config.antialias:
        return [averaged(target, source) for target, source in pairs]
    area, cubic = config.mode.startswith("area"), config.mode == "area_cubic"
    mode = {"area": "bilinear", "area_cubic": "bicubic"}.get(config.mode, config.mode)
    others = []
    for target, source in pairs:
        beyond = border(source.length, config) if config.border else None
        others.append(between(target, source, mode, config.align_corners, beyond))
    if not area:
        return others
    smaller = [target.length <= source.length for target, source in pairs]
    if cubic:
        smaller = [smaller[0] & smaller[1]] * 2
    return [torch.where(few, covered(*pair), other) for few, pair, other in zip(smaller, pairs, others, strict=True)]


def _steps(config: InputConfig, sources: Sides, size: tuple[int, int]) -> list[Sides]:
    """What a picture is resized to, one after the other, as `resizing` has it."""
    device = sources[0].places.device
    last = (Side.of(size[0], device), Side.of(size[1], device))
    if config.grey_levels:
        return [(sources[0], last[1]), last]  # Pillow goes along the rows first
    if config.rule != "longest_side":
        return [last]
    side, longest = max(config.size), torch.maximum(sources[0].length, sources[1].length)
    places = torch.arange(side, device=device)  # of which as many count as the picture's aspect has
    counts = [_rounded(side * s.length, longest).clamp(min=1) for s in sources]
    return [(Side(places, counts[0]), Side(places, counts[1])), last]


def _rounded(above: Tensor, below: Tensor) -> Tensor:
    """above / below to the nearest whole number, of two as near to the even one, as Python's `round`."""
    found = torch.div(2 * above + below, 2 * below, rounding_mode="floor")
    between_two, odd = 2 * above + below == 2 * below * found, found - 2 * torch.div(found, 2, rounding_mode="floor")
    return found - between_two.long() * odd


def _levels(x: Tensor, config: InputConfig, targets: Sides, sources: Sides) -> Tensor:
    """Whole grey levels, where that is how a resize ends. Of INTER_AREA to half of both sides a level between two is the upper."""
    if config.mode == "area_cubic":
        halved = [2 * target.length == source.length for target, source in zip(targets, sources, strict=True)]
        x = x + (halved[0] & halved[1]).float() / 8
    if config.grey_levels:
        x = x + UPWARDS
    return x.round().clamp(0.0, 255.0) if config.grey_levels or config.mode == "area_cubic" else x


def refusal(config: DPTConfig) -> str | None:
    """Why the processing of a model cannot be in a graph; None where it can."""
    if config.input.flip and [head.metric for head in config.heads] != [True]:
        return f"{config.name} averages mirrored maps that are not metres, each of a scale of its own"
    return None


class Processed(nn.Module):
    """Pictures uint8 (B, H, W, 3), RGB -> what `predict` makes of each: depth float32 (B, H, W), labels (B, H, W), normals (B, H, W, 3); of
    several tasks a dictionary by the fields of `Prediction`.

    Args:
        model: a `dpt.DPT`.
        size: height and width that pictures are resized to, whatever their aspect; zeros are added where `config.input.pad` says so.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.model, self.size = model, size
        self.config = cast(DPTConfig, model.config)

    def forward(self, image: Tensor, *further: Tensor) -> Tensor | dict[str, Tensor]:
        """`further`: a prompt (B, h, w) in metres, a focal length (B,) in pixels of the picture, of models that take these."""
        config, how = self.config, self.config.input
        prompts, focals = further[: config.decoder.prompt], further[config.decoder.prompt :]
        sources = (Side.of(image.shape[1], image.device), Side.of(image.shape[2], image.device))
        x = self.resized(image.permute(0, 3, 1, 2).float(), sources)
        parameter = next(self.model.parameters())
        mean, std = (x.new_tensor(values).mul(255).view(1, 3, 1, 1) for values in (how.mean, how.std))
        x = ((x - mean) / std).to(parameter.dtype)
        shown = padded(x, how)
        given = (shown, *prompts)
        if how.flip:
            given = tuple(torch.cat((each, each.flip(-1))) for each in given)
        maps = self.model(*given)
        named = maps if isinstance(maps, dict) else {config.head.task: maps}
        found = {}
        for head in config.heads:
            y = without_padding(named[head.task], x, how)
            if how.flip:
                straight, mirrored = y.unflatten(0, (2, image.shape[0])).unbind()
                y = (straight + mirrored.flip(-1)) / 2
            found[FIELDS[head.task]] = READ[head.task](self, head, y, sources, focals)
        return found if len(found) > 1 else next(iter(found.values()))

    def resized(self, x: Tensor, sources: Sides) -> Tensor:
        """Grey levels (B, 3, H, W) at the graph's size."""
        how = self.config.input
        for targets in _steps(how, sources, self.size):
            rows, columns = _weights(how, targets, sources)
            x = x @ columns.T
            x = _levels(x if targets[0] is sources[0] else rows @ x, how, targets, sources)
            sources = targets
        return x

    def outgoing(self, maps: Tensor, sources: Sides) -> Tensor:
        """Maps (B, K, h, w) at the picture's size, float32, without the border."""
        how, maps = self.config.input, maps.float()
        if not how.border:
            size = (sources[0].places.shape[0], sources[1].places.shape[0])
            return F.interpolate(maps, size=size, mode=how.output_mode, align_corners=how.output_align_corners)
        matrices = []
        for source, side in zip(sources, maps.shape[2:], strict=True):
            beyond = border(source.length, how)
            target = Side(source.places + beyond, source.length + 2 * beyond)
            matrices.append(between(target, Side.of(side, maps.device), how.output_mode, how.output_align_corners))
        return matrices[0] @ (maps @ matrices[1].T)


def _depth(graph: Processed, head: HeadConfig, maps: Tensor, sources: Sides, focals: tuple[Tensor, ...]) -> Tensor:
    depth = graph.outgoing(maps[:, None], sources)[:, 0]
    if head.focal is None:
        return depth
    down, across = (side / source.length.float() for side, source in zip(graph.size, sources, strict=True))
    return depth * (focals[0] * ((down + across) / 2) / head.focal)[:, None, None]


def _labels(graph: Processed, head: HeadConfig, maps: Tensor, sources: Sides, focals: tuple[Tensor, ...]) -> Tensor:
    return graph.outgoing(maps, sources).argmax(1).to(torch.uint8 if len(head.classes) <= 256 else torch.int16)


def _normals(graph: Processed, head: HeadConfig, maps: Tensor, sources: Sides, focals: tuple[Tensor, ...]) -> Tensor:
    return F.normalize(graph.outgoing(F.normalize(maps.float(), dim=1), sources), dim=1).permute(0, 2, 3, 1)


READ: dict[str, Callable[..., Any]] = {"depth": _depth, "segmentation": _labels, "normals": _normals}

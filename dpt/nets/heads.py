"""The heads: the fused map, at half the picture's resolution, to depth or to class logits (Ranftl et al. 2021, section 3.3).

A head reads so many deeper maps beside it as its `DEEPER` says. Depth and normals are float32 at least: the last layer and what follows it
are computed so, for in half precision each of their values would be rounded, and metres in steps of 0.4 %. Logits are in the model's dtype:
their rounding changes hardly a label, and K maps would take twice the memory (docs/precision.md has the figures of both).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TASKS, HeadConfig
from .bins import depth_of_bins
from .functional import LastConv2d, LastLinear
from .sky import SkyBranch, with_far_sky

ACTIVATION: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda x, max_depth: F.relu(x),
    "sigmoid": lambda x, max_depth: max_depth * x.sigmoid(),
    "exp": lambda x, max_depth: x.exp(),
    "linear": lambda x, max_depth: x,
}
LEAST = 1e-8  # of what depth is the reciprocal of


def finished(depth: Tensor, config: HeadConfig) -> Tensor:
    """What follows the activation: the offset, the reciprocal of models that learnt inverse depth to scale (isl-org's for KITTI and NYU),
    and the bounds."""
    if config.offset:
        depth = depth + config.offset
    if config.reciprocal is not None:
        scale, shift = config.reciprocal
        depth = 1 / (scale * depth + shift).clamp(min=LEAST)
    return depth if config.bounds is None else depth.clamp(*config.bounds)


def depth_from(x: Tensor, config: HeadConfig) -> Tensor:
    """What the last layer gives, (B, bins or 1, H, W) -> depth (B, H, W)."""
    return depth_of_bins(x, config) if config.bins else ACTIVATION[config.activation](x.squeeze(1), config.max_depth)


def own_size(x: Tensor, size: tuple[int, int], config: HeadConfig) -> tuple[int, int]:
    """The height and width of the map that is made of a fused map x: the network's input's, `size`, or a multiple of x's."""
    factor = config.upsample
    return size if factor is None else (factor * x.shape[2], factor * x.shape[3])


class DepthHead(nn.Module):
    """(B, F, H/2, W/2) -> depth (B, H, W): conv3x3, upsampling, conv3x3, ReLU, 1x1, and `config.activation`, by default a ReLU.

    With `config.project` a conv3x3 and ReLU come first; with `config.bins` depth is their mean; with `config.sky` a second branch behind
    the upsampling finds the sky. `config.upsample` gives a map of its own size, and not the input's.
    """

    DEEPER = 0

    def __init__(self, features: int, config: HeadConfig):
        super().__init__()
        self.config = config
        self.activation, self.max_depth, self.align_corners = config.activation, config.max_depth, config.align_corners
        self.project = nn.Conv2d(features, features, 3, padding=1) if config.project else nn.Identity()
        self.conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(features // 2, config.hidden, 3, padding=1)
        self.conv3 = LastConv2d(config.hidden, config.bins or 1, 1)
        self.sky = SkyBranch(features // 2, config.hidden) if config.sky else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.config.project:
            x = F.relu(self.project(x))
        return self.resized(self.conv1(x), own_size(x, size, self.config))

    def resized(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """What the first convolution gives (B, F/2, h, w) -> depth (B, *size)."""
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)
        depth = finished(depth_from(self.conv3(F.relu(self.conv2(x))), self.config), self.config)
        return with_far_sky(depth, self.sky(x)) if self.config.sky else depth


class SegmentationHead(nn.Module):
    """(B, F, H/2, W/2) -> logits (B, K, H, W): conv3x3, batch norm, ReLU, dropout, 1x1, upsampling."""

    DEEPER = 0

    def __init__(self, features: int, config: HeadConfig):
        super().__init__()
        self.align_corners = config.align_corners
        self.conv = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(features)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Conv2d(features, len(config.classes), 1)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B, K, H/2, W/2), before the upsampling."""
        return self.classifier(self.dropout(F.relu(self.norm(self.conv(x)))))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(self.logits(x), size=size, mode="bilinear", align_corners=self.align_corners)


class LinearHead(nn.Module):
    """(B, F, h, w) -> depth (B, h, w), logits (B, K, h, w) or normals (B, 3, h, w) of any length, as `config.task` says: conv3x3, a ReLU or
    nothing, and a linear layer. Maps keep the fused map's size; who uses them resizes them once."""

    DEEPER = 0

    def __init__(self, features: int, config: HeadConfig):
        super().__init__()
        self.config = config
        outputs = {"depth": config.bins or 1, "segmentation": len(config.classes), "normals": 3}
        self.project = nn.Conv2d(features, features, 3, padding=1)
        self.linear = (nn.Linear if config.task == "segmentation" else LastLinear)(features, outputs[config.task])

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.project(x)
        return self.read(F.relu(x) if self.config.between == "relu" else x)

    def read(self, x: Tensor) -> Tensor:
        """What the linear layer reads (B, F, h, w) -> the head's result."""
        config, x = self.config, self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return finished(depth_from(x, config), config) if config.task == "depth" else x


HEADS: dict[str, dict[str, Callable[[int, HeadConfig], nn.Module]]] = {
    "convolutions": {"depth": DepthHead, "segmentation": SegmentationHead},
    "linear": dict.fromkeys(TASKS, LinearHead),
}


def head_of(features: int, config: HeadConfig) -> nn.Module:
    """The head that a configuration describes."""
    return HEADS[config.kind][config.task](features, config)

"""The decoder: Reassemble and Fusion (Ranftl et al. 2021, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DecoderConfig
from .functional import ACTIVATION, statically_equal
from .prompt import PromptBranch


class ReadoutProject(nn.Module):
    """Tokens (B, 1 + N, D) -> (B, N, D): every patch token is projected together with the cls token, then activated (exact GELU)."""

    def __init__(self, dim: int, activation: str = "gelu"):
        super().__init__()
        self.activation = activation
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        patches, cls = tokens[:, 1:], tokens[:, :1]
        return ACTIVATION[self.activation](self.linear(torch.cat((patches, cls.expand_as(patches)), dim=-1)))


class ReadoutIgnore(nn.Module):
    """Tokens (B, 1 + N, D) -> (B, N, D): the cls token is left out."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 1:]


class ReadoutAdd(nn.Module):
    """Tokens (B, 1 + N, D) -> (B, N, D): the cls token is added to every patch token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 1:] + tokens[:, :1]


READOUT: dict[str, Callable[[int, str], nn.Module]] = {
    "project": ReadoutProject,
    "ignore": lambda dim, activation: ReadoutIgnore(),
    "add": lambda dim, activation: ReadoutAdd(),
}


def _resize(channels: int, level: int) -> nn.Module:
    """The resampling of one level: strides 4, 8, 16 and 32 out of patches of 16."""
    if level < 2:
        factor = 4 >> level
        return nn.ConvTranspose2d(channels, channels, factor, stride=factor)
    return nn.Identity() if level == 2 else nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class Reassemble(nn.Module):
    """One hooked layer's tokens (B, 1 + h*w, D) -> a map (B, C, h', w'): readout, 1x1 projection, resampling.

    With `config.token_norm` a batch norm stands before the projection.
    """

    def __init__(self, dim: int, level: int, config: DecoderConfig):
        super().__init__()
        channels = config.neck_channels[level]
        self.readout = READOUT[config.readout](dim, config.readout_activation)
        self.norm = nn.BatchNorm2d(dim) if config.token_norm else nn.Identity()
        self.project = nn.Conv2d(dim, channels, 1)
        self.resize = _resize(channels, level)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.readout(tokens).transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        return self.resize(self.project(self.norm(x)))


class ReassembleMap(nn.Module):
    """What the stem gives is a map already (DPT-Hybrid), and what an encoder of several stages does."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x


class ResidualConvUnit(nn.Module):
    """conv3x3(relu(conv3x3(relu(x)))) + x, with batch norm after each convolution in segmentation models.

    The skip is the raw x, not relu(x) (unlike MiDaS v2.1, whose ReLU works in place).
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        features = config.features
        bias = not config.batch_norm if config.unit_bias is None else config.unit_bias
        self.conv1 = nn.Conv2d(features, features, 3, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(features) if config.batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(features) if config.batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(F.relu(x)))
        return self.norm2(self.conv2(F.relu(y))) + x


class FusionBlock(nn.Module):
    """One level: prev + unit1(skip), unit2, bilinear upsampling, 1x1 projection.

    The deepest level has no previous map and runs no unit1, though some checkpoints hold one (`dead_unit`).
    """

    def __init__(self, config: DecoderConfig, deepest: bool):
        super().__init__()
        if not deepest or config.dead_unit:
            self.unit1 = ResidualConvUnit(config)
        self.unit2 = ResidualConvUnit(config)
        self.project = nn.Conv2d(config.features, config.features, 1)
        if config.prompt:
            self.prompt = PromptBranch(config.features)

    def merge(self, previous: Tensor, skip: Tensor) -> Tensor:
        """prev + unit1(skip), the skip first resized to prev where patches came in odd numbers."""
        if not statically_equal(skip.shape[2:], previous.shape[2:]):
            skip = F.interpolate(skip, size=previous.shape[2:], mode="bilinear", align_corners=False)
        return previous + self.unit1(skip)

    def forward(self, previous: Tensor | None, skip: Tensor, size: tuple[int, int] | None, prompt: Tensor | None = None) -> Tensor:
        """`size` (height, width) of the result; None is twice the input's. `prompt` (B, h, w) in 0..1 is added behind unit2."""
        x = skip if previous is None else self.merge(previous, skip)
        x = self.unit2(x)
        if prompt is not None:
            x = x + self.prompt(prompt, (x.shape[2], x.shape[3]))
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.project(F.interpolate(x, size=size, mode="bilinear", align_corners=True))


class Fusion(nn.Module):
    """Four maps, shallow to deep -> one map (B, F, H/2, W/2)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.match_size = config.match_size
        self.convs = nn.ModuleList(nn.Conv2d(channels, config.features, 3, padding=1, bias=False) for channels in config.neck_channels)
        self.blocks = nn.ModuleList(FusionBlock(config, deepest=level == 3) for level in range(4))

    def forward(self, maps: Iterable[Tensor], deeper: int = 0, prompt: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """With `deeper`, so many of the deeper maps behind it: (B, F, H/4, W/4) for auxiliary heads, and so on; the fourth is the deepest
        level's before its block. `prompt`: as `FusionBlock` takes it."""
        skips = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        x: Any = None
        found = [skips[3]]
        for level in (3, 2, 1, 0):
            size = tuple(skips[level - 1].shape[2:]) if self.match_size and level else None
            x = self.blocks[level](x, skips[level], size, prompt)
            found.insert(0, x)
        return tuple(found[: 1 + deeper]) if deeper else x

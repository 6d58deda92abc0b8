"""The stem of DPT-Hybrid: a ResNetV2-50 without its last stage, whose map is what the Vision Transformer takes for patches.

It is that of ViT's hybrid (Dosovitskiy et al. 2021), which is Big Transfer's (Kolesnikov et al. 2020) with the norms behind the
convolutions: R50+ViT-B/16 of timm, by whose names its parts go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import EncoderConfig
from .kept import KeptBySize


def _by_deviation(weight: Tensor) -> Tensor:
    """As Google's code and timm's until 0.4.9 have it: an epsilon on the standard deviation."""
    deviation, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
    return (weight - mean) / (deviation + 1e-5)


def by_variance(weight: Tensor, eps: float = 1e-8) -> Tensor:
    """As later ports have it, which standardise by a batch norm of the filters: an epsilon on the variance."""
    variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
    return (weight - mean) * torch.rsqrt(variance + eps)


STANDARDISE: dict[str, Callable[[Tensor], Tensor]] = {"deviation": _by_deviation, "variance": by_variance}


class StandardisedConv2d(nn.Conv2d):
    """A convolution without bias whose filters have mean 0 and variance 1 (Qiao et al. 2019), padded as TensorFlow's "SAME".

    At a stride of two that padding depends on whether a side is odd. None is here: pictures are whole patches of 16, four halvings. The
    standardised weight is kept while no gradient is wanted.
    """

    def __init__(self, channels: int, width: int, side: int, stride: int, eps_on: str):
        around = max(side - stride, 0)
        before, after = around // 2, around - around // 2
        super().__init__(channels, width, side, stride, before if before == after else 0, bias=False)
        self.around = () if before == after else (before, after, before, after)  # left, right, top, bottom
        self.eps_on = eps_on
        self.kept = KeptBySize(most=1)

    def standardised(self) -> Tensor:
        """The weight as the convolution uses it, computed in float32 at least."""
        if torch.compiler.is_compiling():
            return self._made()
        return self.kept.get((), self.weight, self._made)

    def _made(self) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return STANDARDISE[self.eps_on](weight).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.around) if self.around else x
        return F.conv2d(x, self.standardised(), None, self.stride, self.padding)


class Bottleneck(nn.Module):
    """relu(x + three convolutions of it), each with a group norm: 1x1, 3x3, which has the stride, 1x1.

    A stage's first brings x to the new width and stride by a 1x1 convolution and a norm.
    """

    def __init__(self, channels: int, width: int, stride: int, config: EncoderConfig):
        super().__init__()
        middle, groups, eps_on = width // 4, config.stem_groups, config.stem_eps_on
        self.downsample: nn.Module = nn.Identity()
        if channels != width:
            conv = StandardisedConv2d(channels, width, 1, stride, eps_on)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=nn.GroupNorm(groups, width)))
        self.conv1 = StandardisedConv2d(channels, middle, 1, 1, eps_on)
        self.norm1 = nn.GroupNorm(groups, middle)
        self.conv2 = StandardisedConv2d(middle, middle, 3, stride, eps_on)
        self.norm2 = nn.GroupNorm(groups, middle)
        self.conv3 = StandardisedConv2d(middle, width, 1, 1, eps_on)
        self.norm3 = nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.downsample(x))


class ResNetV2(nn.Module):
    """Picture (B, 3, H, W) of whole patches of 16 -> the embedded patches (B, D, H/16, W/16); the maps of its stages can be hooked."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.stem_width
        conv = StandardisedConv2d(3, width, 7, 2, config.stem_eps_on)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=nn.GroupNorm(config.stem_groups, width)))
        self.stages = nn.Sequential()
        for index, (depth, wide) in enumerate(zip(config.stem_depths, config.stem_widths, strict=True)):
            blocks = nn.Sequential(Bottleneck(width, wide, 1 if index == 0 else 2, config))
            blocks.extend(Bottleneck(wide, wide, 1, config) for _ in range(depth - 1))
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
            width = wide
        self.proj = nn.Conv2d(width, config.embed_dim, 1)

    def maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the maps after each stage: (B, 4 C, H/4, W/4), (B, 8 C, H/8, W/8), (B, 16 C, H/16, W/16)."""
        x = F.relu(self.stem(x))
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, stride=2)  # "SAME"; zeros are below all that a ReLU leaves
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def embed(self, x: Tensor) -> Tensor:
        """The last map (B, 16 C, h, w) -> the embedded patches (B, D, h, w)."""
        return self.proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.maps(x)[-1])

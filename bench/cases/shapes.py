"""The ops' tensors, at the shapes that the models use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6


@dataclass(frozen=True)
class Argument:
    """One tensor of an op. ``scale`` times a normal variable plus ``shift``; ``map``: a (B, C, H, W) tensor that has a memory format."""

    shape: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0
    map: bool = False
    gradient: bool = True
    positive: bool = False

    def make(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        value = self.scale * torch.randn(self.shape, generator=generator) + self.shift
        return (value.abs() + 0.5 if self.positive else value).to(device, dtype)


def tokens(*shape: int) -> Argument:
    return Argument(shape)


def feature_map(*shape: int) -> Argument:
    return Argument(shape, map=True)


def weight(*shape: int) -> Argument:
    """A matrix or convolution of unit gain."""
    return Argument(shape, scale=math.prod(shape[1:]) ** -0.5, map=len(shape) == 4)


def bias(channels: int) -> Argument:
    return Argument((channels,), scale=0.1)


def gain(channels: int) -> Argument:
    return Argument((channels,), scale=0.1, shift=1.0)


def norm(channels: int) -> tuple[Argument, ...]:
    """Weight, bias, mean and variance of a batch norm in evaluation form; the statistics are constants."""
    mean = Argument((channels,), scale=0.1, gradient=False)
    return gain(channels), bias(channels), mean, Argument((channels,), gradient=False, positive=True)


@dataclass(frozen=True)
class Tokens:
    """Tokens of an encoder: batch, tokens with the class token, width, heads."""

    batch: int
    tokens: int
    width: int
    heads: int

    def __str__(self) -> str:
        return f"B={self.batch} N={self.tokens} D={self.width} H={self.heads}"


@dataclass(frozen=True)
class Map:
    """A feature map and what comes out of it: batch, channels, side; channels and side of the result."""

    batch: int
    channels: int
    side: int
    out_channels: int = 0
    out_side: int = 0

    def __str__(self) -> str:
        to = f" to {self.out_channels}" if self.out_channels else ""
        side = f" to {self.out_side}^2" if self.out_side else ""
        return f"B={self.batch} C={self.channels}{to}, {self.side}^2{side}"


def rotation(shape: Tokens) -> Argument:
    """Numbers in the place of cosines and sines."""
    return Argument((2, shape.tokens, shape.width // shape.heads // 2), gradient=False)


# Base at 512, Large at 384, Depth Anything V2 S, B and L at 518; then larger pictures. In order of importance.
BASE, LARGE = Tokens(1, 1025, 768, 12), Tokens(1, 577, 1024, 16)
ENCODERS = (BASE, LARGE, Tokens(16, 1025, 768, 12), Tokens(1, 1370, 384, 6), Tokens(1, 1370, 768, 12), Tokens(1, 1370, 1024, 16))
LONG = (Tokens(1, 2305, 768, 12), Tokens(1, 4097, 768, 12))
DINOV3 = (Tokens(1, 1029, 768, 12), Tokens(16, 1029, 768, 12))
FUSION = (
    Map(1, 256, 128),
    Map(1, 256, 64),
    Map(1, 256, 32),
    Map(1, 256, 16),
    Map(16, 256, 128),
    Map(16, 256, 64),
    Map(1, 256, 256),
    Map(1, 128, 148),
    Map(1, 64, 148),
    Map(4, 256, 128),
)

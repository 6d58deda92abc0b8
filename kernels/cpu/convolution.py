"""The ops' convolutions and resizes where there are no kernels: PyTorch's own, or on a CPU what was measured to be faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts.batch_norm import BatchNormArguments, as_convolution, folded
from ..parts.maps import channels_last
from . import choices, memory, winograd
from .linear import linear
from .plain import are_plain


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: BatchNormArguments | None = None,
    relu_input: bool = False,
    relu: bool = False,
    skip: Tensor | None = None,
    then: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """norm(conv3x3(x) + bias), padding 1: (B, O, H, W); with ``relu_input`` of relu(x), with ``relu`` its ReLU, with ``skip`` that added.

    ``then``, with ``relu``: weight (K, O, 1, 1) and bias (K,) of a 1x1 convolution of it, (B, K, H, W). The norm is folded into the
    convolution.
    """
    if are_plain(x, weight, bias, skip, *(then or ())) and choices.winograd(*x.shape, weight.shape[0]):
        scale, bias = as_convolution(bias, norm)
        skip = None if skip is None else channels_last(skip)
        return winograd.conv3x3(channels_last(x), weight, bias, scale=scale, relu_input=relu_input, relu=relu, skip=skip, then=then)
    weight, bias = folded(weight, bias, norm)
    y = F.conv2d(F.relu(x) if relu_input else x, weight, bias, padding=1)
    y = y.relu_() if relu else y
    if then is not None:
        return linear(y.permute(0, 2, 3, 1), then[0].flatten(1), then[1]).permute(0, 3, 1, 2)
    return y if skip is None else y.add_(skip)


def resized(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """x (B, C, H, W) bilinearly at another size; on a CPU in memory that is used again."""
    if not are_plain(x) or not x.is_contiguous(memory_format=torch.channels_last):
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
    y = memory.empty((x.shape[0], *size, x.shape[1]), x).permute(0, 3, 1, 2)
    return torch.ops.aten.upsample_bilinear2d.out(x, tuple(size), align_corners, out=y)


def halved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 3x3 convolution of x (B, C, H, W) by stride 2, padding 1: (B, O, ceil(H/2), ceil(W/2)); on a CPU one product of matrices."""
    if not are_plain(x, weight, bias):
        return F.conv2d(x, weight, bias, stride=2, padding=1)
    (batch, channels, height, width), outputs = x.shape, weight.shape[0]
    down, across = -(-height // 2), -(-width // 2)
    padded = memory.empty((batch, 2 * down + 1, 2 * across + 1, channels), x).zero_()
    padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
    picture, row, column, _ = padded.stride()
    seen = memory.empty((batch, down, across, 3, 3, channels), x)
    seen.copy_(padded.as_strided(seen.shape, (picture, 2 * row, 2 * column, row, column, 1)))
    taps = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
    return linear(seen.view(batch, down, across, -1), taps, bias).permute(0, 3, 1, 2)


def spread(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The transposed convolution of x (B, C, H, W) by weight (C, O, s, s) and stride s: (B, O, s*H, s*W); on a CPU one product."""
    if not are_plain(x, weight, bias):
        return F.conv_transpose2d(x, weight, bias, stride=weight.shape[-1])
    (batch, channels, height, width), (_, outputs, side, _) = x.shape, weight.shape
    taps = weight.permute(2, 3, 1, 0).reshape(-1, channels)
    pixels = linear(x.permute(0, 2, 3, 1), taps).view(batch, height, width, side, side, outputs).transpose(2, 3)
    y = memory.empty((batch, height, side, width, side, outputs), x)
    if bias is None:
        y.copy_(pixels)
    else:
        torch.add(pixels, bias, out=y)
    return y.view(batch, side * height, side * width, outputs).permute(0, 3, 1, 2)

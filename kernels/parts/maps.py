"""Maps (B, C, H, W) in the memory that the kernels read and write: channels-last, and perhaps padded.

A vector of numbers is loaded at once where it begins at a multiple of its size: of 150 channels side by side, two of bfloat16 at a time.
So a map with as many may be the first of 160 channels in memory, of which the rest mean nothing.
"""

from __future__ import annotations

import torch

MULTIPLE = 16


def padded_channels(channels: int) -> int:
    """How many channels apart the pixels of a padded map are: the next multiple of 16; fewer than 16 are not padded."""
    return channels if channels < MULTIPLE else (channels + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its memory is dense and channels-last, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """An uninitialised (B, channels, height, width) map, channels-last, of the batch, dtype and device of ``like``."""
    return torch.empty((like.shape[0], channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def is_padded(x: torch.Tensor) -> bool:
    """Whether ``x`` is the first channels of a channels-last map of :func:`padded_channels`, and not such a map itself."""
    (_, channels, height, width), apart = x.shape, padded_channels(x.shape[1])
    dense = (height * width * apart, 1, width * apart, apart)
    return apart != channels and x.stride() == dense


def readable_channels(x: torch.Tensor) -> int:
    """How many channels may be read of each pixel: of a padded map all, unless its memory ends with the last pixel's own."""
    apart = padded_channels(x.shape[1])
    end = x.storage_offset() + x.shape[0] * x.shape[2] * x.shape[3] * apart
    return apart if is_padded(x) and end * x.element_size() <= x.untyped_storage().nbytes() else x.shape[1]


def padded(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` that is padded, with memory behind its last pixel."""
    copy: torch.Tensor = empty_channels_last(x, padded_channels(x.shape[1]), *x.shape[2:])[:, : x.shape[1]]
    return copy.copy_(x)


def with_padding(x: torch.Tensor) -> torch.Tensor:
    """A padded map and the channels behind it that mean nothing; any other map as :func:`channels_last` has it."""
    if not is_padded(x):
        return channels_last(x)
    x = x if readable_channels(x) > x.shape[1] else padded(x)
    return x.as_strided((x.shape[0], padded_channels(x.shape[1]), *x.shape[2:]), x.stride(), x.storage_offset())


def channels_last_or_padded(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its memory is channels-last, dense or padded, else a copy that is padded."""
    return x if is_padded(x) or x.is_contiguous(memory_format=torch.channels_last) else padded(x)

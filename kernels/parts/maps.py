"""Maps (B, C, H, W) in the memory that the kernels read and write."""

from __future__ import annotations

import torch


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its memory is dense and channels-last, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """An uninitialised (B, channels, height, width) map, channels-last, of the batch, dtype and device of ``like``."""
    return torch.empty((like.shape[0], channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)

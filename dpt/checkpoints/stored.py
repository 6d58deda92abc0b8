"""A tensor in a file: its place, type and shape, and its values once asked for. Nothing else is ever made from a file's claims."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..zoo import CheckpointError

MAX_DIMENSIONS = 16


@dataclass(eq=False)
class Storage:
    """`size` bytes of a file from `position` on, in numbers of `dtype`; None until the position is known."""

    path: Path
    dtype: torch.dtype
    size: int
    position: int | None = None


@dataclass(frozen=True, eq=False)
class Opaque:
    """A value that was not made: what it would have been."""

    what: str


@dataclass(frozen=True, eq=False)
class Stored:
    """A dense tensor on a storage that nothing was read of yet: offset and strides count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def problem(self) -> str | None:
        """Why the tensor cannot be read: it claims more than its storage holds; None if it can."""
        numbers = (self.offset, *self.shape, *self.stride)
        if (
            any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers)
            or not len(self.shape) == len(self.stride) <= MAX_DIMENSIONS
        ):
            return "has sizes, strides or an offset that are no such thing"
        if self.storage.position is None:
            return "has a storage that is not in the file"
        held = self.storage.size // self.dtype.itemsize
        claimed = max(self.offset + self._span(), math.prod(self.shape))
        return f"claims {claimed} numbers of a storage of {held}" if claimed > held else None

    def read(self) -> Tensor:
        """The tensor on the CPU, contiguous, on memory of its own."""
        buffer = torch.empty(self._span() * self.dtype.itemsize, dtype=torch.uint8, device="cpu")
        left = memoryview(cast(Any, buffer.numpy()))
        with open(self.storage.path, "rb", buffering=0) as file:
            file.seek(cast(int, self.storage.position) + self.offset * self.dtype.itemsize)
            while left and (count := file.readinto(left)):
                left = left[count:]
        if left:
            raise CheckpointError(f"{self.storage.path}: became shorter while it was read")
        return buffer.view(self.dtype).as_strided(self.shape, self.stride).contiguous()

    def _span(self) -> int:
        """Elements from the first to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose elements stand in order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

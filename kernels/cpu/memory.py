"""Memory for what an op makes on a CPU, used again: fresh pages of the system's have to be waited for, and are in no cache.

A buffer is taken by ``empty`` and comes back when the last tensor that has it is gone, whoever that is, so nobody's numbers are written
over. What is not in use is kept until ``release``, or until it is more than ``LIMIT`` bytes. Threads share it without a lock, which a
process forked meanwhile would wait for: a list is taken from and added to at once.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 22  # bytes; smaller ones are the allocator's, which keeps them itself
GRAIN = 1 << 16  # sizes are a multiple of it, so that nearly equal ones share buffers

_free: dict[int, list[Tensor]] = {}  # by size


def _limit() -> int:
    """An eighth of the machine's memory, or 1 GiB where that is not told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    except (AttributeError, OSError, ValueError):
        return 1 << 30


LIMIT = _limit()

# glibc keeps the memory of freed blocks up to the size of the largest that it has seen freed, at most 32 MiB: here it sees one.
torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor on the CPU, in the dtype of ``like``, dense."""
    count = 1
    for side in shape:
        count *= side
    size = count * like.element_size()
    if size < SMALLEST:
        return like.new_empty(shape)
    size = -(-size // GRAIN) * GRAIN
    try:
        buffer = _free[size].pop()
    except (KeyError, IndexError):
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
    owner = buffer.numpy()  # PyTorch lets go of it when nothing has the memory any more
    weakref.finalize(owner, _give_back, size, buffer).atexit = False
    made: Tensor = torch.from_numpy(owner).view(like.dtype)[:count].view(shape)
    return made


def _give_back(size: int, buffer: Tensor) -> None:
    if size > LIMIT:
        return
    if held() + size > LIMIT:
        release()
    _free.setdefault(size, []).append(buffer)


def held() -> int:
    """The bytes that are kept and not in use."""
    return sum(size * len(buffers) for size, buffers in list(_free.items()))


def release() -> None:
    """Give what is not in use back to the system."""
    _free.clear()

"""Memory for what an op makes on a CPU, used again: fresh pages of the system's have to be waited for, and are in no cache.

A range of addresses is reserved, of which pages become real as they are first written. A buffer is taken by ``empty`` at the lowest
address where it fits, and comes back when the last tensor that has it is gone, whoever that is, so nobody's numbers are written over. What
fits nowhere is the allocator's.
"""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 22  # bytes; smaller ones are the allocator's, which keeps them itself
GRAIN = 1 << 16  # sizes are a multiple of it


def _limit() -> int:
    """An eighth of the machine's memory, or 1 GiB where that is not told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    except (AttributeError, OSError, ValueError):
        return 1 << 30


LIMIT = _limit()

# glibc keeps the memory of freed blocks up to the size of the largest that it has seen freed, at most 32 MiB: here it sees one.
torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


class _Arena:
    """A range of addresses: what of it is free, and how far it was ever used."""

    def __init__(self, size: int):
        try:
            self.bytes = np.empty(size, np.uint8)
        except MemoryError:  # a system that promises no more than it has
            self.bytes = np.empty(0, np.uint8)
        self.start = min(-self.bytes.ctypes.data % GRAIN, self.bytes.size)
        self.free = [(self.start, self.bytes.size - self.start)]  # where and how large, in order, none beside another
        self.returned: deque[tuple[int, int]] = deque()  # what was given back since, from any thread and in the midst of anything
        self.reached = self.start

    def take(self, size: int) -> np.ndarray | None:
        while self.returned:
            self._put(*self.returned.popleft())
        for index, (start, room) in enumerate(self.free):
            if room >= size:
                self.free[index : index + 1] = [(start + size, room - size)] if room > size else []
                self.reached = max(self.reached, start + size)
                part = self.bytes[start : start + size]
                weakref.finalize(part, self.returned.append, (start, size)).atexit = False
                return part
        return None

    def _put(self, start: int, size: int) -> None:
        index = bisect.bisect(self.free, (start, size))
        if index < len(self.free) and self.free[index][0] == start + size:
            size += self.free.pop(index)[1]
        if index and sum(self.free[index - 1]) == start:
            index -= 1
            start, size = self.free[index][0], size + self.free.pop(index)[1]
        self.free.insert(index, (start, size))


_arena: _Arena | None = None
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor on the CPU, in the dtype of ``like``, dense."""
    global _arena
    count = 1
    for side in shape:
        count *= side
    size = count * like.element_size()
    if size < SMALLEST:
        return like.new_empty(shape)
    with _lock:
        arena = _arena
        if arena is None:
            arena = _arena = _Arena(LIMIT)
        part = arena.take(-(-size // GRAIN) * GRAIN)
    if part is None:
        return like.new_empty(shape)
    made: Tensor = torch.from_numpy(part).view(like.dtype)[:count].view(shape)  # PyTorch lets go of the part when nothing has it any more
    return made


def reached() -> int:
    """The bytes that have become real: as many as were in use at a time, and what lay between them."""
    arena = _arena
    return 0 if arena is None else arena.reached - arena.start


def release() -> None:
    """Give the memory back to the system: at once, or when the last tensor that has any of it is gone.

    Without the lock, which the thread may hold: the garbage collector calls this in the midst of anything.
    """
    global _arena
    _arena = None

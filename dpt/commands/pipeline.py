"""Work that overlaps: results written in threads while the next are made, and how long the network alone took."""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
# Of glibc's malloc.h: M_MMAP_THRESHOLD, above which memory is mapped anew, as what a damaged file announces and never fills should be;
# M_TRIM_THRESHOLD, beyond which it is given back, both in bytes; and M_ARENA_MAX.
MALLOC = {-3: 1 << 27, -1: (1 << 31) - 1, -8: 2}


def in_threads(work: Callable[[Item], object], items: Iterable[Item], threads: int) -> Generator[tuple[Item, Exception | None], None, None]:
    """Do `work(item)` in threads while the next items are made; gives each item, in order, with the error it raised.

    No more than `threads` + 1 items are held at a time. Where the iterator is closed or the items end in an error, what is in work is
    finished and what waits is dropped.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="dpt-write")
    pending: deque[tuple[Item, Future[object]]] = deque()

    def settled() -> tuple[Item, Exception | None]:
        item, future = pending.popleft()
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        return item, error

    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            del item  # held by what waits alone
            while len(pending) > threads:
                yield settled()
        while pending:
            yield settled()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed pictures for the next ones, of all threads; False where there is no glibc.

    Otherwise each array of megabytes is mapped anew and its pages cleared: a fifth of the processor's time, of pictures of 12 megapixels.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(option, value) for option, value in MALLOC.items()])


class Stopwatch:
    """Adds up the seconds of a model's forward passes; on an accelerator each is waited for, as whoever fetches its result does anyway."""

    def __init__(self, model: nn.Module):
        self.seconds = 0.0
        self._device = next(model.parameters()).device
        self._hooks = [model.register_forward_pre_hook(self._start), model.register_forward_hook(self._stop, always_call=True)]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _now(self) -> float:
        if self._device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def _start(self, *_: object) -> None:
        self._started = self._now()

    def _stop(self, *_: object) -> None:
        self.seconds += self._now() - self._started

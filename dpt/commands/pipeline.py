"""Work that overlaps: results written in threads while the next are made, and how long the network alone took."""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

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
    """Adds up the seconds that a device spends on what is queued while this is entered, which is once at a time.

    On CUDA between two events, for which nobody waits before `seconds` is read; on another accelerator it is waited for at both ends.
    """

    def __init__(self, device: torch.device):
        self._device, self._seconds, self._started = device, 0.0, 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # start and end of what may not have ended yet

    @property
    def seconds(self) -> float:
        while self._pairs:
            self._pairs[0][1].synchronize()
            self._add_ended()
        return self._seconds

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            self._add_ended()
            self._start = self._event()
        else:
            self._started = self._now()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._pairs.append((self._start, self._event()))
        else:
            self._seconds += self._now() - self._started

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add_ended(self) -> None:
        """So no more events are held than there is work in the device's queue."""
        while self._pairs and self._pairs[0][1].query():
            start, end = self._pairs.popleft()
            self._seconds += start.elapsed_time(end) / 1000

    def _now(self) -> float:
        if self._device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

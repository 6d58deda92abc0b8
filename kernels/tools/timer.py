"""The one GPU timer, of the tuning command and of the benchmarks: what a call takes on the device alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 512 * 1024 * 1024  # much more than any L2 cache holds
# Cycles that the device waits while the host queues what is timed: 50 us at 2 GHz, and where that was too short more, up to 10 ms.
SHORTEST, LONGER, LONGEST = 100_000, 4, 20_000_000


def scratch(device: torch.device | str) -> torch.Tensor:
    """Memory that is overwritten between two calls, so that the L2 cache holds nothing of the last one."""
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def queued(run: Callable[[], Any], cycles: int) -> tuple[torch.cuda.Event, torch.cuda.Event, bool]:
    """Queue ``run`` between two CUDA events while the device waits for ``cycles``; and whether the host had queued all of it by then.

    If not, the time between the events has the host's gaps in it: to launch a small kernel takes the host longer than the device to run it.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    run()
    end.record()
    return start, end, not start.query()


def queued_calls(run: Callable[[], Any], repeats: int, flushed: torch.Tensor, cycles: int = SHORTEST) -> tuple[list[float], int]:
    """The milliseconds that ``run`` took the device each time, with ``flushed`` overwritten before it; and the wait, in cycles, that let
    the host queue it in time, with which to begin the next time.

    Where more than a tenth of the calls came late, all are timed again behind a longer wait. A call that waits for the device itself is
    late behind any: its time has the host in it.
    """
    while True:
        calls = []
        for _ in range(repeats):
            flushed.zero_()
            calls.append(queued(run, cycles))
        calls[-1][1].synchronize()
        late = sum(not in_time for _, _, in_time in calls)
        if late <= repeats // 10 or cycles >= LONGEST:
            return [start.elapsed_time(end) for start, end, _ in calls], cycles
        cycles *= LONGER

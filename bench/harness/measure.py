"""Timing, memory and ceilings: how every number of the benchmarks is taken.

The contenders of a case are timed in rounds: each runs once a round, in an order that is rotated from round to round, all on the same
input, so that a machine that slows down or warms up slows all of them alike. A ratio is the median over rounds of the ratio *within* a
round; its spread is told beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dpt.kernels.cpu import memory
from dpt.kernels.tools import timer

Run = Callable[[int], object]  # a contender's run on the input of that index

CONFIDENCE = 0.95
# All rounds of a run share what its process happened to get (where its memory lies, who else used the caches): so much more, either way.
BETWEEN_RUNS = 0.02


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which ``fraction`` of the values lie, interpolated linearly; ValueError if there are none."""
    if not values:
        raise ValueError("no values: a percentile needs at least one")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies: the order statistics that enclose it with 95 % confidence, whatever the distribution.

    Fewer than six values cannot give that confidence: then it is the whole range.
    """
    ordered, count = sorted(values), len(values)
    outside, tail = 0, 0.0  # how many values may be left out at each end
    for left_out in range(count // 2):
        tail += math.comb(count, left_out) / 2**count
        if 2 * tail > 1 - CONFIDENCE:
            break
        outside = left_out
    return ordered[outside], ordered[count - 1 - outside]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline, with the spread that is stated: [low, high]."""

    median: float
    low: float
    high: float

    def agrees(self, other: Ratio) -> bool:
        """Whether the two spreads overlap."""
        return self.low <= other.high and other.low <= self.high


def ratio(baseline: Sequence[float], contender: Sequence[float]) -> Ratio:
    """baseline / contender, round by round. The spread is the wider of the median's 95 % interval and the rounds' p10 to p90, and
    ``BETWEEN_RUNS`` beyond either end.
    """
    ratios = [ours / theirs for ours, theirs in zip(baseline, contender, strict=True)]
    low, high = median_interval(ratios)
    low, high = min(low, percentile(ratios, 0.1)), max(high, percentile(ratios, 0.9))
    return Ratio(percentile(ratios, 0.5), low / (1 + BETWEEN_RUNS), high * (1 + BETWEEN_RUNS))


@dataclass
class Budget:
    """The seconds a session may take; what does not fit any more is not begun."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.started)

    def refusal(self, needed: float) -> str | None:
        """Why something that needs so many seconds is not begun; None if it fits."""
        left = max(0.0, self.left)
        if needed <= left:
            return None
        return f"does not fit: needs about {needed:.0f} s, {left:.0f} s are left of the budget of {self.seconds:.0f} s"


FEWEST = 3  # rounds, where a run took longer than was expected and the budget is spent


@dataclass(frozen=True)
class Rounds:
    """How many rounds: at least ``least``, at most ``most``, and between the two as many as ``seconds`` allow."""

    least: int
    most: int
    seconds: float

    def more(self, done: int, elapsed: float, left: float = math.inf) -> bool:
        """Whether there is another round after so many and so many seconds, with ``left`` seconds of the budget left."""
        if done >= min(FEWEST, self.least) and left <= 0:
            return False
        return done < self.least or (done < self.most and elapsed < self.seconds)


class WallClock:
    """Seconds of a call on the CPU."""

    how = "wall clock"

    def __call__(self, run: Run, index: int) -> float:
        started = time.perf_counter()
        run(index)
        return time.perf_counter() - started


class Told:
    """Seconds that the call itself tells."""

    how = "the calling thread's processor time, on a stub of the driver"

    def __call__(self, run: Run, index: int) -> float:
        return run(index)  # type: ignore[return-value]


class Events:
    """Seconds of a call on the GPU from the moment the device is free for it, by CUDA events, with L2 overwritten before it.

    What the host needs to queue the call counts where the device has to wait for it: a whole model in eager mode may take the host longer
    than the device, and that is what its user waits for.
    """

    how = "CUDA events, L2 flushed, the host's time included"

    def __init__(self, device: torch.device):
        self.scratch = timer.scratch(device)

    def __call__(self, run: Run, index: int) -> float:
        self.scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(index)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Queued:
    """Seconds that the device alone takes: it waits, behind the flush, until the host has queued the call: ``dpt.kernels.tools.timer``.

    A call that the host did not queue in time is timed again behind a longer wait, which that contender then keeps.
    """

    how = "CUDA events, L2 flushed, the device's time alone"

    def __init__(self, device: torch.device, flush: bool = True):
        self.scratch = timer.scratch(device) if flush else torch.empty(0, dtype=torch.int8, device=device)
        self.cycles: weakref.WeakKeyDictionary[Run, int] = weakref.WeakKeyDictionary()

    def __call__(self, run: Run, index: int) -> float:
        cycles = self.cycles.get(run, timer.SHORTEST)
        (milliseconds,), self.cycles[run] = timer.queued_calls(lambda: run(index), 1, self.scratch, cycles)
        return milliseconds / 1000


class Replays:
    """Seconds of one call out of the several that a CUDA graph replays back to back; they find L2 as the one before left it."""

    how = "graph replay, L2 not flushed"

    def __init__(self, calls: int, device: torch.device):
        self.calls, self.queued = calls, Queued(device, flush=False)

    def __call__(self, run: Run, index: int) -> float:
        return self.queued(run, index) / self.calls


Timer = Callable[[Run, int], float]


def interleave(
    runs: Mapping[str, Run], timer: Timer, rounds: Rounds, budget: Budget | None = None, clock: Callable[[], float] = time.monotonic
) -> dict[str, list[float]]:
    """The seconds of every contender in every round."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started, done = clock(), 0
    with _no_garbage_collection():
        while names and rounds.more(done, clock() - started, budget.left if budget else math.inf):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(timer(runs[name], done))
            done += 1
    return seconds


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``run`` held at one time beyond what was held before: what PyTorch's allocator of the device gave out.

    On a GPU that is ``torch.cuda.max_memory_allocated``. On a CPU every allocation and release of PyTorch's CPU allocator, as the profiler
    records them, and on top of their peak what ``dpt.kernels.cpu.memory`` has come to use; what a library allocates by itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    memory.release()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return _peak([event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]) + memory.reached()


def _peak(allocations: list[dict]) -> int:
    """The largest running sum of the profiler's allocations (positive) and releases (negative), in the order of time."""
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


MEMORY = {
    "cuda": "torch.cuda.max_memory_allocated, with what the contender holds between runs",
    "cpu": "peak of PyTorch's CPU allocator and what dpt.kernels.cpu.memory came to use, with what the contender holds between runs",
}


def timer_of(device: torch.device, alone: bool = False) -> Timer:
    """How single calls are timed on a device. ``alone``: on a GPU the device's time, without what the host takes to queue the call."""
    if device.type != "cuda":
        return WallClock()
    return Queued(device) if alone else Events(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_rate(dtype: torch.dtype, device: torch.device, side: int | None = None) -> float:
    """FLOP/s of a square matrix product of random numbers, the median of several: the roof."""
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _median_seconds(lambda index: a @ b, device)


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Bytes/s, read and written, of a copy too large for any cache."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 28)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda index: target.copy_(source), device)


def _median_seconds(run: Run, device: torch.device, repeats: int = 7) -> float:
    timer = timer_of(device, alone=True)
    for _ in range(2):
        run(0)
    return percentile([timer(run, 0) for _ in range(repeats)], 0.5)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, as PyTorch does on a GPU; False where the C library is not glibc.

    By default glibc hands blocks over 32 MB back to the system, and the next call finds each page of them missing. What a page costs
    depends on what else the machine has done: two runs then disagree about whatever writes large maps.
    """
    largest_number_of_mappings, trimming_threshold = -4, -1  # mallopt's M_MMAP_MAX and M_TRIM_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(largest_number_of_mappings, 0) and mallopt(trimming_threshold, -1))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 without TF32, in matrix products and convolutions."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value

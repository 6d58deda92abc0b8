"""One case, measured: its contenders prepared, held to the gate, and timed together, as far as the budget goes."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dpt.kernels.tools import parity

from . import measure
from .records import Row, Skip

# Of a model's FLOPs at the GEMM rate, what plain PyTorch reaches: for estimates before anything ran.
EFFICIENCY = 0.5


class Unavailable(Exception):
    """A contender that cannot run here; the message says why."""


@dataclass
class Prepared:
    """A contender, ready to run.

    ``run(index)``: what is timed, on the input of that index (any integer), under whatever mode it needs. ``outputs()``: the tensors that
    the gate judges, in a fixed order; default: what ``run(0)`` returns. ``recorded``: the call whose peak memory counts; default: the same.
    ``held``: bytes held between runs (parameters, optimiser). ``warm_up``: calls before the first that is judged (compiling, capturing).
    ``unseen``: its memory is a library's own, of which PyTorch's allocator does not know, and none is told. ``dtype``: in which it
    computes, where that is not the case's. ``facts``: about it, beside the case's.
    """

    run: measure.Run
    outputs: Callable[[], Sequence[torch.Tensor]] | None = None
    recorded: Callable[[], object] | None = None
    held: Callable[[], int] = lambda: 0
    warm_up: int = 0
    unseen: bool = False
    note: str = ""
    dtype: torch.dtype | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def judged(self) -> list[torch.Tensor]:
        found = self.run(0) if self.outputs is None else self.outputs()
        return [tensor.detach().clone() for tensor in ([found] if isinstance(found, torch.Tensor) else found)]


class Opened(Protocol):
    """A case, opened: its inputs and references are in memory."""

    flops: int | None
    bytes: int | None
    per_run: float  # how many units (images, steps) one run does
    unit: str
    rms: bool  # how the gate measures: see kernels/tools/parity.py

    def exact(self) -> Sequence[torch.Tensor]:
        """The result the gate judges by, in ``parity.exact_dtype``."""

    def other_plain(self) -> Sequence[torch.Tensor] | None:
        """What plain PyTorch makes of it in the other memory format, where it has one: see kernels/tools/parity.py."""

    def prepare(self, contender: str) -> Prepared:
        """Raises Unavailable."""


@dataclass(frozen=True)
class Case:
    """One line of a suite's table.

    ``importance``: cases with a lower number come first, and so get their share of the budget first. ``contenders``: in order of
    importance, the first is the baseline. ``open(context)``: what runs it. ``estimate()``: FLOPs of one run, before it is opened.
    ``replays``: 0, or how many calls one graph replay holds. ``unavailable``: why the whole case cannot run here. ``key``: cases of one
    suite with the same key are the same at the toy size.
    """

    suite: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    contenders: tuple[str, ...]
    open: Callable[[Context], Opened]
    importance: float = 1.0
    estimate: Callable[[], float] = lambda: 0.0
    replays: int = 0
    unavailable: str | None = None
    key: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        return self.contenders[0]


@dataclass
class Context:
    """What the cases of one session share.

    ``toy``: every case at a toy size, one round, nothing reported. ``setup``: seconds that a compiled contender of a suite took to get
    ready, updated with what was seen.
    """

    device: torch.device
    budget: measure.Budget
    rounds: measure.Rounds
    toy: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)
    setup: dict[str, float] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    def gemm_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a matrix product in this run, on this device."""
        name = f"gemm_{str(dtype).removeprefix('torch.')}_flop_per_second"
        if name not in self.ceilings:
            self.ceilings[name] = measure.gemm_rate(dtype, self.device)
        return self.ceilings[name]

    def copy_rate(self) -> float:
        """Bytes/s of a copy in this run, on this device."""
        if "copy_byte_per_second" not in self.ceilings:
            self.ceilings["copy_byte_per_second"] = measure.copy_rate(self.device)
        return self.ceilings["copy_byte_per_second"]

    def setup_seconds(self, suite: str, contender: str) -> float:
        """How long a contender is expected to take until it can be judged, beyond a run."""
        if not compiles(contender):
            return 0.0
        default = {"models": 60.0, "steps": 60.0, "training": 90.0, "kernels": 12.0}[suite] * (2 if self.device.type == "cuda" else 1)
        return self.setup.get(f"{suite} {contender}", default)


def compiles(contender: str) -> bool:
    """Whether a contender goes through torch.compile; every one that does says so in its name."""
    return "compile" in contender


@dataclass
class _Entry:
    """A contender on its way through a case."""

    prepared: Prepared
    row: Row
    seconds: float = 0.0  # of one run, roughly


def measure_case(case: Case, names: Iterable[str], context: Context) -> tuple[list[Row], list[Skip]]:
    """The rows and skips of one case for the named contenders; the baseline takes part whether named or not."""
    chosen = [name for name in case.contenders if name in set(names) or name == case.baseline]
    if case.unavailable:
        return [], [Skip(case.name, "", case.unavailable)]
    if not context.toy:
        # Setting up the exact result costs some plain runs more in a wider dtype.
        needed = case.estimate() / (EFFICIENCY * context.gemm_rate(case.dtype)) * (context.rounds.least + 4)
        refusal = context.budget.refusal(needed)
        if refusal:
            return [], [Skip(case.name, "", refusal)]
    try:
        return _Measurement(case, chosen, context).result()
    finally:
        _release(context.device)


def _release(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Measurement:
    """The state of `measure_case`."""

    def __init__(self, case: Case, names: Sequence[str], context: Context):
        self.case, self.names, self.context = case, names, context
        self.rows: list[Row] = []
        self.skips: list[Skip] = []
        self.entries: dict[str, _Entry] = {}
        self.plain: dict[torch.dtype, list[torch.Tensor]] = {}  # of the first contender that computes in a dtype

    def result(self) -> tuple[list[Row], list[Skip]]:
        try:
            self.opened = self.case.open(self.context)
            self.exact = self.opened.exact()
            self.other_plain = self.opened.other_plain()
        except torch.OutOfMemoryError:
            return [], [Skip(self.case.name, "", "out of memory while the reference was computed")]
        except Unavailable as error:
            return [], [Skip(self.case.name, "", str(error))]
        for name in self.names:
            self._admit(name)
            if not self.plain:
                return self.rows, [*self.skips, Skip(self.case.name, "", f"its baseline, {self.case.baseline}, did not run")]
        self._drop_what_does_not_fit()
        self._time()
        return self.rows, self.skips

    def _admit(self, name: str) -> None:
        """Prepare one contender and hold it to the gate."""
        refusal = self._refusal(name)
        if refusal:
            self.skips.append(Skip(self.case.name, name, refusal))
            return
        started = self.context.clock()
        try:
            prepared = self.opened.prepare(name)
            for _ in range(prepared.warm_up):
                prepared.run(0)
            measure.synchronize(self.context.device)
            judged_at = self.context.clock()
            peak, outputs = self._judged(prepared)
            measure.synchronize(self.context.device)
        except Unavailable as error:
            self.skips.append(Skip(self.case.name, name, str(error)))
            return
        except torch.OutOfMemoryError:
            self.skips.append(Skip(self.case.name, name, "out of memory"))
            return
        except Exception as error:  # a peer may break in its compiler or its library: reported in its row, the others go on
            self.rows.append(self._row(name, "error", problem=_sentence(error)))
            return
        finished = self.context.clock()
        if compiles(name):
            self.context.setup[f"{self.case.suite} {name}"] = judged_at - started
        self._enter(name, prepared, outputs, peak, finished - judged_at)

    def _judged(self, prepared: Prepared) -> tuple[int | None, list[torch.Tensor]]:
        """The peak memory of a run, and the outputs for the gate; in one run where both are of the same."""
        if self.context.toy or prepared.unseen:
            return None, prepared.judged()
        outputs: list[torch.Tensor] = []
        if prepared.recorded is None and prepared.outputs is None:
            peak = measure.peak_memory(lambda: outputs.append(prepared.run(0)), self.context.device)
            outputs = [output.detach().clone() for output in outputs]
        else:
            peak = measure.peak_memory(prepared.recorded or (lambda: prepared.run(0)), self.context.device)
            outputs = prepared.judged()
        return peak + prepared.held(), outputs

    def _enter(self, name: str, prepared: Prepared, outputs: list[torch.Tensor], peak: int | None, seconds: float) -> None:
        dtype = prepared.dtype or self.case.dtype
        plain = self.plain.setdefault(dtype, outputs)
        other = self.other_plain if dtype == self.case.dtype else None
        verdict = parity.judge(outputs, self.exact, plain, dtype, self.opened.rms, other)
        row = self._row(name, "failed" if verdict.problem else "ok", problem=verdict.problem or "", note=prepared.note)
        row.facts |= prepared.facts
        row.dtype = str(dtype).removeprefix("torch.")
        row.loss, row.allowed, row.peak_memory_bytes = _finite(verdict.loss), verdict.allowed, peak
        if verdict.problem:
            self.rows.append(row)
            return
        against = self.exact if self.exact[0].dtype == torch.float32 else self.plain.get(torch.float32, self.exact)
        row.difference = parity.largest_difference(outputs, against, self.opened.rms)
        self.entries[name] = _Entry(prepared, row, seconds)

    def _row(self, name: str, status: str, problem: str = "", note: str = "") -> Row:
        return Row(
            case=self.case.name,
            contender=name,
            baseline=self.case.baseline,
            dtype=str(self.case.dtype).removeprefix("torch."),
            shape=list(self.case.shape),
            status=status,
            timing=self.timer.how,
            note=note,
            problem=problem,
            facts=dict(self.case.facts),
            unit=self.opened.unit,
            flops=self.opened.flops,
            bytes=self.opened.bytes,
        )

    @property
    def timer(self) -> measure.Timer:
        """One of a kind in a session: it holds memory. A kernel's time is the device's alone, a model's what its user waits for."""
        if self.case.suite == "host":
            return measure.Told()
        alone = self.case.suite == "kernels"
        key = "timer", alone, self.case.replays
        if key not in self.context.cache:
            device = self.context.device
            self.context.cache[key] = measure.Replays(self.case.replays, device) if self.case.replays else measure.timer_of(device, alone)
        return self.context.cache[key]

    def _committed(self) -> float:
        """The seconds that the least number of rounds takes."""
        return self.context.rounds.least * sum(entry.seconds for entry in self.entries.values())

    def _refusal(self, name: str) -> str | None:
        if self.context.toy or not self.entries:
            return None
        one = self.entries[self.case.baseline].seconds if self.case.baseline in self.entries else 0.0
        own = self.context.setup_seconds(self.case.suite, name) + one * (self.context.rounds.least + 2)
        return self.context.budget.refusal(self._committed() + own)

    def _drop_what_does_not_fit(self) -> None:
        """Contenders that took longer to get ready than was expected may leave too little for the rounds: the last go first."""
        while not self.context.toy and len(self.entries) > 1 and self.context.budget.refusal(self._committed()):
            name = list(self.entries)[-1]
            reason = f"took so long to get ready that its rounds {self.context.budget.refusal(self._committed()).removeprefix('does ')}"
            del self.entries[name]
            self.skips.append(Skip(self.case.name, name, reason))

    def _time(self) -> None:
        runs = {name: entry.prepared.run for name, entry in self.entries.items()}
        seconds = measure.interleave(runs, self.timer, self.context.rounds, self.context.budget)
        baseline = seconds.get(self.case.baseline)
        for name, entry in self.entries.items():
            _fill(entry.row, seconds[name], baseline, self.opened.per_run)
            if not self.context.toy:
                entry.row.roofline_share = self._roofline_share(entry.row.p50_ms / 1000, getattr(torch, entry.row.dtype))
            self.rows.append(entry.row)

    def _roofline_share(self, seconds: float, dtype: torch.dtype) -> float | None:
        """The least time the device could need, by its measured rates, over the time taken."""
        floors = []
        if self.opened.flops:
            floors.append(self.opened.flops / self.context.gemm_rate(dtype))
        if self.opened.bytes:
            floors.append(self.opened.bytes / self.context.copy_rate())
        return max(floors) / seconds if floors else None


def _fill(row: Row, seconds: Sequence[float], baseline: Sequence[float] | None, per_run: float) -> None:
    row.durations_ms = [round(1000 * value, 6) for value in seconds]
    row.p20_ms, row.p50_ms, row.p80_ms = (1000 * measure.percentile(seconds, fraction) for fraction in (0.2, 0.5, 0.8))
    row.per_second = per_run * 1000 / row.p50_ms
    if baseline is not None:
        found = measure.ratio(baseline, seconds)
        row.speedup, row.speedup_low, row.speedup_high = found.median, found.low, found.high


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _sentence(error: Exception) -> str:
    """An exception in one line, with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300] + where

"""One run of the benchmarks under pytest: options, what was measured, what was skipped, and the files it is written to."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import environment, measure, records
from .runner import Case, Context, measure_case

DEFAULT_BUDGET = {"cpu": 450.0, "cuda": 420.0}
DEFAULT_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Rounds: at least, at most, and the seconds that are spent on a case between the two.
ROUNDS = {
    ("cpu", "models"): measure.Rounds(5, 30, 10.0),
    ("cpu", "transformers"): measure.Rounds(9, 30, 40.0),
    ("cpu", "steps"): measure.Rounds(5, 30, 10.0),
    ("cpu", "training"): measure.Rounds(5, 15, 10.0),
    ("cpu", "pictures"): measure.Rounds(5, 15, 10.0),
    ("cpu", "kernels"): measure.Rounds(9, 50, 1.0),
    ("cpu", "host"): measure.Rounds(20, 100, 5.0),
    ("cuda", "models"): measure.Rounds(20, 100, 4.0),
    ("cuda", "transformers"): measure.Rounds(20, 100, 4.0),
    ("cuda", "steps"): measure.Rounds(20, 100, 4.0),
    ("cuda", "training"): measure.Rounds(10, 40, 6.0),
    ("cuda", "pictures"): measure.Rounds(5, 20, 6.0),
    ("cuda", "kernels"): measure.Rounds(20, 100, 0.3),
    ("cuda", "host"): measure.Rounds(20, 100, 5.0),
}
TOY_ROUNDS = measure.Rounds(1, 1, 0.0)


@dataclass(frozen=True)
class Cell:
    """One test: a contender of a case."""

    case: Case
    contender: str

    def __str__(self) -> str:
        return "-".join(f"{self.case.name} {self.contender}".replace(",", "").split())


class Replay:
    """Hands pytest-benchmark durations that were measured elsewhere.

    pytest-benchmark times one contender after the other, so a drift of the machine falls on the last; ours are interleaved. It takes any
    timer, and this one stands still but for the recorded duration by which each "run" advances it: so its JSON, its table and its
    comparisons carry our numbers, through nothing but its public interface.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def feed(self, benchmark: Any, seconds: Iterable[float]) -> None:
        """Let the `benchmark` fixture, whose timer is `clock`, see these durations."""
        durations = list(seconds)
        left = iter(durations)
        self.now = 0.0

        def advance() -> None:
            self.now += next(left)

        benchmark.pedantic(advance, rounds=len(durations), iterations=1)


@dataclass
class Bench:
    """What the tests of a session share. ``toy``: without `--benchmark`, when nothing is timed for the record."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    budget: measure.Budget
    toy: bool
    keep: tuple[Path, str] | None = None  # folder and suffix of records that are written after every case
    filter: str = ""  # pytest's -k
    without: tuple[str, ...] = ()  # contenders with one of these in their name are left out
    keep_freed_memory: bool = False  # on a CPU
    names: set[str] = field(default_factory=set)  # of all contenders, left out or not
    offered: dict[str, int] = field(default_factory=dict)  # suite -> its cells, chosen or not
    chosen: dict[str, int] = field(default_factory=dict)
    replay: Replay = field(default_factory=Replay)
    rows: dict[str, list[records.Row]] = field(default_factory=dict)
    skips: dict[str, list[records.Skip]] = field(default_factory=dict)
    wanted: dict[str, list[str]] = field(default_factory=dict)
    results: dict[str, tuple[list[records.Row], list[records.Skip]] | Exception] = field(default_factory=dict)
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.toy:
            torch.set_num_threads(1)  # small tensors, and perhaps a machine whose cores are taken
        if self.device.type == "cuda" and not self.toy:
            torch.backends.cudnn.benchmark = True  # PyTorch's best: cuDNN tries its algorithms; a toy run has no use for the minutes
        self.memory_kept = self.device.type == "cuda" or (self.keep_freed_memory and measure.keep_freed_memory())
        self.context = Context(self.device, self.budget, TOY_ROUNDS, toy=self.toy)
        self.before = {} if self.toy else environment.state(self.device)

    def identity(self, case: Case) -> str:
        """What tells a case from the others: at the toy size many are the same, and run once."""
        return f"{case.suite} {case.key if self.toy and case.key else case.name}"

    def cells(self, cases: Iterable[Case]) -> list[Cell]:
        """Every contender of every case but those of ``without``; at the toy size cases that are the same there are one."""
        different = {self.identity(case): case for case in reversed(list(cases))}
        found = [Cell(case, name) for case in reversed(different.values()) for name in case.contenders]
        for cell in found:
            self.names.add(cell.contender)
            self.offered[cell.case.suite] = self.offered.get(cell.case.suite, 0) + 1
        return [cell for cell in found if not any(word in cell.contender for word in self.without)]

    def want(self, cells: Iterable[Cell]) -> None:
        """Tell which contenders of each case take part: they are measured together."""
        for cell in cells:
            self.chosen[cell.case.suite] = self.chosen.get(cell.case.suite, 0) + 1
            names = self.wanted.setdefault(self.identity(cell.case), [])
            if cell.contender not in names:
                names.append(cell.contender)

    def result(self, cell: Cell) -> records.Row | records.Skip:
        """The row or the skip of a cell, measuring its case when its first cell comes; raises what measuring raised."""
        identity = self.identity(cell.case)
        if identity not in self.results:
            self.results[identity] = self._measured(cell.case, self.wanted.get(identity, [cell.contender]))
        found = self.results[identity]
        if isinstance(found, Exception):
            raise found
        rows, skips = found
        row = next((row for row in rows if row.contender == cell.contender), None)
        return row or next(skip for skip in skips if skip.contender in (cell.contender, ""))

    def _measured(self, case: Case, names: list[str]) -> tuple[list[records.Row], list[records.Skip]] | Exception:
        if not self.toy:
            self.context.rounds = ROUNDS[self.device.type, case.suite]
        try:
            rows, skips = measure_case(case, names, self.context)
        except Exception as error:  # told by each test of the case
            self.skips.setdefault(case.suite, []).append(records.Skip(case.name, "", f"{type(error).__name__}: {error}"))
            return error
        self.rows.setdefault(case.suite, []).extend(rows)
        self.skips.setdefault(case.suite, []).extend(skips)
        if self.keep and rows:
            self.write(*self.keep)
        return rows, skips

    def records(self) -> list[records.Record]:
        """A record for every suite of which something was measured."""
        shared = {
            "device": environment.device_facts(self.device),
            "versions": environment.versions(),
            **environment.commit(),
            "started": self.started,
            "seconds": round(time.monotonic() - self.begun, 1),
            "options": {
                "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.dtypes],
                "budget_s": self.budget.seconds,
                "float32_matmul": torch.backends.cuda.matmul.fp32_precision,
                "float32_convolution": torch.backends.cudnn.conv.fp32_precision,
                "cudnn_benchmark": torch.backends.cudnn.benchmark,
                "freed_memory": "kept" if self.memory_kept else "as the C library does",
            },
            "state": {"before": self.before, "after": environment.state(self.device)},
            "memory": measure.MEMORY[self.device.type],
        }
        asked = {"filter": self.filter, "without": list(self.without)}
        ceilings = {name: round(value) for name, value in self.context.ceilings.items()}
        found = []
        for suite, rows in self.rows.items():
            if rows:
                cells = [self.chosen.get(suite, 0), self.offered.get(suite, 0)]
                options = {**shared["options"], **asked, "cells": cells}
                skipped = self.skips.get(suite, [])
                found.append(records.Record(**{**shared, "options": options}, what=suite, ceilings=ceilings, rows=rows, skipped=skipped))
        return found

    def write(self, folder: Path, suffix: str = "") -> list[Path]:
        """Write the records; the files written."""
        written = []
        for record in self.records():
            path = folder / records.file_name(environment.slug(record.device), record.what, suffix)
            records.write(record, path)
            written.append(path)
        return written


def parse_dtypes(text: str) -> tuple[torch.dtype, ...]:
    """ "float32,bfloat16" -> dtypes; ValueError for another name."""
    unknown = [name for name in text.split(",") if name not in DTYPES]
    if unknown:
        raise ValueError(f"--dtypes {text}: no dtype {unknown[0]!r}, there are {', '.join(DTYPES)}")
    return tuple(DTYPES[name] for name in text.split(","))

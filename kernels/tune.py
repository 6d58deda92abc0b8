"""Write the configuration table on a GPU.

    python -m dpt.kernels.tune [--kernel attention] [--budget SECONDS]

For every kernel and shape bucket of an op module's ``tuning_space(family)``: each candidate configuration is compiled and held to the gates
of ``compiled.py`` (no spills, ...), run and held to the parity rule, and then timed; the fastest goes into ``configs/<family>.json`` with
its provenance. A candidate that fails is told and left out; one whose gain over the shipped configuration is within the noise does not
replace it. Each bucket is written as soon as it is done, so that a run that is cut short loses nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import compiled, launch

REPEATS = 30
# A candidate has to beat the shipped configuration by this much, or the table changes with the noise of each run.
NOISE = 0.02


@dataclass(frozen=True)
class Bucket:
    """One entry of the table to be tuned.

    ``kernel``: its name in the table. ``when``: the entry's conditions. ``candidates``: configurations, the shipped one among them or not.
    ``run``: makes the launches, and is what is timed; called with nothing, on tensors it holds. ``check``: raises AssertionError if the
    outputs of ``run`` break the parity rule. ``cases(family)``: the compile cases of the launches of ``run`` under the candidate in force.
    """

    kernel: str
    when: Mapping[str, Any]
    candidates: Sequence[Mapping[str, Any]]
    run: Callable[[], Any]
    check: Callable[[], None]
    cases: Callable[[], Iterable[launch.CompileCase]]


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: its median time in microseconds, or why it was left out."""

    config: Mapping[str, Any]
    microseconds: float | None
    refused: str | None = None


def judge(bucket: Bucket, candidate: Mapping[str, Any], timer: Callable[[Callable[[], Any]], float], gates: Callable) -> Outcome:
    """Gate, check and time one candidate. ``timer``: microseconds of a call; ``gates``: the problems of a compile case."""
    with launch.using(bucket.kernel, candidate):
        try:
            problems = [problem for case in bucket.cases() for problem in gates(case)]
            if problems:
                return Outcome(candidate, None, "; ".join(problems))
            bucket.check()
            return Outcome(candidate, timer(bucket.run))
        except Exception as error:  # a candidate may fail in the compiler, in the driver or in parity: told, never fatal
            return Outcome(candidate, None, " ".join(f"{type(error).__name__}: {error}".split())[:200])


def fastest(outcomes: Sequence[Outcome], shipped: Mapping[str, Any] | None) -> Outcome | None:
    """The outcome whose configuration the table should hold: the fastest, or the shipped one if that is as fast within the noise."""
    timed = sorted((o for o in outcomes if o.microseconds is not None), key=lambda o: o.microseconds)
    if not timed:
        return None
    for outcome in timed:
        if outcome.config == shipped and outcome.microseconds <= timed[0].microseconds * (1 + NOISE):
            return outcome
    return timed[0]


def time_on_gpu(run: Callable[[], Any]) -> float:
    """Median microseconds of ``run`` by CUDA events, with L2 overwritten before each call."""
    scratch = torch.empty(256 * 1024 * 1024, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        scratch.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


@contextlib.contextmanager
def _locked_table(family: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The table of ``family``, to be changed in place: under a lock, and written whole or not at all."""
    path = folder / f"{launch.TABLES[family]}.json"
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table = json.loads(path.read_text()) if path.exists() else {}
        yield table
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(format_table(table))
        partial.replace(path)
    finally:
        os.close(lock)
    launch.load_table.cache_clear()
    launch._entry.cache_clear()


def format_table(table: Mapping[str, Any]) -> str:
    """JSON with one entry a line, so that a change of one configuration is a change of one line."""
    kernels = []
    for kernel in sorted(table):
        entries = ",\n".join(f"  {json.dumps(entry)}" for entry in table[kernel])
        kernels.append(f"{json.dumps(kernel)}: [\n{entries}\n]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def write_entries(family: str, kernel: str, entries: Sequence[Mapping[str, Any]], folder: Path = launch.CONFIGS) -> None:
    """Make ``entries`` ({"when", "config", "provenance"} each, the last without conditions) the whole list of ``kernel``."""
    if not entries or entries[-1]["when"]:
        raise ValueError(f"the entries of {kernel!r} must end with one that has no conditions")
    with _locked_table(family, folder) as table:
        table[kernel] = list(entries)


def write_config(
    family: str, kernel: str, when: Mapping[str, Any], config: Mapping[str, Any], provenance: str, folder: Path = launch.CONFIGS
) -> None:
    """Put one configuration into the table: over the entry with the same conditions, or before all others."""
    entry = {"when": dict(when), "config": dict(config), "provenance": provenance}
    with _locked_table(family, folder) as table:
        entries = table.setdefault(kernel, [])
        same = [index for index, old in enumerate(entries) if old["when"] == entry["when"]]
        if same:
            entries[same[0]] = entry
        else:
            entries.insert(0, entry)


def _provenance(microseconds: float) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name()
    return f"measured on {device}, {datetime.date.today()}, commit {commit or 'unknown'}: {microseconds:.1f} us"


def tune(
    buckets: Iterable[Bucket],
    family: str,
    *,
    timer: Callable[[Callable[[], Any]], float],
    gates: Callable[[launch.CompileCase], Sequence[str]],
    provenance: Callable[[float], str],
    budget: float = float("inf"),
    folder: Path = launch.CONFIGS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Bucket, list[Outcome], Outcome | None]]:
    """Tune bucket after bucket until ``budget`` seconds are over, writing each winner; yields what was found."""
    started = clock()
    for bucket in buckets:
        if clock() - started > budget:
            return
        entries = json.loads((folder / f"{launch.TABLES[family]}.json").read_text()).get(bucket.kernel, [])
        shipped = next((entry["config"] for entry in entries if entry["when"] == bucket.when), None)
        candidates = [c for c in bucket.candidates if c != shipped]
        outcomes = [judge(bucket, c, timer, gates) for c in ([shipped] if shipped else []) + candidates]
        best = fastest(outcomes, shipped)
        if best is not None:
            write_config(family, bucket.kernel, bucket.when, best.config, provenance(best.microseconds), folder)
        yield bucket, outcomes, best


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune on the GPU at hand; 1 if a bucket was left without any configuration that passes, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m dpt.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", action="append", help="an op's module; default: all that can be tuned")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; default 480")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning measures, and there is no CUDA device here; the table stays as it is", file=sys.stderr)
        return 2
    family = launch.device_family(torch.device("cuda"))
    modules = compiled.op_modules()
    unknown = set(options.kernel or ()) - set(modules)
    if unknown:
        parser.error(f"no op module {', '.join(sorted(unknown))}; there are {', '.join(modules)}")
    chosen = [importlib.import_module(f".{op}", __package__) for op in options.kernel or modules]
    buckets = (bucket for module in chosen if hasattr(module, "tuning_space") for bucket in module.tuning_space(family))
    failed = False
    for bucket, outcomes, best in tune(
        buckets,
        family,
        timer=time_on_gpu,
        gates=lambda case: compiled.measure(case).problems,
        provenance=_provenance,
        budget=options.budget,
    ):
        print(f"{bucket.kernel} {dict(bucket.when)}")
        for outcome in outcomes:
            result = outcome.refused if outcome.microseconds is None else f"{outcome.microseconds:.1f} us"
            print(f"  {'*' if outcome is best else ' '} {dict(outcome.config)}: {result}")
        failed = failed or best is None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

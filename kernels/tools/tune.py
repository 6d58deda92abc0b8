"""Write the configuration table on a GPU.

    python -m dpt.kernels.tools.tune [--kernel attention] [--stage forward] [--dtype half] [--budget SECONDS] [--json FILE]
    python -m dpt.kernels.tools.tune --dry-run [--arch sm_90]
    python -m dpt.kernels.tools.tune --settle FILE

Each op's space gives workloads by ``tuning_space()`` (``workload.py``), and these the entries of the table and the candidates for each. A
candidate is compiled and held to the gates of ``compiler.py`` (no spills, ...) in another process, ahead of the GPU; then it is run, held
to the parity rule and timed; the fastest goes into ``configs/<family>.json`` with its provenance. A candidate that fails is told and left
out; one whose gain over the shipped configuration is within the noise does not replace it. Each entry is written as soon as it is done, so
that a run that is cut short loses nothing.

Times are medians of CUDA events around the launcher's whole call, with the L2 cache overwritten before each and the device kept busy until
the call is queued, so that they are the device's; of several workloads, the geometric mean. ``--json`` keeps every outcome. What was
measured may, with another version of Triton, not compile well in all the shapes and dtypes that the tests demand of an entry: ``--settle``
goes through the recorded outcomes, on any machine, and puts the next best into the table where that is so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from .. import launch
from . import compiler, spaces
from .parity import float32_products
from .timer import queued_calls, scratch
from .workload import BACKWARD, FORWARD, RARE, Bucket, Config, Trial, Workload, buckets

# A candidate has to beat the shipped configuration by this much, or the table changes with the noise of each run.
NOISE = 0.02
# Timed a few times first; one that is slower than the best by this factor is timed no more.
FEW, REPEATS, LOSER = 5, 30, 1.5
# The fastest, and the shipped one, are timed again one after the other before the choice: the clock of the first may not be the last's.
FINALISTS = 3
# Left to the process that measures, which launches what the GPU waits for, and to the system.
FREE_CORES = 2
# A process that dies in the compiler takes its candidate with it: after so many seconds of waiting the candidate is given up.
COMPILE_SECONDS = 60
# After these the CUDA context is lost, and everything in this process fails.
FATAL = ("illegal memory access", "misaligned address", "illegal instruction", "unspecified launch failure", "device-side assert")
STAGES = {"forward": FORWARD, "backward": BACKWARD, "rare": RARE}
Timer = Callable[[Callable[[], Any], int], float]
Gates = Callable[[Bucket, Config], Sequence[str]]


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: the median microseconds of each workload, or why it was left out."""

    config: Config
    times: tuple[float, ...] = ()
    refused: str | None = None

    @property
    def microseconds(self) -> float | None:
        """The geometric mean of the workloads."""
        return statistics.geometric_mean(self.times) if self.times else None

    @property
    def fatal(self) -> bool:
        return self.refused is not None and any(words in self.refused for words in FATAL)


@dataclass
class Result:
    """What was found for a bucket. ``failed``: why its workloads could not be set up at all."""

    bucket: Bucket
    outcomes: list[Outcome] = field(default_factory=list)
    best: Outcome | None = None
    failed: str | None = None

    @property
    def lost(self) -> bool:
        """Whether the process can measure nothing any more."""
        return any(outcome.fatal for outcome in self.outcomes) or any(words in (self.failed or "") for words in FATAL)


def _sentence(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def judge(bucket: Bucket, candidate: Config, trials: Sequence[Trial], gates: Gates, timer: Timer, best: float = float("inf")) -> Outcome:
    """Gate, check and time one candidate. ``gates``: what is wrong with its compiled code; ``timer``: microseconds of a call, the median
    of so many; ``best``: of the candidates so far.
    """
    try:
        problems = gates(bucket, candidate)
        if problems:
            return Outcome(candidate, refused="; ".join(problems))
        with launch.using(bucket.kernel, candidate):
            for trial in trials:
                with float32_products(trial.workload.precision):
                    trial.check()
        outcome = timed(bucket, candidate, trials, timer, FEW)
        return outcome if outcome.microseconds > LOSER * best else timed(bucket, candidate, trials, timer, REPEATS)
    except Exception as error:  # a candidate may fail in the compiler, in the driver or in parity: told, never fatal
        return Outcome(candidate, refused=_sentence(error))


def timed(bucket: Bucket, candidate: Config, trials: Sequence[Trial], timer: Timer, repeats: int) -> Outcome:
    """The candidate's time on every trial."""
    times = []
    with launch.using(bucket.kernel, candidate):
        for trial in trials:
            with float32_products(trial.workload.precision):
                times.append(timer(trial.run, repeats))
    return Outcome(candidate, tuple(times))


def fastest(outcomes: Sequence[Outcome], shipped: Config | None) -> Outcome | None:
    """The outcome whose configuration the table should hold: the fastest, or the shipped one if that is as fast within the noise."""
    ranked = sorted((o for o in outcomes if o.times), key=lambda o: o.microseconds)
    if not ranked:
        return None
    for outcome in ranked:
        if outcome.config == shipped and outcome.microseconds <= ranked[0].microseconds * (1 + NOISE):
            return outcome
    return ranked[0]


def _again(bucket: Bucket, outcomes: list[Outcome], trials: Sequence[Trial], timer: Timer) -> list[Outcome]:
    """The outcomes with new times of the shipped configuration and the fastest, taken one right after the other."""
    ranked = sorted((o for o in outcomes if o.times), key=lambda o: o.microseconds)
    finalists = [o for index, o in enumerate(ranked) if index < FINALISTS or o.config == bucket.shipped]
    if len(finalists) < 2:
        return outcomes
    try:
        new = {id(outcome): timed(bucket, outcome.config, trials, timer, REPEATS) for outcome in finalists}
    except Exception as error:
        print(f"{bucket.kernel}: the finalists keep their first times: {_sentence(error)}", file=sys.stderr)
        return outcomes
    return [new.get(id(outcome), outcome) for outcome in outcomes]


def tune_bucket(bucket: Bucket, *, trial: Callable[[Workload], Trial], gates: Gates, timer: Timer, over: Callable[[], bool]) -> Result:
    """Judge the candidates, the shipped one first, until ``over()``; choose among those that were reached."""
    result = Result(bucket)
    try:
        trials = [trial(workload) for workload in bucket.workloads]
        for each in trials:
            _ = each.expected  # before the candidates are waited for
    except Exception as error:
        result.failed = _sentence(error)
        return result
    best = float("inf")
    for candidate in bucket.candidates:
        if over() or result.lost:
            break
        result.outcomes.append(judge(bucket, candidate, trials, gates, timer, best))
        best = min(best, result.outcomes[-1].microseconds or best)
    if not result.lost:
        result.outcomes = _again(bucket, result.outcomes, trials, timer)
    result.best = fastest(result.outcomes, bucket.shipped)
    return result


def tune(
    found: Iterable[Bucket],
    family: str,
    *,
    trial: Callable[[Workload], Trial],
    gates: Gates,
    timer: Timer,
    provenance: Callable[[Bucket, Outcome], str],
    budget: float = float("inf"),
    folder: Path = launch.CONFIGS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Result]:
    """Tune bucket after bucket until ``budget`` seconds are over or the GPU is lost, writing each winner; yields what was found."""
    started = clock()

    def over() -> bool:
        return clock() - started > budget

    for bucket in found:
        if over():
            return
        result = tune_bucket(bucket, trial=trial, gates=gates, timer=timer, over=over)
        if result.best is not None:
            text = provenance(bucket, result.best)
            write_config(family, bucket.kernel, bucket.when, result.best.config, text, folder, before=bucket.parent)
        yield result
        if result.lost:
            return


@functools.cache
def _scratch() -> torch.Tensor:
    return scratch("cuda")


def time_on_gpu(run: Callable[[], Any], repeats: int) -> float:
    """Median microseconds of ``run`` on the device alone, with the L2 cache overwritten before each call: :func:`queued_calls`.

    The first call is not timed: it may compile the kernel and the C function that launches it.
    """
    run()
    return statistics.median(milliseconds * 1000 for milliseconds in queued_calls(run, repeats, _scratch())[0])


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
    launch.forget_tables()


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
    family: str,
    kernel: str,
    when: Config,
    config: Config,
    provenance: str,
    folder: Path = launch.CONFIGS,
    before: Config | None = None,
) -> None:
    """Put one configuration into the table: over the entry with the same conditions; or, where there is none, in front of the entry with
    the conditions ``before``, so that what stands above that one still comes first; or in front of all.
    """
    entry = {"when": dict(when), "config": dict(config), "provenance": provenance}
    with _locked_table(family, folder) as table:
        entries = table.setdefault(kernel, [])
        place = {json.dumps(old["when"], sort_keys=True): index for index, old in enumerate(entries)}
        same = place.get(json.dumps(entry["when"], sort_keys=True))
        if same is not None:
            entries[same] = entry
        else:
            entries.insert(place.get(json.dumps(before, sort_keys=True), 0), entry)


class CompilerPool:
    """The gates, passed in processes of their own in the order of the buckets, ahead of who asks.

    The binaries are where a launch in this process finds them, in Triton's cache: the key is made of the source, the arguments' types and
    alignment, and the target, and tensors on the meta device have them all.
    """

    def __init__(self, found: Sequence[Bucket], family: str, processes: int, left: Callable[[], float]):
        self._left = left
        self._pool = multiprocessing.get_context("spawn").Pool(processes, initializer=_prepare_compiler)
        self._results = {
            self._key(bucket, candidate): self._pool.apply_async(candidate_problems, (bucket, family, candidate))
            for bucket in found
            for candidate in bucket.candidates
        }

    @staticmethod
    def _key(bucket: Bucket, candidate: Config) -> str:
        return json.dumps([bucket.kernel, bucket.when, candidate])

    def __call__(self, bucket: Bucket, candidate: Config) -> Sequence[str]:
        """Waits no longer than the budget lasts."""
        seconds = max(0.0, min(COMPILE_SECONDS, self._left()))
        try:
            return self._results.pop(self._key(bucket, candidate)).get(seconds)
        except multiprocessing.TimeoutError:
            return [f"not compiled after {seconds:.0f} s of waiting"]

    def __enter__(self) -> CompilerPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.terminate()


def _prepare_compiler() -> None:
    """In a process that only compiles: it takes no memory of the GPU, and no CPU time from the process that measures."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(5)


def candidate_problems(bucket: Bucket, family: str, candidate: Config) -> list[str]:
    """What the gates have against the bucket's launches under ``candidate``."""
    try:
        return [problem for case in bucket.cases(family, candidate) for problem in compiler.measure(case).problems]
    except Exception as error:
        return [_sentence(error)]


def entry_problems(kernel: str, when: Config, family: str) -> list[str]:
    """What the gates have against the compile cases, of every op, that the table's entry serves: what ``tests/compiled`` demands of it."""
    launch.forget_tables()
    cases = [case for op in spaces.ops() for case in spaces.space(op).compile_cases(family) if _serves(kernel, when, case)]
    return [f"{case.name}: {problem}" for case in cases for problem in compiler.measure(case).problems]


def _serves(kernel: str, when: Config, case: launch.CompileCase) -> bool:
    return any(name == kernel and json.loads(conditions) == when for name, conditions in case.used)


def settle(record: Mapping[str, Any], check: Callable[[str, Config, str], Sequence[str]], folder: Path = launch.CONFIGS) -> bool:
    """Where an entry that was measured does not pass ``check`` (:func:`entry_problems`), put the next best into the table. Whether every
    entry passes in the end; one of which no candidate does is left with the last.
    """
    family, passes = record["family"], True
    for found in (bucket for bucket in record["buckets"] if bucket["chosen"] is not None):
        kernel, when = found["kernel"], found["when"]
        ranked = sorted((o for o in found["outcomes"] if o["microseconds"]), key=lambda o: o["microseconds"])
        others = iter([outcome for outcome in ranked if outcome["config"] != found["chosen"]])
        while problems := check(kernel, when, family):
            print(f"{kernel} {when}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else ""), flush=True)
            outcome = next(others, None)
            if outcome is None:
                passes = False
                break
            text = f"{record['provenance']}: {outcome['microseconds']:.1f} us, the fastest that passes the gates"
            write_config(family, kernel, when, outcome["config"], text, folder)
    return passes


def _commit() -> str:
    """Of the checkout; "unknown" where there is none, or no git to ask."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _environment() -> dict[str, Any]:
    """The conditions of a measurement."""
    return {
        "device": torch.cuda.get_device_name(),
        "date": str(datetime.date.today()),
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def provenance(environment: Mapping[str, Any]) -> str:
    """The part of an entry's provenance that all entries of a run share."""
    return "measured on {device}, {date}, commit {commit}, torch {torch}, triton {triton}, L2 overwritten".format(**environment)


def as_json(result: Result) -> dict[str, Any]:
    """A result as ``--json`` keeps it."""
    bucket = result.bucket
    outcomes = [
        {"config": dict(o.config), "microseconds": o.microseconds, "times": list(o.times), "refused": o.refused} for o in result.outcomes
    ]
    return {
        "kernel": bucket.kernel,
        "when": dict(bucket.when),
        "workloads": [workload.name for workload in bucket.workloads],
        "shipped": dict(bucket.shipped),
        "chosen": None if result.best is None else dict(result.best.config),
        "failed": result.failed,
        "untried": len(bucket.candidates) - len(result.outcomes),
        "outcomes": outcomes,
    }


def _summary(result: Result) -> str:
    bucket, name = result.bucket, f"{result.bucket.kernel} {dict(result.bucket.when)}"
    if result.failed:
        return f"{name}: its workloads fail: {result.failed}"
    refused = [o for o in result.outcomes if o.refused]
    counts = f"{len(result.outcomes)} of {len(bucket.candidates)} candidates, {len(refused)} refused"
    if result.best is None:
        return f"{name}: nothing passes ({counts}): {refused[0].refused if refused else 'nothing was reached'}"
    shipped = next((o for o in result.outcomes if o.config == bucket.shipped), None)
    before = "refused: " + shipped.refused if shipped.refused else f"{shipped.microseconds:.1f} us"
    return f"{name}: {result.best.microseconds:.1f} us, shipped {before} ({counts}) {dict(result.best.config)}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dpt.kernels.tools.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", action="append", choices=spaces.ops(), help="an op's module; default: all that can be tuned")
    parser.add_argument("--stage", choices=STAGES, help="only entries with a workload of this stage")
    parser.add_argument("--dtype", choices=("half", "float32"), help="only entries with a workload in it; default: half precision first")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; default 480")
    parser.add_argument("--json", type=Path, help="keep every outcome in this file, written as it goes")
    parser.add_argument("--dry-run", action="store_true", help="list the entries and the number of candidates; needs no GPU")
    parser.add_argument("--settle", type=Path, metavar="FILE", help="choose again from a --json file what compiles well; needs no GPU")
    parser.add_argument("--arch", choices=list(launch.TABLES), help="for --dry-run; default: that of the GPU, or sm_90")
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if launch.INTERPRETED and (options.settle or torch.cuda.is_available()):
        parser.error("TRITON_INTERPRET is set: interpreted functions cannot be compiled, start again without it")
    return options


def workloads(ops: Iterable[str] | None = None) -> list[Workload]:
    """Those of the given ops; of all by default."""
    return [workload for op in ops or spaces.ops() for workload in spaces.space(op).tuning_space()]


def chosen(found: Iterable[Bucket], stage: str | None, dtype: str | None) -> list[Bucket]:
    """The buckets with a workload of that stage ("forward", ...) and in that dtype ("half" or "float32"); None: of any."""

    def fits(work: Workload) -> bool:
        return (stage is None or work.stage == STAGES[stage]) and (dtype is None or (work.dtype == torch.float32) == (dtype == "float32"))

    return [bucket for bucket in found if any(fits(work) for work in bucket.workloads)]


def processes() -> int:
    """How many compile at once."""
    return max(1, len(os.sched_getaffinity(0)) - FREE_CORES)


def _list(found: Sequence[Bucket]) -> None:
    for bucket in found:
        new = "" if bucket.when == bucket.parent else " (new)"
        print(f"{bucket.kernel} {dict(bucket.when)}{new}: {len(bucket.candidates)} candidates on {len(bucket.workloads)} workloads")
        print("".join(f"    {workload.name}\n" for workload in bucket.workloads), end="")
    print(f"{len(found)} entries, {sum(len(bucket.candidates) for bucket in found)} candidates")


def _measure(options: argparse.Namespace, found: Sequence[Bucket], family: str, started: float) -> tuple[bool, int | None]:
    """Whether every bucket that was reached has a configuration that passes, and where to go on if the GPU was lost."""
    environment, done, passes = _environment(), options.skip, True
    shared = provenance(environment)
    record = {
        **environment,
        "family": family,
        "provenance": shared,
        "repeats": REPEATS,
        "l2": "overwritten before each call",
        "buckets": [],
    }
    if options.skip and options.json and options.json.exists():
        record["buckets"] = json.loads(options.json.read_text())["buckets"]

    def text(bucket: Bucket, best: Outcome) -> str:
        return f"{shared}: {best.microseconds:.1f} us ({'; '.join(workload.name for workload in bucket.workloads)})"

    def trial(workload: Workload) -> Trial:
        return Trial(workload, "cuda")

    def left() -> float:
        return options.budget - (time.monotonic() - started)

    with CompilerPool(found[done:], family, processes(), left) as gates:
        for result in tune(found[done:], family, trial=trial, gates=gates, timer=time_on_gpu, provenance=text, budget=left()):
            done, passes = done + 1, passes and result.best is not None
            print(_summary(result), flush=True)
            record["buckets"].append(as_json(result))
            if options.json:
                partial = options.json.with_suffix(f".{os.getpid()}")
                partial.write_text(json.dumps(record, indent=1) + "\n")
                partial.replace(options.json)
            if result.lost:
                return passes, done
    if done < len(found):
        print(f"the budget is over; not reached: {', '.join(f'{b.kernel} {dict(b.when)}' for b in found[done:])}")
    return passes, None


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune on the GPU at hand; 1 if a bucket was left without any configuration that passes, 2 without a GPU."""
    started, arguments = time.monotonic(), list(sys.argv[1:] if arguments is None else arguments)
    options = _options(arguments)
    if options.settle:
        return 0 if settle(json.loads(options.settle.read_text()), entry_problems) else 1
    if not torch.cuda.is_available() and not options.dry_run:
        print("tuning measures, and there is no CUDA device here; the table stays as it is", file=sys.stderr)
        return 2
    family = options.arch or (launch.device_family(torch.device("cuda")) if torch.cuda.is_available() else "sm_90")
    found = chosen(buckets(workloads(options.kernel), family), options.stage, options.dtype)
    if options.dry_run:
        _list(found)
        return 0
    passes, lost_after = _measure(options, found, family, started)
    if lost_after is None:
        return 0 if passes else 1
    print("the GPU's context is lost: going on with the next entry in a new process", flush=True)
    budget = options.budget - (time.monotonic() - started)
    command = [sys.executable, "-m", "dpt.kernels.tools.tune", *arguments, "--budget", f"{budget:.0f}", "--skip", str(lost_after)]
    return max(subprocess.call(command), 0 if passes else 1)


if __name__ == "__main__":
    sys.exit(main())

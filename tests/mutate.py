"""Break the code on purpose, one change at a time, and see the tests fail.

    python tests/mutate.py [--only attention] [--only dpt/training] [--jobs 2] [--list]

The kernels are broken as `tests/mutations/kernels/<op>.toml` says, in a table `[[mutation]]` each: name, file, old, new, tests, and perhaps
count. ``old`` must occur exactly ``count`` times (default once) in ``file``, and all are replaced. One that its tests do not notice is an
error; so is one whose tests cannot even be collected, for that proves nothing.

dpt/ is broken as `mutation_draw` draws it by a fixed seed: `tests/mutations/dpt/draw.toml` says how many of each kind, and which tests must
notice a change to which files. At least 90 % have to be noticed, and `tests/mutations/dpt/unnoticed.toml` has to give the reason for each
of the others.

Tests run in temporary copies of the repository. Tests that hang have noticed.
"""

from __future__ import annotations

import argparse
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutation_draw

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = ROOT / "tests" / "mutations" / "kernels"
DRAWN = MUTATIONS.with_name("dpt")
REQUIRED = 0.9  # of what is drawn must be noticed
NOTHING_COLLECTED = 5  # pytest's exit codes: 0 passed, 1 tests failed, 2 to 4 interrupted, broken, misused
TESTS_FAILED = 1
HUNG = "hung"
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)  # a kernel that leaves its tensors may end the interpreter's process
SECONDS = 600  # the longest that a kernel's tests take
PATIENCE = 60  # seconds more than three times what dpt's tests take without a change; after that they hang
MEMORY = 12 << 30  # bytes that a process may fill: a change may ask for all that there is

_running: set[subprocess.Popen] = set()  # sessions of tests


def read(file: Path) -> list[dict]:
    """The mutations of a file, in order."""
    return tomllib.loads(file.read_text(encoding="utf-8"))["mutation"]


def mutated(source: str, mutation: dict) -> str:
    """``source`` with the mutation's replacement made; ValueError unless ``old`` occurs as often as stated."""
    count, found = mutation.get("count", 1), source.count(mutation["old"])
    if found != count:
        raise ValueError(f"{mutation['name']}: {mutation['old']!r} occurs {found} times in {mutation['file']}, not {count}")
    if mutation["old"] == mutation["new"]:
        raise ValueError(f"{mutation['name']}: old and new are the same")
    return source.replace(mutation["old"], mutation["new"])


@contextmanager
def copies(root: Path, count: int) -> Iterator[queue.Queue[Path]]:
    """Copies of the repository to work in, without what git ignores."""
    lines = (root / ".gitignore").read_text().split()
    everywhere = shutil.ignore_patterns(".git", *(line.rstrip("/") for line in lines if not line.startswith("/")))
    at_the_top = shutil.ignore_patterns(*(line.strip("/") for line in lines if line.startswith("/")))

    def ignored(folder: str, names: list[str]) -> set[str]:
        return everywhere(folder, names) | (at_the_top(folder, names) if Path(folder) == root else set())

    with tempfile.TemporaryDirectory() as folder:
        free: queue.Queue[Path] = queue.Queue()
        for number in range(count):
            free.put(shutil.copytree(root, Path(folder, str(number)), ignore=ignored))
        yield free


def run_tests(tests: Sequence[str], copy: Path, seconds: float) -> tuple[int | str, str]:
    """pytest's exit code, or HUNG, and output for these tests, in the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, tempfile.TemporaryFile() as log:
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        process = subprocess.Popen(command, cwd=copy, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        _running.add(process)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = HUNG
        finally:
            _end_group(process)
            _running.discard(process)
        log.seek(0)
        return code, log.read().decode("utf-8", "replace")


def _end_group(process: subprocess.Popen) -> None:
    """End the tests and what they started and left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@dataclass(frozen=True)
class Trial:
    """One change to a file of the copy, and the tests that should notice."""

    name: str
    file: str
    text: str  # of the whole file, changed
    tests: tuple[str, ...]
    seconds: float  # after which they hang


@dataclass(frozen=True)
class Outcome:
    code: int | str
    output: str
    seconds: float


def outcomes(trials: Iterable[Trial], free: queue.Queue[Path], jobs: int) -> Iterator[tuple[Trial, Outcome]]:
    """What became of each trial, in order, `jobs` of them at a time."""

    def outcome(trial: Trial) -> Outcome:
        copy, started = free.get(), time.monotonic()
        target = copy / trial.file
        original = target.read_bytes()
        target.write_text(trial.text, encoding="utf-8")
        try:
            return Outcome(*run_tests(trial.tests, copy, trial.seconds), time.monotonic() - started)
        finally:
            target.write_bytes(original)
            free.put(copy)

    trials = list(trials)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from zip(trials, pool.map(outcome, trials), strict=True)
        finally:  # of a run that was interrupted, what still runs
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                _end_group(process)


def written(file: Path) -> list[Trial]:
    """The trials of a file of written mutations."""
    trials = []
    for mutation in read(file):
        text = mutated((ROOT / mutation["file"]).read_text(), mutation)
        trials.append(Trial(f"{file.stem}: {mutation['name']}", mutation["file"], text, tuple(mutation["tests"]), SECONDS))
    return trials


def try_written(trials: list[Trial], free: queue.Queue[Path], jobs: int) -> int:
    """Print a line for every written mutation; how many were not caught."""
    failures = 0
    for trial, outcome in outcomes(trials, free, jobs):
        verdict = {TESTS_FAILED: "caught", HUNG: "caught, for the tests hang", 0: "NOT CAUGHT: its tests passed"}.get(outcome.code)
        if outcome.code in CRASHES:
            verdict = f"caught by a crash, {signal.Signals(-outcome.code).name}"
        verdict = verdict or f"NOT RUN: pytest ended with code {outcome.code}"
        failures += not verdict.startswith("caught")
        print(f"{outcome.seconds:5.1f} s  {trial.name:60} {verdict}", flush=True)
        if not verdict.startswith("caught"):
            print(outcome.output[-2000:])
    print(f"{failures} of {len(trials)} not caught" if failures else f"all {len(trials)} caught")
    return failures


def settings(name: str) -> dict[str, Any]:
    return tomllib.loads((DRAWN / name).read_text(encoding="utf-8"))


def tests_of(file: str, table: dict[str, list[str]]) -> tuple[str, ...]:
    """The tests of a file of dpt/: those of its own row in the table, or else of the nearest folder above it that has one."""
    for part in (file, *(parent.as_posix() for parent in Path(file).parents)):
        if part in table:
            return tuple(table[part])
    raise ValueError(f"draw.toml has no tests for {file}")


def drawn(only: Sequence[str] = (), count: int | None = None) -> list[mutation_draw.Mutation]:
    """What the seed draws: of all of dpt/, of which `only` keeps some files; or `count` of each kind of these files alone."""
    chosen = settings("draw.toml")
    files = sorted((ROOT / "dpt").rglob("*.py"))
    wanted = {file for file in files if not only or any(_is_in(file.relative_to(ROOT), part) for part in only)}
    found = mutation_draw.candidates(ROOT, [file for file in files if count is None or file in wanted], chosen["seed"])
    counts = chosen["counts"] if count is None else dict.fromkeys(chosen["counts"], count)
    return [each for each in mutation_draw.draw(found, counts, chosen["seed"]) if ROOT / each.file in wanted]


def _is_in(file: Path, part: str) -> bool:
    return Path(part) in (file, *file.parents)


def reasons() -> dict[tuple[str, ...], str]:
    """Why mutations that nobody notices need not be noticed, by their keys."""
    listed = settings("unnoticed.toml").get("unnoticed", [])
    return {(entry["file"], entry["function"], entry["line"], entry["becomes"]): entry["reason"] for entry in listed}


def try_drawn(mutations: list[mutation_draw.Mutation], free: queue.Queue[Path], jobs: int, required: float = REQUIRED) -> int:
    """Print a line for every drawn mutation and the share that was noticed, which must be `required`; how much is wrong."""
    table, accepted = settings("draw.toml")["tests"], reasons()
    tests = {mutation.file: tests_of(mutation.file, table) for mutation in mutations}
    limits: dict[tuple[str, ...], float] = {}
    some = mutations[0].file
    unchanged = [
        Trial("unchanged", some, (ROOT / some).read_text(encoding="utf-8"), each, SECONDS) for each in dict.fromkeys(tests.values())
    ]
    for trial, outcome in outcomes(unchanged, free, jobs):
        print(f"{outcome.seconds:5.1f} s  without a change: {' '.join(trial.tests)}", flush=True)
        if outcome.code == 0:
            limits[trial.tests] = PATIENCE + 3 * outcome.seconds
        else:
            print(f"{outcome.output[-3000:]}\nthese tests fail without any change, and so notice none")
    tried = [mutation for mutation in mutations if tests[mutation.file] in limits]
    trials = []
    for mutation in tried:
        text = mutation.made((ROOT / mutation.file).read_text(encoding="utf-8"))
        trials.append(Trial(str(mutation), mutation.file, text, tests[mutation.file], limits[tests[mutation.file]]))
    noticed, wrong = 0, len(mutations) - len(tried)
    for mutation, (trial, outcome) in zip(tried, outcomes(trials, free, jobs), strict=True):
        seen, listed = outcome.code not in (0, NOTHING_COLLECTED), mutation.key in accepted
        noticed += seen
        wrong += seen == listed
        verdict = ("noticed, but LISTED" if listed else "noticed") if seen else ("listed" if listed else "NOT NOTICED")
        print(f"{outcome.seconds:5.1f} s  {verdict:11}  {mutation.kind:10}  {trial.name}", flush=True)
    share = noticed / len(mutations)
    print(f"{noticed} of {len(mutations)} noticed, {share:.0%}; {wrong} that unnoticed.toml should have, or should not")
    return wrong + (share < required)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every mutation; 1 if too few were noticed."""
    files = sorted(MUTATIONS.glob("*.toml"))
    parser = argparse.ArgumentParser(prog="python tests/mutate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", metavar="WHAT", help="an op, or dpt, or a file or folder of it; default: all")
    parser.add_argument("--draw", type=int, metavar="N", help="draw N of each kind from the files of --only, and not from all of dpt/")
    parser.add_argument("--list", action="store_true", help="show the mutations and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    only = options.only or ["dpt", *(file.stem for file in files)]
    parts = [part for part in only if Path(part).parts[:1] == ("dpt",)]
    unknown = set(only) - set(parts) - {file.stem for file in files}
    if unknown or any(not (ROOT / part).exists() for part in parts):
        parser.error(f"--only {' '.join(only)}: each is dpt, something in it, or one of {', '.join(file.stem for file in files)}")
    ops = [trial for file in files if file.stem in only for trial in written(file)]
    mutations = drawn(parts, options.draw) if parts else []
    if options.list:
        print(*(trial.name for trial in ops), *(f"{mutation.kind:10}  {mutation}" for mutation in mutations), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: copies and tests are cleared away
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with copies(ROOT, options.jobs) as free:
        failures = try_written(ops, free, options.jobs) if ops else 0
        failures += try_drawn(mutations, free, options.jobs, required=0 if options.only else REQUIRED) if mutations else 0
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a GPU can tell, for a machine that is at hand for half an hour: `python bench/gpu_session.py --out FOLDER`.

Runs from a checkout, uninstalled. Each step is a process of its own with a time limit under ten minutes, and writes `<step>.json` and
`<step>.log` into the folder as soon as it has ended, so that a step that fails, hangs or is cut off loses nothing of the others. `--steps`
picks some, for a machine that is lent for one command at a time; what has passed before is not done again unless `--again` is given.

    parity    tests/kernels, a process a file: the GPU's dtypes, kernels compiled for it
    tune      the launch configurations of the table, measured; the tables it wrote are copied to the folder
    models, steps, training, kernels     the benchmarks
    profile   a trace of the model that is farthest from its roofline, and Nsight Compute on its slowest kernel where that is installed
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 590.0  # seconds a step, and a call: each must stay under ten minutes
SHARE = 0.85  # of a step's limit that it is told to use; the rest is for starting and for what does not stop in time
TAIL = 4000  # characters of the output that the result keeps


@dataclass(frozen=True)
class Step:
    """A process. ``command(out, seconds)``: its arguments, given the folder and the seconds it may use. ``keeps``: a folder of the checkout
    that it changes, which is copied into the results whatever becomes of the step."""

    name: str
    command: Callable[[Path, float], list[str]]
    limit: float = LIMIT
    keeps: str | None = None

    @property
    def group(self) -> str:
        """What `--steps` calls it: parity-attention is of parity."""
        return self.name.split("-")[0]


@dataclass
class Outcome:
    """What became of a step; `status` is passed, failed, timeout or not begun."""

    step: str
    status: str
    seconds: float
    code: int | None
    command: list[str]
    tail: str


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _benchmark(suite: str) -> Step:
    def command(out: Path, seconds: float) -> list[str]:
        options = ["--benchmark", "--device", "cuda", "--budget", f"{seconds:.0f}", "--record-to", str(out / "results")]
        return _python("-m", "pytest", f"bench/test_{suite}.py", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options)

    return Step(suite, command)


def _parity(file: Path) -> Step:
    arguments = ("-m", "pytest", f"tests/kernels/{file.name}", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5")
    return Step(f"parity-{file.stem.removeprefix('test_')}", lambda out, seconds: _python(*arguments))


def steps(root: Path = ROOT) -> list[Step]:
    """In the order they run: first what must hold, then what is quick to lose."""
    tune = _python("-m", "dpt.kernels.tune")
    return [
        *(_parity(file) for file in sorted((root / "tests" / "kernels").glob("test_*.py"))),
        Step(
            "tune",
            lambda out, seconds: [*tune, "--budget", f"{seconds:.0f}", "--json", str(out / "tuning-outcomes.json")],
            keeps="kernels/configs",
        ),
        *(_benchmark(suite) for suite in ("models", "steps", "training", "kernels")),
        Step("profile", lambda out, seconds: _python("-m", "bench.profile_model", "--out", str(out), "--results", str(out / "results"))),
    ]


def run(step: Step, out: Path, limit: float, root: Path = ROOT) -> Outcome:
    """Run a step, kill it and all it started at its limit, and write its result at once."""
    limit = min(step.limit, limit)
    command = step.command(out, limit * SHARE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}
    log = out / f"{step.name}.log"
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    if step.keeps:
        shutil.copytree(root / step.keeps, out / step.keeps, dirs_exist_ok=True)
    status = "timeout" if code is None else "passed" if code == 0 else "failed"
    tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    outcome = Outcome(step.name, status, round(time.monotonic() - started, 1), code, _without_paths(command, root, out), tail)
    write(outcome, out)
    return outcome


def _end(process: subprocess.Popen) -> None:
    """End a step's whole process group: compilers and workers too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _without_paths(command: Sequence[str], root: Path, out: Path) -> list[str]:
    """The command as someone else would give it."""
    replaced = [part.replace(sys.executable, "python").replace(str(out), "OUT") for part in command]
    return [part.replace(str(root), ".") for part in replaced]


def write(outcome: Outcome, out: Path) -> None:
    path = out / f"{outcome.step}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def earlier(step: Step, out: Path) -> Outcome | None:
    """The outcome of a step that has passed before."""
    path = out / f"{step.name}.json"
    if not path.is_file():
        return None
    outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    return outcome if outcome.status == "passed" else None


def session(chosen: Sequence[Step], out: Path, seconds: float, again: bool = False, root: Path = ROOT) -> list[Outcome]:
    """Run the steps as long as there are seconds; every step has an outcome, also those that were not begun."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes = []
    for step in chosen:
        before = None if again else earlier(step, out)
        left = deadline - time.monotonic()
        if before is not None:
            outcomes.append(before)
            continue
        if left < 1:
            outcomes.append(Outcome(step.name, "not begun", 0.0, None, [], f"the {seconds:.0f} s of this call are over"))
            write(outcomes[-1], out)
            continue
        print(f"{step.name} ...", flush=True)
        outcomes.append(run(step, out, left, root))
        print(f"{step.name}: {outcomes[-1].status} in {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line a step; of one that did not pass the last lines of its output too."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.step:24} {outcome.status:10} {outcome.seconds:6.1f} s")
        if outcome.status != "passed":
            lines += [f"    {line}" for line in outcome.tail.splitlines()[-5:]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every chosen step has passed, else 1."""
    available = steps()
    groups = list(dict.fromkeys(step.group for step in available))
    parser = argparse.ArgumentParser(prog="python bench/gpu_session.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder of the results; default: out/gpu")
    parser.add_argument("--steps", default=",".join(groups), help=f"of {', '.join(groups)}, or one file of parity; default: all")
    parser.add_argument("--seconds", type=float, default=1800.0, help="of this call; what does not fit is not begun; default 1800")
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    options = parser.parse_args(arguments)
    wanted = options.steps.split(",")
    unknown = [name for name in wanted if name not in groups and name not in [step.name for step in available]]
    if unknown:
        parser.error(f"no step {unknown[0]}; there are {', '.join(groups)}")
    chosen = [step for step in available if step.group in wanted or step.name in wanted]
    outcomes = session(chosen, options.out.resolve(), options.seconds, options.again)
    text = summary(outcomes)
    (options.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a GPU can tell, for a machine that is at hand for half an hour: `python bench/gpu_session.py --out FOLDER`.

Runs from a checkout, uninstalled. Each step is a process of its own, and writes `<step>.json` and `<step>.log` into the folder as soon as
it has ended, so that a step that fails, hangs or is cut off loses nothing of the others. Steps of one name share a time limit under ten
minutes. `--steps` picks some, for a machine that is lent for one command at a time; what has passed before is not done again unless
`--again` is given. Without a CUDA device nothing is run, and that is said.

    parity      tests/kernels in every dtype, compiled for the GPU; a process a file, some at a time
    sanitizer   compute-sanitizer's memcheck over every op at a small shape, forward and backward, where it is installed
    tune        the launch configurations, measured; the tables that come of it are copied to the folder
    benchmark   `pytest bench/ --benchmark`, and the step-by-step suite a second time, to show that the ratios repeat
    profile     a trace of the model that is farthest from its roofline, and Nsight Compute on its slowest kernel where that is installed
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds of the steps of one name together: each under ten minutes, all within half an hour.
LIMITS = {"parity": 400.0, "sanitizer": 200.0, "tune": 440.0, "benchmark": 580.0, "profile": 170.0}
SHARE = 0.85  # of a step's limit that it is told to use; the rest is for starting and for what does not stop in time
AT_A_TIME = {"parity": 4}  # compiling keeps the cores busy, and not the GPU; what is timed runs alone
TAIL = 4000  # characters of the output that the result keeps
FIND_GPU = """
import torch, triton
found = torch.cuda.is_available()
print(f"torch {torch.__version__}, triton {triton.__version__}, {torch.cuda.get_device_name() if found else 'no CUDA device'}")
raise SystemExit(0 if found else 2)
"""


@dataclass(frozen=True)
class Step:
    """A process. ``command(out, seconds)``: its arguments, given the folder and the seconds it may use. ``keeps``: a folder of the checkout
    that it changes, which is copied into the results whatever becomes of the step. ``missing``: why it cannot run on this machine."""

    name: str
    command: Callable[[Path, float], list[str]]
    limit: float
    keeps: str | None = None
    missing: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What `--steps` calls it: parity-attention is of parity."""
        return self.name.split("-")[0]


@dataclass
class Outcome:
    """What became of a step; `status` is passed, failed, timeout, skipped or not begun."""

    step: str
    status: str
    seconds: float
    code: int | None
    command: list[str]
    tail: str


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]


def _parity(file: Path) -> Step:
    name = f"parity-{file.stem.removeprefix('test_')}"
    return Step(name, lambda out, seconds: _pytest(f"tests/kernels/{file.name}", "--durations=5"), LIMITS["parity"])


def _sanitizer() -> Step:
    """PyTorch's own caching of memory is switched off: inside one of its blocks nobody sees a kernel leave its tensor."""
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    options = ("--device", "cuda", "--dtypes", "float32,bfloat16", "--only", "fused and not replay")
    return Step(
        "sanitizer",
        lambda out, seconds: [str(tool), "--tool", "memcheck", "--error-exitcode", "99", *_pytest("bench/test_kernels.py", *options)],
        LIMITS["sanitizer"],
        missing=None if tool else "compute-sanitizer is not installed",
        variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _benchmark(name: str, what: str, most: float, *more: str) -> Step:
    def command(out: Path, seconds: float) -> list[str]:
        budget = f"{min(most, seconds):.0f}"
        return _pytest(what, "--benchmark", "--device", "cuda", "--budget", budget, "--record-to", str(out / "results"), *more)

    return Step(name, command, LIMITS["benchmark"])


def steps(root: Path = ROOT) -> list[Step]:
    """In the order they run: first what must hold, then what is quick to lose."""
    tune = (sys.executable, "-m", "dpt.kernels.tune")
    profile = (sys.executable, "-m", "bench.profile_model")
    return [
        *(_parity(file) for file in sorted((root / "tests" / "kernels").glob("test_*.py"))),
        _sanitizer(),
        Step(
            "tune",
            lambda out, seconds: [*tune, "--budget", f"{seconds:.0f}", "--json", str(out / "tuning-outcomes.json")],
            LIMITS["tune"],
            keeps="kernels/configs",
        ),
        _benchmark("benchmark", "bench/", 420.0),
        _benchmark("benchmark-again", "bench/test_steps.py", 140.0, "--record-suffix", "again"),
        Step("profile", lambda out, seconds: [*profile, "--out", str(out), "--results", str(out / "results")], LIMITS["profile"]),
    ]


def run(step: Step, out: Path, seconds: float, root: Path = ROOT) -> Outcome:
    """Run a step, kill it and all it started when its seconds are over, and write its result at once."""
    if step.missing or seconds < 1:
        outcome = Outcome(step.name, "skipped" if step.missing else "not begun", 0.0, None, [], step.missing or "its time was over")
        write(outcome, out)
        return outcome
    print(f"{step.name} ...", flush=True)
    command = step.command(out, seconds * SHARE)
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", **step.variables}
    log = out / f"{step.name}.log"
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
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
    print(f"{step.name}: {outcome.status} in {outcome.seconds:.0f} s", flush=True)
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
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for group, of_group in itertools.groupby(chosen, lambda step: step.group):
        members = list(of_group)
        over = min(end, time.monotonic() + members[0].limit)

        def outcome(step: Step, over: float = over) -> Outcome:
            return (None if again else earlier(step, out)) or run(step, out, over - time.monotonic(), root)

        with ThreadPoolExecutor(AT_A_TIME.get(group, 1)) as pool:
            outcomes += pool.map(outcome, members)
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
    """0 if every chosen step has passed or cannot run here, 1 if one failed or was not begun, 2 without a GPU."""
    available = steps()
    names = [step.name for step in available]
    parser = argparse.ArgumentParser(prog="python bench/gpu_session.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder of the results; default: out/gpu")
    parser.add_argument("--steps", default=",".join(LIMITS), help=f"of {', '.join(LIMITS)}, or e.g. parity-attention; default: all")
    parser.add_argument("--seconds", type=float, default=1800.0, help="of this call; what does not fit is not begun; default 1800")
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    options = parser.parse_args(arguments)
    wanted = options.steps.split(",")
    unknown = [name for name in wanted if name not in (*LIMITS, *names)]
    if unknown:
        parser.error(f"no step {unknown[0]}; there are {', '.join(LIMITS)}")
    gpu = subprocess.run([sys.executable, "-c", FIND_GPU], capture_output=True, text=True, check=False)
    print((gpu.stdout or gpu.stderr).strip().splitlines()[-1])
    if gpu.returncode:
        print("Every step here needs a CUDA device, and none was found: nothing was run, nothing was written.")
        return 2
    chosen = [step for step in available if step.group in wanted or step.name in wanted]
    outcomes = session(chosen, options.out.resolve(), options.seconds, options.again)
    text = summary(outcomes)
    (options.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(outcome.status in ("passed", "skipped") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a GPU can tell, asked of a rented card in two commands:

    python bench/gpu_session.py first --out FOLDER                       # what must hold, and the tables' tuning
    python bench/gpu_session.py second --out FOLDER --after all.tar.xz   # what had failed, and the numbers with the new tables

Runs from a checkout, uninstalled, with the standard library alone. GPU.md says what to do with what comes back, card/gpu_steps.py has the
steps. In the folder are `all.tar.xz` (all that was written so far, and the tables), `summary.txt` (a line a step) and `files/`, which the
archive holds too, and which `--files` puts elsewhere, if the way back is narrow. Archive and summary are replaced, whole, after every step
and every minute of one: who cuts the command off, at any second, has them. Each step is a process that is ended at its time with all it
started. What does not fit is not begun, what has passed before (in the folder, or in the archive of `--after`) is not done again. Steps
run one at a time: what times something has the machine to itself.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed, and a script in a folder of it

from bench.card import gpu_steps  # noqa: E402
from bench.card.gpu_steps import Step  # noqa: E402

TABLES = "kernels/configs"
ARCHIVE, SUMMARY, FILES = "all.tar.xz", "summary.txt", "files"
EVERY = 60.0  # seconds between two archives while a step runs
SHORTEST = 5.0  # a step that has fewer seconds is not begun
TAIL = 4000  # characters of its output that a step's result keeps
SHOWN = 12  # lines of it that the summary shows if it did not pass
LARGEST = 4 << 20  # bytes of a log in the archive: the last
REHEARSAL = 6.0  # times as long: a rehearsal is on few cores
FIND_GPU = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)"


@dataclass
class Outcome:
    """What became of a step: passed (of a rehearsal: rehearsed), failed, timeout, cut off, skipped (it cannot run here) or not begun."""

    step: str
    status: str
    seconds: float
    code: int | None
    command: list[str]
    tail: str


def has_gpu() -> bool:
    """By the driver, at once; where that finds none, PyTorch is asked too, for a wrong no would cost the whole session."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return True
    except (OSError, AttributeError):
        pass
    return subprocess.run([sys.executable, "-c", FIND_GPU], capture_output=True, check=False).returncode == 0


def write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


class Session:
    """One command: its steps in order, and what is known of each."""

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        seconds: float,
        *,
        files: Path | None = None,
        again: bool = False,
        passed: str = "passed",
        root: Path = ROOT,
        every: float = EVERY,
    ):
        self.steps, self.out, self.files = list(steps), out, files or out / FILES
        self.again, self.passed, self.root, self.every = again, passed, root, every
        self.started = time.monotonic()
        self.end = self.started + seconds
        self.outcomes: dict[str, Outcome] = {}
        self.running: tuple[str, float] | None = None  # the step, and since when
        self.cut_off = False
        for folder in (self.out, self.files):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> list[Outcome]:
        """Every step has an outcome in the end, also those that were not begun. A step may use what those before it left over."""
        over = self.started
        try:
            for step in self.steps:
                over += step.seconds
                self.outcomes[step.name] = self._earlier(step) or self._run(step, min(over, self.end) - time.monotonic())
                self.keep()
                outcome = self.outcomes[step.name]
                print(f"{step.name}: {outcome.status} in {outcome.seconds:.1f} s", flush=True)
        except BaseException:  # a signal, wherever it came
            self.cut_off = True
            self.keep()
            raise
        return list(self.outcomes.values())

    def _earlier(self, step: Step) -> Outcome | None:
        """The outcome of a step that has passed before."""
        path = self.files / f"{step.name}.json"
        if self.again or step.always or not path.is_file():
            return None
        outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
        return outcome if outcome.status == self.passed else None

    def _run(self, step: Step, seconds: float) -> Outcome:
        missing = step.missing(self.files)
        if missing or seconds < min(SHORTEST, step.seconds / 2):
            outcome = Outcome(step.name, "skipped" if missing else "not begun", 0.0, None, [], missing or "its time was over")
            self._write(outcome)
            return outcome
        command = step.command(self.files, seconds * gpu_steps.SHARE)
        path = os.pathsep.join([str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0", **step.variables}
        log, started, code, status = self.files / f"{step.name}.log", time.monotonic(), None, "cut off"
        self.running, process = (step.name, started), None
        try:
            self.keep()
            with log.open("wb") as file:
                # A process group of its own, to be ended as one; no session of its own: who ends this script's ends the step too.
                process = subprocess.Popen(
                    command,
                    cwd=self.root,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    preexec_fn=os.setpgrp,
                )
                code = self._wait(process, started + seconds)
            status = "timeout" if code is None else self.passed if code == 0 else "failed"
        finally:
            if process is not None:
                _end(process)
            self.running = None
            tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:] if log.exists() else ""
            took = round(time.monotonic() - started, 1)
            outcome = self.outcomes[step.name] = Outcome(step.name, status, took, code, self._without_paths(command), tail)
            self._write(outcome)
        return outcome

    def _wait(self, process: subprocess.Popen, over: float) -> int | None:
        """The exit code; None where the time was over. Meanwhile the archive is kept up."""
        while True:
            left = over - time.monotonic()
            try:
                return process.wait(max(0.0, min(left, self.every)))
            except subprocess.TimeoutExpired:
                if left <= self.every:
                    return None
                self.keep()

    def _without_paths(self, command: Sequence[str]) -> list[str]:
        """The command as someone else would give it."""
        replaced = [part.replace(sys.executable, "python").replace(str(self.files), f"OUT/{FILES}") for part in command]
        return [part.replace(str(self.root), ".") for part in replaced]

    def _write(self, outcome: Outcome) -> None:
        write(self.files / f"{outcome.step}.json", (json.dumps(asdict(outcome), indent=1) + "\n").encode())

    def keep(self) -> None:
        """Summary and archive anew, of what is there now. Where that fails, a full disk say, the steps go on all the same."""
        try:
            tables = self.files / TABLES
            tables.mkdir(parents=True, exist_ok=True)
            for path in (self.root / TABLES).glob("*.json"):
                write(tables / path.name, path.read_bytes())
            write(self.out / SUMMARY, self.summary().encode())
            write(self.out / ARCHIVE, archive(self.out / SUMMARY, self.files))
        except OSError as error:
            print(f"nothing new was kept: {error}", flush=True)

    def summary(self) -> str:
        """A line a step with the last of its output; of one that did not pass more of it."""
        lines = [f"{time.monotonic() - self.started:.0f} s"]
        for step in self.steps:
            outcome = self.outcomes.get(step.name)
            if outcome is None:
                running = self.running is not None and self.running[0] == step.name
                status = "cut off" if self.cut_off else "running"
                since = f"{status:10} {time.monotonic() - self.running[1]:6.1f} s" if running else "to come"
                lines.append(f"{step.name:14} {since}")
                continue
            said = outcome.tail.strip().splitlines()
            lines.append(f"{step.name:14} {outcome.status:10} {outcome.seconds:6.1f} s  {said[-1] if said else ''}".rstrip())
            if outcome.status in ("failed", "timeout", "cut off"):
                lines += [f"    {line}" for line in said[-SHOWN:]]
        return "\n".join(lines) + "\n"


def _end(process: subprocess.Popen) -> None:
    """End a step's whole process group: compilers and workers too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def archive(summary: Path, files: Path) -> bytes:
    """An archive of summary and files. A file is read before it is added: a step may be writing it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz", preset=1) as tar:
        for path in [summary, *sorted(files.rglob("*"))]:
            if not path.is_file() or path.suffix == ".partial":
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # replaced or removed by its step
                continue
            info = tarfile.TarInfo(SUMMARY if path == summary else f"{FILES}/{path.relative_to(files)}")
            data = data[-LARGEST:] if path.suffix == ".log" else data
            info.size, info.mtime = len(data), int(time.time())
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def unpack(after: Path, files: Path) -> None:
    """Put an earlier command's files among this one's: from its archive, or its folder. ValueError if there are none."""
    try:
        if after.is_dir():
            shutil.copytree(after / FILES, files, dirs_exist_ok=True)
            return
        with tarfile.open(after) as tar:
            members = [member for member in tar.getmembers() if member.isfile() and member.name.startswith(f"{FILES}/")]
            tar.extractall(files, [member.replace(name=member.name.removeprefix(f"{FILES}/")) for member in members], filter="data")
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"--after {after}: {error}") from error


def rehearsed(step: Step) -> Step:
    """The step's form for a machine without a GPU."""
    found = replace(step, seconds=step.seconds * REHEARSAL, variables={**step.variables, **step.rehearsal_variables})
    return replace(found, command=step.rehearsal, missing=lambda files: None if step.rehearsal else "it has no rehearsal")


def made_up(step: Step, durations: dict[str, float]) -> Step:
    """A step that only takes its time, and writes a file."""

    def command(files: Path, seconds: float) -> list[str]:
        code = f"import time; open({str(files / f'{step.name}.txt')!r}, 'w').write('made up'); time.sleep({durations.get(step.name, 0.0)})"
        return [sys.executable, "-S", "-c", code]

    return replace(step, command=command, missing=lambda files: None)


def describe(plan: dict[str, list[Step]]) -> str:
    """The steps with their seconds."""
    lines = []
    for name, steps in plan.items():
        lines.append(f"{name}: {sum(step.seconds for step in steps):.0f} s of {gpu_steps.SECONDS[name]:.0f}")
        lines += [f"    {step.name:14} {step.seconds:4.0f} s" for step in steps]
    total = sum(step.seconds for steps in plan.values() for step in steps)
    return "\n".join([*lines, f"together {total:.0f} s of {gpu_steps.MOST:.0f}"])


def parse(arguments: Sequence[str] | None, plan: dict[str, list[Step]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python bench/gpu_session.py", description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=list(plan))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder of the results; default: out/gpu")
    parser.add_argument("--files", type=Path, help="folder of what the steps write; default: files/ in that of the results")
    parser.add_argument("--after", type=Path, help="an earlier command's all.tar.xz, or its folder: go on from there")
    parser.add_argument("--steps", help="some of the command's, with commas between; default: all")
    parser.add_argument("--seconds", type=float, help="of this call; default 555 for the first, 225 for the second")
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    parser.add_argument("--plan", action="store_true", help="only print the steps and their seconds")
    parser.add_argument("--rehearse", action="store_true", help="each step's form for a machine without a GPU; nothing is measured")
    parser.add_argument("--durations", type=Path, metavar="FILE", help="made-up steps that take these seconds (JSON, by step)")
    parser.add_argument("--every", type=float, default=EVERY, help="seconds between two archives while a step runs; default 60")
    options = parser.parse_args(arguments)
    if options.command is None and not options.plan:
        parser.error(f"which command: {' or '.join(plan)}")
    if options.steps and options.command:
        names = [step.name for step in plan[options.command]]
        unknown = [name for name in options.steps.split(",") if name not in names]
        if unknown:
            parser.error(f"{options.command} has no step {unknown[0]}; it has {', '.join(names)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every step has passed or cannot run here, 1 if one failed or was not begun, 2 without a GPU or an archive to go on from."""
    plan = gpu_steps.plan()
    options = parse(arguments, plan)
    if options.plan:
        print(describe(plan))
        return 0
    steps = [step for step in plan[options.command] if not options.steps or step.name in options.steps.split(",")]
    seconds = options.seconds or gpu_steps.SECONDS[options.command]
    if options.durations:
        durations = json.loads(options.durations.read_text(encoding="utf-8"))
        steps = [made_up(step, durations) for step in steps]
    elif options.rehearse:
        steps, seconds = [rehearsed(step) for step in steps], seconds * REHEARSAL
    elif not has_gpu():
        print("Every step here needs a CUDA device, and there is no CUDA device: nothing was run, nothing was written.")
        return 2
    out = options.out.resolve()
    files = options.files.resolve() if options.files else out / FILES
    try:
        if options.after:
            unpack(options.after.resolve(), files)
    except ValueError as error:
        print(error)
        return 2
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda number, frame: sys.exit(128 + number))  # the step is ended, and what there is kept
    passed = "rehearsed" if options.rehearse or options.durations else "passed"
    session = Session(steps, out, seconds, files=files, again=options.again, passed=passed, every=options.every)
    outcomes = session.run()
    print(session.summary())
    return 0 if all(outcome.status in (passed, "skipped") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

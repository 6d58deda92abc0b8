"""Break the code on purpose, one replacement at a time, and see the tests fail.

    python tests/mutate.py [--only attention]

``tests/mutations/kernels/<op>.toml`` has a table `[[mutation]]` each: name, file, old, new, tests, and perhaps count. ``old`` must occur
exactly ``count`` times (default once) in ``file``; all are replaced in a temporary copy of the repository, and ``tests`` (arguments to
pytest) run there. A mutation that the tests do not notice is an error; so is one whose tests cannot even be collected, for that proves
nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = ROOT / "tests" / "mutations" / "kernels"
COPIED = ("dpt", "kernels", "tests", "bench", "pyproject.toml")
PYTEST_TESTS_FAILED = 1  # pytest's exit codes: 0 passed, 1 tests failed, 2 to 5 interrupted, broken, misused, nothing collected
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)  # a kernel that leaves its tensors may end the interpreter's process


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


def run_tests(mutation: dict, copy: Path) -> tuple[int, str]:
    """pytest's exit code and output for the mutation's tests, in the mutated copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation["tests"]]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def check(mutation: dict, copy: Path) -> str:
    """ "caught" and how, or what is wrong."""
    target = copy / mutation["file"]
    original = target.read_text()
    target.write_text(mutated(original, mutation))
    try:
        code, output = run_tests(mutation, copy)
    finally:
        target.write_text(original)
    if code == PYTEST_TESTS_FAILED:
        return "caught"
    if code in CRASHES:
        return f"caught by a crash, {signal.Signals(-code).name}"
    reason = "NOT CAUGHT: its tests passed" if code == 0 else f"NOT RUN: pytest ended with code {code}"
    return f"{reason}\n{output[-2000:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every mutation; 1 if one was not caught."""
    files = sorted(MUTATIONS.glob("*.toml"))
    parser = argparse.ArgumentParser(prog="python tests/mutate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=[file.stem for file in files], help="an op; default: all")
    options = parser.parse_args(arguments)
    chosen = [file for file in files if not options.only or file.stem in options.only]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, copy / name)
        for file in chosen:
            for mutation in read(file):
                started = time.monotonic()
                verdict = check(mutation, copy)
                failures += not verdict.startswith("caught")
                print(f"{file.stem:18} {mutation['name']:44} {time.monotonic() - started:5.1f} s  {verdict}", flush=True)
    print(f"{failures} not caught" if failures else "all caught")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

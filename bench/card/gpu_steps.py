"""What a rented card is asked, and for how long: the steps of `gpu_session.py`'s two commands. Standard library only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import ROOT
from ..harness.tools import tool

# Seconds of each command. The rest of a quarter of an hour is for the machine's start, the way there and back, and giving it back.
SECONDS = {"first": 555.0, "second": 225.0}
MOST = 780.0  # of both together
# Of its seconds, what a step is told to use: the rest is for starting, and for what does not stop in time.
SHARE = 0.85
FREE_CORES = 2  # for the process that measures and for the system, while others compile
HOST_STUB = ROOT / "tests" / "host" / "run.py"  # every op through Triton's real launcher, on a driver that is none
Command = Callable[[Path, float], list[str]]


@dataclass(frozen=True)
class Step:
    """A process. ``command(files, seconds)``: its arguments, given the folder for what it writes and the seconds it may use.

    ``seconds``: it is ended after these and what the steps before it left over. ``rehearsal``: the command for a machine without a GPU.
    ``missing(files)``: why it cannot run, or has nothing to do. ``always``: also where it has passed before.
    """

    name: str
    seconds: float
    command: Command
    rehearsal: Command | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    rehearsal_variables: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[Path], str | None] = lambda files: None
    always: bool = False


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def pytest(*arguments: str) -> list[str]:
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def workers() -> str:
    return str(max(1, len(os.sched_getaffinity(0)) - FREE_CORES))


def versions() -> Step:
    command = python("-m", "bench.harness.environment")
    # A machine without a card has no card to tell of, which is no failure of the rehearsal: code 2.
    rehearsal = python("-c", "import sys; from bench.harness.environment import main; sys.exit(0 if main() in (0, 2) else 1)")
    return Step("versions", 20.0, lambda files, seconds: command, lambda files, seconds: rehearsal, always=True)


def every_op() -> Step:
    """It also builds the C functions by which Triton launches, before anything is timed."""

    def rehearsal(files: Path, seconds: float) -> list[str]:
        if HOST_STUB.is_file():
            return python(str(HOST_STUB))
        return python("-m", "bench.card.every_op", "--toy", "--device", "cpu", "--dtypes", "float32", "--here")

    interpreted = {"TRITON_INTERPRET": "0" if HOST_STUB.is_file() else "1"}
    return Step(
        "ops",
        60.0,
        lambda files, seconds: python("-m", "bench.card.every_op", "--seconds", f"{seconds:.0f}"),
        rehearsal,
        rehearsal_variables=interpreted,
    )


def parity(name: str, seconds: float, marker: str, *more: str, again_of: str | None = None) -> Step:
    """tests/kernels on the card, or what a step before has as failed or not run. Results are written as they come."""

    def arguments(files: Path) -> list[str]:
        found = ["tests/kernels", "-m", marker, "-p", "bench.card.junit", "--junit-as-it-goes", str(files / f"{name}.xml"), "--tb=short"]
        return [*found, "--not-passed-in", str(files / f"{again_of}.xml")] if again_of else found

    def nothing(files: Path) -> str | None:
        if again_of is None:
            return None
        if not (files / f"{again_of}.xml").is_file():
            return f"there is no {again_of}.xml of a first command here: --after tells where"
        from .junit import not_passed  # imports pytest, which the rest of the script does without

        return None if not_passed(files / f"{again_of}.xml") else f"in {again_of} nothing failed, and all was run"

    return Step(
        name,
        seconds,
        lambda files, seconds: pytest(*arguments(files), *more),
        lambda files, seconds: pytest(*arguments(files), "--collect-only", "-p", "no:xdist"),
        variables={"OMP_NUM_THREADS": "1"},
        missing=nothing,
    )


def benchmark(name: str, seconds: float, file: str, *more: str, measured: tuple[str, ...] = (), rehearsed: tuple[str, ...] = ()) -> Step:
    """A suite in bfloat16, recorded as it goes. ``measured`` and ``rehearsed``: options of the one only, or of the other."""
    chosen = [f"bench/test_{file}.py", "-p", "no:xdist", "--dtypes", "bfloat16", *more]

    def command(files: Path, seconds: float) -> list[str]:
        recorded = ["--benchmark", "--device", "cuda", "--budget", f"{seconds:.0f}", "--record-to", str(files / "results")]
        return pytest(*chosen, *recorded, *measured)

    return Step(name, seconds, command, lambda files, seconds: pytest(*chosen, "--device", "cpu", *rehearsed))


# torch.compile takes a minute or two a model; the peers are for a machine with more time.
PEERS = ("--without", "torch.compile", "--without", "transformers", "--without", "mmsegmentation")


def tune(name: str, seconds: float) -> Step:
    module = ("-m", "dpt.kernels.tools.tune", "--stage", "forward", "--dtype", "half")
    return Step(
        name,
        seconds,
        lambda files, seconds: python(*module, "--budget", f"{seconds:.0f}", "--json", str(files / "results" / "tuning.json")),
        lambda files, seconds: python(*module, "--dry-run", "--arch", "sm_90"),
    )


def sanitizer() -> tuple[Step, Step]:
    """memcheck over our kernels at toy sizes; before it the same without, which fills Triton's cache in several processes.

    PyTorch's own caching of memory is switched off: inside one of its blocks nobody sees a kernel leave its tensor.
    """
    toy = ("-m", "bench.card.every_op", "--toy", "--dtypes", "float32,bfloat16")
    on_cpu = python("-m", "bench.card.every_op", "--toy", "--dtypes", "float32", "--device", "cpu", "--here", "--op", "attention")

    def missing(files: Path) -> str | None:
        return None if tool("compute-sanitizer") else "compute-sanitizer is not installed"

    def rehearsal(files: Path, seconds: float) -> list[str]:
        return on_cpu

    return (
        Step("warm", 25.0, lambda files, seconds: python(*toy, "--seconds", f"{seconds:.0f}"), rehearsal, missing=missing),
        Step(
            "sanitizer",
            35.0,
            lambda files, seconds: python(*toy, "--sanitize"),
            rehearsal,
            variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            missing=missing,
        ),
    )


def profile() -> Step:
    module = ("-m", "bench.card.profile_model")

    def command(files: Path, seconds: float) -> list[str]:
        return python(*module, "--out", str(files / "profile"), "--results", str(files / "results"), "--seconds", f"{seconds:.0f}")

    def rehearsal(files: Path, seconds: float) -> list[str]:
        return python(*module, "--out", str(files / "profile"), "--toy", "--device", "cpu", "--dtype", "float32")

    return Step("profile", 35.0, command, rehearsal)


def plan() -> dict[str, list[Step]]:
    """The steps of each command, in the order they run: first what must hold, then what is quick to lose."""
    return {
        "first": [
            versions(),
            every_op(),
            parity("parity", 145.0, "not far", "-n", workers()),
            parity("far", 35.0, "far", "-n", "0"),
            benchmark("models", 100.0, "models", "-k", "not batch-4-", *PEERS, measured=("--record-suffix", "untuned")),
            tune("tune", 190.0),
        ],
        "second": [
            versions(),
            parity("failed", 25.0, "not far", "-n", workers(), again_of="parity"),
            parity("failed-far", 10.0, "far", "-n", "0", again_of="far"),
            benchmark("models-tuned", 30.0, "models", "-k", "not batch-4-", *PEERS),
            benchmark("steps", 20.0, "steps"),
            benchmark("kernels", 25.0, "kernels", *PEERS[:2], measured=("-k", "graph-replay"), rehearsed=("-k", "upsample")),
            *sanitizer(),
            profile(),
        ],
    }

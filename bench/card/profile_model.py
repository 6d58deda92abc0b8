"""Where a model's time goes: `python -m bench.card.profile_model --out FOLDER [--results FOLDER] [--seconds N]`.

Writes `profile.txt` (the profiler's table), `profile-kernels.json` (each kernel's calls, time and share, and whether it is ours) and, where
Nsight Compute is installed, `profile-ncu.txt` of our kernel that takes longest. The model is the one that a recorded run found farthest
from its roofline.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime.jit import JITFunction

import dpt

from .. import ROOT
from ..cases import models
from ..harness.records import Record, first_runs, read_all
from ..harness.tools import tool

RUNS = 5
LEAST = 15.0  # seconds: Python alone takes most of them to start under Nsight Compute
SPARE = 3.0  # for ending it


@dataclass(frozen=True)
class Subject:
    """A model, its square input's side, its batch and dtype."""

    model: str = "dpt-base-ade20k"
    side: int = 512
    batch: int = 1
    dtype: str = "bfloat16"


@functools.cache
def our_kernels() -> frozenset[str]:
    """The names of our kernels, which Triton gives the compiled code too: the jit functions of kernels/ that no other one calls."""
    files = [path.relative_to(ROOT / "kernels") for pattern in ("*.py", "parts/*.py") for path in sorted((ROOT / "kernels").glob(pattern))]
    modules = [importlib.import_module(".".join(("dpt.kernels", *path.with_suffix("").parts))) for path in files]
    found = {value.fn for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    ours = [function for function in found if function.__module__.startswith("dpt.kernels.")]
    called = {name for function in ours for name in re.findall(r"(?<!def )\b(\w+)\(", inspect.getsource(function))}
    return frozenset(function.__name__ for function in ours if function.__name__ not in called)


def slowest(records: Sequence[Record]) -> Subject:
    """What runs farthest from its roofline among the fast rows of recorded runs; the default where there are none."""
    rows = [row for record in records if record.what == "models" for row in record.rows]
    rows = [row for row in rows if row.contender.startswith("fast") and row.status == "ok" and row.roofline_share]
    if not rows:
        return Subject()
    worst = min(rows, key=lambda row: row.roofline_share)
    name = models.find(worst.facts["model"])
    return Subject(name, worst.shape[2], worst.shape[0], worst.dtype) if name else Subject()


def runner(subject: Subject, device: torch.device, toy: bool = False):
    """A function that runs the fast model once."""
    config = models.config_of(subject.model)
    torch.manual_seed(0)
    model = models.randomise(dpt.build(models.toy(config) if toy else config)).to(device, getattr(torch, subject.dtype))
    model = dpt.accelerate(model)
    side = 4 * config.encoder.patch_size if toy else subject.side
    x = torch.randn(subject.batch, 3, side, side).to(device, getattr(torch, subject.dtype))

    @torch.inference_mode()
    def run() -> None:
        model(x)

    return run


def profile(run, device: torch.device) -> tuple[str, list[dict[str, Any]]]:
    """The profiler's table, and the kernels (on a CPU: the operators) by their time, longest first."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(RUNS):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    events = trace.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    if cuda:
        chosen = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    else:
        chosen = list(events)
    total = sum(getattr(event, key) for event in chosen) or 1.0
    kernels = [
        {
            "name": event.key,
            "calls_a_run": event.count / RUNS,
            "microseconds_a_run": getattr(event, key) / RUNS,
            "share": getattr(event, key) / total,
            "ours": event.key.split("(")[0] in our_kernels(),
        }
        for event in sorted(chosen, key=lambda event: -getattr(event, key))
        if getattr(event, key) > 0
    ]
    return events.table(sort_by=key, row_limit=60, max_name_column_width=80), kernels


def nsight(kernel: str, subject: Subject, path: Path, seconds: float) -> str:
    """Nsight Compute's details of the first launch of a kernel, into a file, within the seconds; what became of it.

    It changes nothing of the card: by default it would fix the clocks.
    """
    found = tool("ncu")
    if found is None:
        return "Nsight Compute (ncu) is not installed"
    if seconds < LEAST:
        return f"{seconds:.0f} s are left, too few for Nsight Compute"
    again = [sys.executable, "-m", "bench.card.profile_model", "--once", *_arguments(subject)]
    name = f"regex:^{re.escape(kernel.split('(')[0])}$"
    options = ["--clock-control", "none", "--kernel-name", name, "--launch-skip", "0", "--launch-count", "1", "--set", "detailed"]
    with path.open("wb") as file:
        process = subprocess.Popen([found, *options, *again], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, preexec_fn=os.setpgrp)
        try:
            return f"ncu ended with code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.wait()
            return f"ncu took more than {seconds:.0f} s"


def _arguments(subject: Subject) -> list[str]:
    return ["--model", subject.model, "--side", str(subject.side), "--batch", str(subject.batch), "--dtype", subject.dtype]


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.card.profile_model", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path, help="records to choose the model by")
    parser.add_argument("--model")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=300.0, help="Nsight Compute is given what is left of them; default 300")
    parser.add_argument("--toy", action="store_true", help="the model at its toy size")
    parser.add_argument("--once", action="store_true", help="only run the model a few times: what ncu watches")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    recorded = read_all(options.results) if options.results and options.results.is_dir() else {}
    recorded = first_runs(recorded) or recorded  # rather the tuned ones than those of before
    subject = Subject(options.model, options.side, options.batch, options.dtype) if options.model else slowest(list(recorded.values()))
    run = runner(subject, device, options.toy)
    if options.once:
        for _ in range(2):
            run()
        return 0
    if options.out is None:
        parser.error("--out is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    table, kernels = profile(run, device)
    (options.out / "profile.txt").write_text(f"{subject}\n{table}\n", encoding="utf-8")
    content = {"subject": vars(subject), "device": str(device), "kernels": kernels}
    (options.out / "profile-kernels.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{subject}: {kernels[0]['name']} takes {kernels[0]['share']:.0%}")
    if device.type == "cuda":
        ours = [kernel for kernel in kernels if kernel["ours"]]
        print(f"{len(ours)} of {len(kernels)} kernels are ours, {sum(kernel['share'] for kernel in ours):.0%} of the time")
        left = options.seconds - SPARE - (time.monotonic() - started)
        if ours:
            print(nsight(ours[0]["name"], subject, options.out / "profile-ncu.txt", left))
    return 0


if __name__ == "__main__":
    sys.exit(main())

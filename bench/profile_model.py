"""Where a model's time goes: `python -m bench.profile_model --out FOLDER [--results FOLDER]`.

Writes `profile.txt` (the profiler's table), `profile-kernels.json` (each kernel's calls, time and share) and, where Nsight Compute is
installed, `profile-ncu.txt` of the kernel that takes longest. The model is the one that a recorded run found farthest from its roofline.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dpt

from . import models
from .environment import ROOT
from .records import Record, read_all

RUNS = 5
NCU_SECONDS = 240.0


@dataclass(frozen=True)
class Subject:
    """A model, its square input's side, its batch and dtype."""

    model: str = "dpt-base-ade20k"
    side: int = 512
    batch: int = 1
    dtype: str = "bfloat16"


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
        }
        for event in sorted(chosen, key=lambda event: -getattr(event, key))
        if getattr(event, key) > 0
    ]
    return events.table(sort_by=key, row_limit=60, max_name_column_width=80), kernels


def nsight(kernel: str, subject: Subject, path: Path) -> str:
    """Nsight Compute's details of one launch of a kernel, into a file; what became of it."""
    tool = shutil.which("ncu")
    if tool is None:
        return "Nsight Compute (ncu) is not installed"
    again = [sys.executable, "-m", "bench.profile_model", "--once", *_arguments(subject)]
    name = "regex:" + re.escape(kernel.split("(")[0])[:80]
    command = [tool, "--kernel-name", name, "--launch-skip", "3", "--launch-count", "1", "--set", "detailed", *again]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NCU_SECONDS, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        return f"ncu took more than {NCU_SECONDS:.0f} s"
    path.write_text(done.stdout + done.stderr, encoding="utf-8")
    return f"ncu ended with code {done.returncode}"


def _arguments(subject: Subject) -> list[str]:
    return ["--model", subject.model, "--side", str(subject.side), "--batch", str(subject.batch), "--dtype", subject.dtype]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_model", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path, help="records to choose the model by")
    parser.add_argument("--model")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--once", action="store_true", help="only run the model a few times: what ncu watches")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    recorded = list(read_all(options.results).values()) if options.results and options.results.is_dir() else []
    subject = Subject(options.model, options.side, options.batch, options.dtype) if options.model else slowest(recorded)
    run = runner(subject, device)
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
        ours = next((kernel for kernel in kernels if "dpt" in kernel["name"] or "_kernel" in kernel["name"]), kernels[0])
        print(nsight(ours["name"], subject, options.out / "profile-ncu.txt"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

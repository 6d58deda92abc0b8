"""Every op once, at a model's shape, forward and backward, against PyTorch: `python -m bench.card.every_op`.

A line an op and direction as soon as it is known; an op that fails does not stop the others, nor one that takes the GPU's context or its
process with it: each has a process of its own, several at a time, since what they do most is compile. The first contact of the kernels
with a card, and under compute-sanitizer (`--sanitize`) a check of their memory accesses.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from dpt.kernels.tools import parity

from .. import ROOT
from ..cases import kernels
from ..harness import measure, records
from ..harness.runner import Context
from ..harness.session import parse_dtypes
from ..harness.tools import tool
from .gpu_steps import FREE_CORES
from .profile_model import our_kernels


def check(op: kernels.Op, direction: str, dtype: torch.dtype, context: Context) -> str:
    """ "ok" and how far the op is off, or "FAILED" and why, whatever it raised."""
    started = time.monotonic()
    try:
        opened = kernels.OpenedOp(op, op.shapes[0], direction, dtype, context)
        plain = opened.prepare(kernels.contenders(op)[0]).judged()
        fused = opened.prepare(records.FUSED)
        verdict = parity.judge(fused.judged(), opened.exact(), plain, dtype, opened.rms, opened.other_plain())
    except Exception as error:  # of the compiler, the driver or the op: told, and the next has its turn
        return "FAILED: " + " ".join(f"{type(error).__name__}: {error}".split())[:400]
    if context.device.type == "cuda" and fused.note:
        return f"FAILED: {fused.note}"
    if verdict.problem:
        return f"FAILED: {verdict.problem}"
    note = f" ({fused.note})" if fused.note else ""
    return f"ok, off by {verdict.loss:.1e}, allowed {verdict.allowed:.1e}, {time.monotonic() - started:.1f} s{note}"


def here(names: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device, toy: bool) -> bool:
    """Run these ops in this process, a line each; whether all are right."""
    context = Context(device, measure.Budget(1e9), measure.Rounds(1, 1, 0.0), toy=toy)
    right = True
    for op in kernels.ops():
        for dtype in dtypes if op.name in names else ():
            for direction in (kernels.FORWARD, kernels.BOTH) if op.backward else (kernels.FORWARD,):
                result = check(op, direction, dtype, context)
                right = right and result.startswith("ok")
                shape = op.toy if toy else op.shapes[0]
                print(f"{op.name} {direction}, {shape}, {str(dtype).removeprefix('torch.')}: {result}", flush=True)
    return right


def apart(names: Sequence[str], arguments: Sequence[str], seconds: float) -> list[str]:
    """Run each op in a process of its own; the names of those that failed, died or were not done after the seconds."""
    end = time.monotonic() + seconds

    def failed(name: str) -> bool:
        command = [sys.executable, "-m", "bench.card.every_op", "--here", "--op", name, *arguments]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=max(0.0, end - time.monotonic()), check=False).returncode
        except subprocess.TimeoutExpired:
            code = None
        if code not in (0, 1):
            became = f"its process ended with code {code}" if code is not None else "not done when the time was over"
            print(f"{name}: FAILED: {became}", flush=True)
        return code != 0

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - FREE_CORES)) as pool:
        return [name for name, wrong in zip(names, pool.map(failed, names), strict=True) if wrong]


def sanitized(found: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs all ops in one process under compute-sanitizer, which looks at our kernels only: the others are PyTorch's."""
    names = [part for name in sorted(our_kernels()) for part in ("--kernel-name", f"kne={name}")]
    options = ["--tool", "memcheck", "--error-exitcode", "99", *names]
    return [found, *options, sys.executable, "-m", "bench.card.every_op", "--here", *arguments]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every op agrees with PyTorch, else 1."""
    names = [op.name for op in kernels.ops()]
    parser = argparse.ArgumentParser(prog="python -m bench.card.every_op", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=names, help="default: all")
    parser.add_argument("--dtypes", default="bfloat16", help="float32,float16,bfloat16; default: bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="at the toy size")
    parser.add_argument("--here", action="store_true", help="in this process, one after the other")
    parser.add_argument("--sanitize", action="store_true", help="in one process under compute-sanitizer; warm Triton's cache first")
    parser.add_argument("--seconds", type=float, default=300.0, help="an op that is not done by then has failed; default 300")
    options = parser.parse_args(arguments)
    chosen = options.op or names
    passed_on = ["--dtypes", options.dtypes, "--device", options.device, *(["--toy"] if options.toy else [])]
    if options.sanitize:
        found = tool("compute-sanitizer")
        if found is None:
            parser.error("compute-sanitizer is not installed")
        command = sanitized(found, [*passed_on, *(part for name in options.op or () for part in ("--op", name))])
        os.execv(found, command)
    if options.here:
        return 0 if here(chosen, parse_dtypes(options.dtypes), torch.device(options.device), options.toy) else 1
    failed = apart(chosen, passed_on, options.seconds)
    print(f"{len(chosen)} ops, {'failed: ' + ', '.join(failed) if failed else 'all agree with PyTorch'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

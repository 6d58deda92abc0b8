"""The host's work: how long a call keeps the processor until everything is queued, which is what a GPU may have to wait for.

On a CPU the calls go to a stub of the driver (`harness/stub.py`), as on an H100, in a process of their own, and PyTorch's own arithmetic is
left out (`harness/silent.py`): `python -m bench.cases.host` is that process. What is counted is the processor's time of the thread that
calls. The gate compares what was launched: kernels, grids, arguments but for addresses; of a CUDA graph (`harness/graphs.py`) when it was
captured.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dpt
from dpt.kernels import launch

from .. import ROOT
from ..harness import graphs, measure, silent, stub
from ..harness.runner import Case, Context, Prepared, Unavailable
from . import models, peers
from .ops import ops

ANEW, PLANNED, GRAPHED = "fast, worked out in each call", "fast, by plans", "fast, CUDA graph"
FAMILY = "sm_90"
CALLS = 10  # that are timed together
# Ops, by the name of their benchmark case, at its last shape: the largest; and whole models.
OPS = ("attention", "layernorm_linear", "linear_residual", "layernorm_mlp", "residual_conv_unit, norms and add")
MODELS = {"dpt-base-ade20k": (512, 512), "dpt-large-midas": (384, 384)}
THEIRS = {"dpt-large-midas of transformers": "dpt-large-midas"}  # transformers' class of a model, accelerated in place


@dataclass
class OpenedHost:
    """A case in the process that makes its calls: ``ask(contender, what)`` gives seconds a call, or what was launched."""

    ask: Callable[[str, str], list[float]]
    flops: int | None = None
    bytes: int | None = None
    per_run: float = 1.0
    unit: str = "calls"
    rms: bool = False

    def exact(self) -> Sequence[torch.Tensor]:
        return [torch.tensor(self.ask(ANEW, "launches"), dtype=torch.float32)]

    def other_plain(self) -> Sequence[torch.Tensor] | None:
        return None

    def prepare(self, contender: str) -> Prepared:
        launches = self.exact() if contender == ANEW else [torch.tensor(self.ask(contender, "launches"), dtype=torch.float32)]
        facts = dict(zip(("launches", "calls of PyTorch"), map(int, self.ask(contender, "counts")), strict=True))
        return Prepared(lambda index: self.ask(contender, "seconds")[0], lambda: launches, recorded=lambda: None, facts=facts)


def cases(device_type: str, importance: float) -> list[Case]:
    """Each op and each model."""
    return [
        Case(
            suite="host",
            name=f"{name}, host, bfloat16",
            dtype=torch.bfloat16,
            shape=MODELS.get(THEIRS.get(name, name), ()),
            contenders=(ANEW, PLANNED, GRAPHED)[: 2 + (name in MODELS)],
            open=lambda context, name=name: OpenedHost(_process(context, name)),
            importance=importance + (name in OPS),
            unavailable=None if device_type == "cpu" else "measured on the driver's stub, without a GPU",
            key=f"host {name if name in THEIRS else name in MODELS}",
        )
        for name in (*MODELS, *THEIRS, *OPS)
    ]


def _process(context: Context, name: str) -> Callable[[str, str], list[float]]:
    """Asks the process of one case, which ends with the session."""
    command = [sys.executable, "-m", "bench.cases.host", name, *(["--toy"] if context.toy else [])]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    context.cache[f"host {name}"] = child

    def ask(contender: str, what: str) -> list[float]:
        print(json.dumps([contender, what]), file=child.stdin, flush=True)
        answer = child.stdout.readline()
        if not answer:
            raise Unavailable(f"the process that makes the calls ended with {child.wait()}")
        return json.loads(answer)

    return ask


def called(name: str, toy: bool) -> dict[str, Callable[[], Any]]:
    """The calls of a case, on tensors without numbers, by contender."""
    if name in MODELS or name in THEIRS:
        config = dpt.zoo.config_of(THEIRS.get(name, name))
        config, size = (models.toy(config), (3 * config.encoder.patch_size,) * 2) if toy else (config, MODELS[config.name])
        x = torch.empty(1, 3, *size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        if name in THEIRS:
            theirs = peers.transformers_model(dpt.build(config, dtype=torch.bfloat16).eval(), size)
            dpt.accelerate(theirs.model)
            return dict.fromkeys((ANEW, PLANNED), lambda: theirs(x))
        with torch.device("meta"):
            model = dpt.build(config, fast=True, dtype=torch.bfloat16).eval()
        model = model.to_empty(device="cpu")
        graphed = dpt.graphed(model)
        return {ANEW: lambda: model(x), PLANNED: lambda: model(x), GRAPHED: lambda: graphed(x)}
    op = next(op for op in ops() if op.name == name)
    shape = op.toy if toy else op.shapes[-1]
    tensors = [
        torch.empty(argument.shape, dtype=torch.bfloat16, memory_format=torch.channels_last if argument.map else torch.contiguous_format)
        for argument in op.arguments(shape)
    ]
    return dict.fromkeys((ANEW, PLANNED), lambda: op.call(shape, *tensors))


def _seconds(call: Callable[[], Any], gpu: stub.Stub) -> list[float]:
    """Of a call; before, the addresses that it meets again are met once, and a graph is captured."""
    call()
    call()
    started = time.thread_time()
    for _ in range(CALLS):
        call()
    return [(time.thread_time() - started) / CALLS]


def _launches(call: Callable[[], Any], gpu: stub.Stub) -> list[float]:
    """A checksum of each launch, of the second call, which is by plans where there are any. Addresses are left out."""
    with stub.Watch(gpu.compiler.seen) as watch:
        watch.of(call)
        watch.note = lambda name, tensor: None
        return [float(zlib.crc32(repr(told).encode()) % (1 << 24)) for told in watch.of(call)]


def _launches_of_a_graph(call: Callable[[], Any], gpu: stub.Stub) -> list[float]:
    """Of the call that makes it, which runs the forward twice: to warm up, and in the capture."""
    found = _launches(call, gpu)
    if found[: len(found) // 2] != found[len(found) // 2 :]:
        raise ValueError("a graph holds something else than the forward that came before it")
    return found[: len(found) // 2]


def _counts(call: Callable[[], Any], gpu: stub.Stub) -> list[float]:
    """How many launches the host makes, the replay of a graph being one, and how many calls PyTorch itself."""
    for _ in range(2):
        call()
    silent.CALLED.clear()
    before = gpu.library.stub_launches() + graphs.Graph.replays
    call()
    return [gpu.library.stub_launches() + graphs.Graph.replays - before, silent.CALLED.total()]


ANSWERS = {"seconds": _seconds, "launches": _launches, "counts": _counts}


def serve(name: str, toy: bool) -> None:
    """Answer what is asked on standard input, a line each, by a list of numbers."""
    measure.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        gpu = stub.Stub(Path(folder))
        gpu.use(FAMILY)
        calls = called(name, toy)
        graphs.install()
        kept = silent.silence()  # noqa: F841 - in force for as long as it lives
        with torch.inference_mode():
            for line in sys.stdin:
                contender, what = json.loads(line)
                answer = _launches_of_a_graph if (contender, what) == (GRAPHED, "launches") else ANSWERS[what]
                with launch.without_plans() if contender == ANEW else contextlib.nullcontext():
                    print(json.dumps(answer(calls[contender], gpu)), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], "--toy" in sys.argv[2:])

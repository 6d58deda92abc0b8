"""Where a forward's time goes on a CPU, stage by stage, beside its floor: `python -m bench.stages` runs each model of `MEASURED`, plain and
with `fast=True`, float32, side by side, and writes docs/cpu.json and docs/cpu.md; `--check` only compares the page with the file.

A stage's floor is the FLOPs that it does, by Winograd where that does fewer, at the best rate that a product of matrices had between runs.
All figures are shares of the plain model's whole time.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dpt
from dpt.fast import modules
from dpt.fast.rules import PLAIN
from dpt.kernels.cpu import choices, winograd

from . import ROOT
from .cases.models import randomise, shared_copy
from .harness import environment, measure
from .reporting import recorded

RECORD, PAGE = ROOT / "docs" / "cpu.json", ROOT / "docs" / "cpu.md"
MEASURED = {  # the side of the picture
    "dpt-base-ade20k": 512,
    "dpt-large-midas": 384,
    "depth-anything-v2-small": 518,
    "depth-anything-v2-base": 518,
}
RUNS = 9
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
STAGES = ("LayerNorm, qkv", "attention", "projection", "MLP", "rest of the encoder", "reassemble", "fusion", "head")
OPS = {"layernorm_linear": STAGES[0], "attention": STAGES[1], "linear_residual": STAGES[2], "layernorm_mlp": STAGES[3]}
PARTS = {"reassemble": STAGES[5], "fusion": STAGES[6], "head": STAGES[7]}


class Clock:
    """What each stage adds of something that grows: seconds, or FLOPs; what is within another stage is that one's alone."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.total, self.open, self.since = now, defaultdict(float), ["rest"], now()

    def _tell(self) -> None:
        now = self.now()
        self.total[self.open[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._tell()
        self.open.append(name)
        try:
            yield
        finally:
            self._tell()
            self.open.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return wrapper

    def shares(self) -> dict[str, float]:
        self._tell()
        encoder = self.total.pop("encoder", 0.0) + self.total.pop("rest", 0.0)
        return {stage: self.total.get(stage, 0.0) for stage in STAGES} | {"rest of the encoder": encoder}


@contextlib.contextmanager
def watched(model: nn.Module, clock: Clock) -> Iterator[None]:
    """The model's stages, told to the clock: each module's forward, and of the fast blocks each op."""
    names: dict[nn.Module, str] = {model.encoder: "encoder"}
    for part, stage in PARTS.items():
        names |= {
            module: stage for name, module in model.named_modules() if name == part or part == "reassemble" and name[:-1] == f"{part}."
        }
    for block in model.blocks():
        if type(block) not in PLAIN:
            names |= {block.norm1: STAGES[0], block.attn: STAGES[1], block.attn.qkv: STAGES[0], block.attn.proj: STAGES[2]}
            names |= {block.norm2: STAGES[3], block.mlp: STAGES[3]}
    before = {name: getattr(modules, name) for name in OPS}
    for module, name in names.items():
        module.forward = clock.around(name, module.forward)
    for name, op in before.items():
        setattr(modules, name, clock.around(OPS[name], op))
    try:
        yield
    finally:
        for module in names:
            del module.forward
        for name, op in before.items():
            setattr(modules, name, op)


@contextlib.contextmanager
def saved(clock: Callable[[], Clock]) -> Iterator[None]:
    """Tell a clock, as negative FLOPs, what Winograd's algorithm does less than the convolution."""
    before = winograd.conv3x3

    def counted(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (batch, channels, height, width), outputs = x.shape, weight.shape[0]
        done = 4.5 * channels * outputs + 45 * channels + 72 * outputs
        clock().total[clock().open[-1]] -= batch * height * width * (18 * channels * outputs - done)
        return before(x, weight, *args, **kwargs)

    winograd.conv3x3 = counted
    try:
        yield
    finally:
        winograd.conv3x3 = before


def _attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Of PyTorch's attention on a CPU, which its counter does not know."""
    batch, heads, tokens, size = query
    return 4 * batch * heads * tokens * key[2] * size


def flops(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    with FlopCounterMode(display=False, custom_mapping={ATTENTION: _attention_flops}) as counter:
        clock = Clock(lambda: float(counter.get_total_flops()))
        with watched(model, clock):
            model(x)
        found = clock.shares()
    fewer = Clock(lambda: 0.0)
    with saved(lambda: fewer), watched(model, fewer):
        model(x)
    less = fewer.shares()
    return {stage: found[stage] + less[stage] for stage in STAGES}


@torch.inference_mode()
def measured(name: str, side: int) -> dict[str, Any]:
    """A model's record: for each stage the shares of plain, fast and the floor, and the whole's."""
    plain = randomise(dpt.build(name)).eval()
    models = {"plain": plain, "fast": dpt.accelerate(shared_copy(plain))}
    x = torch.randn(1, 3, side, side)
    done = {kind: flops(model, x) for kind, model in models.items()}
    rate = 0.0  # the best of all turns, or what disturbs it would raise the floor
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in models}
    for turn in range(RUNS + 1):
        rate = max(rate, measure.gemm_rate(torch.float32, torch.device("cpu")))
        for kind, model in models.items():
            clock = Clock(time.perf_counter)
            with watched(model, clock):
                clock.since = time.perf_counter()
                model(x)
            if turn:
                runs[kind].append(clock.shares())
    median = {kind: {stage: statistics.median(run[stage] for run in found) for stage in STAGES} for kind, found in runs.items()}
    whole = sum(median["plain"].values())
    stages = {
        stage: {
            "plain": round(median["plain"][stage] / whole, 4),
            "fast": round(median["fast"][stage] / whole, 4),
            "floor": round(done["fast"][stage] / rate / whole, 4),
        }
        for stage in STAGES
    }
    return {"model": name, "side": side, "stages": stages}


def page(record: dict[str, Any]) -> str:
    lines = [
        "# Where the time goes on a CPU",
        "",
        f"Written by `python -m bench.stages`; {record['device']}, {record['threads']} threads, {record['capability']}, float32, one",
        "picture. Percent of the plain model's whole time, medians of runs side by side. The floor is what a stage has to do, its FLOPs,",
        "by Winograd where that does fewer, at the best rate of a large product of matrices between the runs; exponentials and what only",
        "moves memory have none.",
    ]
    for model in record["models"]:
        lines += [
            "",
            f"## {model['model']}, {model['side']}x{model['side']}",
            "",
            "| stage | plain | fast | floor |",
            "| --- | ---: | ---: | ---: |",
        ]
        rows = [*model["stages"].items()]
        whole = {kind: sum(stage[kind] for _, stage in rows) for kind in ("plain", "fast", "floor")}
        for name, stage in [*rows, ("whole", whole)]:
            lines.append(f"| {name} | {100 * stage['plain']:.1f} | {100 * stage['fast']:.1f} | {100 * stage['floor']:.1f} |")
    return "\n".join(lines) + "\n"


def recorded_stages(names: Sequence[str]) -> dict[str, Any]:
    facts = environment.device_facts(torch.device("cpu"))
    return {
        "device": facts["name"],
        "threads": torch.get_num_threads(),
        "capability": choices.capability(),
        "models": [measured(name, MEASURED[name]) for name in names],
    }


def main(arguments: list[str] | None = None) -> int:
    return recorded.run(sys.modules[__name__], page, recorded_stages, MEASURED, arguments)


if __name__ == "__main__":
    raise SystemExit(main())

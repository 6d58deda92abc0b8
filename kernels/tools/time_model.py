"""The time model: from what a kernel's compiled code does at each turn of its loops to the time of a launch. Nothing of it is measured.

A kernel's loops, and the cycles of a turn on a multiprocessor that holds so many CTAs, are read off its machine code (``loops``); how
often they turn follows from the launch's arguments. A round is what a multiprocessor does with the CTAs that it holds at once:

    round(k) = START + outside(k) + sum over loops of turns * max(SLACK * cycles(k), k * bytes / L2 rate)

A launch is as many rounds as the fullest multiprocessors need, no faster than its tensors pass through the memory once, and LAUNCH. Where
several CTAs share a multiprocessor, half of what one does outside its loops hides behind the loops of another.

Calibrated, on what is published for the H100: SLACK by the forward attention of D=64 (Triton's 400 TFLOP/s at 4096 tokens; at 1024 and
2048 it is within 5 % of the published 382 and 396 without more); the L2 cache's rate by Triton's persistent GEMM of K 512 to 1024 (560 to
600 TFLOP/s); the libraries' share of the peak by cuBLAS (588) and cuDNN (444). Assumed: clocks under load, START, FILL and LAUNCH in a CUDA
graph, the latencies of ``issue``, that tensors come from the memory and not from the L2 cache, and all cards but the H100. Expect +-25 %,
and less of a comparison of two kernels of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import launch
from . import trips
from .cards import Card
from .loops import Facts

LAUNCH = 1.2  # us from one launch to the next in a CUDA graph
START = 900  # cycles until a CTA's first instructions are there, and after its last
FILL = 600  # until the first asynchronous copy is there
SLACK = 1.15  # what instructions take longer than counted: calibrated
HIDDEN = 0.5  # of what is outside loops, where another CTA's loops run beside it
ALONE = 1.7  # times its share of the L2 cache's rate, for a multiprocessor while most of the others are idle
# Of the peak, what the libraries reach; the least microseconds of a product, by its depth in steps of 64; and of anything else.
LIBRARY = {"gemm": 0.64, "convolution": 0.48}
DEPTH_STEP, DEPTH_MOST, PRODUCT_LEAST, OTHER_LEAST = 0.3, 15.0, 2.5, 1.0
TILE = 128


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch of one of our kernels. ``key``: of its specialisation in the record; ``arguments``: its integers, by name; ``moved``: bytes
    of its tensors."""

    name: str
    key: str
    arguments: Mapping[str, int | float]
    grid: tuple[int, ...]
    moved: int


@dataclass(frozen=True, eq=False)
class Library:
    """A call of PyTorch's own: "gemm", "convolution" or "other". ``columns``: of the product's result; ``depth``: what it sums over."""

    name: str
    kind: str
    moved: int
    flops: int = 0
    columns: int = 0
    depth: int = 0


@dataclass(frozen=True)
class Prediction:
    """Microseconds, what limits them, the share of multiprocessors that have nothing to do in the mean, and FLOPs of tensor cores."""

    microseconds: float
    limit: str
    idle: float
    flops: float
    waves: float = 1.0


def launch_of(case: launch.CompileCase, key: str) -> Launch:
    """What the model has to know of a recorded launch."""
    names = case.function.arg_names
    numbers = {
        name: value
        for name, value in zip(names, case.args, strict=False)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    words = [str(value) for name, value in case.kwargs.items() if isinstance(value, str) and name != "PRECISION"]
    sizes = "x".join(str(value) for value in numbers.values() if isinstance(value, int))
    name = " ".join([case.function.__name__, *words, sizes])
    return Launch(name.strip(), key, numbers, tuple(case.grid), case.moved)


def predict(work: Launch | Library, facts: Mapping[str, Facts], card: Card) -> Prediction:
    """The time of a launch, from the facts under its key, or of a library's call."""
    return _of_library(work, card) if isinstance(work, Library) else _of_launch(work, facts[work.key], card)


def _of_library(call: Library, card: Card) -> Prediction:
    memory = call.moved / card.memory / 1e6
    if call.kind == "other":
        return Prediction(max(memory, OTHER_LEAST) + LAUNCH, "memory" if memory > OTHER_LEAST else "launch", 0.0, 0.0)
    share = LIBRARY[call.kind] * call.columns / (math.ceil(call.columns / TILE) * TILE)
    products = call.flops / (share * card.tensor * card.multiprocessors * card.clock * 1e3)
    least = PRODUCT_LEAST + min(DEPTH_STEP * call.depth / 64, DEPTH_MOST)
    limit = max((products, "tensor cores"), (memory, "memory"), (least, "latency"))[1]
    return Prediction(max(products, memory, least) + LAUNCH, limit, 0.0, call.flops)


@dataclass(frozen=True)
class _Round:
    """Cycles of a round, those in loops, and of each resource what it alone would take."""

    cycles: float
    loops: float
    resources: Mapping[str, float]


def _cycles(region: Mapping[str, Any], ctas: int) -> float:
    """Of a region with so many CTAs, between those that were counted."""
    counted = {int(count): value for count, value in region["cycles"].items()}
    below = max(count for count in counted if count <= ctas)
    above = min(count for count in counted if count >= ctas)
    share = (ctas - below) / (above - below) if above > below else 0.0
    return counted[below] + share * (counted[above] - counted[below])


def _round(facts: Facts, turns: Sequence[float], ctas: int, active: int, card: Card) -> _Round:
    """With ``ctas`` on each of ``active`` multiprocessors."""
    l2 = card.l2 * min(ALONE, card.multiprocessors / active)
    outside = START + (FILL if any(region["copied"] for region in facts["regions"]) else 0)
    within = 0.0
    resources = dict.fromkeys(("tensor cores", "issue", "special functions", "L2"), 0.0)
    for region, times in zip(facts["regions"], turns, strict=True):
        bytes_moved = ctas * (region["copied"] + region["stored"]) / l2
        cycles = times * max(SLACK * _cycles(region, ctas), bytes_moved)
        within, outside = (within + cycles, outside) if region["loops"] else (within, outside + cycles)
        issued = region["instructions"] * facts["warps"] / 4
        resources["tensor cores"] += times * ctas * region["flops"] / card.tensor
        resources["issue"] += times * ctas * issued
        resources["special functions"] += times * ctas * region["special"] * facts["warps"] / 4 * 8
        resources["L2"] += times * bytes_moved
    return _Round(within + outside, within, resources)


def _turns(work: Launch, facts: Facts, program: Sequence[int]) -> list[float]:
    """Of each region, in a program."""
    place = [*program, *[0] * (3 - len(program))]
    at = trips.Bounds(facts["kernel"], facts["scalars"], work.arguments, (*work.grid, 1, 1), place)
    return [at.turns([(counter, bounds) for counter, *bounds in region["loops"]]) / region["unrolled"] for region in facts["regions"]]


def _of_launch(work: Launch, facts: Facts, card: Card) -> Prediction:
    programs, held = math.prod(work.grid), facts["ctas"]
    of_programs = [_turns(work, facts, [place(size) for size in work.grid]) for place in (lambda _: 0, lambda n: n // 2, lambda n: n - 1)]
    turns = [max(times) for times in zip(*of_programs, strict=True)]  # the others wait for who has most to do
    mean = [sum(times) / len(times) for times in zip(*of_programs, strict=True)]
    each = programs / card.multiprocessors
    active = min(programs, card.multiprocessors)
    full, rest = (int(each // held), math.ceil(each - each // held * held - 1e-9)) if each > 1 else (0, 1)
    whole, last = _round(facts, turns, held, active, card), _round(facts, turns, max(rest, 1), active, card)
    hidden = HIDDEN * (whole.cycles - whole.loops) if held > 1 else 0.0
    cycles = full * (whole.cycles - hidden) + (hidden if full else 0.0) + (last.cycles if rest else 0.0)
    busy = cycles / card.clock / 1e3
    memory = work.moved / card.memory / 1e6
    flops = programs * sum(times * region["flops"] for times, region in zip(mean, facts["regions"], strict=True))
    idle = 1 - each * sum(mean) / sum(turns) / (full * held + rest) if full * held + rest else 0.0
    most = max(busy, memory)
    limit = "memory" if memory >= busy else _limit(whole if full else last)
    return Prediction(most + LAUNCH, "launch" if most < LAUNCH else limit, max(0.0, idle), flops, each / held)


def _limit(made: _Round) -> str:
    """What a round is limited by: a resource that is used for most of it, or that nothing is: latency."""
    name, most = max(made.resources.items(), key=lambda item: item[1])
    return name if most > 0.6 * made.cycles else "latency"

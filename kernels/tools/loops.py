"""What a compiled kernel does at each turn of its loops and outside them, and how often they turn: what :mod:`predict` multiplies.

A loop of the machine code (``sass``) and one of Triton's (``trips``) are the same where they come from the same line. What Triton's has and
the machine code has not is unrolled; what the machine code has twice, several turns at once and one at a time, is unrolled with a
remainder, which is left out. A stretch of code's cycles on a multiprocessor that holds so many CTAs are ``issue``'s.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from .. import launch
from . import compiler, issue, sass, trips
from .cards import CARDS

Facts = dict[str, Any]
TURNS, MEASURED = 10, 4  # of a loop: the first fill its pipeline
SEVERAL = (1, 2, 3, 4, 6, 8, 12, 16)  # CTAs on a multiprocessor for which cycles are counted, up to as many as it holds
MOVES = ("LDG", "STG", "LDS", "STS", "LDGSTS")
COUNTED = {"special": "MUFU", "barriers": "BAR", "waits": "SYNCS"}


def disassemble(cubin: bytes) -> str:
    """The machine code with its lines of source and its control words."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return compiler.tool("nvdisasm", "-c", "-g", "-hex", file.name)


def facts(case: launch.CompileCase) -> Facts:
    """Compile ``case`` (or take it from Triton's cache) and read its loops."""
    report = compiler.measure(case)
    kernel, _ = compiler.compiled(case)
    found = read(report, disassemble(kernel.asm["cubin"]), kernel.asm["ttgir"])
    return json.loads(json.dumps(found))


def read(report: compiler.Report, machine_code: str, ttgir: str) -> Facts:
    """The facts of a kernel: {"kernel", "warps", "ctas" an SM holds, "scalars" (of its loops' bounds), "regions"}; a region is the code
    outside loops, which is the first, or a loop's without those in it."""
    code = sass.parse(machine_code)
    reached, found = sass.loops(code)
    outside, scalars = trips.read(ttgir)
    kernel = report.name.partition(" ")[0]
    products = sum(instruction.kind == "UTCHMMA" for instruction in code)
    product = sum(loop.flops for loop in trips.walk(outside)) / products if products else 0.0
    matched = list(_matched(kernel, code, found, outside, []))
    kept = {id(path[-1]) for _, path, _ in matched}
    constant = trips.Bounds(kernel, scalars, {}, (), ())

    def moved(loop: trips.For) -> tuple[int, int, int]:
        """(copied, stored, flops) of a turn, with those of the loops in it that are unrolled. What is copied ahead of a loop is that
        loop's, whose last turns copy nothing."""
        sums = [0 if loop.inner else loop.copied, loop.stored, loop.flops]
        for inner in loop.inner:
            if id(inner) not in kept:
                turns = constant.turns([(inner.counter, inner.bounds)])
                sums = [total + turns * more for total, more in zip(sums, moved(inner), strict=True)]
        copied, stored, flops = sums
        return copied, stored, flops

    def turns_are_constant(loop: trips.For) -> bool:
        try:
            return constant.turns([(loop.counter, loop.bounds)]) > 0
        except ValueError:
            return False

    within = frozenset[int]().union(*(loop.members for loop in found))
    regions = [_region(report, [code[place] for place in sorted(reached - within)], product, [], moved(outside), True)]
    for loop, path, times in matched:
        own_code = [code[place] for place in sorted(own(loop))]
        regions.append(_region(report, own_code, product, path, moved(path[-1]), turns_are_constant(path[-1]), times))
    return {"kernel": kernel, "warps": report.warps, "ctas": report.ctas_per_sm, "scalars": scalars, "regions": regions}


def _matched(
    kernel: str, code: Sequence[sass.Instruction], found: Sequence[sass.Loop], outer: trips.For, path: list[trips.For]
) -> Iterator[tuple[sass.Loop, list[trips.For], int]]:
    """Each loop of the machine code with Triton's, from the outermost to it, and how many of its turns are one: where its branch back is of
    the loop's line or, as the compiler moves instructions, another of its own. Those of one line come in the same order."""
    left = list(outer.inner)
    for loop, turns in _turns_at_once(code, found, outer):
        lines = [loop.line, *(code[place].line for place in sorted(own(loop)))]
        same = next((each for line in lines for each in left if each.line == line), None)
        if same is None:
            raise ValueError(f"{kernel}: the machine code has a loop of {loop.line} more than Triton's code has in its place")
        left.remove(same)
        yield loop, [*path, same], turns
        yield from _matched(kernel, code, loop.inner, same, [*path, same])


def _turns_at_once(code: Sequence[sass.Instruction], found: Sequence[sass.Loop], outer: trips.For) -> Iterator[tuple[sass.Loop, int]]:
    """The loops, each with how many turns it makes in one, without those that make what remains: of a line with more loops than Triton's
    code has, one that moves a whole part of what the loop before it moves."""
    more = Counter(loop.line for loop in found) - Counter(loop.line for loop in outer.inner)
    loops = list(found)
    while loops:
        loop, turns = loops.pop(0), 1
        if loops and loops[0].line == loop.line and more[loop.line]:
            much, little = (sum(code[place].kind in MOVES for place in own(each)) for each in (loop, loops[0]))
            if little and much > little and much % little == 0:
                turns = much // little
                more[loop.line] -= 1
                del loops[0]
        yield loop, turns


def own(loop: sass.Loop) -> frozenset[int]:
    """A loop's instructions without those of the loops in it."""
    return loop.members.difference(*(each.members for each in loop.inner))


def _region(
    report: compiler.Report,
    code: list[sass.Instruction],
    product: float,
    path: list[trips.For],
    moved: tuple[int, int, int],
    constant: bool,
    turns_at_once: int = 1,
) -> Facts:
    """``unrolled``: how many of the loop's turns one of the machine code's is: ``turns_at_once``, where there is a loop for the remainder,
    or by its products, where it turns a constant number of times."""
    rates = CARDS[report.family].rates(product)
    turns = {"stages": report.stages, "turns": TURNS, "measured": MEASURED} if path else {}
    flops = round(sum(issue.tensor_flops(each) * report.warps + product * (each.kind == "UTCHMMA") for each in code))
    times = flops / moved[2] if path and moved[2] else 1.0
    # A part of a turn's products is no turn: warps share out what is too small for them.
    unrolled = round(times) if constant and times == round(times) > 1 else turns_at_once
    return {
        "line": path[-1].line if path else None,
        "loops": [[each.counter, *each.bounds] for each in path],
        "unrolled": unrolled,
        "instructions": len(code),
        **{name: sum(each.kind == kind for each in code) for name, kind in COUNTED.items()},
        "flops": flops,
        "copied": moved[0] * unrolled,
        "stored": moved[1] * unrolled,
        "cycles": {
            str(ctas): round(issue.cycles(code, rates, warps=report.warps, ctas=ctas, **turns))
            for ctas in sorted({*SEVERAL, report.ctas_per_sm})
            if ctas <= report.ctas_per_sm
        },
    }

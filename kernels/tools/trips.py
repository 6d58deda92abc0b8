"""The loops of a kernel as Triton's own intermediate code has them: how often each turns, and what it moves.

The bounds are integers that the kernel computes from its arguments and its place in the grid. What of the code leads to them is kept, an
operation a value, and computed again for a launch: so no one says a second time how long a kernel's loops are.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Scalars = dict[str, list[str]]  # a value -> the operation that makes it, and what of

_VALUE = r"%[\w\-#.]+"
_FOR = re.compile(rf"^( *)(?:{_VALUE}(?::\d+)? = )?scf\.for ({_VALUE}) = ({_VALUE}) to ({_VALUE}) step ({_VALUE})")
_ASSIGNED = re.compile(rf"^ *({_VALUE}) = (?:arith|math|tt)\.(\w+) (.*?) : (.*?) loc\(")
_PROGRAM = re.compile(rf"^ *({_VALUE}) = tt\.(get_program_id|get_num_programs) (\w)")
_CLOSED = re.compile(r"^( *)\}.* loc\((.*)\)$")
_LOCATION = re.compile(r"^(#\w+) = loc\((.*)\)$")
_ARGUMENT = re.compile(rf"({_VALUE}): \w+(?: \{{[^}}]*\}})? loc\(\"(\w+)\"")
_COPY, _STORE = (
    ("async_tma_copy_global_to_local", "async_copy_global_to_local", "async_tma_gather"),
    ("tt.store", "async_tma_copy_local_to_global"),
)
_PRODUCT = re.compile(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) ")
_TYPE = re.compile(r"<((?:\d+x)*)(?:!tt\.ptr<)?(bf16|f\d+\w*|i\d+)")
_AXES = {"x": 0, "y": 1, "z": 2}


def _quotient(a: float, b: float) -> int:
    return int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


_COMPARED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("addi", "addf"), operator.add),
    **dict.fromkeys(("subi", "subf"), operator.sub),
    **dict.fromkeys(("muli", "mulf"), operator.mul),
    **dict.fromkeys(("divsi", "divui"), _quotient),
    **dict.fromkeys(("divf", "precise_divf"), operator.truediv),
    **dict.fromkeys(("remsi", "remui"), lambda a, b: a - _quotient(a, b) * b),
    **dict.fromkeys(("minsi", "minui", "minnumf", "minimumf"), min),
    **dict.fromkeys(("maxsi", "maxui", "maxnumf", "maximumf"), max),
    **dict.fromkeys(("extsi", "extui", "trunci", "sitofp", "uitofp", "extf", "truncf"), lambda a: a),
    "ceildivsi": lambda a, b: -(-a // b),
    "fptosi": int,
    "floor": math.floor,
    "ceil": math.ceil,
    "negf": operator.neg,
    "fma": lambda a, b, c: a * b + c,
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
    "shli": operator.lshift,
    "shrsi": operator.rshift,
    "select": lambda condition, a, b: a if condition else b,
}


@dataclass
class For:
    """A loop, or (with no line) all that is in none. ``bounds``: the values from, to and by which ``counter`` goes. Of one turn and CTA,
    inner loops apart: ``copied`` and ``stored`` bytes, those of asynchronous copies from the device's memory and those written, and
    ``flops`` of products."""

    line: str | None = None
    counter: str = ""
    bounds: tuple[str, ...] = ()
    copied: int = 0
    stored: int = 0
    flops: int = 0
    inner: list[For] = field(default_factory=list)


def walk(root: For) -> Iterator[For]:
    """The loop and all in it, in their order."""
    yield root
    for loop in root.inner:
        yield from walk(loop)


def read(text: str) -> tuple[For, Scalars]:
    """(everything outside loops, with the loops in it; what their bounds are computed from) of a kernel's TTGIR."""
    locations = {match[1]: match[2] for row in text.splitlines() if (match := _LOCATION.match(row))}
    root, made = For(), {}
    open_loops = [(-1, root)]
    for row in text.splitlines():
        if "tt.func" in row:
            made |= {value: ["argument", name] for value, name in _ARGUMENT.findall(row)}
        elif match := _FOR.match(row):
            loop = For(counter=match[2], bounds=match.group(3, 4, 5))
            open_loops[-1][1].inner.append(loop)
            open_loops.append((len(match[1]), loop))
        elif (match := _CLOSED.match(row)) and len(match[1]) == open_loops[-1][0]:
            open_loops.pop()[1].line = _line(match[2], locations)
        else:
            _gather(row, open_loops[-1][1], made)
    wanted: Scalars = {}
    for loop in walk(root):
        for value in loop.bounds:
            _slice(value, made, wanted)
    return root, wanted


def _line(location: str, locations: Mapping[str, str]) -> str:
    """ "file.py:12" of a location, which may be a name's, or of a call: the innermost."""
    while not (match := re.match(r'"[^"]*/([^"/]*)":(\d+):', location)):
        location = locations[re.search(r"#\w+", location)[0]]
    return f"{match[1]}:{match[2]}"


def _gather(row: str, loop: For, made: Scalars) -> None:
    """What a row adds to its loop, and the number that it makes."""
    if match := _PROGRAM.match(row):
        made[match[1]] = [match[2], match[3]]
    elif (match := _ASSIGNED.match(row)) and "<" not in match[4]:
        made[match[1]] = [match[2], *(part.strip() for part in match[3].split(","))]
    if any(f"{name} " in row for name in _COPY):
        loop.copied += _bytes(row.rpartition("->")[2] if "tma" in row else row.rpartition("->")[0])
    elif any(f"{name} " in row for name in _STORE):
        loop.stored += _bytes(row)
    elif _PRODUCT.search(row):
        operands = [[int(side) for side in sides.split("x")[:-1]] for sides, _ in re.findall(r"<((?:\d+x)+)(bf16|f\w+|i8)", row)]
        loop.flops += 2 * math.prod(operands[0][-2:]) * operands[1][-1]


def _bytes(types: str) -> int:
    """Of the largest tensor among the types: a pointer's elements, or what is copied."""
    found = []
    for sides, kind in _TYPE.findall(types):
        bits = int(re.sub(r"\D.*", "", re.sub(r"^\D+", "", kind)) or 0)
        found.append(math.prod(int(side) for side in sides.split("x")[:-1]) * bits // 8)
    return max(found, default=0)


def _slice(value: str, made: Scalars, wanted: Scalars) -> None:
    """Put into ``wanted`` the value and what it is made of. A loop's counter, and what else is not made by an operation, stays a name."""
    if value in made and value not in wanted:
        wanted[value] = made[value]
        for operand in made[value][1:]:
            _slice(operand, made, wanted)


class Bounds:
    """Computes the bounds of a kernel's loops for one launch and program."""

    def __init__(
        self, kernel: str, scalars: Mapping[str, Sequence[str]], arguments: Mapping[str, Any], grid: Sequence[int], program: Sequence[int]
    ):
        self.kernel, self.scalars, self.arguments, self.grid, self.program = kernel, scalars, arguments, grid, program

    def value(self, name: str, counters: Mapping[str, int]) -> Any:
        """A number that the kernel computes, where the loops around it are at ``counters``."""
        if name in counters:
            return counters[name]
        if not name.startswith("%"):
            return (
                {"true": 1, "false": 0}.get(name) if name in ("true", "false") else float(name) if re.search(r"[.e]", name) else int(name)
            )
        if name not in self.scalars:
            raise ValueError(
                f"{self.kernel}: a loop's bound depends on {name}, which is no integer made of its arguments and its place in the grid"
            )
        operation, *operands = self.scalars[name]
        if operation == "argument":
            if not isinstance(self.arguments.get(operands[0]), (int, float)):
                raise ValueError(f"{self.kernel}: a loop's bound depends on its argument {operands[0]!r}, which is no number")
            return self.arguments[operands[0]]
        if operation in ("get_program_id", "get_num_programs"):
            places = self.program if operation == "get_program_id" else self.grid
            if not places:
                raise ValueError(f"{self.kernel}: a loop's bound depends on the program's place in the grid")
            return places[_AXES[operands[0]]]
        if operation == "constant":
            return self.value(operands[0], counters)
        if operation in ("cmpi", "cmpf"):
            compare = _COMPARED[operands[0].lstrip("sou")]
            return compare(*(self.value(operand, counters) for operand in operands[1:]))
        if operation not in _OPERATIONS:
            raise ValueError(f"{self.kernel}: a loop's bound is made by {operation!r}, which is not in kernels/tools/trips.py")
        return _OPERATIONS[operation](*(self.value(operand, counters) for operand in operands))

    def turns(self, loops: Sequence[tuple[str, Sequence[str]]], counters: Mapping[str, int] | None = None) -> int:
        """How often the innermost of nested loops, (counter, bounds) each from the outermost, turns altogether."""
        if not loops:
            return 1
        (counter, bounds), *inner = loops
        known = dict(counters or {})
        start, stop, step = (int(self.value(bound, known)) for bound in bounds)
        if not inner:
            return len(range(start, stop, step))
        return sum(self.turns(inner, {**known, counter: value}) for value in range(start, stop, step))

"""A kernel's machine code as nvdisasm writes it: its instructions, each with what it waits for, and its loops.

The upper word of each instruction says how long the scheduler stalls after it, which of six scoreboards it waits for, and which it sets
when its result is there or its operands are read: the compiler's own account of every dependency, so that none has to be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?)(U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_UPPER = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^\.(L_\w+):")
_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_TARGET = re.compile(r"\.(L_\w+)")
NONE = 7  # no scoreboard
SPIN, ASKING, MOVING = 8, {"SYNCS", "NANOSLEEP", "UTCATOMSWS"}, {"BRA", "IMAD", "MOV", "UMOV", "DEPBAR", "YIELD"}  # a wait's instructions


@dataclass(frozen=True)
class Instruction:
    """``name``: "HGMMA.64x128x16.F32.BF16". ``stall``: cycles before the warp's next one; ``sets`` and ``releases``: the scoreboard of its
    result and of its operands, or NONE; ``waits``: a mask of scoreboards. ``line``: of the source, "products.py:106". ``target``: where
    a branch goes."""

    name: str
    operands: str
    predicated: bool
    stall: int
    sets: int
    releases: int
    waits: int
    line: str
    target: int | None = None

    @property
    def kind(self) -> str:
        """The name without its modifiers."""
        return self.name.partition(".")[0]


@dataclass
class Loop:
    """A natural loop: the indices of its instructions, those of inner loops included; ``line``: of the statement that it comes from."""

    line: str
    members: frozenset[int]
    inner: list[Loop] = field(default_factory=list)


def parse(text: str) -> list[Instruction]:
    """The instructions of ``nvdisasm -c -g -hex`` of a binary that holds one kernel."""
    found: list[tuple[re.Match[str], str]] = []
    uppers: list[int] = []
    labels: dict[str, int] = {}
    line = ""
    for row in text.splitlines():
        if match := _LABEL.match(row):
            labels[match[1]] = len(found)
        elif match := _LINE.search(row):
            line = f"{match[1].rpartition('/')[2]}:{match[2]}"
        elif match := _INSTRUCTION.match(row):
            found.append((match, line))
        elif (match := _UPPER.match(row)) and len(uppers) < len(found):
            uppers.append(int(match[1], 16))
    return [_instruction(match, upper, line, labels) for (match, line), upper in zip(found, uppers, strict=True)]


def _instruction(match: re.Match[str], upper: int, line: str, labels: dict[str, int]) -> Instruction:
    _, predicate, name, operands, _ = match.groups()
    target = labels.get(_TARGET.search(operands)[1]) if name.startswith("BRA") and _TARGET.search(operands) else None
    control = upper >> 41
    return Instruction(
        name,
        operands,
        predicate not in (None, "PT", "UPT"),
        stall=control & 15,
        sets=control >> 5 & 7,
        releases=control >> 8 & 7,
        waits=control >> 11 & 63,
        line=line,
        target=target,
    )


def _followers(code: list[Instruction]) -> list[list[int]]:
    """Where control can go from each instruction. A called function is one of the compiler's slow paths, and is not followed."""
    found = []
    for index, each in enumerate(code):
        ends = each.kind in ("EXIT", "RET") or (each.kind == "BRA" and not _conditional(each))
        after = [] if ends and not (each.kind == "EXIT" and each.predicated) else [index + 1]
        found.append([place for place in (*after, each.target) if place is not None and place < len(code)])
    return found


def _conditional(branch: Instruction) -> bool:
    """A branch's condition is its predicate, or an operand before its target: `BRA.U UP0, ...`."""
    return branch.predicated or re.match(r"!?U?P\d", branch.operands) is not None


def _reached(followers: list[list[int]], start: int, without: int | None = None) -> set[int]:
    reached, pending = set(), [start]
    while pending:
        place = pending.pop()
        if place not in reached and place != without:
            reached.add(place)
            pending += followers[place]
    return reached


def loops(code: list[Instruction]) -> tuple[frozenset[int], list[Loop]]:
    """(all instructions that can be reached, the outermost loops). A branch back is a loop's if the kernel gets to it only through its
    target: the wait for an asynchronous copy is compiled to a spin behind the code, which branches back too and is none. A spin itself,
    which only asks whether it may go on, is left out."""
    followers = _followers(code)
    reached = _reached(followers, 0)
    members: dict[int, set[int]] = {}
    lines: dict[int, str] = {}
    predecessors: list[list[int]] = [[] for _ in code]
    for place in reached:
        for after in followers[place]:
            predecessors[after].append(place)
    for place in sorted(reached):
        head = code[place].target
        if head is None or head > place or head == place or place in _reached(followers, 0, without=head):
            continue
        body, pending = {head}, [place]
        while pending:
            each = pending.pop()
            if each not in body:
                body.add(each)
                pending += predecessors[each]
        members.setdefault(head, set()).update(body)
        lines[head] = code[place].line
    spins = {place for body in members.values() if _spins(code, body) for place in body}
    found = [Loop(lines[head], frozenset(body - spins)) for head, body in members.items() if not body <= spins]
    return frozenset(reached - spins), _nested(sorted(found, key=lambda loop: -len(loop.members)))


def _spins(code: list[Instruction], body: set[int]) -> bool:
    """Whether a loop does nothing but ask, for a barrier's phase or for tensor memory that another CTA still has, and move its question."""
    kinds = {code[place].kind for place in body}
    return len(body) <= SPIN and bool(kinds & ASKING) and kinds <= ASKING | MOVING


def _nested(found: list[Loop]) -> list[Loop]:
    """The loops, largest first, as a forest in the order of the code."""
    outermost: list[Loop] = []
    for loop in found:
        level = outermost
        while outer := next((each for each in level if loop.members < each.members), None):
            level = outer.inner
        level.append(loop)
        level.sort(key=lambda each: min(each.members))
    return outermost


def walk(found: list[Loop], outer: Loop | None = None) -> Iterator[tuple[Loop, Loop | None]]:
    """Every loop with the one around it."""
    for loop in found:
        yield loop, outer
        yield from walk(loop.inner, loop)

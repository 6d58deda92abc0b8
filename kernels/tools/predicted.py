"""The committed predictions: `compiled-code/predicted.md`, what its times are computed from, and what the same model says of older code.

predicted.json          the loops of each specialisation that the table's forwards launch, by its key in the ledger
predicted-before.json   those of the kernels of an earlier commit, with its forwards' launches: so that the model, where it is
                        corrected, is corrected for both
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import launch
from . import compiler, ledger, loops
from .cards import CARDS, Card
from .time_model import Launch, Library, Prediction, launch_of, predict

FAMILY, DTYPE = "sm_90", torch.bfloat16
RECORD, BEFORE, TABLE = "predicted", "predicted-before.json", "predicted.md"
SMALL = 0.015  # of a forward: what takes less is not shown
Counts = dict[Launch | Library, int]
HEAD = """# Predicted times

Written by `make compiled-code` with Triton {triton}; a test holds it to the code. **A prediction, +-25 %, of a model that is calibrated on
published figures (`kernels/tools/time_model.py`): {measured}.** {card}, {dtype}, launches in a CUDA graph.
"Before" is the same model's word on the kernels of commit {commit}.
"""


@dataclass(frozen=True)
class Row:
    """A launch or call, how often it is made, and what one takes."""

    work: Launch | Library
    count: int
    each: Prediction

    @property
    def microseconds(self) -> float:
        return self.count * self.each.microseconds


@dataclass(frozen=True)
class Forward:
    """The rows of a forward, what takes the most first."""

    rows: Sequence[Row]

    @property
    def microseconds(self) -> float:
        return sum(row.microseconds for row in self.rows)

    @property
    def launches(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def rate(self) -> float:
        """TFLOP/s."""
        return sum(row.count * row.each.flops for row in self.rows) / self.microseconds / 1e6

    def table(self, least: float = 0.0) -> list[str]:
        """In Markdown, of what takes at least that share."""
        lines = ["| launch | number | us each | us | TFLOP/s | limited by | idle |", "| --- |" + " --- |" * 6]
        for row in self.rows:
            if row.microseconds >= least * self.microseconds:
                each = row.each
                rate = f"{each.flops / each.microseconds / 1e6:.0f}" if each.flops else ""
                cells = [
                    row.work.name,
                    row.count,
                    f"{each.microseconds:.1f}",
                    f"{row.microseconds:.0f}",
                    rate,
                    each.limit,
                    f"{each.idle:.0%}",
                ]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        return lines


def counted(works: Iterable[launch.CompileCase | Library], known: dict[str, loops.Facts], compiling: bool = True) -> Counts:
    """Each different launch and call of ``works``, and how often it is made. The facts of what is not ``known`` are read off its compiled
    code and put there, if ``compiling``."""
    keys: dict[Any, str] = {}
    found: dict[str, tuple[Launch | Library, int]] = {}
    for each in works:
        work: Launch | Library
        if isinstance(each, Library):
            work = each
        else:
            what = each.specialisation()
            if what not in keys:
                keys[what] = compiler.key_of(each)
            if compiling and keys[what] not in known:
                known[keys[what]] = loops.facts(each)
            work = launch_of(each, keys[what])
        known_work, count = found.get(repr(work), (work, 0))
        found[repr(work)] = known_work, count + 1
    return dict(found.values())


def forward(counts: Mapping[Launch | Library, int], facts: Mapping[str, loops.Facts], card: Card) -> Forward:
    """What a forward takes."""
    rows = [Row(work, count, predict(work, facts, card)) for work, count in counts.items()]
    return Forward(sorted(rows, key=lambda row: (-row.microseconds, row.work.name)))


def without_lines(facts: loops.Facts) -> loops.Facts:
    """The facts as they are recorded: where the loops stand in a file is not of the code."""
    return {**facts, "regions": [{name: value for name, value in region.items() if name != "line"} for region in facts["regions"]]}


def write_before(module: ModuleType, commit: str, folder: Path = ledger.FOLDER) -> None:
    """Record what the code as it is, which is that of ``commit``, launches for the table's forwards."""
    known: dict[str, loops.Facts] = {}
    forwards = {}
    for name, works in module.forwards(DTYPE, FAMILY):
        forwards[name] = [[count, type(work).__name__, asdict(work)] for work, count in counted(works, known).items()]
    facts = {key: without_lines(found) for key, found in known.items()}
    lines = [f'"commit": {json.dumps(commit)}', *_entries("loops", facts), *_entries("forwards", forwards)]
    (folder / BEFORE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _entries(name: str, content: Mapping[str, Any]) -> Iterator[str]:
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    yield f"{json.dumps(name)}: {{\n{lines}\n}}"


def read_before(folder: Path = ledger.FOLDER) -> tuple[str, dict[str, Forward]]:
    """(the commit, its forwards as the model predicts them now)."""
    record = json.loads((folder / BEFORE).read_text())
    kinds = {"Launch": Launch, "Library": Library}
    found = {}
    for name, works in record["forwards"].items():
        counts = {
            kinds[kind](**{**fields, **({"grid": tuple(fields["grid"])} if "grid" in fields else {})}): count
            for count, kind, fields in works
        }
        found[name] = forward(counts, record["loops"], CARDS[FAMILY])
    return record["commit"], found


def text(forwards: Mapping[str, Forward], before: tuple[str, Mapping[str, Forward]], measured: Mapping[str, float]) -> str:
    """The table. ``measured``: milliseconds of the forwards that a card has run; without any there is no such column."""
    commit, earlier = before
    said = "measured beside it, where a card has run it" if measured else "nothing here has been measured"
    head = HEAD.format(
        triton=compiler.TABLE_TRITON, measured=said, card=CARDS[FAMILY].name, dtype=str(DTYPE).removeprefix("torch."), commit=commit
    )
    columns = ["forward", "before, ms", "predicted, ms", *(["measured, ms"] if measured else []), "launches before", "launches", "TFLOP/s"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for name, made in forwards.items():
        old = earlier.get(name)
        cells = [name, f"{old.microseconds / 1e3:.3f}" if old else "", f"{made.microseconds / 1e3:.3f}"]
        cells += [f"{measured[name]:.3f}" if name in measured else ""] if measured else []
        cells += [str(old.launches) if old else "", str(made.launches), f"{made.rate:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    parts = [f"\n## {name}\n\n" + "\n".join(made.table(SMALL)) + "\n" for name, made in forwards.items()]
    return head + "\n" + "\n".join(lines) + "\n" + f"\nBelow, what takes at least {SMALL:.1%} of a forward.\n" + "".join(parts)


def write(module: ModuleType, folder: Path = ledger.FOLDER) -> None:
    """Make the record and the table those of the code as it is; only what is not recorded is compiled."""
    recorded, known = ledger.read(RECORD, folder), {}
    forwards = {}
    used: set[str] = set()
    known = dict(recorded)
    for name, works in module.forwards(DTYPE, FAMILY):
        counts = counted(works, known)
        used |= {work.key for work in counts if isinstance(work, Launch)}
        forwards[name] = forward(counts, known, CARDS[FAMILY])
    ledger.write(RECORD, {key: without_lines(found) for key, found in known.items() if key in used}, folder)
    (folder / TABLE).write_text(text(forwards, read_before(folder), module.measured(FAMILY)))


def problems(module: ModuleType, draw: int = 0, seed: int = 0, folder: Path = ledger.FOLDER) -> Iterator[str]:
    """What of the committed predictions is not current; nothing is compiled but ``draw`` of the recorded specialisations, at random."""
    recorded = ledger.read(RECORD, folder)
    cases: dict[str, launch.CompileCase] = {}
    forwards = {}
    for name, works in module.forwards(DTYPE, FAMILY):
        kept = list(works)
        for case in launch.distinct(each for each in kept if not isinstance(each, Library)):
            cases.setdefault(compiler.key_of(case), case)
        forwards[name] = counted(kept, recorded, compiling=False)
    different = sorted(set(cases) ^ set(recorded))
    if different:
        yield f"the record's specialisations are not the forwards': {', '.join(different)}: run `make compiled-code`"
        return
    made = {name: forward(counts, recorded, CARDS[FAMILY]) for name, counts in forwards.items()}
    if (folder / TABLE).read_text() != text(made, read_before(folder), module.measured(FAMILY)):
        yield f"{TABLE} is not what the model makes of the record: run `make compiled-code`"
    for key in random.Random(seed).sample(sorted(cases), min(draw, len(cases))):
        if without_lines(loops.facts(cases[key])) != recorded[key]:
            yield f"{key}, {cases[key].function.__name__}: its loops are not as recorded"

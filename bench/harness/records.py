"""Recorded runs: one JSON file a device and a suite, `bench/results/<device>-<what>.json`, in one schema.

README.md describes the fields. A file is checked when it is written and when it is read: a field that is missing, of another type or
unknown is a ValueError that names it.
"""

from __future__ import annotations

import json
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from .. import ROOT

SCHEMA = 1
RESULTS = ROOT / "bench" / "results"
SUITES = ("models", "transformers", "steps", "training", "pictures", "kernels", "host")
STATUSES = ("ok", "failed", "error")
FUSED = "fused"  # what our op is called among the contenders of a kernel's case
ALGEBRA = "PyTorch algebra"  # how the note of a fast row begins where no kernel runs


@dataclass
class Row:
    """One contender of one case. Times in milliseconds; what was not measured is None.

    ``status``: "ok"; "failed", its output did not pass the gate and it was not timed; "error", it raised. ``loss`` and ``allowed`` are the
    gate's, ``difference`` the largest difference from float32; all are relative to the largest value. ``roofline_share``: the least time
    the device could need (see README.md) over p50. ``speedup``: the median over rounds of baseline / contender, [low, high] its spread.
    """

    case: str
    contender: str
    baseline: str
    dtype: str
    shape: list[int]
    status: str
    timing: str
    note: str = ""
    problem: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    durations_ms: list[float] = field(default_factory=list)
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    per_second: float | None = None
    unit: str = "images"
    peak_memory_bytes: int | None = None
    flops: int | None = None
    bytes: int | None = None
    roofline_share: float | None = None
    loss: float | None = None
    allowed: float | None = None
    difference: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.case, self.contender


@dataclass
class Skip:
    """What was not measured, and why. ``contender`` is empty for a whole case."""

    case: str
    contender: str
    reason: str


@dataclass
class Record:
    """One suite of one run. ``state``: {"before", "after"}, clocks and the like. ``ceilings``: the rates the roofline is made of.

    ``options``: among them ``filter`` (-k), ``without``, and ``cells``: [rows that were asked for, rows that the suite has].
    """

    what: str
    device: dict[str, Any]
    versions: dict[str, Any]
    commit: str | None
    dirty: bool | None
    started: str
    seconds: float
    options: dict[str, Any]
    state: dict[str, Any]
    ceilings: dict[str, float]
    memory: str
    rows: list[Row]
    skipped: list[Skip]
    schema: int = SCHEMA

    @property
    def part(self) -> str:
        """Of a run that was not asked for its whole suite, what it was asked for; else empty. Older files were always of the whole."""
        chosen, offered = self.options.get("cells", (0, 0))
        if chosen == offered:
            return ""
        only = [f"only `{self.options['filter']}`"] if self.options.get("filter") else []
        return ", ".join([f"{chosen} of {offered} rows", *only, *(f"without {name}" for name in self.options.get("without", []))])

    def row(self, key: tuple[str, str]) -> Row | None:
        """The row of (case, contender)."""
        return next((row for row in self.rows if row.key == key), None)


def file_name(device_slug: str, what: str, suffix: str = "") -> str:
    """`<device>-<what>.json`; a suffix tells a second run of the same from the first."""
    return f"{device_slug}-{what}{'-' + suffix if suffix else ''}.json"


def write(record: Record, path: Path) -> None:
    """Write a record, whole or not at all; ValueError if it does not keep the schema."""
    content = asdict(record)
    _build(Record, json.loads(json.dumps(content)), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(_format(content), encoding="utf-8")
    os.replace(partial, path)


def _format(content: Mapping[str, Any]) -> str:
    """One field a line, rows and skips one entry a line."""
    lines = []
    for name, value in content.items():
        if name in ("rows", "skipped") and value:
            entries = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            lines.append(f'"{name}": [\n{entries}\n]')
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: Path | str) -> Record:
    """A record from its file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, of another schema, or a field that is missing, unknown or of another type.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a benchmark record of schema {SCHEMA}")
    return _build(Record, content, str(path))


def read_all(folder: Path = RESULTS) -> dict[str, Record]:
    """File name -> record, for every file in a folder that is named after a suite; others (the tuning's) have schemas of their own."""
    named = re.compile(rf".+-({'|'.join(SUITES)})(-[a-z0-9]+)?\.json")
    return {path.name: read(path) for path in sorted(folder.glob("*.json")) if named.fullmatch(path.name)}


def first_runs(records: Mapping[str, Record]) -> dict[str, Record]:
    """Without second runs of the same (`<device>-<what>-again.json`), which are there to show that the first repeats."""
    return {name: record for name, record in records.items() if name.endswith(f"-{record.what}.json")}


def _build(kind: type, content: Any, where: str) -> Any:
    """An instance of a dataclass out of JSON, strictly."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, found {type(content).__name__}")
    hints = typing.get_type_hints(kind)
    names = {item.name for item in fields(kind)}
    problems = [f"unknown field {name!r}" for name in content.keys() - names] + [f"no field {name!r}" for name in names - content.keys()]
    if problems:
        raise ValueError(f"{where}: {', '.join(sorted(problems))}")
    built = kind(**{name: _value(hints[name], content[name], f"{where}: {name}") for name in names})
    for name, allowed in (("status", STATUSES), ("what", SUITES)):
        if name in names and getattr(built, name) not in allowed:
            raise ValueError(f"{where}: {name} is {getattr(built, name)!r}, it must be one of {', '.join(allowed)}")
    return built


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        return _build(hint, value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} is {value!r}, it must be {getattr(hint, '__name__', hint)}")

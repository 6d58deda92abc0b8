"""Charts of recorded runs, `bench/results/<device>-<what>.svg`.

Each carries a hash of the data it shows: by that, not by its pixels, it is told whether it is current.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..harness.records import Record, Row, first_runs
from . import tables

CHARTED = ("models", "steps")

# Legible on white and on GitHub's dark background: tests/bench holds every one of these to a contrast of 3 on both.
INK, PLAIN, FAST, PEER = "#7d8590", "#8b7d6b", "#c2410c", "#2f81c7"


def charted_rows(record: Record) -> list[Row]:
    """What a chart shows: of the models the batch 1 cases, of the steps the first case."""
    rows = [row for row in record.rows if row.status == "ok"]
    if record.what == "models":
        return [row for row in rows if row.facts.get("batch") == 1]
    return [row for row in rows if row.case == rows[0].case] if rows else []


class Bar(NamedTuple):
    """Of a chart; the length is images/s on a GPU and times the baseline elsewhere."""

    label: str
    length: float
    difference: float | None
    colour: str


def chart_data(record: Record) -> dict[str, list[Bar]]:
    """Case -> its bars."""

    def bar(row: Row) -> Bar:
        length = row.per_second if record.device["kind"] == "cuda" else row.speedup or 1.0
        return Bar(tables.label(row), float(f"{length:.5g}"), row.difference, _colour(row))

    return {case: [bar(row) for row in rows] for case, rows in tables.by_case(charted_rows(record)).items()}


def fingerprint(record: Record) -> str:
    """A hash of what a chart shows."""
    return hashlib.sha256(json.dumps([record.what, record.device["name"], chart_data(record)]).encode()).hexdigest()


def fingerprint_of(path: Path) -> str | None:
    """The hash a chart carries; None if it carries none or is not there."""
    if not path.is_file():
        return None
    match = re.search(r"data sha256 ([0-9a-f]{64})", path.read_text(encoding="utf-8"))
    return match.group(1) if match else None


def charts(records: Mapping[str, Record]) -> dict[str, Record]:
    """File name of each chart -> the record it shows."""
    return {
        f"{Path(name).stem}.svg": record for name, record in first_runs(records).items() if record.what in CHARTED and charted_rows(record)
    }


def _colour(row: Row) -> str:
    if row.contender.startswith(("fast", "+")):
        return FAST
    return PLAIN if row.contender.startswith("plain") else PEER


def draw(record: Record, path: Path) -> None:
    """A bar a row, the difference from float32 beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    data = chart_data(record)
    unit = "images per second" if record.device["kind"] == "cuda" else "times as fast as the first"
    inked = dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({"svg.hashsalt": "dpt", **inked}):
        height = 0.34 * sum(map(len, data.values())) + 0.7 * len(data) + 0.5
        figure = Figure(figsize=(8, height), layout="constrained")
        axes = figure.subplots(len(data), 1, squeeze=False, height_ratios=[len(bars) + 1 for bars in data.values()])[:, 0]
        for axis, (case, bars) in zip(axes, data.items(), strict=True):
            _bars(axis, case, bars)
        figure.supxlabel(f"{unit}, {record.device['name']}; beside the bar the largest difference from float32", fontsize=8, color=INK)
        metadata = {"Date": None, "Creator": None, "Description": f"data sha256 {fingerprint(record)}"}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.svg")
        figure.savefig(partial, transparent=True, metadata=metadata)
    os.replace(partial, path)


def _bars(axis, case: str, bars: Sequence[Bar]) -> None:
    places = range(len(bars))
    axis.barh(places, [bar.length for bar in bars], color=[bar.colour for bar in bars], height=0.7)
    for place, bar in zip(places, bars, strict=True):
        difference = "" if bar.difference is None else f", {bar.difference:.0e}"
        axis.text(bar.length, place, f" {bar.length:.3g}{difference}", va="center", fontsize=8)
    axis.set_yticks(places, [bar.label for bar in bars], color=INK, fontsize=8)
    axis.set_title(case, fontsize=9, loc="left", color=INK)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)

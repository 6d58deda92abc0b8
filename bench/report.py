"""From recorded runs to what people read: `python -m bench.report` writes the README's tables and the charts; `--check` only compares.

The tables stand in README.md between `<!-- bench:begin -->` and `<!-- bench:end -->`. The charts are `bench/results/<device>-<what>.svg`;
each carries a hash of the data it shows, and it is by that, not by its pixels, that `--check` tells whether it is current.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import ROOT
from .harness.records import RESULTS, Record, Row, first_runs, read_all
from .reporting import tables

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_GPU = "**No GPU run exists yet.** The kernels need a GPU: what follows is of a CPU, where none of them runs."
NOTHING = "**No run has been recorded yet**, neither on a GPU nor on a CPU."
TITLES = {"models": "Whole models", "steps": "Step by step", "training": "Training step", "kernels": "Kernels"}
CHARTED = ("models", "steps")

# Legible on white and on GitHub's dark background: tests/bench holds every one of these to a contrast of 3 on both.
INK, PLAIN, FAST, PEER = "#7d8590", "#8b7d6b", "#c2410c", "#2f81c7"


def block(records: Mapping[str, Record]) -> str:
    """What stands between the markers."""
    records = first_runs(records)
    if not records:
        return NOTHING
    parts = [] if any(record.device["kind"] == "cuda" for record in records.values()) else [NO_GPU]
    for name, record in sorted(records.items(), key=_order):
        parts.append("\n".join(_section(name, record)))
    return "\n\n".join(parts)


def _order(item: tuple[str, Record]) -> tuple[bool, str, int]:
    """GPUs first; of a device the suites in the order of their titles."""
    _, record = item
    return record.device["kind"] != "cuda", record.device["name"], list(TITLES).index(record.what)


def _section(name: str, record: Record) -> Iterator[str]:
    yield f"### {TITLES[record.what]}, {record.device['name']}{' (a part of the suite)' if record.part else ''}"
    yield ""
    if record.what in CHARTED and charted_rows(record):
        yield f"![{TITLES[record.what]}](bench/results/{Path(name).stem}.svg)"
        yield ""
    yield from tables.markdown(record.what, record.rows, absolute=record.device["kind"] == "cuda")
    yield ""
    yield conditions(name, record)
    if record.what in ("models", "training"):
        yield tables.PUBLISHED


def conditions(name: str, record: Record) -> str:
    """What was measured with, in a sentence; the rest is in the file."""
    before = record.state.get("before", {})
    known = {"power_limit_w": "W limit", "sm_clock_mhz": "MHz", "cpu_clock_mhz": "MHz", "load_average": "load average"}
    state = [f"{before[key]:g} {unit}" for key, unit in known.items() if isinstance(before.get(key), int | float)]
    state += [str(before["missing"])] if "missing" in before else []
    threads = [f"{record.device['threads']} threads"] if "threads" in record.device else []
    commit = f"commit {(record.commit or 'unknown')[:10]}{' with changes' if record.dirty else ''}"
    timing = " and ".join(dict.fromkeys(row.timing for row in record.rows))
    facts = [
        *threads,
        f"torch {record.versions['torch']}",
        f"triton {record.versions['triton']}",
        commit,
        record.started[:10],
        *state,
        timing,
    ]
    skipped = f" {len(record.skipped)} were skipped, each with its reason in the file." if record.skipped else ""
    part = f" **Only a part of the suite was asked for**: {record.part}." if record.part else ""
    return f"[`{name}`](bench/results/{name}): {', '.join(facts)}.{part}{skipped}"


def with_block(text: str, content: str) -> str:
    """README text with the content between the markers; ValueError if they are not there once each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md needs the line {BEGIN} and after it the line {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


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


def problems(results: Path, readme: Path) -> list[str]:
    """Where README and charts disagree with the recorded files."""
    records = read_all(results)
    found = []
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    try:
        if with_block(text, block(records)) != text:
            found.append(f"{readme.name} does not show what bench/results holds")
    except ValueError as error:
        found.append(str(error))
    expected = charts(records)
    for name, record in expected.items():
        carried = fingerprint_of(results / name)
        if carried != fingerprint(record):
            found.append(f"{name} {'is missing' if carried is None else 'shows other data than its file'}")
    stale = sorted(path.name for path in results.glob("*.svg") if path.name not in expected)
    return found + [f"{name} belongs to no recorded file" for name in stale]


def update(results: Path, readme: Path) -> list[str]:
    """Bring README and charts up to the recorded files; what was written. Current charts are left as they are."""
    records = read_all(results)
    text = readme.read_text(encoding="utf-8")
    new = with_block(text, block(records))
    written = []
    if new != text:
        readme.write_text(new, encoding="utf-8")
        written.append(readme.name)
    for name, record in charts(records).items():
        if fingerprint_of(results / name) != fingerprint(record):
            draw(record, results / name)
            written.append(name)
    for path in results.glob("*.svg"):
        if path.name not in charts(records):
            path.unlink()
            written.append(f"{path.name} (removed)")
    return written


def main(arguments: Iterable[str] | None = None) -> int:
    """0 if README and charts agree with the files (now), 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README or charts disagree with the recorded files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    try:
        found = problems(options.results, options.readme) if options.check else update(options.results, options.readme)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for line in found:
        print(line if options.check else f"wrote {line}")
    if options.check and found:
        print("python -m bench.report brings them up to date")
    return 1 if options.check and found else 0


if __name__ == "__main__":
    sys.exit(main())

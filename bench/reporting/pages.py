"""What README.md and bench/results/README.md say of the recorded runs, each between its two markers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..harness.comparison import compare
from ..harness.records import Record, first_runs
from . import tables
from .charts import CHARTED, charted_rows

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_GPU = "**No GPU run exists yet.** The kernels need a GPU: what follows is of a CPU, where none of them runs."
NOTHING = "**No run has been recorded yet**, neither on a GPU nor on a CPU."
TITLES = {
    "models": "Whole models",
    "transformers": "transformers' models, accelerated in place",
    "steps": "Step by step",
    "training": "Training step",
    "pictures": "From files to files",
    "kernels": "Kernels",
    "host": "The host's work",
}
AGAIN = "-again.json"


def everything(records: Mapping[str, Record]) -> str:
    """Every recorded run with its conditions, for the page beside the files."""
    shown = _shown(records)
    if not shown:
        return NOTHING
    sections = ["\n".join(_section(name, record)) for name, record in shown.items()]
    return "\n\n".join([*_no_gpu(records), *_repeated(records), *sections])


def gains(records: Mapping[str, Record]) -> str:
    """The one table for the README: fast beside plain, in time and memory, on the first device that ran models; GPUs come first."""
    chosen = [record for record in _shown(records).values() if record.what in ("models", "training")]
    if not chosen:
        return NOTHING
    device = next((record for record in chosen if record.what == "models"), chosen[0]).device
    ours = [record for record in chosen if record.device == device]
    on = ", ".join([device["name"], *_threads(device), *(f"only a part: {record.part}" for record in ours if record.part)])
    caption = f"{on}. All that was recorded: [bench/results](bench/results/README.md)."
    return "\n\n".join([*_no_gpu(records), "\n".join(tables.gains(ours)), caption])


def _shown(records: Mapping[str, Record]) -> dict[str, Record]:
    return dict(sorted(first_runs(records).items(), key=_order))


def _threads(device: Mapping[str, Any]) -> list[str]:
    return [f"{device['threads']} threads"] if "threads" in device else []


def _no_gpu(records: Mapping[str, Record]) -> list[str]:
    return [] if any(record.device["kind"] == "cuda" for record in records.values()) else [NO_GPU]


def _repeated(records: Mapping[str, Record]) -> list[str]:
    """On how many ratios the second runs, which lie beside the first, agree with them."""
    pairs = [(first, records.get(name.replace(".json", AGAIN))) for name, first in records.items()]
    found = [comparison for first, again in pairs if again for comparison in compare(first.rows, again.rows)[0]]
    agree = sum(comparison.agrees for comparison in found)
    said = f"Second runs, recorded beside the first (`*{AGAIN}`), agree on {agree} of the {len(found)} ratios that both have, "
    return [f"{said}within the spreads they state."] if found else []


def _order(item: tuple[str, Record]) -> tuple[bool, str, int]:
    """GPUs first; of a device the suites in the order of their titles."""
    _, record = item
    return record.device["kind"] != "cuda", record.device["name"], list(TITLES).index(record.what)


def _section(name: str, record: Record) -> Iterator[str]:
    yield f"## {TITLES[record.what]}, {record.device['name']}{' (a part of the suite)' if record.part else ''}"
    yield ""
    if record.what in CHARTED and charted_rows(record):
        yield f"![{TITLES[record.what]}]({Path(name).stem}.svg)"
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
    commit = f"commit {(record.commit or 'unknown')[:10]}{' with changes' if record.dirty else ''}"
    timing = " and ".join(dict.fromkeys(row.timing for row in record.rows))
    facts = [
        *_threads(record.device),
        f"torch {record.versions['torch']}",
        f"triton {record.versions['triton']}",
        commit,
        record.started[:10],
        *state,
        timing,
    ]
    skipped = f" {len(record.skipped)} were skipped, each with its reason in the file." if record.skipped else ""
    part = f" **Only a part of the suite was asked for**: {record.part}." if record.part else ""
    return f"[`{name}`]({name}): {', '.join(facts)}.{part}{skipped}"


def with_block(text: str, content: str) -> str:
    """A page's text with the content between the markers; ValueError if they are not there once each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"it needs the line {BEGIN} and after it the line {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"

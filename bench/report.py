"""From recorded runs to what people read: `python -m bench.report` writes it, `--check` only compares.

That is the table of README.md, the tables of bench/results/README.md, each between its markers, and the charts beside the records.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import ROOT
from .harness.records import RESULTS, Record, read_all
from .reporting import charts, pages


def contents(records: Mapping[str, Record], results: Path, readme: Path) -> dict[Path, str]:
    """Page -> what has to stand between its markers."""
    return {readme: pages.gains(records), results / "README.md": pages.everything(records)}


def problems(results: Path, readme: Path) -> list[str]:
    """Where pages and charts disagree with the recorded files."""
    records = read_all(results)
    found = []
    for path, content in contents(records, results, readme).items():
        text, name = path.read_text(encoding="utf-8"), os.path.relpath(path, readme.parent)
        try:
            if pages.with_block(text, content) != text:
                found.append(f"{name} does not show what the records hold")
        except ValueError as error:
            found.append(f"{name}: {error}")
    expected = charts.charts(records)
    for name, record in expected.items():
        carried = charts.fingerprint_of(results / name)
        if carried != charts.fingerprint(record):
            found.append(f"{name} {'is missing' if carried is None else 'shows other data than its file'}")
    stale = sorted(path.name for path in results.glob("*.svg") if path.name not in expected)
    return found + [f"{name} belongs to no recorded file" for name in stale]


def update(results: Path, readme: Path) -> list[str]:
    """Bring pages and charts up to the recorded files; what was written. What is current is left as it is."""
    records = read_all(results)
    written = []
    for path, content in contents(records, results, readme).items():
        text = path.read_text(encoding="utf-8")
        new = pages.with_block(text, content)
        if new != text:
            path.write_text(new, encoding="utf-8")
            written.append(os.path.relpath(path, readme.parent))
    expected = charts.charts(records)
    for name, record in expected.items():
        if charts.fingerprint_of(results / name) != charts.fingerprint(record):
            charts.draw(record, results / name)
            written.append(name)
    for path in results.glob("*.svg"):
        if path.name not in expected:
            path.unlink()
            written.append(f"{path.name} (removed)")
    return written


def main(arguments: Iterable[str] | None = None) -> int:
    """0 if pages and charts agree with the files (now), 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page or chart disagrees with the recorded files")
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

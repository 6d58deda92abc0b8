"""A record in docs/ and the page that shows it: the command that measures and writes both, or only compares them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any


def run(
    module: Any,
    page: Callable[[dict[str, Any]], str],
    measure: Callable[[Sequence[str]], dict[str, Any]],
    names: Collection[str],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command of a module that has a RECORD and a PAGE, which ``page`` makes of it. ``measure`` gets the names of what is to be
    measured, of those in ``names``; where some are chosen the page is printed, and nothing is written.

    0; 1 with --check where the page does not show what the file holds; 2 for a name that is not there.
    """
    record, shown = Path(module.RECORD), Path(module.PAGE)
    parser = argparse.ArgumentParser(prog=f"python -m {module.__spec__.name}", description=module.__doc__.partition(": `python")[0])
    parser.add_argument("--check", action="store_true", help="compare the page with the file, and measure nothing")
    parser.add_argument("names", nargs="*", help=f"instead of {', '.join(names)}; nothing is written then")
    options = parser.parse_args(arguments)
    if options.check:
        same = page(json.loads(record.read_text(encoding="utf-8"))) == shown.read_text(encoding="utf-8")
        print("" if same else f"{shown.name} does not show what {record.name} holds", end="" if same else "\n")
        return 0 if same else 1
    unknown = [name for name in options.names if name not in names]
    if unknown:
        print(f"no model {unknown[0]!r}: {', '.join(names)}", file=sys.stderr)
        return 2
    found = measure(options.names or list(names))
    if options.names:
        print(page(found))
        return 0
    record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shown.write_text(page(found), encoding="utf-8")
    return 0

"""Write pictures of docs/ anew: `python -m bench.pictures [NAME ...]`, all of them without a name."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[1] / "docs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def main(names: list[str]) -> int:
    """Draw those named, or all; returns the exit code."""
    for name in names:
        if name not in NAMES:
            print(f"{name!r} is no picture: there are {', '.join(NAMES)}", file=sys.stderr)
            return 2
    for name in names or NAMES:
        import_module(f"bench.pictures.{name}").draw().save(DOCS / f"{name}.png", optimize=True)
        print(DOCS / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Whether two recorded runs of one device agree: `python -m bench.against FILE FILE`; during a run, `pytest ... --against FILE` asks."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

from .harness.comparison import OtherDevice, check_device, compare
from .harness.records import read


def main(arguments: Sequence[str] | None = None) -> int:
    """Show whether two runs agree on every ratio within the spreads they state; 1 if they do not, 2 if they cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=main.__doc__.splitlines()[0])
    parser.add_argument("then")
    parser.add_argument("now")
    options = parser.parse_args(arguments)
    then, now = read(options.then), read(options.now)
    try:
        check_device(then.device, now.device, options.then)
    except OtherDevice as error:
        print(error, file=sys.stderr)
        return 2
    found, missing = compare(then.rows, now.rows)
    for comparison in found:
        print(f"{'agrees' if comparison.agrees else 'DIFFERS'}: {comparison}")
    for case, contender in missing:
        print(f"only then: {case}: {contender}")
    apart = sum(not comparison.agrees for comparison in found)
    differences = [abs(comparison.now.median / comparison.then.median - 1) for comparison in found]
    middle = f"; the medians differ by {statistics.median(differences):.1%} in the middle" if differences else ""
    print(f"{len(found)} ratios, {apart} apart by more than their spreads{middle}")
    return 1 if apart or not found else 0


if __name__ == "__main__":
    sys.exit(main())

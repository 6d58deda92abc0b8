"""Two runs of one device, compared by their ratios: `python -m bench.against FILE FILE`, or `pytest bench/ --benchmark --against FILE`.

A ratio is a contender against the baseline of its case in the same run, so that another clock or a busy machine does not count as a
regression. Both runs state its spread: two runs *agree* on a ratio if the spreads overlap, and one has *regressed* if its whole spread lies
below the other's by more than the margin.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .harness import environment
from .harness.measure import Ratio
from .harness.records import Record, Row, read

MARGIN = 0.05


class OtherDevice(ValueError):
    """The two runs are not of the same device."""


@dataclass(frozen=True)
class Comparison:
    """One ratio in both runs."""

    key: tuple[str, str]
    then: Ratio
    now: Ratio

    @property
    def agrees(self) -> bool:
        return self.then.agrees(self.now)

    def regressed(self, margin: float) -> bool:
        """Slower than before by more than the margin, and by more than both spreads explain."""
        return self.now.high < self.then.low * (1 - margin)

    def __str__(self) -> str:
        then, now = (f"{r.median:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in (self.then, self.now))
        return f"{self.key[0]}: {self.key[1]}: {then} then, {now} now"


def check_device(one: dict, other: dict, where: str = "the file") -> None:
    """OtherDevice unless both are of the same device."""
    if not environment.same_device(one, other):
        slugs = environment.slug(one), environment.slug(other)
        raise OtherDevice(f"{where} is of {slugs[0]}, this is {slugs[1]}: ratios of different devices do not compare")


def _ratio(row: Row) -> Ratio | None:
    if row.status != "ok" or row.speedup is None or row.contender == row.baseline:
        return None
    return Ratio(row.speedup, row.speedup_low, row.speedup_high)


def compare(then: Iterable[Row], now: Iterable[Row]) -> tuple[list[Comparison], list[tuple[str, str]]]:
    """The ratios that both runs have, and the keys of those that only the first has."""
    current = {row.key: _ratio(row) for row in now}
    found, missing = [], []
    for row in then:
        before = _ratio(row)
        if before is None:
            continue
        after = current.get(row.key)
        if after is None:
            missing.append(row.key)
        else:
            found.append(Comparison(row.key, before, after))
    return found, missing


def lines(then: Record, rows: Iterable[Row], margin: float) -> tuple[list[str], bool]:
    """What to print of a comparison, and whether it is passed; one that compares nothing is not."""
    found, missing = compare(then.rows, rows)
    regressed = [comparison for comparison in found if comparison.regressed(margin)]
    text = [f"REGRESSED by more than {margin:.0%}: {comparison}" for comparison in regressed]
    text += [f"ok: {comparison}" for comparison in found if comparison not in regressed]
    text += [f"not measured now: {case}: {contender}" for case, contender in missing]
    text.append(f"{len(found)} ratios compared, {len(regressed)} regressed, {len(missing)} not measured now")
    return text, bool(found) and not regressed


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

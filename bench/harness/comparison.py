"""Two runs of one device, compared by their ratios.

A ratio is a contender against the baseline of its case in the same run, so that another clock or a busy machine does not count as a
regression. Both runs state its spread: two runs *agree* on a ratio if the spreads overlap, and one has *regressed* if its whole spread lies
below the other's by more than the margin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import environment
from .measure import Ratio
from .records import Record, Row

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

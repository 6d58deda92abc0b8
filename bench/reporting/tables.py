"""Rows as tables: the same columns in the terminal and in the README."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..harness.measure import ratio
from ..harness.records import ALGEBRA, FUSED, Record, Row, Skip

PUBLISHED = "Published for dpt-base-ade20k by mmsegmentation, on V100s in float32: 10.41 images/s; 8.09 GB in training, 2 images a GPU."


@dataclass(frozen=True)
class Column:
    """``absolute``: a time or a rate, which is quoted of a GPU only; a shared CPU's means nothing a day later, its ratios do."""

    title: str
    value: Callable[[Row], str]
    absolute: bool = False


def milliseconds(value: float | None) -> str:
    """Three significant digits or more, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def _scaled(value: float | None, by: float, digits: int = 3) -> str:
    return "" if value is None else f"{value / by:.{digits}g}" if value / by < 1000 else f"{value / by:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"


def speedup(row: Row) -> str:
    """The ratio to the baseline with its spread."""
    if row.speedup is None:
        return ""
    if row.contender == row.baseline:
        return "1"
    return f"{row.speedup:.2f} [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"


def _difference(row: Row) -> str:
    return "" if row.difference is None else f"{row.difference:.1e}"


LATENCY = (
    Column("p20 ms", lambda row: milliseconds(row.p20_ms), absolute=True),
    Column("p50 ms", lambda row: milliseconds(row.p50_ms), absolute=True),
    Column("p80 ms", lambda row: milliseconds(row.p80_ms), absolute=True),
    Column("times baseline", speedup),
)
MEMORY = Column("peak GB", lambda row: _scaled(row.peak_memory_bytes, 1e9))
SAVED = Column("saved GB", lambda row: _scaled(row.facts.get("saved_bytes"), 1e9))
ROOFLINE = Column("of roofline", lambda row: _percent(row.roofline_share))
DIFFERENCE = Column("difference", _difference)
FORWARD = (*LATENCY, Column("images/s", lambda row: _scaled(row.per_second, 1), absolute=True), MEMORY, ROOFLINE, DIFFERENCE)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "models": FORWARD,
    "transformers": FORWARD,
    "steps": (
        Column("dtype", lambda row: row.dtype),
        *LATENCY,
        Column("images/s", lambda row: _scaled(row.per_second, 1), absolute=True),
        MEMORY,
        DIFFERENCE,
    ),
    "training": (
        *LATENCY,
        Column("steps/s", lambda row: _scaled(row.per_second, 1), absolute=True),
        MEMORY,
        SAVED,
        ROOFLINE,
        DIFFERENCE,
    ),
    "pictures": (
        *LATENCY,
        Column("pictures/s", lambda row: _scaled(row.per_second, 1), absolute=True),
        MEMORY,
        DIFFERENCE,
    ),
    "kernels": (
        *LATENCY,
        Column("TFLOP/s", lambda row: _rate(row.flops, row, 1e12), absolute=True),
        Column("GB/s", lambda row: _rate(row.bytes, row, 1e9), absolute=True),
        Column("of floor", lambda row: _percent(row.roofline_share)),
        DIFFERENCE,
    ),
    "host": (
        *LATENCY,
        Column("launches", lambda row: str(row.facts.get("launches", ""))),
        Column("calls of PyTorch", lambda row: str(row.facts.get("calls of PyTorch", ""))),
    ),
}


def _rate(amount: int | None, row: Row, unit: float) -> str:
    return "" if not amount or row.p50_ms is None else f"{amount / (row.p50_ms / 1000) / unit:.3g}"


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each case, in the order of the first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def _order(rows: Sequence[Row]) -> list[Row]:
    """The baseline first, then as measured."""
    return sorted(rows, key=lambda row: row.contender != row.baseline)


def columns(suite: str, absolute: bool) -> list[Column]:
    """The columns of a suite's table, with the absolute ones or without."""
    return [column for column in COLUMNS[suite] if absolute or not column.absolute]


def cells(suite: str, row: Row, absolute: bool = True) -> list[str]:
    """A row's values; of one that did not pass the gate, only why."""
    if row.status != "ok":
        return [f"{row.status.upper()}: {row.problem}"]
    return [column.value(row) for column in columns(suite, absolute)]


def label(row: Row) -> str:
    """A contender's name; of a fast one that ran no kernel, that too."""
    return f"{row.contender} ({ALGEBRA})" if row.note.startswith(ALGEBRA) else row.contender


def text_lines(suite: str, rows: Iterable[Row]) -> list[str]:
    """A table for the terminal, one block a case, with how it was timed."""
    lines = []
    for case, of_case in by_case(rows).items():
        titles = [case, *(column.title for column in COLUMNS[suite])]
        body = [[label(row), *cells(suite, row)] for row in _order(of_case)]
        whole = [line for line in body if len(line) == len(titles)]
        widths = [max(len(line[i]) for line in [titles, *whole]) for i in range(len(titles))]
        widths[0] = max(widths[0], *(len(line[0]) for line in body))
        lines.append("  ".join([titles[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(titles[1:], widths[1:], strict=True))]))
        for line, row in zip(body, _order(of_case), strict=True):
            padded = [value.rjust(width) for value, width in zip(line[1:], widths[1:], strict=False)]
            note = f"  {row.note}" if row.note and row.status == "ok" else ""
            lines.append("  ".join([line[0].ljust(widths[0]), *padded]) + note)
        lines += [f"  {of_case[0].timing}, {max(len(row.durations_ms) for row in of_case)} rounds", ""]
    return lines


def markdown(suite: str, rows: Iterable[Row], absolute: bool) -> list[str]:
    """A Markdown table of all cases: of models a line a contender, of kernels a line a case."""
    if suite == "kernels":
        return _kernel_lines(rows, absolute)
    shown = columns(suite, absolute)
    titles = ["case", "contender", *(column.title for column in shown)]
    lines = [f"| {' | '.join(titles)} |", "| --- | --- |" + " ---: |" * len(shown)]
    for case, of_case in by_case(rows).items():
        for position, row in enumerate(_order(of_case)):
            values = cells(suite, row, absolute)
            values += [""] * (len(shown) - len(values))
            lines.append(f"| {' | '.join([case if not position else '', label(row), *values])} |")
    return lines


def _kernel_lines(rows: Iterable[Row], absolute: bool) -> list[str]:
    """The fused op beside the fastest of its peers; the others are in the file."""
    shared = [column for column in columns("kernels", absolute) if column not in LATENCY]
    time = ["p50 ms"] if absolute else []
    titles = ["case", "ours", *time, "best of the others", *time, "times as fast", *(column.title for column in shared)]
    numbers = " ---: |" * len(time)
    lines = [f"| {' | '.join(titles)} |", f"| --- | --- |{numbers} --- |{numbers}" + " ---: |" * (1 + len(shared))]
    for case, of_case in by_case(rows).items():
        ours = next((row for row in of_case if row.contender == FUSED), None)
        others = [row for row in of_case if row is not ours and row.status == "ok"]
        if ours is None or not others:
            continue
        best = min(others, key=lambda row: row.p50_ms)
        if ours.status == "ok":
            found = ratio(best.durations_ms, ours.durations_ms)
            times = [[milliseconds(row.p50_ms)] if absolute else [] for row in (ours, best)]
            values = [*times[0], best.contender, *times[1], f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"]
            values += [column.value(ours) for column in shared]
        else:
            values = cells("kernels", ours)
            values += [""] * (len(titles) - 2 - len(values))
        lines.append(f"| {' | '.join([case, label(ours), *values])} |")
    return lines


def gains(records: Iterable[Record]) -> list[str]:
    """A Markdown table of fast beside plain: how many times as fast, and how many times its memory."""
    lines = ["| model | | times as fast as plain | times its memory |", "| --- | --- | ---: | ---: |"]
    for record in records:
        for case, of_case in by_case(record.rows).items():
            of_step = ", training step" if record.what == "training" else ""
            for position, row in enumerate(row for row in of_case if row.contender.startswith("fast")):
                plain = record.row((case, row.baseline))
                values = [speedup(row), _memory_ratio(row, plain)] if row.status == "ok" else [f"{row.status.upper()}: {row.problem}", ""]
                lines.append(f"| {' | '.join(['' if position else case + of_step, label(row), *values])} |")
    return lines


def _memory_ratio(row: Row, plain: Row | None) -> str:
    if plain is None or not plain.peak_memory_bytes or row.peak_memory_bytes is None:
        return ""
    return f"{row.peak_memory_bytes / plain.peak_memory_bytes:.2f}"


def skip_lines(skips: Iterable[Skip]) -> list[str]:
    """What was skipped, a line each; what was skipped for one reason stands together."""
    by_reason: dict[str, list[Skip]] = {}
    for skip in skips:
        by_reason.setdefault(skip.reason, []).append(skip)
    lines = []
    for reason, of_reason in by_reason.items():
        lines.append(f"{reason}:")
        lines += [f"    {skip.case}{': ' + skip.contender if skip.contender else ''}" for skip in of_reason]
    return lines

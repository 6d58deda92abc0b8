"""`dpt data`: how each kind of data set lies on the disk, and what is wrong with one."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING

from ..data.kinds import KINDS, guessed
from ..system.endings import CommandError, printable

if TYPE_CHECKING:
    from ..data.checking import Report

WIDTH = 120  # of the lines that tell the share of each class


def run(args: argparse.Namespace) -> int:
    if args.check is None:
        for name in [args.kind] if args.kind else KINDS:
            print(f"{name}\n{textwrap.indent(textwrap.dedent(KINDS[name].layout).strip(), '    ')}")
        return 0
    kind = args.kind or guessed(args.check)
    print(printable(f"{args.check}: {kind}{'' if args.kind else ', by its layout'}"))
    from ..data.checking import checked  # PyTorch, which the layouts do not need

    reports = []
    for report in checked(kind, args.check, args.split or (), args.depth_scale, args.reduce_zero_label):
        reports.append(report)
        print("\n".join(map(printable, described(report))))
        for problem in report.problems:
            print(printable(f"{report.split or args.check}: {problem}"), file=sys.stderr)
        if report.failed > len(report.problems):
            print(f"{report.split or args.check}: and {report.failed - len(report.problems)} more", file=sys.stderr)
    if not any(report.pixels for report in reports):
        raise CommandError(f"{args.check}: no picture with a target could be read")
    return int(any(report.failed for report in reports))


def described(report: Report) -> list[str]:
    """A report in lines, without what is wrong."""
    published = "" if report.published is None else f", {report.published} published"
    lines = [f"{report.split or 'pictures'}, {report.task}: {report.count} pictures{published}"]
    if not report.pixels:
        return lines
    smallest, largest = ("x".join(map(str, size)) for size in (report.smallest, report.largest))
    known = f"{report.known / report.pixels:.2%} of the pixels known" + (f", {report.sky / report.pixels:.2%} sky" if report.sky else "")
    lines.append(f"  {smallest} to {largest}; {known}")
    if report.task == "depth" and report.known:
        lines.append(f"  {report.nearest:.3f} to {report.farthest:.3f} m, on average {report.total / report.known:.3f} m")
    shares = sorted(((count, name) for name, count in report.classes.items() if count), key=lambda pair: -pair[0])
    words = ", ".join(f"{name} {count / report.known:.2%}" for count, name in shares)
    absent = len(report.classes) - len(shares)
    lines += textwrap.wrap(words, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return lines + ([f"  {absent} of {len(report.classes)} classes in no picture"] if absent else [])

"""All of a data set read, and what it holds and what is wrong with it: `checked`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..classes import palette
from ..config import HeadConfig, numbered_classes
from .datasets import TARGETS, classes_of, open_data
from .kinds import SPLITS, kind_of
from .pairs import PairDataset
from .targets import IGNORE, MAX_CLASSES

NAMED = 10  # problems that are told by name


@dataclass
class Report:
    """What a split holds, as far as its files can be used.

    Attributes:
        split: its name, "" where the folder has none; `task`: what its targets are for.
        count, published: pictures with a target; None where no number is published.
        problems: the first of them in words; `failed`: how many there are.
        smallest, largest: height and width of pictures.
        pixels, known, sky: of targets: all, those with a class or a depth, and those that are infinitely far.
        classes: pixels of each class, by name.
        nearest, farthest, total: metres; `total` over `known` is their mean.
    """

    split: str
    task: str
    count: int = 0
    published: int | None = None
    problems: list[str] = field(default_factory=list)
    failed: int = 0
    smallest: tuple[int, int] = (0, 0)
    largest: tuple[int, int] = (0, 0)
    pixels: int = 0
    known: int = 0
    sky: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    nearest: float = math.inf
    farthest: float = 0.0
    total: float = 0.0

    def fails(self, problem: str) -> None:
        self.failed += 1
        if len(self.problems) < NAMED:
            self.problems.append(problem)


def checked(
    kind: str,
    root: Path,
    splits: Sequence[str] = (),
    depth_scale: float | None = None,
    reduce_zero_label: bool | None = None,
    progress: bool = True,
) -> Iterator[Report]:
    """Read every picture and target of a data set's splits (of none: of all).

    A folder of pairs is read as depth and as labels, as far as it has them. What cannot be read is a problem, and so is a split that is
    missing, or has another number of pictures than was published.
    """
    row = kind_of(kind)
    first = {split: name for name, split in reversed(list(row.splits.items()))}  # of two names of one split
    own = (
        [name for name, split in row.splits.items() if first[split] == name] or [name for name in SPLITS if (root / name).is_dir()] or [""]
    )
    for split in splits or own:
        base = root / split if not row.splits else root
        found = [task for task, (folder, _) in TARGETS.items() if (base / folder).is_dir()] or list(TARGETS)[:1]
        for task in [row.task] if row.task is not None else found:
            report = Report(split, task, published=row.splits[split].count if split in row.splits else None)
            try:
                classes = classes_of(kind, base)[0] or numbered_classes(MAX_CLASSES)
                head = HeadConfig(task, classes, palette(len(classes))) if task == "segmentation" else HeadConfig(task)
                data = open_data(kind, root, split or None, head, depth_scale=depth_scale, reduce_zero_label=reduce_zero_label)
            except (ValueError, OSError) as error:
                report.fails(str(error))
            else:
                _read(data, report, progress)
            yield report


def _read(data: PairDataset, report: Report, progress: bool) -> None:
    report.count = len(data)
    if report.published not in (None, report.count):
        report.fails(f"{report.count} pictures: {report.published} were published")
    sizes, counts, summary = set(), np.zeros(IGNORE + 1, np.int64), _labels if report.task == "segmentation" else _metres

    def read(index: int) -> tuple[tuple[int, ...], np.ndarray] | str:
        try:
            picture, target = data[index]
        except ValueError as error:  # TargetError and ImageError, which name the file
            return str(error)
        return picture.shape[:2], summary(target)

    for found in data.mapped(read, progress):
        if isinstance(found, str):
            report.fails(found)
            continue
        (height, width), values = found
        sizes.add((height, width))
        report.pixels += height * width
        if report.task == "segmentation":
            counts += values
        else:
            known, sky, total, nearest, farthest = values.tolist()
            report.known, report.sky, report.total = report.known + int(known), report.sky + int(sky), report.total + total
            report.nearest, report.farthest = min(report.nearest, nearest), max(report.farthest, farthest)
    if sizes:
        report.smallest, report.largest = (pick(sizes, key=math.prod) for pick in (min, max))
    if report.task == "segmentation":
        report.known = int(counts[:IGNORE].sum())
        named = dict(zip(data.head.classes, counts.tolist(), strict=False))
        report.classes = {name: count for name, count in named.items() if count or data.named}


def _labels(target: np.ndarray) -> np.ndarray:
    """Pixels of each label."""
    return np.bincount(target.ravel(), minlength=IGNORE + 1)


def _metres(target: np.ndarray) -> np.ndarray:
    """How many are known, and infinitely far; the sum, the least and the most of the known."""
    known = target[(target > 0) & np.isfinite(target)]
    return np.array([known.size, np.isinf(target).sum(), known.sum(dtype=np.float64), known.min(initial=np.inf), known.max(initial=0)])

"""Pictures with pairs of points of which one is known to be nearer, as DIW has them (Chen et al. 2016)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ..config import HeadConfig
from ..data.targets import TargetError
from ..inference.images import load_image
from ..system.disk import open_regular

COLUMNS = ("picture", "near_row", "near_column", "far_row", "far_column")


class PointPairs:
    """`images/` beside `points.csv`, whose head is `COLUMNS`: a picture's file name, and the nearer and the farther point of a pair, pixels
    from 0 at the top left. A picture may have any number of lines; it counts as it is named first.

    Raises:
        ValueError: no such file, another head, a line that is no pair of different points, or a picture that is not there; by line.
    """

    crop: tuple[int, int] | None = None  # pictures are seen whole

    def __init__(self, root: str | Path, head: HeadConfig) -> None:
        self.root, self.head = Path(root), head
        path = self.root / "points.csv"
        pairs: dict[str, list[tuple[int, ...]]] = {}
        with open_regular(path) as file:
            text = file.read().decode("utf-8", "replace")
        lines = csv.reader(text.splitlines())
        if tuple(next(lines, ())) != COLUMNS:
            raise ValueError(f"{path}: its first line must be {','.join(COLUMNS)}")
        for cells in filter(None, lines):
            name, *numbers = cells
            where = f"{path}, line {lines.line_num}"
            if len(numbers) != 4 or not all(number.isdecimal() for number in numbers) or numbers[:2] == numbers[2:]:
                raise ValueError(f"{where}: {','.join(cells)!r}: it must be a picture and two points, whole numbers from 0")
            if Path(name).name != name or not (self.root / "images" / name).is_file():
                raise ValueError(f"{where}: {name!r}: no such file in {self.root / 'images'}")
            pairs.setdefault(name, []).append(tuple(map(int, numbers)))
        if not pairs:
            raise ValueError(f"{path}: it has no pair of points")
        self.names, self._pairs = list(pairs), list(pairs.values())
        self.images = [self.root / "images" / name for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return load_image(self.images[index])

    def target(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Row and column of the nearer point, and of the farther one, int64 (N, 4); `TargetError` for one outside of `size`, if given."""
        points = np.array(self._pairs[index], dtype=np.int64)
        if size is not None and (points >= np.tile(size, 2)).any():
            raise TargetError(f"{self.root / 'points.csv'}: a point of {self.names[index]} is outside of its {size[1]}x{size[0]} pixels")
        return points

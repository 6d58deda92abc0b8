"""Metres from depth that is known up to scale and shift, by pixels whose distance is known.

Inverse depth is fitted as inverse depth, `1 / metres = scale * map + shift`, as it was learnt: what is near counts most. Wrong distances
are found by the fit of least median of squares (Rousseeuw 1984): of all lines through two of the pixels the one whose residuals have the
smallest median; what lies within 2.5 deviations of it, taken from that median, is fitted by least squares.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import HeadConfig
from ..system.disk import open_regular
from .images import ImageError, reason
from .prompts import load_prompt

FARTHEST = 1000.0  # metres: what a calibrated map says is farther, or behind infinity, is as far as this
PAIRS = 2000  # lines that are tried, at most, and known pixels that they are tried on
DEVIATION = 1.4826  # of a normal distribution, to the median of its sizes
WITHIN = 2.5  # deviations
ROUNDED = 1e-3  # of a distance, which no known one is nearer to the truth


@dataclass(frozen=True)
class Calibration:
    """A map's way to metres.

    Attributes:
        scale, shift: of the map, to inverse metres where `inverse`, else to metres.
        given, used: known pixels, and those of them that the fit holds for right.
        residual: metres, the median distance of all that were given from what the fit says of them.
        farthest: metres, of those that were given.
    """

    scale: float
    shift: float
    inverse: bool
    given: int
    used: int
    residual: float
    farthest: float

    def head(self, head: HeadConfig) -> HeadConfig:
        """The head that maps in metres are of: in files of 16 bits in millimetres, or in 256ths of a metre where those do not reach."""
        return replace(head, inverse=False, relative=False, depth_scale=1000.0 if self.farthest * 1000 <= 65535 else 256.0)

    def metres(self, depth: np.ndarray) -> np.ndarray:
        """Metres, float32, of a map (H, W) like the one that was fitted; at most `FARTHEST`, and not below 0."""
        return _metres(self.scale * depth.astype(np.float64) + self.shift, self.inverse).astype(np.float32)


def calibrate(depth: np.ndarray, head: HeadConfig, x: np.ndarray, y: np.ndarray, metres: np.ndarray) -> Calibration:
    """The scale and shift that bring a map to known distances.

    Args:
        depth: float (H, W), of a head whose depth is known up to scale and shift.
        head: says whether the map is inverse depth.
        x, y: (N,) places in pixels, 0 the middle of the first; between pixels the map is taken bilinearly.
        metres: (N,) their distances, above 0.

    Raises:
        ValueError: metres are known already; fewer than two pixels, or a place outside, or a distance that is none; the map is the same at
            all of them; or what is farther is nearer in the map.
    """
    if head.task != "depth" or head.metric:
        raise ValueError(f"a map of {'metres' if head.metric else head.task} is not calibrated: only relative or inverse depth is")
    x, y, metres = (np.asarray(values, np.float64) for values in (x, y, metres))
    if len(metres) < 2:
        raise ValueError(f"{len(metres)} known distance{'s' * (len(metres) != 1)}: a scale and a shift need two")
    height, width = depth.shape
    outside = ~((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))
    if outside.any():
        first = int(outside.argmax())
        raise ValueError(f"x={x[first]:g}, y={y[first]:g} is outside the picture: x is 0 to {width - 1} and y 0 to {height - 1}")
    wrong = ~(np.isfinite(metres) & (metres > 0))
    if wrong.any():
        raise ValueError(f"metres={metres[int(wrong.argmax())]:g}: a distance is finite and above 0")
    predicted, wanted = _bilinear(depth, x, y), 1 / metres if head.inverse else metres
    if not np.isfinite(predicted).all() or np.ptp(predicted) <= 1e-6 * np.abs(predicted).max():
        raise ValueError("the map is the same at all known distances: they have to lie at different depths")
    right = _inliers(predicted, wanted)
    scale, shift = _line(predicted[right], wanted[right])
    if not scale > 0:
        raise ValueError("the known distances contradict the map: what is farther is nearer in it")
    residual = float(np.median(np.abs(_metres(scale * predicted + shift, head.inverse) - metres)))
    return Calibration(float(scale), float(shift), head.inverse, len(metres), int(right.sum()), residual, float(metres.max()))


def _metres(values: np.ndarray, inverse: bool) -> np.ndarray:
    return 1 / np.maximum(values, 1 / FARTHEST) if inverse else values.clip(0, FARTHEST)


def _bilinear(depth: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    height, width = depth.shape
    left, top = np.minimum(x.astype(int), max(width - 2, 0)), np.minimum(y.astype(int), max(height - 2, 0))
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = x - left, y - top
    depth = depth.astype(np.float64)
    above = (1 - across) * depth[top, left] + across * depth[top, right]
    below = (1 - across) * depth[bottom, left] + across * depth[bottom, right]
    found: np.ndarray = (1 - down) * above + down * below
    return found


def _line(predicted: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Least squares."""
    centre, level = predicted.mean(), wanted.mean()
    scale = float(((predicted - centre) * (wanted - level)).sum() / max(((predicted - centre) ** 2).sum(), np.finfo(float).tiny))
    return scale, float(level - scale * centre)


def _inliers(predicted: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of the known pixels are right; all, of two or three, among which none can be told to be wrong."""
    count = len(wanted)
    if count < 4:
        return np.ones(count, bool)
    generator = np.random.default_rng(0)
    asked = np.arange(count) if count <= PAIRS else generator.choice(count, PAIRS, replace=False)
    if count * (count - 1) // 2 <= PAIRS:
        one, other = np.array(list(itertools.combinations(range(count), 2))).T
    else:
        one, other = generator.choice(count, (2, PAIRS))
    apart = predicted[one] - predicted[other]
    usable = np.abs(apart) > 1e-6 * np.abs(predicted).max()
    scales = (wanted[one] - wanted[other])[usable] / apart[usable]
    shifts = wanted[one][usable] - scales * predicted[one][usable]
    medians = np.concatenate(
        [
            np.median(np.abs(scale[:, None] * predicted[asked] + shift[:, None] - wanted[asked]), axis=1)
            for scale, shift in zip(*(np.array_split(values, max(1, len(scales) // 64)) for values in (scales, shifts)), strict=True)
        ]
    )
    best = int(medians.argmin())
    residuals = np.abs(scales[best] * predicted + shifts[best] - wanted)
    deviation = DEVIATION * (1 + 5 / (count - 2)) * medians[best]  # of few pixels the line goes through two
    right: np.ndarray = residuals <= WITHIN * deviation + ROUNDED * np.abs(wanted)
    return right


def read_known(path: str | os.PathLike[str], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and metres of known pixels, of a file.

    Args:
        path: a `.csv` of three columns, x, y and metres, with their names in the first row or without; or a sparse map, as
            `dpt.inference.prompts.load_prompt` takes it, of the picture's size, in which 0 is not known.
        size: the picture's height and width.

    Raises:
        ImageError: unreadable, or not as above; it names the row. OSError.
    """
    path = Path(path)
    if path.suffix.lower() != ".csv":
        sparse = load_prompt(path)
        if sparse.shape != size:
            (height, width), (rows, columns) = size, sparse.shape
            raise ImageError(f"{path}: is {columns}x{rows}: a sparse map is as large as its picture, {width}x{height}")
        y, x = np.nonzero(sparse)
        return x.astype(np.float64), y.astype(np.float64), sparse[y, x].astype(np.float64)
    with open_regular(path) as file:
        content = file.read()
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{path}: {reason(error)}") from error
    found = []
    for number, row in enumerate(rows, start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and [cell.lower() for cell in cells] == ["x", "y", "metres"]):
            continue
        try:
            one, other, metres = map(float, cells)
        except ValueError:
            raise ImageError(f"{path}: row {number} is {','.join(cells)!r}: a row is x,y,metres, three numbers") from None
        found.append((one, other, metres))
    columns = np.array(found, np.float64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]

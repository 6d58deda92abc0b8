"""Ground truth as files: depth in metres (PNG, TIFF, `.npy`, `.pfm`) and class labels (PNG)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..inference.images import GREY_STEPS, open_picture, reason
from ..system.disk import open_regular

IGNORE = 255  # the label of a pixel without a class
DEPTH_SCALE = 1000.0  # of integer depth: units a metre
MAX_CLASSES = 255  # labels are bytes, and one of them is IGNORE
PFM_LINE = 100  # bytes, at most, of a line of a PFM's header


class TargetError(ValueError):
    """A file of ground truth that cannot be used; the message names it, the value and the rule."""


def read_depth(path: str | Path, scale: float = DEPTH_SCALE, sky: float | None = None) -> np.ndarray:
    """Metres, float32 (H, W), 0 where unknown, infinite for the sky.

    Integers (PNG and TIFF of 16 bits or more, `.npy`) are divided by `scale`; floats (TIFF, `.npy`, `.pfm`) are metres. What is not
    finite or not positive is unknown. `sky` is the value in the file that stands for the sky; without it there is none.

    Raises:
        TargetError: unreadable, not grey, or of 8 bits, which are too few for metres.
    """
    path = Path(path)
    values = _read(path, DEPTH_READERS)
    if values.dtype.kind not in "iuf":
        raise TargetError(f"{path}: holds {values.dtype}: depth is integers, divided by the scale, or floats, in metres")
    if values.dtype.kind in "iu":
        if values.dtype.itemsize < 2:
            raise TargetError(f"{path}: holds {8 * values.dtype.itemsize}-bit integers: depth has 16 bits or more")
        metres = values / scale
    else:
        metres = values
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, and so unknown
        metres = metres.astype(np.float32)
    metres = np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0))
    return metres if sky is None else np.where(values == sky, np.float32(np.inf), metres)


def read_labels(path: str | Path) -> np.ndarray:
    """Class indices as stored, int64 (H, W), of a grey or palette PNG; TargetError for anything else."""
    path = Path(path)
    values = _read(path, LABEL_READERS)
    if values.dtype.kind not in "iub":
        raise TargetError(f"{path}: holds {values.dtype}: labels are integers")
    return values.astype(np.int64)


def class_labels(stored: np.ndarray, classes: int, reduce_zero_label: bool, path: str | Path) -> np.ndarray:
    """Labels as a file has them -> indices of classes, or IGNORE.

    Args:
        stored: int (H, W).
        classes: how many the model has.
        reduce_zero_label: 0 means "other" and becomes IGNORE, and k becomes k - 1, as mmsegmentation's option does for ADE20K.

    Raises:
        TargetError: a label that is neither a class nor IGNORE, with the file and the rule.
    """
    first = int(reduce_zero_label)
    wrong = stored[((stored < 0) | (stored >= classes + first)) & (stored != IGNORE)]
    if wrong.size:
        rule = f"labels are {first} to {classes - 1 + first}, a class each, and {'0 or ' * first}{IGNORE} where there is none"
        hint = "; if 0 means 'other' in these files, as in ADE20K's, say reduce_zero_label" if set(wrong.flat) == {classes} else ""
        raise TargetError(f"{path}: holds the label {wrong.flat[0]}: {rule}{hint}")
    return np.where((stored == IGNORE) | (stored < first), IGNORE, stored - first)


def _read(path: Path, readers: Mapping[str, Callable[[Path], np.ndarray]]) -> np.ndarray:
    try:
        values = readers[path.suffix.lower()](path)
    except TargetError:
        raise
    except Exception as error:  # decoders raise what their bytes lead them to
        raise TargetError(f"{path}: {reason(error)}") from error
    if values.ndim != 2 or 0 in values.shape:
        raise TargetError(f"{path}: has the shape {values.shape}: ground truth is (height, width), both at least 1")
    return values


def _read_grey(path: Path) -> np.ndarray:
    with open_regular(path) as file, open_picture(file, formats=("PNG", "TIFF")) as image:
        tile: Any = getattr(image, "tile", None)
        step = GREY_STEPS.get(tile[0].args if tile else "", 1)
        image.load()
        if image.mode not in ("1", "L", "P", "I", "F") and not image.mode.startswith("I;16"):
            raise TargetError(f"{path}: a picture of mode {image.mode}: ground truth has one channel")
        values = np.array(image)
    return values.astype(values.dtype.newbyteorder("=")) // step if step > 1 else values


def _read_npy(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        values = np.load(file, allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise TargetError(f"{path}: an archive of arrays: depth is one array")
    return values


def _read_pfm(path: Path) -> np.ndarray:
    """A Portable Float Map: "Pf", width and height, a scale whose sign is the byte order; rows from the bottom up."""
    with open_regular(path) as file:
        lines = [file.readline(PFM_LINE) for _ in range(3)]
        kind, (width, height), scale = lines[0].strip(), map(int, lines[1].split()), float(lines[2])
        if kind != b"Pf":
            raise TargetError(f"{path}: starts with {kind!r}: a grey float map starts with Pf")
        if not (math.isfinite(scale) and scale):
            raise TargetError(f"{path}: has the scale {scale}: it is a number, not 0, negative for little-endian")
        size = os.fstat(file.fileno()).st_size - file.tell()
        if width < 1 or height < 1 or size != 4 * width * height:
            raise TargetError(f"{path}: {size} bytes after the header, which announces {width}x{height} floats")
        content = file.read(size)
    values = np.frombuffer(content, "<f4" if scale < 0 else ">f4").reshape(height, width)[::-1]
    return values.astype(np.float32) * np.float32(abs(scale))


DEPTH_READERS = {".png": _read_grey, ".npy": _read_npy, ".pfm": _read_pfm, ".tif": _read_grey, ".tiff": _read_grey}
LABEL_READERS = {".png": _read_grey}

"""Predictions as files: maps for programs (PNG, .npy, .pfm) and pictures for people (JPEG).

Every file appears whole or not at all. The PNG and the JPEG carry, as their comment, a record of what they were made
from. The PNG is written last: while all files are there and its record says the same, the picture is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .config import HeadConfig
from .predict import Prediction

RECORD = "dpt "  # before the JSON in a file's comment
COLOR_MAP = "inferno"
PNG_LEVEL = 3  # of zlib: 16-bit depth in half of the time of 6, Pillow's own, and a fifth larger
STRIP_PIXELS = 1 << 16  # of depth that are worked on at once
MAX_VIEW_SIDE = 16384  # of the pictures for people; JPEG ends at 65535
_UNKNOWN = (128, 128, 128)  # colour of depths that are not finite


def result_paths(stem: Path, head: HeadConfig, pfm: bool = False) -> list[Path]:
    """The files of one picture, in the order they are written: depth `.npy`, `.pfm` on request, `_color.jpg`, `.png`;
    segmentation `_overlay.jpg`, `.png`."""
    if head.task == "depth":
        suffixes = [".npy", *([".pfm"] if pfm else []), "_color.jpg", ".png"]
    else:
        suffixes = ["_overlay.jpg", ".png"]
    return [stem.with_name(stem.name + suffix) for suffix in suffixes]


def write(
    stem: Path, image: np.ndarray, prediction: Prediction, head: HeadConfig, *, pfm: bool = False, record: dict[str, Any] | None = None
) -> list[Path]:
    """Write `result_paths(stem, head, pfm)` and return them; folders are made.

    The PNG is 16-bit inverse depth scaled to 0..65535, or depth in millimetres up to 65535, or label indices of 8 bits
    (16 beyond 256 classes).

    Args:
        image: the picture, uint8 (H, W, 3).
        record: what `read_record` will return; JSON values.

    Raises:
        OSError: what could not be written and why.
    """
    depth, labels = prediction.depth, prediction.labels
    png = depth_to_uint16(depth, head.inverse) if labels is None else labels.astype(np.uint8 if labels.dtype == np.uint8 else np.uint16)
    chunks = PngImagePlugin.PngInfo()
    comment = RECORD + json.dumps(record or {}, sort_keys=True)
    chunks.add_text("comment", comment)
    writers: dict[str, Callable[[BinaryIO], object]] = {
        ".npy": lambda file: np.save(file, depth),
        ".pfm": lambda file: file.write(pfm_bytes(depth)),
        "_color.jpg": lambda file: _save_view(side_by_side(image, depth, head.inverse), comment, file),
        "_overlay.jpg": lambda file: _save_view(overlay(image, labels, head), comment, file),
        ".png": lambda file: Image.fromarray(png).save(file, "PNG", pnginfo=chunks, compress_level=PNG_LEVEL),
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = result_paths(stem, head, pfm)
    for path in paths:
        write_whole(path, writers[path.name[len(stem.name) :]])
    return paths


def write_whole(path: Path, writer: Callable[[BinaryIO], object]) -> None:
    """Let `writer` fill a hidden file in the same folder, then rename it to `path`; on any failure or Ctrl-C nothing is left."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            writer(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a PNG or JPEG that `write` made, or None: no such file, not a picture, not ours."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            comment = image.info.get("comment", "")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    comment = comment.decode("ascii", "replace") if isinstance(comment, bytes) else comment
    return json.loads(comment[len(RECORD) :]) if comment.startswith(RECORD + "{") else None


def depth_to_uint16(depth: np.ndarray, inverse: bool) -> np.ndarray:
    """(H, W) for a 16-bit PNG: inverse depth spread over 0..65535, or metres as millimetres clipped to that range.

    What is not finite becomes 0, and so does a constant inverse depth, which has no range to spread.
    """
    result = np.empty(depth.shape, np.uint16)
    for rows, values in _spread(depth) if inverse else _strips(depth):
        values = np.nan_to_num(values * (65535 if inverse else 1000), nan=0, posinf=0, neginf=0)
        result[rows] = np.rint(values.clip(0, 65535))
    return result


def _strips(depth: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Depth (H, W) in float64, a few rows at a time: what is made of them stays in the processor's cache."""
    count = max(STRIP_PIXELS // depth.shape[1], 1)
    for start in range(0, len(depth), count):
        rows = slice(start, start + count)
        yield rows, depth[rows].astype(np.float64)


def _spread(depth: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """`_strips` with the finite depths moved to 0..1, all 0 if they are equal; the others NaN."""
    finite = np.isfinite(depth)
    low, high = (float(edge(depth, where=finite, initial=start)) for edge, start in ((np.min, np.inf), (np.max, -np.inf)))
    for rows, values in _strips(depth):
        values[~finite[rows]] = np.nan
        yield rows, (values - low) / (high - low if high > low else 1)


def pfm_bytes(depth: np.ndarray) -> bytes:
    """A grey Portable Float Map: float32, rows from the bottom up, little-endian by its negative scale."""
    height, width = depth.shape
    return f"Pf\n{width} {height}\n-1.0\n".encode("ascii") + depth[::-1].astype("<f4").tobytes()


def colored(depth: np.ndarray, inverse: bool) -> np.ndarray:
    """uint8 RGB (H, W, 3), near bright and far dark by matplotlib's inferno; grey where depth is not finite."""
    from matplotlib import colormaps  # half a second that segmentation does not need

    table = np.rint(colormaps[COLOR_MAP](np.arange(256))[:, :3] * 255).astype(np.uint8)
    result = np.empty((*depth.shape, 3), np.uint8)
    for rows, values in _spread(depth):
        unknown, near = np.isnan(values), values if inverse else 1 - values
        np.take(table, np.rint(np.where(unknown, 0, near) * 255).astype(np.uint8), axis=0, out=result[rows])
        result[rows][unknown] = _UNKNOWN
    return result


def side_by_side(image: np.ndarray, depth: np.ndarray, inverse: bool) -> Image.Image:
    """The picture with the coloured depth to its right."""
    return Image.fromarray(np.concatenate([image, colored(depth, inverse)], axis=1))


def depth_scale(height: int) -> Image.Image:
    """What the colours of depth mean, for beside it: a strip of this height from near to far."""
    canvas = Image.new("RGB", (0, height))
    letter = letter_height(canvas)
    font = ImageFont.load_default(letter)
    gap = letter // 2
    width = 2 * gap + letter + int(max(font.getlength(text) for text in ("near", "far")))
    canvas = Image.new("RGB", (width + gap, height), "white")
    canvas.paste(Image.fromarray(colored(np.linspace(1, 0, height, dtype=np.float32)[:, None].repeat(letter, 1), inverse=True)), (gap, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((2 * gap + letter, gap), "near", fill="black", font=font, anchor="lt")
    draw.text((2 * gap + letter, height - gap), "far", fill="black", font=font, anchor="lb")
    return canvas


def overlay(image: np.ndarray, labels: np.ndarray, head: HeadConfig, opacity: float = 0.55) -> Image.Image:
    """The picture tinted by class, and below it a legend of the classes present with their share, the largest first.

    The legend is `with_legend`'s.
    """
    return with_legend(tinted(image, labels, head, opacity), legend(labels, head))


def tinted(image: np.ndarray, labels: np.ndarray, head: HeadConfig, opacity: float = 0.55) -> Image.Image:
    """The picture, uint8 (H, W, 3), under the colours of its labels (H, W)."""
    colours = np.take(np.asarray(head.palette, dtype=np.uint8), labels, axis=0)
    return Image.blend(Image.fromarray(image), Image.fromarray(colours), opacity)


def legend(labels: np.ndarray, head: HeadConfig) -> list[tuple[str, tuple[int, int, int]]]:
    """The classes present in labels of any shape, with their share, and their colours, the largest first."""
    counts = np.bincount(labels.reshape(-1), minlength=len(head.classes))
    present = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    return [(f"{head.classes[index]} {counts[index] / labels.size:.1%}", head.palette[index]) for index in present]


def letter_height(picture: Image.Image) -> int:
    """Pixels: of a size with the picture, and never too small to be read."""
    return min(max(max(picture.size) // 45, 12), 72)


def with_legend(picture: Image.Image, entries: list[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """The picture with names and their colours below it.

    Letters are at least 12 pixels high whatever the picture's size; a picture narrower than an entry is given a white margin.
    """
    letter = letter_height(picture)
    font = ImageFont.load_default(letter)
    gap = letter // 2
    column = letter + 3 * gap + int(max(font.getlength(text) for text, _ in entries))
    width = max(picture.width, column + gap)
    columns = (width - gap) // column
    line = letter + gap
    rows = -(-len(entries) // columns)
    canvas = Image.new("RGB", (width, picture.height + rows * line + gap), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (text, color) in enumerate(entries):
        left, top = gap + number % columns * column, picture.height + gap + number // columns * line
        draw.rectangle((left, top, left + letter, top + letter), fill=tuple(color), outline="black")
        draw.text((left + letter + gap, top + letter // 2), text, fill="black", font=font, anchor="lm")
    return canvas


def _save_view(picture: Image.Image, comment: str, file: BinaryIO) -> None:
    picture.thumbnail((MAX_VIEW_SIDE, MAX_VIEW_SIDE))
    picture.save(file, "JPEG", quality=92, subsampling=0, comment=comment)

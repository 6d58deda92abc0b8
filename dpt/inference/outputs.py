"""Predictions as files: maps for programs (PNG, .npy, .pfm) and pictures for people (JPEG).

Every file appears whole or not at all. The JPEG, which is written first, and the PNG, the last, carry as their comment a
record of what they were made from, and the size and checksum of the others: so a file is known to be ours, also if the run
that wrote it was killed. While all are there and both records say the same, the picture is done.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ..config import DPTConfig, HeadConfig
from ..system.disk import open_regular, write_whole
from .prediction import Prediction

RECORD = b"dpt {"  # what the comment with the record begins with: its JSON from the brace on
RECORD_SIZE = 1 << 16  # bytes, the most that a JPEG's comment holds
MAX_PARTS = 100  # of a PNG or JPEG that are looked through for the comment, which is the second or third
NAME_BYTES = 255  # the longest name of a file on common file systems
SUFFIXES = {  # by task, in the order they are written
    "depth": ("_color.jpg", ".npy", ".pfm", ".png"),
    "segmentation": ("_overlay.jpg", ".png"),
    "normals": ("_color.jpg", ".npy", ".png"),
}
COLOR_MAP = "inferno"
PNG_LEVEL = 3  # of zlib: 16-bit depth in half of the time of 6, Pillow's own, and a fifth larger
STRIP_PIXELS = 1 << 16  # of depth that are worked on at once
MAX_VIEW_SIDE = 16384  # of the pictures for people; JPEG ends at 65535
_UNKNOWN = (128, 128, 128)  # colour of depths that are not finite


def result_name(picture: str, model: str, tasks: Sequence[str] = ()) -> str:
    """`picture_model`, the name of a picture's results before their suffixes, or before `stem_of` several tasks. Where a file system has no
    such long names, the picture's part is cut, at a letter, and a hash of the whole put behind it."""
    names = ["", *(f"_{task}" for task in tasks)]
    name, room = f"{picture}_{model}", NAME_BYTES - max(map(len, names)) - max(map(len, itertools.chain(*SUFFIXES.values())))
    if len(os.fsencode(name)) <= room:
        return name
    end = f"-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}_{_cut(model, room // 2)}"
    return _cut(picture, room - len(os.fsencode(end))) + end


def separate_tasks(config: DPTConfig) -> list[str]:
    """The tasks whose names stand in those of their files: all of several, none of one."""
    return [head.task for head in config.heads] if config.further else []


def stem_of(stem: Path, head: HeadConfig, config: DPTConfig) -> Path:
    """The stem of one task's files: the picture's, or, of a model with several tasks, that with the task behind it."""
    return stem.with_name(f"{stem.name}_{head.task}") if head.task in separate_tasks(config) else stem


def _cut(name: str, size: int) -> str:
    """The beginning of a name, whole letters of at most `size` bytes in all."""
    return os.fsencode(name)[:size].decode("utf-8", "ignore")


def result_paths(stem: Path, head: HeadConfig, pfm: bool = False) -> list[Path]:
    """The files of one picture, in the order they are written: depth `_color.jpg`, `.npy`, `.pfm` on request, `.png`;
    segmentation `_overlay.jpg`, `.png`; normals `_color.jpg`, `.npy`, `.png`."""
    return [stem.with_name(stem.name + suffix) for suffix in SUFFIXES[head.task] if pfm or suffix != ".pfm"]


def write(
    stem: Path, image: np.ndarray, prediction: Prediction, head: HeadConfig, *, pfm: bool = False, record: dict[str, Any] | None = None
) -> list[Path]:
    """Write `result_paths(stem, head, pfm)` and return them; folders are made.

    The PNG is 16-bit inverse or relative depth scaled to 0..65535, or metres times `head.depth_scale` up to 65535, or label indices of 8
    bits (16 beyond 256 classes), or normals as colours, -1..1 over 0..255, x red, y green and z blue. A loss of power may leave files empty
    or short, which `is_done` sees: they cost less to make again than to wait for the disk.

    Args:
        image: the picture, uint8 (H, W, 3).
        record: what `read_record` will return, with "files" added: size and CRC-32 of what carries no record. JSON values.

    Raises:
        OSError: what could not be written and why.
    """
    found: Any = {"depth": prediction.depth, "segmentation": prediction.labels, "normals": prediction.normals}[head.task]
    paths = result_paths(stem, head, pfm)
    names = {path: path.name[len(stem.name) :] for path in paths}
    maps = {suffix: MAPS[suffix](found) for suffix in names.values() if suffix in MAPS}
    sums = {suffix: [len(content), zlib.crc32(content)] for suffix, content in maps.items()}
    comment = RECORD[:-1] + json.dumps({**(record or {}), "files": sums}, sort_keys=True).encode("ascii")
    png = Image.fromarray(PIXELS[head.task](found, head))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", comment.decode("ascii"))
    writers: dict[str, Callable[[BinaryIO], object]] = {
        "_color.jpg": lambda file: _save_view(beside(image, COLOURS[head.task](found, head)), comment, file),
        "_overlay.jpg": lambda file: _save_view(overlay(image, found, head), comment, file),
        ".png": lambda file: png.save(file, "PNG", pnginfo=chunks, compress_level=PNG_LEVEL),
        **{suffix: functools.partial(_write_bytes, content) for suffix, content in maps.items()},
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        write_whole(path, writers[names[path]], durable=False)
    return paths


def _write_bytes(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def is_done(paths: Sequence[Path], made_from: dict[str, Any]) -> bool:
    """Whether all of `result_paths` are there, of one run of `write` with the record `made_from`, by their sizes."""
    records = [read_record(path) for path in paths if _has_record(path)]
    sums = (records[0] or {}).get("files", {})
    if any(record != {**made_from, "files": sums} for record in records):
        return False
    try:
        return all(_has_record(path) or path.stat().st_size == sums.get(path.suffix, [-1])[0] for path in paths)
    except OSError:
        return False


def of_others(paths: Sequence[Path]) -> Path | None:
    """The first of `result_paths` whose name is taken by what `write` with a source in its record did not make: that is somebody's."""
    taken = [path for path in paths if os.path.lexists(path)]  # before the records are read: another run may be writing these
    records = {path: record for path in paths if _has_record(path) and "source" in (record := read_record(path) or {})}
    sums = [record.get("files", {}) for record in records.values()]
    for path in taken:
        if path not in records and _sum(path) not in [of.get(path.suffix) for of in sums]:
            return path
    return None


def _has_record(path: Path) -> bool:
    return path.suffix in (".jpg", ".png")


def _sum(path: Path) -> list[int] | str:
    """Size and CRC-32 of a file, or why it has none."""
    size = checksum = 0
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
    except OSError as error:
        return str(error)
    return [size, checksum]


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a PNG or JPEG that `write` made, or None: no such file, not a picture, not ours.

    Nothing of the file is trusted, and nothing is decoded: this reads up to the comment. Of the record it is certain that "source", if it
    is there, is a name, a size and a checksum, and "files" sizes and checksums by suffix.
    """
    try:
        with open_regular(path) as file:
            start = file.read(2)
            comment = _jpeg_comment(file) if start == b"\xff\xd8" else _png_comment(file) if start == b"\x89P" else b""
        record = json.loads(comment[len(RECORD) - 1 :]) if comment.startswith(RECORD) else None
    except (OSError, ValueError, RecursionError):
        return None
    return record if record is not None and _is_record(record) else None


def _is_record(record: dict[str, Any]) -> bool:
    source, sums = record.get("source", ["", 0, 0]), record.get("files", {})
    lists = [source[1:] if isinstance(source, list) and source and isinstance(source[0], str) else None]
    lists += sums.values() if isinstance(sums, dict) else [None]
    return all(isinstance(pair, list) and [type(number) for number in pair] == [int, int] for pair in lists)


def _png_comment(file: BinaryIO) -> bytes:
    """The text chunk "comment" before the pixels of a PNG, whose first two bytes are read; empty if there is none."""
    if file.read(6) != b"NG\r\n\x1a\n":
        return b""
    for _ in range(MAX_PARTS):
        head = file.read(8)
        if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
            break
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"tEXt" and length <= RECORD_SIZE:
            keyword, _, text = file.read(length).partition(b"\0")
            if keyword == b"comment":
                return text
            length = 0
        file.seek(length + 4, os.SEEK_CUR)
    return b""


def _jpeg_comment(file: BinaryIO) -> bytes:
    """The comment before the pixels of a JPEG, whose first two bytes are read; empty if there is none."""
    for _ in range(MAX_PARTS):
        head = file.read(4)
        length = int.from_bytes(head[2:], "big") - 2
        if len(head) < 4 or head[0] != 0xFF or head[1] == 0xDA or length < 0:  # 0xDA begins the pixels
            break
        if head[1] == 0xFE:
            return file.read(length)
        file.seek(length, os.SEEK_CUR)
    return b""


def depth_to_uint16(depth: np.ndarray, relative: bool, scale: float = 1000.0) -> np.ndarray:
    """(H, W) for a 16-bit PNG: relative depth, inverse or not, spread over 0..65535, or metres times `scale` clipped to that range.

    What is not finite becomes 0, and so does a constant relative depth, which has no range to spread.
    """
    result = np.empty(depth.shape, np.uint16)
    for rows, values in _spread(depth) if relative else _strips(depth):
        values = np.nan_to_num(values * (65535 if relative else scale), nan=0, posinf=0, neginf=0)
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


def npy_bytes(values: np.ndarray) -> bytes:
    """What `numpy.save` writes."""
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def pfm_bytes(depth: np.ndarray) -> bytes:
    """A grey Portable Float Map: float32, rows from the bottom up, little-endian by its negative scale."""
    height, width = depth.shape
    return f"Pf\n{width} {height}\n-1.0\n".encode("ascii") + depth[::-1].astype("<f4").tobytes()


MAPS = {".npy": npy_bytes, ".pfm": pfm_bytes}  # the files of depth and normals themselves, which carry no record


def normals_to_uint8(normals: np.ndarray) -> np.ndarray:
    """Unit vectors (H, W, 3) as the colours of a PNG: -1..1 spread over 0..255; grey where they are not finite."""
    colours = np.nan_to_num((normals.astype(np.float32) + 1) / 2, nan=0.5, posinf=0.5, neginf=0.5).clip(0, 1)
    return cast(np.ndarray, np.rint(colours * 255).astype(np.uint8))


PIXELS: dict[str, Callable[[np.ndarray, HeadConfig], np.ndarray]] = {  # of the PNG, by task
    "depth": lambda depth, head: depth_to_uint16(depth, not head.metric, head.depth_scale),
    "segmentation": lambda labels, head: labels.astype(np.uint8 if labels.dtype == np.uint8 else np.uint16),
    "normals": lambda normals, head: normals_to_uint8(normals),
}


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


COLOURS: dict[str, Callable[[np.ndarray, HeadConfig], np.ndarray]] = {  # for people, by task: uint8 (H, W, 3)
    "depth": lambda depth, head: colored(depth, head.inverse),
    "normals": lambda normals, head: normals_to_uint8(normals),
}


def beside(image: np.ndarray, colours: np.ndarray) -> Image.Image:
    """The picture with a coloured map, both uint8 (H, W, 3), to its right."""
    return Image.fromarray(np.concatenate([image, colours], axis=1))


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


def _save_view(picture: Image.Image, comment: bytes, file: BinaryIO) -> None:
    picture.thumbnail((MAX_VIEW_SIDE, MAX_VIEW_SIDE))
    picture.save(file, "JPEG", quality=92, subsampling=0, comment=comment)

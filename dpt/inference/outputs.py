"""Predictions as files: maps for programs (PNG, .npy; .pfm, .exr, .tiff on request) and pictures for people (JPEG).

Every file appears whole or not at all. The JPEG, which is written first, and the PNG, the last, carry as their comment a
record of what they were made from, and the size and checksum of the others: so a file is known to be ours, also if the run
that wrote it was killed. While all are there and both records say the same, the picture is done.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ..config import DPTConfig, HeadConfig
from ..system.disk import open_regular, write_whole
from . import drawing, maps
from .prediction import Prediction

RECORD = b"dpt {"  # what the comment with the record begins with: its JSON from the brace on
RECORD_SIZE = 1 << 16  # bytes, the most that a JPEG's comment holds
MAX_PARTS = 100  # of a PNG or JPEG that are looked through for the comment, which is the second or third
NAME_BYTES = 255  # the longest name of a file on common file systems
SUFFIXES = {  # by task, in the order they are written
    "depth": ("_color.jpg", ".npy", ".pfm", ".exr", ".tiff", ".png"),
    "segmentation": ("_overlay.jpg", ".png"),
    "normals": ("_color.jpg", ".npy", ".exr", ".png"),
}
PNG_LEVEL = 3  # of zlib: 16-bit depth in half of the time of 6, Pillow's own, and a fifth larger
MAX_VIEW_SIDE = 16384  # of the pictures for people; JPEG ends at 65535
Drawn = Mapping[str, np.ndarray]  # by its name in `drawing.DRAW`, what of a map is drawn already


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


def result_paths(stem: Path, head: HeadConfig, further: Collection[str] = ()) -> list[Path]:
    """The files of one picture, in the order they are written, of which those of `maps.FURTHER` on request, by their names: depth
    `_color.jpg`, `.npy`, `.pfm`, `.exr`, `.tiff`, `.png`; segmentation `_overlay.jpg`, `.png`; normals `_color.jpg`, `.npy`, `.exr`,
    `.png`.

    Raises:
        ValueError: another name.
    """
    for name in further:
        if name not in maps.FURTHER:
            raise ValueError(f"further files are {', '.join(maps.FURTHER)}, not {name!r}")
    left_out = {f".{name}" for name in maps.FURTHER} - {f".{name}" for name in further}
    return [stem.with_name(stem.name + suffix) for suffix in SUFFIXES[head.task] if suffix not in left_out]


def write(
    stem: Path,
    image: np.ndarray,
    prediction: Prediction,
    head: HeadConfig,
    *,
    further: Collection[str] = (),
    record: dict[str, Any] | None = None,
    drawn: Drawn | None = None,
    ends: drawing.Ends = None,
) -> list[Path]:
    """Write `result_paths(stem, head, further)` and return them; folders are made.

    The PNG is 16-bit inverse or relative depth scaled to 0..65535, or metres times `head.depth_scale` up to 65535, which its text "depth"
    tells; or label indices of 8 bits (16 beyond 256 classes), or normals as colours, -1..1 over 0..255, x red, y green and z blue. The
    coloured view of metres has a scale with its ends in metres. A loss of power may leave files empty or short, which `is_done` sees: they
    cost less to make again than to wait for the disk.

    Args:
        image: the picture, uint8 (H, W, 3).
        record: what `read_record` will return, with "files" added: size and CRC-32 of what carries no record. JSON values.
        drawn: of `Result.drawn` what is of this head; what is missing is drawn here.
        ends: the lowest and highest depth of the colours, and of the PNG where it is not in metres; by default those of the map.

    Raises:
        OSError: what could not be written and why. ValueError: a name of `further`, or its package is missing.
    """
    found = prediction.of(head.task)
    paths = result_paths(stem, head, further)
    names = {path: path.name[len(stem.name) :] for path in paths}
    contents = {suffix: maps.WRITERS[suffix](found, head) for suffix in names.values() if suffix in maps.WRITERS}
    sums = {suffix: [len(content), zlib.crc32(content)] for suffix, content in contents.items()}
    sums |= _still_true(read_record(paths[-1]), record, sums)
    comment = RECORD[:-1] + json.dumps({**(record or {}), "files": sums}, sort_keys=True).encode("ascii")
    drawn = drawn or {}
    colours = functools.partial(_drawn, "colours", found, image, head, drawn, ends)
    png = Image.fromarray(_pixels(found, image, head, drawn, ends))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", comment.decode("ascii"))
    if head.task == "depth":
        chunks.add_text("depth", meaning(head, ends))
    writers: dict[str, Callable[[BinaryIO], object]] = {
        "_color.jpg": lambda file: _save_view(beside(image, colours(), _metres(found, head, ends)), comment, file),
        "_overlay.jpg": lambda file: _save_view(with_legend(Image.fromarray(colours()), legend(found, head)), comment, file),
        ".png": lambda file: png.save(file, "PNG", pnginfo=chunks, compress_level=PNG_LEVEL),
        **{suffix: functools.partial(_write_bytes, content) for suffix, content in contents.items()},
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    for path in paths:
        write_whole(path, writers[names[path]], durable=False)
    return paths


def _still_true(former: dict[str, Any] | None, record: dict[str, Any] | None, sums: dict[str, list[int]]) -> dict[str, list[int]]:
    """Of further files that an earlier run wrote and this one does not, what the record says, where it was of the same map."""
    if former is None or former != {**(record or {}), "files": (files := former.get("files", {}))} or ".npy" not in sums:
        return {}
    return {suffix: of for suffix, of in files.items() if suffix not in sums} if files.get(".npy") == sums[".npy"] else {}


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


def _pixels(found: np.ndarray, image: np.ndarray, head: HeadConfig, drawn: Drawn, ends: drawing.Ends) -> np.ndarray:
    """Of the PNG: depth of 16 bits, labels of 8 or 16, normals as colours."""
    if head.task == "segmentation":
        return found.astype(np.uint8 if found.dtype == np.uint8 else np.uint16)
    return _drawn("colours" if head.task == "normals" else "pixels", found, image, head, drawn, ends)


def _drawn(what: str, found: np.ndarray, image: np.ndarray, head: HeadConfig, drawn: Drawn, ends: drawing.Ends) -> np.ndarray:
    """What a GPU drew, or what is drawn now."""
    return drawn[what] if what in drawn else drawing.DRAW[what][head.task](_tensor(found), _tensor(image), head, ends).numpy()


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(values, requirements=("C", "W")))


def colored(depth: np.ndarray, inverse: bool) -> np.ndarray:
    """uint8 RGB (H, W, 3) of depth (H, W): `drawing.colored`."""
    return drawing.colored(_tensor(depth), inverse).numpy()


def meaning(head: HeadConfig, ends: drawing.Ends = None) -> str:
    """What the numbers of depth in a PNG of 16 bits are."""
    if head.metric:
        return f"metres times {head.depth_scale:g}"
    if ends is not None:
        return f"{'inverse' if head.inverse else 'relative'} depth: {ends[0]:.9g} and less 0, {ends[1]:.9g} and more 65535"
    return "inverse depth: the farthest 0, the nearest 65535" if head.inverse else "relative depth: the nearest 0, the farthest 65535"


def _metres(depth: np.ndarray, head: HeadConfig, ends: drawing.Ends) -> tuple[str, str] | None:
    """How near and how far a map of metres goes, for its colours' scale; None of other maps, and where nothing is finite."""
    finite = depth[np.isfinite(depth)] if head.metric else np.empty(0)
    near, far = ends or ((finite.min(), finite.max()) if finite.size else (0.0, 0.0))
    return (f"{near:.3g} m", f"{far:.3g} m") if finite.size else None


def beside(image: np.ndarray, colours: np.ndarray, ends: tuple[str, str] | None = None) -> Image.Image:
    """The picture with a coloured map, both uint8 (H, W, 3), to its right; and, with names for its ends, the colours' scale."""
    parts = [image, colours] if ends is None else [image, colours, np.asarray(depth_scale(len(image), ends))]
    return Image.fromarray(np.concatenate(parts, axis=1))


def depth_scale(height: int, ends: tuple[str, str] = ("near", "far")) -> Image.Image:
    """What the colours of depth mean, for beside it: a strip of this height from near to far, with names at its ends."""
    canvas = Image.new("RGB", (0, height))
    letter = letter_height(canvas)
    font = ImageFont.load_default(letter)
    gap = letter // 2
    width = 2 * gap + letter + int(max(font.getlength(text) for text in ends))
    canvas = Image.new("RGB", (width + gap, height), "white")
    canvas.paste(Image.fromarray(colored(np.linspace(1, 0, height, dtype=np.float32)[:, None].repeat(letter, 1), inverse=True)), (gap, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((2 * gap + letter, gap), ends[0], fill="black", font=font, anchor="lt")
    draw.text((2 * gap + letter, height - gap), ends[1], fill="black", font=font, anchor="lb")
    return canvas


def tinted(image: np.ndarray, labels: np.ndarray, head: HeadConfig) -> Image.Image:
    """The picture, uint8 (H, W, 3), under the colours of its labels (H, W): `drawing.tinted`."""
    return Image.fromarray(drawing.tinted(_tensor(image), _tensor(labels), head.palette).numpy())


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

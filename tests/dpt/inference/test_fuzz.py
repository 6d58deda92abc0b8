"""Damaged files of every format: each is a picture, or an error of its own. Blind spots: damage that leaves a picture of other colours;
what a decoder does to memory it does not own, unless the process dies of it; other versions of Pillow and its C libraries."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import random
import re
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pictures
import pytest
from PIL import Image

from dpt.data.targets import DEPTH_READERS, LABEL_READERS, TargetError, read_depth, read_labels
from dpt.inference.images import FORMATS, MAX_PIXELS, ImageError, load_image
from dpt.inference.maps import pfm_bytes

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
try:
    import OpenEXR
    import tifffile
except ImportError:
    OpenEXR = tifffile = None

MUTATIONS = 1000  # of each of the eleven formats
TARGET_MUTATIONS = 2000
PIXELS = 4_000_000  # at most, of pictures; the default of targets
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
NUMBERS = (0, 1, 7, 255, 256, 32767, 32768, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
SAVED: dict[str, tuple[tuple[str, dict], ...]] = {  # Pillow's format -> modes, and how they are saved
    "JPEG": (
        ("RGB", {}),
        ("L", {"progressive": True}),
        ("CMYK", {"quality": 95}),
        ("RGB", {"exif": "orientation"}),
        ("RGB", {"mpo": True}),
    ),
    "PNG": (
        *((mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        ("RGB", {"exif": "orientation", "icc_profile": bytes(99)}),
        ("L", {"transparency": 7}),
        ("RGB", {"transparency": (220, 40, 30)}),
        ("P", {"transparency": bytes(3)}),
        ("RGB;16", {}),
    ),
    "WEBP": (("RGB", {}), ("RGBA", {"lossless": True}), ("RGB", {"frames": 2})),
    "TIFF": (
        *((mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")),
        *(("RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "zstd", "lzma")),
        ("1", {"compression": "group4"}),
        ("RGB", {"exif": "orientation"}),
        *(("RGB;16", options) for options in ({}, {"compression": "zlib"}, {"planarconfig": "separate"}, {"tile": (16, 16)})),
        *(("RGB;F", options) for options in ({}, {"compression": "zlib"}, {"planarconfig": "separate"}, {"tile": (16, 16)})),
    ),
    "BMP": tuple((mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    "GIF": (("L", {}), ("P", {"transparency": 1}), ("RGB", {"frames": 3}), ("P", {"interlace": 1, "comment": b"a comment"})),
    "PPM": tuple((mode, {}) for mode in ("1", "L", "RGB", "I;16", "F")),
    "JPEG2000": (("L", {}), ("RGB", {}), ("RGBA", {"irreversible": True}), ("RGB", {"tile_size": (16, 16)})),
    "AVIF": (("RGB", {"quality": 50}), ("RGBA", {"quality": 80})),
    "HEIF": (("RGB", {"quality": 50}), ("RGBA", {"quality": 80})),
    "EXR": (
        *(("RGB", {"compression": name}) for name in ("NO", "RLE", "ZIPS", "ZIP", "PIZ", "PXR24", "B44", "DWAA")),
        ("RGBA", {}),
        ("Y", {}),
    ),
}
PACKAGES = {"HEIF": pillow_heif, "EXR": OpenEXR, "TIFF": tifffile}
# OpenEXR prints what is wrong with a file, to stderr from C and to stdout from Python, and cannot be told not to.
TALKATIVE = {"EXR"}
RAMP = np.arange(24 * 32).reshape(24, 32)
TARGETS = (
    *((RAMP.astype(dtype), ".png") for dtype in ("bool", "u1", "u2")),
    *((RAMP.astype(dtype), ".tif") for dtype in ("u2", "i4", "f4")),
    *((RAMP.astype(dtype), ".npy") for dtype in ("u2", "i8", "f4", "f8", ">f2")),
    (RAMP.astype("f4"), ".pfm"),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, list[tuple[str, bytes]]]:
    """(extension, content) of the good files of each format."""
    folder = tmp_path_factory.mktemp("good")
    files = {form: [_saved(folder, form, *variant) for variant in variants] for form, variants in SAVED.items() if PACKAGES.get(form, True)}
    return files | {"targets": [_saved_target(folder, values, extension) for values, extension in TARGETS]}


def _saved(folder: Path, form: str, mode: str, options: dict) -> tuple[str, bytes]:
    path = folder / f"picture{FORMATS[form][0]}"
    _save(path, form, mode, dict(options))
    assert load_image(path).shape in ((24, 32, 3), (32, 24, 3))
    return path.suffix, path.read_bytes()


def _saved_target(folder: Path, values: np.ndarray, extension: str) -> tuple[str, bytes]:
    path = folder / f"target{extension}"
    if extension == ".npy":
        np.save(path, values)
    elif extension == ".pfm":
        path.write_bytes(pfm_bytes(values))
    else:
        Image.fromarray(values).save(path)
    return extension, path.read_bytes()


def _save(path: Path, form: str, mode: str, options: dict) -> None:
    scene = pictures.scene(24, 32)
    if form == "EXR" or mode in ("RGB;16", "RGB;F"):
        path.write_bytes(_deep(scene, form, mode, options))
        return
    if mode in ("I;16", "I", "F"):
        values = pictures.luma(scene)
        picture = Image.fromarray(
            {"I;16": values.astype(np.uint16) * 257, "I": values.astype(np.int32), "F": values.astype(np.float32) / 255}[mode]
        )
    else:
        picture = Image.fromarray(scene).convert(mode)
    if options.pop("exif", None):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    if options.pop("mpo", None):
        form, options = "MPO", {"save_all": True, "append_images": [picture.rotate(90)]}
    if frames := options.pop("frames", None):
        options |= {"save_all": True, "append_images": [picture.rotate(90 * turn) for turn in range(1, frames)]}
    if form == "HEIF":
        pillow_heif.from_pillow(picture).save(path, **options)
    else:
        picture.save(path, form, **options)


def _deep(scene: np.ndarray, form: str, mode: str, options: dict) -> bytes:
    """What Pillow does not save."""
    if form == "PNG":
        rows = b"".join(b"\0" + row.tobytes() for row in scene.astype(">u2") * 257)
        return pictures.png(32, 24, 16, 2, rows)
    file = io.BytesIO()
    if form == "EXR":
        kind = {"compression": getattr(OpenEXR, f"{options.get('compression', 'ZIP')}_COMPRESSION"), "type": OpenEXR.scanlineimage}
        planes = {name: np.ascontiguousarray(scene[..., index % 3] / 255, np.float16) for index, name in enumerate(mode)}
        OpenEXR.File(kind, planes, num_threads=0).write(file)
    else:
        values = scene.astype(np.uint16) * 257 if mode == "RGB;16" else (scene / 255).astype(np.float32)
        values[0, 0, 0] += values.dtype.type(1 if mode == "RGB;16" else 1e-5)
        values = np.moveaxis(values, -1, 0) if "planarconfig" in options else values
        tifffile.imwrite(file, values, photometric="rgb", **options)
    return file.getvalue()


Mutation = Callable[[random.Random, bytearray, bytes], None]


def _flip_bits(chance: random.Random, content: bytearray, other: bytes) -> None:
    for _ in range(chance.choice((1, 1, 2, 8))):
        content[_place(chance, content)] ^= 1 << chance.randrange(8)


def _set_bytes(chance: random.Random, content: bytearray, other: bytes) -> None:
    for _ in range(chance.choice((1, 1, 2, 4))):
        content[_place(chance, content)] = chance.choice((*EXTREMES, chance.randrange(256)))


def _truncate(chance: random.Random, content: bytearray, other: bytes) -> None:
    del content[_place(chance, content) :]


def _insert(chance: random.Random, content: bytearray, other: bytes) -> None:
    place = _place(chance, content)
    content[place:place] = chance.randbytes(chance.randint(1, 20))


def _delete(chance: random.Random, content: bytearray, other: bytes) -> None:
    place = _place(chance, content)
    del content[place : place + chance.randint(1, 20)]


def _splice(chance: random.Random, content: bytearray, other: bytes) -> None:
    content[_place(chance, content) :] = other[chance.randrange(len(other)) :]


def _number(chance: random.Random, content: bytearray, other: bytes) -> None:
    """A 16- or 32-bit number of either byte order, anywhere."""
    _write_number(chance, content, _place(chance, content))


def _length(chance: random.Random, content: bytearray, other: bytes) -> None:
    """The length of a chunk or box: the number before its name (PNG, AVIF, HEIC, JPEG 2000) or after it (WebP)."""
    names = [match.start() for match in re.finditer(rb"[A-Za-z0-9 ]{4}", content)]
    _write_number(chance, content, max(chance.choice(names or [4]) + chance.choice((-4, 4)), 0))


def _text_number(chance: random.Random, content: bytearray, other: bytes) -> None:
    """A number that is written in digits, as in the headers of PPM."""
    runs = list(re.finditer(rb"[0-9.]+", content[:64])) or [re.match(b"", content)]
    run = chance.choice(runs)
    content[run.start() : run.end()] = chance.choice((b"0", b"2x", b"-1", b"99999", b"9" * 30, b"1e9", b"nan", b"", b"65536", b"#"))


def _write_number(chance: random.Random, content: bytearray, place: int) -> None:
    size = chance.choice((2, 4))
    number = chance.choice((*NUMBERS, chance.randrange(1 << 16))) % (1 << 8 * size)
    content[place : place + size] = number.to_bytes(size, chance.choice(("big", "little")))


def _place(chance: random.Random, content: bytearray) -> int:
    """Half of them in the header."""
    return chance.randrange(min(len(content), 64) if chance.random() < 0.5 else len(content))


MUTATE = (_flip_bits, _set_bytes, _truncate, _insert, _delete, _splice, _number, _length, _text_number)


def _with_checksums(content: bytes) -> bytes:
    """A PNG's checksums made right again, without which nothing behind them is looked at."""
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        end = place + 8 + struct.unpack_from(">I", content, place)[0]
        parts.append(
            pictures.chunk(content[place + 4 : place + 8], content[place + 8 : end]) if end + 4 <= len(content) else content[place:]
        )
        place = end + 4
    return b"".join(parts) + content[place:]


def _mutated(chance: random.Random, files: list[tuple[str, bytes]], others: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """One of `files` with one to three mutations, under its own extension or, of one in ten, under another's."""
    extension, content = chance.choice(files)
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        chance.choice(MUTATE)(chance, content, chance.choice(others)[1])
        content = content or bytearray(1)
    if content.startswith(b"\x89PNG\r\n\x1a\n") and chance.random() < 0.7:
        content = _with_checksums(bytes(content))
    return chance.choice(others)[0] if chance.random() < 0.1 else extension, bytes(content)


def _picture(path: Path) -> None:
    picture = load_image(path, PIXELS)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and 0 < picture.size <= 3 * PIXELS


def _target(path: Path) -> None:
    for read, readers, dtype in ((read_depth, DEPTH_READERS, np.float32), (read_labels, LABEL_READERS, np.int64)):
        if path.suffix in readers:
            values = read(path)
            assert values.dtype == dtype and values.ndim == 2 and values.size


def _peak() -> int:
    """Most memory in MB that this process has held since it was last asked."""
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak // 1024


def _read_all(form: str, count: int, files: list, others: list, folder: Path, read: Callable[[Path], None], pixels: int, pipe) -> None:
    """Read `count` mutated files; sends what went wrong, by file, and the numbers of good and of refused ones.

    To go wrong is also to take more memory than 16 bytes for each of the `pixels` that are allowed, or more time than they need, and
    what a decoder takes besides, whatever the file announces.
    """
    logging.root.handlers.clear()  # pytest's, without which what nobody handles is printed
    wrong, outcomes = [], [0, 0]
    for number in range(count):
        extension, content = _mutated(random.Random(f"{form} {number}"), files, others)
        path = folder / f"mutation{number}{extension}"
        path.write_bytes(content)
        before, start, error = measured and _peak(), time.process_time(), None
        try:
            read(path)
        except (ImageError, TargetError) as caught:
            error = caught
            if not str(caught).startswith(f"{path}: "):
                wrong.append(f"{path}: not named by {caught}")
        except Exception as caught:
            wrong.append(f"{path}: {type(caught).__name__}: {caught}")
        outcomes[error is not None] += 1
        seconds, megabytes = time.process_time() - start, (measured and _peak()) - before
        if seconds > 1 + pixels / 2e7 or megabytes > 100 + 16 * pixels / 1e6:
            wrong.append(f"{path}: took {seconds:.1f} s and {megabytes} MB")
        path.unlink()
    pipe.send((wrong, outcomes))


measured = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged metadata, and Python's, about forks of processes with threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("form", [*SAVED, "targets"])
def test_damaged_files(tmp_path, good, capfd, form):
    """Blind spot: a decoder's own exception, the process's death, output of a C library, memory or time without bound."""
    if form not in good:
        pytest.skip("needs a package that is not installed")
    others = good[form] if form == "targets" else [file for name, files in good.items() if name != "targets" for file in files]
    count, read, pixels = (TARGET_MUTATIONS, _target, MAX_PIXELS) if form == "targets" else (MUTATIONS, _picture, PIXELS)
    context = multiprocessing.get_context("fork")  # a process of its own, that may die
    receiver, sender = context.Pipe(duplex=False)
    reading = context.Process(target=_read_all, args=(form, count, good[form], others, tmp_path, read, pixels, sender))
    reading.start()
    sender.close()
    try:
        wrong, outcomes = receiver.recv()
    except EOFError:
        reading.join()
        pytest.fail(f"the process ended with {reading.exitcode} at {[path.name for path in tmp_path.iterdir()]}")
    reading.join()
    assert not wrong, "\n".join(wrong[:5])
    assert min(outcomes) > count // 30, "the mutations are too mild, or too harsh"
    assert form in TALKATIVE or capfd.readouterr() == ("", "")

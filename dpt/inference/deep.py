"""Pictures of more than 8 bits a channel, of files that Pillow makes 8 of, or does not read.

Of 16 bits a colour (PNG, TIFF) Pillow keeps one byte, and its decoders are told which by a raw mode, the order of a number's bytes: the
mode of the other order keeps the other byte. So such a file is decoded twice, by Pillow, within its limits and with its errors, and no
other package is needed. EXR is read by OpenEXR, and TIFF that Pillow refuses, such as floats in colour, by tifffile.
"""

from __future__ import annotations

import logging
import re
import sys
import zlib
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

EXR = b"\x76\x2f\x31\x01"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
OF_16_BITS = re.compile(r"(RGB|RGBA|RGBX|RGBa);16([BLN])")  # Pillow's raw modes
OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # order of bytes -> the one that keeps the lower byte
# TIFF's numbers: what the pixels are, a plane for each colour, what the channel behind the colours is, compression by zlib, and tags.
GREY, RGB, SEPARATE, PREMULTIPLIED, OPACITY, DEFLATE = 1, 2, 2, 1, 2, (8, 32946)
BITS, PLANES, ORIENTATION = 258, 284, 274
TURNS: dict[object, Callable[[np.ndarray], np.ndarray]] = {  # of arrays (H, W, C), by orientation
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: values[::-1].swapaxes(0, 1),
    7: lambda values: values[::-1, ::-1].swapaxes(0, 1),
    8: lambda values: values[:, ::-1].swapaxes(0, 1),
}
Limit = Callable[[int, int, int], None]  # width, height and channels of what is to be decoded: it raises where that is too much

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # without a handler Python prints what it logs about damaged files


def is_exr(start: bytes) -> bool:
    """Whether a file that begins so says that it is EXR."""
    return start.startswith(EXR)


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins so says that it is TIFF."""
    return start.startswith(TIFF)


class Decodings(NamedTuple):
    """How the bytes of a file of 16 bits a colour are got: for each decoding the raw mode of each part of the file, the upper bytes' first;
    and whether the colours are multiplied by their opacity."""

    modes: list[list[str]]
    premultiplied: bool


def decodings(image: Image.Image) -> Decodings | None:
    """Of a file that is opened and not decoded; None of one that has no 16 bits a colour, or whose lower bytes are out of reach."""
    if image.format not in ("PNG", "TIFF"):
        return None
    tiles: list[Any] = getattr(image, "tile", None) or []
    modes = [tile.args if isinstance(tile.args, str) else tile.args[0] for tile in tiles if tile.args]
    tags: Any = getattr(image, "tag_v2", {})
    separate = tags.get(PLANES) == SEPARATE
    if separate and tiles[0].codec_name == "raw" and set(modes) <= set("RGB") and set(tags.get(BITS, ())) == {16}:
        order = "L" if tags.prefix == b"II" else "B"  # which Pillow leaves out: it would take 8 bits
        return Decodings([[f"{mode};16{one}" for mode in modes] for one in (order, OTHER[order])], False)
    if set(modes) == {"LA;16B"}:
        return Decodings([["RGBA"]], False)  # grey and opacity: their four bytes as four channels
    found = OF_16_BITS.fullmatch(modes[0]) if len(set(modes)) == 1 and not separate else None
    if found is None:
        return None
    kind, order = found.groups()
    plain = kind.replace("a", "A")  # RGBa would be divided by its opacity, byte by byte
    return Decodings([[f"{plain};16{one}"] * len(modes) for one in (order, OTHER[order])], kind == "RGBa")


def sixteen_bits(how: Decodings, images: list[Image.Image], loaded: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """The pixels of such a file, uint16 (H, W, 3 or 4), upright.

    Args:
        images: the file opened anew, once for each of the decodings.
        loaded: decodes, and turns upright.
    """
    transparent = images[0].info.get("transparency")
    parts = []
    for image, modes in zip(images, how.modes, strict=True):
        told: Any = image
        told.tile = [tile._replace(args=_with_mode(tile.args, mode)) for tile, mode in zip(told.tile, modes, strict=True)]
        parts.append(np.array(loaded(image)))
    if len(parts) == 1:
        return parts[0].view(">u2").astype(np.uint16)[..., [0, 0, 0, 1]]
    values: np.ndarray = parts[0].astype(np.uint16)
    values <<= 8
    values |= parts[1]
    if isinstance(transparent, tuple):  # the one colour of a PNG that is not shown
        values[(values == np.array(transparent)).all(axis=-1)] = 65535
    return values


def _with_mode(args: Any, mode: str) -> Any:
    return mode if isinstance(args, str) else (mode, *args[1:])


def on_white(values: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """uint16, or floats in 0..1, (H, W, C + 1) with opacity last -> (H, W, C) over white, of the same kind."""
    whole = values.dtype.kind == "u"
    white = np.float32(65535 if whole else 1)
    colours, alpha = values[..., :-1].astype(np.float32), values[..., -1:].astype(np.float32) / white
    shown = ((colours if premultiplied else colours * alpha) + white * (1 - alpha)).clip(0, white)
    return np.rint(shown).astype(values.dtype) if whole else shown


def read_exr(file: IO[bytes], limit: Limit) -> np.ndarray:
    """The colours of an EXR, float32 (H, W, 1 or 3), 0..1 by sRGB's curve: the file's are in proportion to light, and what is brighter than
    1 becomes 1.

    They are R, G, B or Y, of the first part and layer that has them, over white by A where there is one, at the size of the display window,
    black where the data window leaves it empty.

    Raises:
        ValueError: there are none, some are no numbers, or OpenEXR is not installed. Exception: what OpenEXR makes of damaged bytes, of
        which it prints lines as well.
    """
    try:
        import OpenEXR
    except ImportError as error:
        raise ValueError(f"EXR needs OpenEXR: pip install 'dense-prediction-transformers[exr]' ({error})") from error
    file.seek(0)
    headers = [part.header for part in OpenEXR.File(file, header_only=True, num_threads=0).parts]
    for header in headers:  # all of them are decoded
        left, top, right, bottom = _box(header["dataWindow"])
        limit(right - left, bottom - top, len(header["channels"]))
        if str(header["type"]).endswith(("deepscanline", "deeptile")):
            raise ValueError("a deep EXR, of several samples a pixel")
    number, names = _colours(headers)
    left, top, right, bottom = _box(headers[number]["displayWindow"])
    limit(right - left, bottom - top, len(names))
    file.seek(0)
    parts = OpenEXR.File(file, separate_channels=True, num_threads=0).parts
    if len(parts) != len(headers):  # it leaves out those whose pixels it cannot read
        raise ValueError("its pixels are damaged")
    found = np.stack([parts[number].channels[name].pixels for name in names], axis=-1, dtype=np.float32, casting="unsafe")
    del parts
    if np.isnan(found).any():
        raise ValueError("it holds values that are no numbers (NaN)")
    shown = np.zeros((bottom - top, right - left, len(names)), np.float32)
    _paste(found, _box(headers[number]["dataWindow"])[:2], shown, (left, top))
    if names[-1].endswith("A"):
        shown[..., -1].clip(0, 1, out=shown[..., -1])
        shown = on_white(shown, premultiplied=True)
    return srgb(shown)


def _box(window: Any) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, the last two behind it."""
    (left, top), (right, bottom) = (corner.tolist() for corner in window)
    return left, top, right + 1, bottom + 1


def _colours(headers: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The first part that has colours, and the names of its channels that are."""
    for number, header in enumerate(headers):
        names = {channel.name for channel in header["channels"] if channel.xSampling == channel.ySampling == 1}
        layers = {name.rpartition(".")[0] for name in names}
        for layer in sorted(layers):  # "" first
            dot = f"{layer}." if layer else ""
            for colours in (["R", "G", "B"], ["Y"]):
                if {dot + name for name in colours} <= names:
                    return number, [dot + name for name in (*colours, "A") if dot + name in names]
    held = ", ".join(sorted({channel.name for header in headers for channel in header["channels"]}))
    raise ValueError(f"its channels are {held or 'none'}: R, G and B are wanted, or Y")


def _paste(source: np.ndarray, place: tuple[int, int], target: np.ndarray, origin: tuple[int, int]) -> None:
    """`source` (h, w, C), whose first pixel lies at `place` (x, y), into `target` (H, W, C), which begins at `origin`."""
    across, down = place[0] - origin[0], place[1] - origin[1]
    height, width = source.shape[:2]
    rows = slice(max(down, 0), min(down + height, target.shape[0]))
    columns = slice(max(across, 0), min(across + width, target.shape[1]))
    if rows.start < rows.stop and columns.start < columns.stop:
        target[rows, columns] = source[rows.start - down : rows.stop - down, columns.start - across : columns.stop - across]


def srgb(light: np.ndarray) -> np.ndarray:
    """Light, of which 1 is white, by sRGB's curve (IEC 61966-2-1): float32 in 0..1."""
    curve = np.empty(light.shape, np.float32)
    for row, levels in zip(light, curve, strict=True):  # which need no memory on the way
        row = row.clip(0, 1)
        levels[:] = np.where(row <= 0.0031308, row * 12.92, 1.055 * row ** (1 / 2.4) - 0.055).clip(0, 1)
    return curve


def read_tiff(file: IO[bytes], limit: Limit) -> tuple[np.ndarray, bool]:
    """The first page of a TIFF that Pillow does not read, grey or RGB, with opacity or without: uint8, uint16 or floats (H, W, 1, 3 or 4),
    upright; and whether the colours are multiplied by their opacity.

    Raises:
        ValueError: another kind, or tifffile is not installed. Exception: what it makes of the bytes.
    """
    try:
        import tifffile
    except ImportError as error:
        wanted = "Pillow does not read this kind of TIFF, and tifffile may: pip install 'dense-prediction-transformers[tiff]'"
        raise ValueError(f"{wanted} ({error})") from error
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        limit(page.imagewidth, page.imagelength, page.samplesperpixel)
        limit(page.tilewidth, page.tilelength, page.samplesperpixel)
        colour, whole = page.photometric == RGB, page.dtype in (np.uint8, np.uint16)
        if page.axes not in ("YX", "YXS", "SYX") or page.photometric not in (GREY, RGB) or not (whole or page.dtype.kind == "f"):
            found = f"a TIFF of axes {page.axes}, {page.dtype}, photometric {page.photometric}"
            raise ValueError(f"{found}: grey or RGB is wanted, of uint8, uint16 or floats")
        if page.compression in DEFLATE:
            _check_deflated(file, page)
        values: np.ndarray = page.asarray(maxworkers=1)
        turn, extra = getattr(page.tags.get(ORIENTATION), "value", None), [int(kind) for kind in page.extrasamples]
    values = values.reshape(values.shape + (1,) * (3 - values.ndim))
    values = values.transpose(1, 2, 0) if page.axes == "SYX" else values
    colours = [0, 1, 2] if colour else [0]
    if extra[:1] in ([PREMULTIPLIED], [OPACITY]):
        colours = [*(colours * 3)[:3], len(colours)]
    values = TURNS.get(turn, np.asarray)(values[..., colours])
    return values.astype(values.dtype.newbyteorder("=")), extra[:1] == [PREMULTIPLIED]


def _check_deflated(file: IO[bytes], page: Any) -> None:
    """ValueError where a part of a TIFF becomes more than the page says, for which tifffile would take any memory."""
    most = int(np.prod(page.chunks)) * page.dtype.itemsize
    for place, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(place)
        if len(zlib.decompressobj().decompress(file.read(size), most + 1)) > most:
            raise ValueError(f"a part of it has more than the {most} bytes that it should have")

"""Small test pictures, made here: one scene in every format, files that must be refused, and models to show them to."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import dpt
from dpt.config import DPTConfig

RED, GREEN, BLUE, GREY = (220, 40, 30), (40, 200, 60), (30, 60, 210), (180, 180, 180)
HEIGHT, WIDTH = 48, 64


def scene(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (H, W, 3), a colour in each quarter: red, green above blue, grey. No turning or mirroring leaves it equal."""
    picture = np.empty((height, width, 3), dtype=np.uint8)
    top, left = height // 2, width // 2
    picture[:top, :left], picture[:top, left:], picture[top:, :left], picture[top:, left:] = RED, GREEN, BLUE, GREY
    return picture


def quarters(picture: np.ndarray) -> list[tuple[int, ...]]:
    """The colours in the middles of the four quarters, in the order of `scene`."""
    height, width = picture.shape[:2]
    places = ((1, 1), (1, 3), (3, 1), (3, 3))
    return [tuple(int(value) for value in picture[y * height // 4, x * width // 4]) for y, x in places]


def lively_model(config: DPTConfig) -> nn.Module:
    """A model of random weights whose maps have contrast; as initialised they are nearly constant, and every map fits every other."""
    torch.manual_seed(0)
    model = dpt.build(config)
    last = model.head.conv3 if config.head.task == "depth" else model.head.classifier
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 64, 64)) - last.bias.mean()
        last.weight /= maps.std()
        last.bias.fill_(5 - float(maps.mean() / maps.std()))  # far from the ReLU of depth, and no matter between logits
    return model


def luma(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W)."""
    return np.array(Image.fromarray(picture).convert("L"))


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG file of filtered `rows`, for what Pillow does not write; `transparent` is the content of its tRNS chunk."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    header += chunk(b"tRNS", transparent) if transparent else b""
    return SIGNATURE + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _with_alpha(mode: str) -> Image.Image:
    """The scene with its left half opaque and its right half wholly transparent, over colours that must not show."""
    picture = Image.fromarray(scene()).convert(mode[:-1])
    alpha = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha[:, WIDTH // 2 :] = 0
    picture.putalpha(Image.fromarray(alpha))
    return picture


def rgb16(path: Path) -> None:
    rows = np.zeros((HEIGHT, 1 + WIDTH * 6), dtype=np.uint8)
    rows[:, 1:] = (scene().astype(">u2") * 257).reshape(HEIGHT, -1).view(np.uint8)
    path.write_bytes(png(WIDTH, HEIGHT, 16, 2, rows.tobytes()))


def palette_with_transparency(path: Path) -> None:
    """Palette entry of green is transparent."""
    colors = [RED, GREEN, BLUE, GREY]
    index = np.array([colors.index(tuple(c)) for c in scene().reshape(-1, 3).tolist()], dtype=np.uint8).reshape(HEIGHT, WIDTH)
    picture = Image.fromarray(index).convert("P")
    picture.putpalette([value for color in colors for value in color])
    picture.save(path, transparency=1)


def turned(orientation: int) -> Callable[[Path], None]:
    """A JPEG that shows the scene once its EXIF orientation is applied."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]

    def write(path: Path) -> None:
        picture = Image.fromarray(scene())
        exif = Image.Exif()
        exif[0x0112] = orientation
        (picture if undo is None else picture.transpose(undo)).save(path, quality=95, exif=exif)

    return write


def damaged_exif(path: Path) -> None:
    Image.fromarray(scene()).save(path, quality=95, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12")


def saved(mode: str, **options) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(scene()).convert(mode).save(path, **options)


COLOR: dict[str, Callable[[Path], None]] = {
    "color.jpg": saved("RGB", quality=95),
    "progressive.jpg": saved("RGB", quality=95, progressive=True),
    "color.png": saved("RGB"),
    "color.bmp": saved("RGB"),
    "color.webp": saved("RGB", lossless=True),
    "lossy.webp": saved("RGB", quality=95),
    "palette.png": lambda path: Image.fromarray(scene()).quantize(4).save(path),
    "palette.gif": lambda path: Image.fromarray(scene()).quantize(4).save(path),
    "cmyk.jpg": saved("CMYK", quality=95),
    "cmyk.tif": saved("CMYK"),
    "rgb16.png": rgb16,
    "several.jpg": lambda path: Image.fromarray(scene()).save(
        path, "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", (64, 48))]
    ),
    "damaged_exif.jpg": damaged_exif,
    **{f"orientation{number}.jpg": turned(number) for number in range(1, 9)},
}
GREY_FILES: dict[str, Callable[[Path], None]] = {
    "grey.jpg": saved("L", quality=95),
    "grey.png": saved("L"),
    "grey16.png": lambda path: Image.fromarray(luma(scene()).astype(np.uint16) * 257).save(path),
    "grey16.tif": lambda path: Image.fromarray(luma(scene()).astype(np.uint16) * 257).save(path),
    "grey32.tif": lambda path: Image.fromarray(luma(scene()).astype(np.int32) * 257).save(path),
    "float.tif": lambda path: Image.fromarray(luma(scene()).astype(np.float32) / 255).save(path),
}
RIGHT_HALF_WHITE: dict[str, Callable[[Path], None]] = {
    "rgba.png": lambda path: _with_alpha("RGBA").save(path),
    "rgba.webp": lambda path: _with_alpha("RGBA").save(path, lossless=True),
}


def truncated(name: str) -> Callable[[Path], None]:
    """The first half of a good file."""

    def write(path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format={"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "tif": "TIFF"}[name])
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return write


def flipped_bytes(path: Path) -> None:
    """A PNG whose compressed data is damaged in the middle."""
    truncated("png")(path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 64):
        content[place] ^= 0xFF
    path.write_bytes(bytes(content))


def _with_chunk(kind: bytes, content: bytes) -> Callable[[Path], None]:
    """A good PNG with another chunk behind its header."""
    good = png(1, 1, 8, 0, bytes(2))
    return lambda path: path.write_bytes(good[:33] + chunk(kind, content) + good[33:])


def _corrupt_avif(path: Path) -> None:
    Image.fromarray(scene()).save(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"av1C", b"none"))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, chdir(path.parent):  # an address is short
        server.bind(path.name)


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


SIGNATURE = b"\x89PNG\r\n\x1a\n"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\nshowpage\n%%EOF\n"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {  # what the error must say, beside the name
    "truncated.jpg": (truncated("jpg"), "truncated"),
    "truncated.png": (truncated("png"), "truncated"),
    "truncated.webp": (truncated("webp"), "."),
    "truncated.tif": (truncated("tif"), "."),
    "damaged.png": (flipped_bytes, "cannot be decoded"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "empty"),
    "text.jpg": (lambda path: path.write_text("these are words\n" * 9), "not a picture"),
    "zeros.png": (lambda path: path.write_bytes(bytes(4096)), "not a picture"),
    "zero_width.png": (lambda path: path.write_bytes(png(0, 5, 8, 2, b"")), "."),
    "zero_height.gif": (lambda path: path.write_bytes(b"GIF89a" + struct.pack("<HHBBB", 8, 0, 0, 0, 0) + b";"), "."),
    "bomb.png": (lambda path: path.write_bytes(png(100_000, 100_000, 8, 0, b"")), "10000.0 million: more than the limit"),
    "header_0.ppm": (lambda path: path.write_bytes(b"P6 0 5 255\n" + bytes(99)), "cannot be decoded"),
    "header_2x.ppm": (lambda path: path.write_bytes(b"P6 2x 5 255\n" + bytes(99)), "2x"),
    "depth_0.ppm": (lambda path: path.write_bytes(b"P6 5 5 0\n" + bytes(99)), "cannot be decoded"),
    "depth.pnm": (lambda path: path.write_bytes(b"P2 2 2 9\n1 2 3 99\n"), "cannot be decoded"),
    "profile_bomb.png": (_with_chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1 << 24))), "cannot be decoded"),
    "text_bomb.png": (_with_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(1 << 24))), "cannot be decoded"),
    "international_bomb.png": (_with_chunk(b"iTXt", b"c\0\1\0\0\0" + zlib.compress(bytes(1 << 24))), "cannot be decoded"),
    "short_header.png": (lambda path: path.write_bytes(SIGNATURE + chunk(b"IHDR", bytes(5)) + chunk(b"IEND", b"")), "cannot be decoded"),
    "no_header.png": (lambda path: path.write_bytes(SIGNATURE + chunk(b"IDAT", bytes(5))), "cannot be decoded"),
    "sgi.png": (lambda path: Image.fromarray(scene()).save(path, "SGI"), "not a picture in a format"),
    "postscript.png": (lambda path: path.write_bytes(POSTSCRIPT), "not a picture in a format"),
    "metafile.bmp": (lambda path: path.write_bytes(b"\xd7\xcd\xc6\x9a" + bytes(99)), "not a picture in a format"),
    "document.jpg": (lambda path: Image.fromarray(scene()).save(path, "PDF"), "not a picture in a format"),
    "icon.png": (lambda path: Image.fromarray(scene()).save(path, "ICO"), "not a picture in a format"),
    "corrupt.avif": (_corrupt_avif, "cannot be decoded"),
    "film.mp4": (lambda path: path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(99)), "a video"),
    "film.MKV": (lambda path: path.write_bytes(b"\x1aE\xdf\xa3" + bytes(99)), "a video"),
    "empty.mov": (lambda path: path.write_bytes(b""), "empty"),
    "missing.mov": (lambda path: None, "[Nn]o such file"),
    "pipe.png": (os.mkfifo, "a pipe"),
    "socket.jpg": (_socket, "a socket"),
    "null.png": (lambda path: path.symlink_to("/dev/null"), "a device"),
    "endless.gif": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "circle.jpg": (lambda path: path.symlink_to(path), "[Tt]oo many"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere"), "[Nn]o such file"),
    "wide_range.tif": (lambda path: Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(path), "int32"),
    "folder.jpg": (lambda path: path.mkdir(), "."),
    "missing.jpg": (lambda path: None, "[Nn]o such file"),
}

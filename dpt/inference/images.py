"""Pictures in: decoding of files, arrays and tensors to RGB, of 8 bits, and of more where there are more."""

from __future__ import annotations

import ctypes
import io
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor

from ..system.disk import open_regular
from ..system.forks import held_over_forks
from . import deep

FORMATS = {  # Pillow's name of each format that is opened -> the extensions of its files. Nothing that runs another program
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),  # MPO too, several JPEGs in one file, of which the first is taken
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),  # by pillow-heif, where it is installed
    "EXR": (".exr",),  # by OpenEXR, where it is installed
}
EXTENSIONS = {extension for extensions in FORMATS.values() for extension in extensions}
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".flv", ".mpg", ".mpeg", ".mts", ".m2ts", ".3gp", ".ogv"}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
WARNED_PIXELS = 1024**3 // 12  # Pillow warns of larger pictures
MAX_PIXELS = 2 * WARNED_PIXELS  # and refuses those: 179 megapixels
LIFTED = "--max-pixels (or max_pixels=) lifts it"
STRIP_VALUES = 1 << 20  # that are worked on at once, of more than 8 bits
GREY_STEPS = {"L;2": 85, "L;4": 17}  # what Pillow multiplies the values of a PNG of 2 and of 4 bits by
TURNS: dict[object, Image.Transpose] = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Picture = str | os.PathLike[str] | IO[bytes] | Image.Image | np.ndarray | Tensor  # what `load_image` takes
# Many of them. Of an array of no known type a type checker could not tell whether it is one picture, if any iterable were many.
Pictures = Sequence[Picture] | Set[Picture] | Iterator[Picture]
_limit_lock = held_over_forks(threading.Lock())

logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler Python prints what Pillow logs about damaged files
with suppress(AttributeError, OSError):  # libtiff prints its errors, without a name, unless told not to; Pillow does so with its warnings
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # type: ignore[attr-defined]


class ImageError(ValueError):
    """A picture that cannot be used; the message names it and says why."""


class TooManyPixels(ImageError):
    """A picture of more pixels than are allowed; it was not decoded."""


class NoFocalLength(ImageError):
    """A picture that some models can use, but not those whose metres depend on its focal length."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A picture, RGB (H, W, 3), upright and opaque.

    Attributes:
        image: uint8.
        deep: uint16 (0..65535) or float32 (0..1), where the picture has more than 8 bits; None where `image` is all of it.
        focal: the focal length it was taken with, in its pixels, where its EXIF data tell it.
    """

    image: np.ndarray
    deep: np.ndarray | None = None
    focal: float | None = None


def load_image(source: Picture, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as uint8 RGB (H, W, 3): the `image` of `load`."""
    return load(source, max_pixels).image


def load(source: Picture, max_pixels: int = MAX_PIXELS) -> Loaded:
    """A picture, as people see it and with all its bits.

    Args:
        source: a path, a file object open for reading bytes, a PIL image, an array (H, W) or (H, W, 1|3|4), or a
            tensor (H, W) or (1|3|4, H, W), channels first as everywhere in PyTorch. Arrays and tensors are uint8,
            uint16 (0..65535), bool, or floats in 0..1. A path is of a regular file: devices and pipes are not opened.
        max_pixels: a file's picture with more pixels is refused before it is decoded.

    EXIF orientation is applied. Transparency is composited on white, since the colours under it are arbitrary. PNG, TIFF and PGM keep 16
    bits, and TIFF its floats, which are in 0..1 like an array's; EXR is brought from light to sRGB's curve, 0..1, what is brighter being
    cut (`deep.read_exr`). `image` has them rounded to 8 bits. A PIL image has what Pillow has made of it: 8 bits a colour, or deep grey.
    Of an animation the first frame is taken. ICC profiles are not applied.

    Raises:
        ImageError: unreadable, truncated, empty, or too large a file (`TooManyPixels`); a wrong shape or range; a package is missing;
            memory ran out. TypeError: another type. Nothing else, whatever the file holds.
    """
    name = name_of(source)
    try:
        if isinstance(source, Image.Image):
            return _decode(source)
        if isinstance(source, Tensor):
            array = source.detach().cpu()
            array = array.float() if array.is_floating_point() else array  # numpy has no bfloat16
            return _from_array((array.movedim(0, -1) if array.ndim == 3 else array).numpy())
        if isinstance(source, np.ndarray):
            return _from_array(source)
        opened = open_regular(source) if isinstance(source, str | os.PathLike) else nullcontext(source)
        with opened as file:
            return _from_file(_seekable(file), max_pixels)
    except Exception as error:  # decoders raise what their bytes lead them to: SyntaxError, struct.error, IndexError ...
        why, cause = reason(error), error.with_traceback(None) if isinstance(error, OSError) else None
        kind = TooManyPixels if isinstance(error, TooManyPixels | Image.DecompressionBombError) else ImageError
    # Out here, and of a cause without its traceback, so that the error does not keep the decoder's frames, and with them the pixels, alive.
    raise kind(f"{name}: {why}") from cause


def name_of(source: Any) -> str:
    """What messages call a picture. TypeError where it is none."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    for kind, name in ((Image.Image, "the PIL image"), (Tensor, "the tensor"), (np.ndarray, "the array")):
        if isinstance(source, kind):
            return name
    if hasattr(source, "read"):
        return str(getattr(source, "name", "the file object"))
    raise TypeError(f"a picture is a path, a file object, a PIL image, an array or a tensor, not {type(source).__name__}")


def reason(error: Exception) -> str:
    """Why a file cannot be used, from what its decoder raised."""
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):  # a decoder's own question
        return f"{error} {LIFTED}"
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    system = isinstance(error, OSError) and error.strerror  # decoders raise OSError too, without an error number
    return system or f"cannot be decoded: {str(error) or type(error).__name__}"


def open_picture(file: IO[bytes], max_pixels: int = MAX_PIXELS, formats: Iterable[str] = FORMATS) -> Image.Image:
    """A picture, not yet decoded, by the first of `formats` that takes it.

    As PIL.Image.open, of which this keeps the errors and the limit of pixels to the call, instead of the process. Pillow is told no
    name: it would open the file again by it, and map it into memory, where a file that is cut short meanwhile ends the process.

    Raises:
        ImageError: empty, no picture, or of more than `max_pixels`. Exception: whatever the decoder makes of the bytes.
    """
    file = _seekable(file)
    start, failure = file.read(16), None
    if not start:
        raise ImageError("the file is empty")
    for opener, accepts in (_openers()[name] for name in formats if name in _openers()):
        if accepts(start) is True:
            file.seek(0)
            try:
                with _pillow_limit(max_pixels // 2):
                    image = opener(file, "")
                break
            except Exception as error:
                failure = failure or error
    else:
        raise failure or ImageError(_not_a_picture(start, str(getattr(file, "name", "")), formats))
    _check_size(max_pixels, image.width, image.height)
    return image


def _check_size(max_pixels: int, width: int, height: int, channels: int = 4) -> None:
    """TooManyPixels where there are more than so many pixels, or than so many of four channels have values."""
    pixels, limit = width * height, f"more than the limit of {max_pixels / 1e6:.1f} million. {LIFTED}"
    if pixels > max_pixels:
        raise TooManyPixels(f"{width}x{height} pixels, {pixels / 1e6:.1f} million: {limit}")
    if pixels * channels > 4 * max_pixels:
        raise TooManyPixels(f"{width}x{height} pixels of {channels} channels, as {pixels * channels / 4e6:.1f} million of four: {limit}")


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """The file object, at its beginning, or its content where it cannot go there."""
    try:
        file.seek(0)
    except (AttributeError, io.UnsupportedOperation):
        return io.BytesIO(file.read())
    return file


def _not_a_picture(start: bytes, name: str, formats: Iterable[str]) -> str:
    if Path(name).suffix.lower() in VIDEOS:
        return "a video; pictures are wanted, such as its frames as files"
    if _is_heif(start) and "HEIF" in formats:
        return "a HEIC picture, for which pillow-heif is needed: pip install 'dense-prediction-transformers[heic]'"
    return f"not a picture in a format that is read here: {', '.join(formats)}"


@cache
def _openers() -> dict[str, tuple[Callable[..., Image.Image], Callable[[bytes], bool | str | None]]]:
    """Of each format that can be read here, what opens a file, and what tells from its first 16 bytes whether it might be one."""
    Image.init()
    openers: dict[str, Any] = {name: Image.OPEN[name] for name in FORMATS if name in Image.OPEN}
    with suppress(ImportError):
        from pillow_heif import HeifImageFile

        openers["HEIF"] = HeifImageFile, _is_heif
    return openers


def _is_heif(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


@contextmanager
def _pillow_limit(pixels: int) -> Iterator[None]:
    """Pillow's own limit at `pixels` or more, where that is more than it is: only there and then, for it is of the whole process."""
    if pixels <= WARNED_PIXELS:
        yield
        return
    with _limit_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = before and max(before, pixels)  # None is no limit
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _from_file(file: IO[bytes], max_pixels: int) -> Loaded:
    """Of a seekable file."""
    start, limit = file.read(16), partial(_check_size, max_pixels)
    if deep.is_exr(start):
        return _from_array(deep.read_exr(file, limit))
    try:
        image = open_picture(file, max_pixels)
    except SyntaxError:  # Pillow's, of what it does not read
        if not deep.is_tiff(start):
            raise
        return _from_array(*deep.read_tiff(file, limit))
    how = deep.decodings(image)
    if how is None:
        with image:
            return _decode(image)
    _check_not_empty(image)
    images = [image, *(open_picture(file, max_pixels) for _ in how.modes[1:])]
    pixels = deep.sixteen_bits(how, images, _loaded)
    return replace(_from_array(pixels, how.premultiplied), focal=_focal_length(image))


def _decode(image: Image.Image) -> Loaded:
    _check_not_empty(image)
    image, focal = _loaded(image), _focal_length(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return replace(_from_array(_deep_grey(image)), focal=focal)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return Loaded(np.array(image.convert("RGB")), focal=focal)


def _check_not_empty(image: Image.Image) -> None:
    if 0 in image.size:
        raise ImageError(f"zero-sized, {image.width}x{image.height} pixels")


def _loaded(image: Image.Image) -> Image.Image:
    """Decoded and turned upright."""
    with _pillow_limit(image.width * image.height):
        _scale_transparent_colour(image)
        image.load()
    return _oriented(image)


def _focal_length(image: Image.Image) -> float | None:
    """In pixels: EXIF gives that of a camera with the same angle of view across the diagonal, on film of 36 x 24 mm; 0 is unknown."""
    try:
        millimetres = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm)
    except Exception:  # damaged EXIF data, as in `_oriented`
        return None
    if not isinstance(millimetres, int | float) or not 0 < millimetres < math.inf:
        return None
    return millimetres * math.hypot(*image.size) / math.hypot(36, 24)


def _scale_transparent_colour(image: Image.Image) -> None:
    """The one transparent value of a PNG (tRNS) in the range of the pixels that Pillow makes; the file has it in its own bit depth."""
    tile = getattr(image, "tile", None)
    value, stored = image.info.get("transparency"), tile[0].args if tile else None
    if stored in GREY_STEPS and isinstance(value, int):
        image.info["transparency"] = value * GREY_STEPS[stored]
    elif stored == "RGB;16B" and isinstance(value, tuple):
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _oriented(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF data says nothing about the orientation, and the picture itself is good
        return image
    return image if turn is None else image.transpose(turn)


def _deep_grey(image: Image.Image) -> np.ndarray:
    """Grey of more than 8 bits: uint16, or floats in 0..1. Pillow's mode "I" holds 16-bit files too."""
    values = np.array(image)
    if values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 65535:
        values = values.astype(np.uint16)
        if isinstance(image.info.get("transparency"), int):
            values[values == image.info["transparency"]] = 65535  # white
        return values
    return values.astype(values.dtype.newbyteorder("="))


def _from_array(array: np.ndarray, premultiplied: bool = False) -> Loaded:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(f"1, 3 or 4 channels are wanted, not the shape {array.shape}")
    if array.size == 0:
        raise ImageError(f"zero-sized, {array.shape[1]}x{array.shape[0]} pixels")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true of NaN
            raise ImageError(f"floats are wanted in 0..1, not {low:g}..{high:g}")
    values = _to_uint8(array)
    if array.dtype in (np.uint8, bool) or _is_of_8_bits(array, values):
        if values.shape[2] == 4:
            alpha = values[..., 3:].astype(np.float32) / 255
            values = np.rint(values[..., :3] * (1 if premultiplied else alpha) + 255 * (1 - alpha)).clip(0, 255).astype(np.uint8)
        return Loaded(_three(values))
    array = array.clip(0, 1).astype(np.float32) if array.dtype.kind == "f" else array
    array = deep.on_white(array, premultiplied) if array.shape[2] == 4 else array
    return Loaded(_three(_to_uint8(array)), _three(array))


def _three(values: np.ndarray) -> np.ndarray:
    """(H, W, 1 or 3) -> (H, W, 3), in memory of its own."""
    return np.array(np.broadcast_to(values, (*values.shape[:2], 3)))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype != np.uint16 and array.dtype.kind != "f":
        raise ImageError(f"values are uint8, uint16, bool or floats in 0..1, not {array.dtype}")
    values = np.empty(array.shape, np.uint8)
    for rows in _strips(array):
        if array.dtype == np.uint16:
            values[rows] = (array[rows].astype(np.uint32) + 128) // 257
        else:
            values[rows] = np.rint(array[rows].clip(0, 1).astype(np.float32) * 255)
    return values


def _is_of_8_bits(array: np.ndarray, values: np.ndarray) -> bool:
    """Whether uint16 or floats say no more than the uint8 `values` that were made of them: such a picture is one of 8 bits."""
    if array.dtype == np.uint16:
        return all(np.array_equal(values[rows] * np.uint16(257), array[rows]) for rows in _strips(array))
    white = array.dtype.type(255)
    return all(np.array_equal(values[rows].astype(array.dtype) / white, array[rows]) for rows in _strips(array))


def _strips(array: np.ndarray) -> Iterator[slice]:
    """Rows of (H, ...), so few that what is made of them on the way takes no memory to speak of."""
    count = max(STRIP_VALUES // array[0].size, 1)
    return (slice(start, start + count) for start in range(0, len(array), count))

"""Depth and normals as files of their own numbers: float32, as the model gives them, without a record.

.npy    of both        numpy
.pfm    of depth       Portable Float Map
.exr    of both        OpenEXR: Z of depth, N.X, N.Y and N.Z of normals; what they are is told by the attribute "depth" or "normals"
.tiff   of depth       TIFF of 32-bit floats: what they are is told by its ImageDescription
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from PIL import Image

from ..config import HeadConfig

DESCRIPTION = 270  # TIFF's tag
CHANNELS = {"depth": ("Z",), "normals": ("N.X", "N.Y", "N.Z")}  # of an EXR, by task


def meaning(head: HeadConfig) -> str:
    """What the numbers of a map are."""
    if head.task == "normals":
        return "unit vectors: x along the picture's rows"
    if head.metric:
        return "metres"
    return "inverse depth, up to scale and shift: larger is nearer" if head.inverse else "depth, up to scale and shift: larger is farther"


def npy_bytes(values: np.ndarray) -> bytes:
    """What `numpy.save` writes."""
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def pfm_bytes(depth: np.ndarray) -> bytes:
    """A grey Portable Float Map: float32, rows from the bottom up, little-endian by its negative scale."""
    height, width = depth.shape
    return f"Pf\n{width} {height}\n-1.0\n".encode("ascii") + depth[::-1].astype("<f4").tobytes()


def exr_bytes(values: np.ndarray, head: HeadConfig) -> bytes:
    """An EXR of (H, W) or (H, W, C), 32-bit floats, without loss: the channels `CHANNELS` of the head's task.

    Raises:
        ValueError: OpenEXR is not installed.
    """
    openexr = _openexr()
    planes = values.reshape(*values.shape[:2], -1)
    channels = {name: np.array(planes[..., index], np.float32, order="C") for index, name in enumerate(CHANNELS[head.task])}
    header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage, head.task: meaning(head)}
    file = io.BytesIO()
    openexr.File(header, channels, num_threads=0).write(file)
    return file.getvalue()


def tiff_bytes(depth: np.ndarray, head: HeadConfig) -> bytes:
    """A TIFF of depth (H, W), 32-bit floats, uncompressed."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(depth, np.float32)).save(file, "TIFF", tiffinfo={DESCRIPTION: meaning(head)})
    return file.getvalue()


def _openexr() -> Any:
    try:
        import OpenEXR
    except ImportError as error:
        raise ValueError(f"an .exr needs OpenEXR: pip install '.[exr]' ({error})") from error
    return OpenEXR


WRITERS: dict[str, Callable[[np.ndarray, HeadConfig], bytes]] = {  # by suffix
    ".npy": lambda values, head: npy_bytes(values),
    ".pfm": lambda values, head: pfm_bytes(values),
    ".exr": exr_bytes,
    ".tiff": tiff_bytes,
}
FURTHER: dict[str, Callable[[], object] | None] = {"pfm": None, "exr": _openexr, "tiff": None}  # on request, and what each needs


def check(further: Collection[str]) -> None:
    """ValueError where a package is missing that one of `FURTHER` needs."""
    for name in further:
        if (needed := FURTHER[name]) is not None:
            needed()

"""Prompts in: a sensor's depth, of files, arrays and tensors, to metres."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torch import Tensor

from ..system.disk import open_regular
from .images import ImageError, open_picture, reason

MILLIMETRES = 1000.0  # a metre, in PNGs
Prompt = str | os.PathLike[str] | np.ndarray | Tensor  # what `load_prompt` takes


def load_prompt(source: Prompt) -> np.ndarray:
    """A sensor's depth, metres, float32 (h, w), of any size.

    Args:
        source: an array or a tensor of floats (h, w), metres; or a path, of a `.npy` of such, or of a PNG of 16 bits, millimetres. Every
            pixel counts, 0 too: fill what the sensor did not see.

    Raises:
        ImageError: unreadable, of another kind, shape or type, or not finite and positive throughout or 0. TypeError: another type of
            source.
    """
    name = os.fsdecode(source) if isinstance(source, str | os.PathLike) else "the prompt"
    if isinstance(source, str | os.PathLike):
        values = _read(Path(source))
    elif isinstance(source, Tensor):
        values = source.detach().cpu().float().numpy() if source.is_floating_point() else source.cpu().numpy()
    elif isinstance(source, np.ndarray):
        values = source
    else:
        raise TypeError(f"a prompt is a path, an array or a tensor, not {type(source).__name__}")
    if values.ndim != 2 or 0 in values.shape:
        raise ImageError(f"{name}: has the shape {values.shape}: a prompt is (height, width), both at least 1")
    if values.dtype.kind != "f":
        raise ImageError(f"{name}: holds {values.dtype}: a prompt is floats, in metres, or a PNG of 16 bits, in millimetres")
    metres = values.astype(np.float32)
    if not (np.isfinite(metres).all() and metres.min() >= 0):
        wrong = metres[~(np.isfinite(metres) & (metres >= 0))].flat[0]
        raise ImageError(f"{name}: holds {wrong:g}: each pixel of a prompt must be a distance, finite and not below 0")
    return metres


def _read(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            with open_regular(path) as file:
                values = np.load(file, allow_pickle=False)
            if not isinstance(values, np.ndarray):
                raise ImageError("an archive of arrays: a prompt is one array")
            return values
        with open_regular(path) as file, open_picture(file, formats=("PNG",)) as image:
            image.load()
            if not image.mode.startswith("I"):
                raise ImageError(f"a PNG of mode {image.mode}: a prompt has one channel of 16 bits")
            return np.array(image).astype(np.float32) / np.float32(MILLIMETRES)
    except Exception as error:  # decoders raise what their bytes lead them to
        why = reason(error)
    raise ImageError(f"{path}: {why}")

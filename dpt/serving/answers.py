"""What a server answers with: a table of formats, each made of a picture's `Result`, the same as the commands write to files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from ..config import TASKS, DPTConfig, HeadConfig
from ..inference import drawing, maps, outputs
from ..inference.points import FOV, Intrinsics, as_distance, back_projected, flying, write_ply
from ..inference.prediction import Result

COLOURS = 256  # steps from far to near
BINARY, PNG = "application/octet-stream", "image/png"


class Unanswerable(ValueError):
    """A picture of which this cannot be made; the message says why."""


@dataclass(frozen=True)
class Asked:
    """A picture's map of one task, and how it was asked for: `fov`, in degrees, is the camera's for points."""

    result: Result
    config: DPTConfig
    head: HeadConfig
    fov: float | None = None

    @property
    def map(self) -> np.ndarray:
        found: Any = self.result.prediction
        values: np.ndarray = found.of(self.head.task)
        return values

    def drawn(self, what: str) -> np.ndarray:
        """`drawing.DRAW` of it, uint16 (H, W) or uint8 (H, W, 3)."""
        image: Any = self.result.image
        tensors = [torch.from_numpy(np.require(values, requirements=("C", "W"))) for values in (self.map, image)]
        return drawing.DRAW[what][self.head.task](tensors[0], tensors[1], self.head, None).numpy()


@dataclass(frozen=True)
class Format:
    """How an answer is made: its media type, the end of a file's name, and the tasks that have it."""

    media: str
    suffix: str
    tasks: tuple[str, ...]
    make: Callable[[Asked], bytes]


def unit_of(head: HeadConfig) -> str:
    """What the numbers of a map are."""
    if head.task != "depth":
        return {"segmentation": "class", "normals": "normal"}[head.task]
    return "metres" if head.metric else "inverse depth" if head.inverse else "relative depth"


def colour_table() -> list[list[int]]:
    """The colours of depth, RGB, from far to near in `COLOURS` steps, and behind them that of the unknown."""
    steps = torch.arange(COLOURS, dtype=torch.float32)[None]
    found: list[list[int]] = drawing.colored(steps, True)[0].tolist()
    return [*found, drawing.colored(torch.full((1, 1), torch.nan), True)[0, 0].tolist()]


def _png(pixels: np.ndarray, text: str | None = None) -> bytes:
    file, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    if text is not None:
        chunks.add_text("depth", text)
    Image.fromarray(pixels).save(file, "PNG", pnginfo=chunks, compress_level=outputs.PNG_LEVEL)
    return file.getvalue()


def _points(asked: Asked) -> bytes:
    image: Any = asked.result.image
    depth, focal = as_distance(asked.map, asked.head), asked.result.focal
    height, width = depth.shape
    if asked.fov is None and focal is not None:
        camera = Intrinsics.of_focal((height, width), focal)
    else:
        camera = Intrinsics.of_fov((height, width), asked.fov or FOV)
    kept = ~flying(depth)
    if not kept.any():
        raise Unanswerable("it has no points: everywhere depth changes as it does only between an object and what is behind it")
    file = io.BytesIO()
    write_ply(file, back_projected(depth, camera)[kept], image[kept])
    return file.getvalue()


def _summary(asked: Asked) -> bytes:
    values = asked.map
    height, width = values.shape[:2]
    told: dict[str, Any] = {"model": asked.config.name, "task": asked.head.task, "width": width, "height": height}
    told["unit"] = unit_of(asked.head)
    if asked.head.task == "depth":
        told |= {"lowest": float(values.min()), "highest": float(values.max()), "focal": asked.result.focal}
    elif asked.head.task == "segmentation":
        counts = np.bincount(values.reshape(-1), minlength=len(asked.head.classes))
        present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        told["classes"] = [{"index": i, "name": asked.head.classes[i], "share": int(counts[i]) / values.size} for i in present]
    return json.dumps(told).encode()


def _labels(asked: Asked) -> bytes:
    return _png(asked.map if asked.map.dtype == np.uint8 else asked.map.astype(np.uint16))


FORMATS = {
    "json": Format("application/json", ".json", TASKS, _summary),
    "npy": Format(BINARY, ".npy", TASKS, lambda asked: maps.npy_bytes(asked.map)),
    "png16": Format(PNG, ".png", ("depth",), lambda asked: _png(asked.drawn("pixels"), outputs.meaning(asked.head))),
    "ply": Format(BINARY, ".ply", ("depth",), _points),
    "labels": Format(PNG, "_labels.png", ("segmentation",), _labels),
    "colours": Format(PNG, "_colours.png", TASKS, lambda asked: _png(asked.drawn("colours"))),
}


def picture(image: np.ndarray) -> bytes:
    """The picture as a model sees it, uint8 (H, W, 3), as a JPEG: for a browser that cannot read its file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()

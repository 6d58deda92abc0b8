"""Depth and labels of the pictures that come with the package: scenes of the test seeds, which no training has seen."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from ..factory import build
from ..inference.images import load_image
from ..inference.outputs import colored, depth_scale, tinted, with_legend, write
from ..model import DPT
from ..system.disk import write_whole
from ..system.endings import printable
from . import running
from .arguments import CARRIED

PICTURES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
REPEATS = 5


def run(args: argparse.Namespace) -> int:
    images = {path: load_image(path) for path in PICTURES}
    device = running.device_of(args.device)
    columns: list[list[Image.Image]] = [[Image.fromarray(image) for image in images.values()]]
    entries: list[tuple[str, tuple[int, int, int]]] = []
    for name in CARRIED:
        model = build(name, weights="pretrained", device=device)
        head = model.config.head
        predictions = [model.predict(image) for image in images.values()]
        for (path, image), prediction in zip(images.items(), predictions, strict=True):
            write(args.out / f"{path.stem}_{name}", image, prediction, head)
        if head.task == "depth":
            columns.append([Image.fromarray(colored(cast(np.ndarray, prediction.depth), head.inverse)) for prediction in predictions])
            columns.append([depth_scale(prediction.size[0]) for prediction in predictions])
        else:
            labels = [cast(np.ndarray, prediction.labels) for prediction in predictions]
            columns.append([tinted(image, found, head) for image, found in zip(images.values(), labels, strict=True)])
            present = np.unique(np.concatenate([found.reshape(-1) for found in labels]))
            entries += [(head.classes[index], head.palette[index]) for index in present]
        seconds = statistics.median(_seconds(model, image) for image in images.values() for _ in range(REPEATS))
        print(f"{name}: {1000 * seconds:.0f} ms a picture of {image.shape[1]}x{image.shape[0]} (median of {REPEATS * len(images)})")
    sheet = args.out / "demo.png"
    rows = [_row(row) for row in zip(*columns, strict=True)]
    write_whole(sheet, functools.partial(with_legend(_stack(rows), entries).save, format="PNG"))
    print(f"the pictures, their depth and their labels: {printable(sheet)}")
    print(f"one file each, and the maps themselves (16-bit depth, .npy, labels): {printable(args.out)}")
    return 0


def _seconds(model: DPT, image: np.ndarray) -> float:
    start = time.perf_counter()
    model.predict(image)
    return time.perf_counter() - start


def _row(views: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height side by side."""
    row = Image.new("RGB", (sum(view.width for view in views), views[0].height))
    left = 0
    for view in views:
        row.paste(view, (left, 0))
        left += view.width
    return row


def _stack(rows: list[Image.Image]) -> Image.Image:
    """Pictures below each other."""
    stack = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        stack.paste(row, (0, top))
        top += row.height
    return stack

"""Depth and labels of the pictures that come with the package: scenes of the test seeds, which no training has seen."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from PIL import Image

from . import running
from .arguments import CARRIED
from .factory import build
from .images import load_image
from .outputs import overlay, side_by_side, write

PICTURES = sorted((Path(__file__).parent / "examples").glob("*.png"))
REPEATS = 5


def run(args: argparse.Namespace) -> int:
    images = {path: load_image(path) for path in PICTURES}
    views: dict[Path, list[Image.Image]] = {path: [] for path in PICTURES}
    device = running.device_of(args.device)
    for name in CARRIED:
        model = build(name, weights="pretrained", device=device)
        head = model.config.head
        for path, image in images.items():
            prediction = model.predict(image)
            write(args.out / f"{path.stem}_{name}", image, prediction, head)
            view = side_by_side(image, prediction.depth, head.inverse) if head.task == "depth" else overlay(image, prediction.labels, head)
            views[path].append(view)
        seconds = statistics.median(_seconds(model, image) for image in images.values() for _ in range(REPEATS))
        print(f"{name}: {1000 * seconds:.0f} ms a picture of {image.shape[1]}x{image.shape[0]} (median of {REPEATS * len(images)})")
    sheet = args.out / "demo.png"
    _stack([_row(row) for row in views.values()]).save(sheet)
    print(f"the pictures, their depth and their labels: {sheet}")
    print(f"one file each, and the maps themselves (16-bit depth, .npy, labels): {args.out}")
    return 0


def _seconds(model, image) -> float:
    start = time.perf_counter()
    model.predict(image)
    return time.perf_counter() - start


def _row(views: list[Image.Image]) -> Image.Image:
    """Pictures side by side, at the height of the first."""
    views = [view.resize((round(view.width * views[0].height / view.height), views[0].height)) for view in views]
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

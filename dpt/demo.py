"""Depth and labels of the pictures that come with the package: scenes of the test seeds, which no training has seen."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path

from PIL import Image

from .endings import printable
from .factory import build
from .files import write_whole
from .images import load_image
from .outputs import overlay, side_by_side, write

PICTURES = sorted((Path(__file__).parent / "examples").glob("*.png"))
MODELS = ("dpt-tiny-depth", "dpt-tiny-scenes")
REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> int:
    images = {path: load_image(path) for path in PICTURES}
    views: dict[Path, list[Image.Image]] = {path: [] for path in PICTURES}
    for name in MODELS:
        model = build(name, weights="pretrained", device=args.device)
        head = model.config.head
        for path, image in images.items():
            prediction = model.predict(image)
            write(args.out / f"{path.stem}_{name}", image, prediction, head)
            view = side_by_side(image, prediction.depth, head.inverse) if head.task == "depth" else overlay(image, prediction.labels, head)
            views[path].append(view)
        seconds = statistics.median(_seconds(model, image) for image in images.values() for _ in range(REPEATS))
        print(f"{name}: {1000 * seconds:.0f} ms a picture of {image.shape[1]}x{image.shape[0]} (median of {REPEATS * len(images)})")
    sheet = args.out / "demo.png"
    write_whole(sheet, functools.partial(_stack([_row(row) for row in views.values()]).save, format="PNG"))
    print(f"the pictures, their depth and their labels: {printable(sheet)}")
    print(f"one file each, and the maps themselves (16-bit depth, .npy, labels): {printable(args.out)}")
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

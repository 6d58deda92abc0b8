"""What 8 and 16 bits of the same picture become: a smooth dark gradient and a scene of little contrast, their maps, and how far those are
from the map of the picture in floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import dpt
from dpt.inference.outputs import colored

SCENE = Path(dpt.__file__).parent / "examples" / "scene-20000015.png"
HEIGHT, WIDTH = 192, 256
DARKEST, SPAN = 0.05, 0.04  # of white: ten grey levels of 8 bits
TIMES = 10  # by which differences are shown enlarged
LETTER, GAP = 15, 6


def draw() -> Image.Image:
    """Two scenes, each of 8 and of 16 bits: the picture, its contrast stretched; its map; and the difference from the floats' map."""
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    rows = []
    for scene in (_gradient(), _rendered()):
        exact = DARKEST + SPAN * scene
        wanted = model.predict(exact).depth
        for bits, dtype in ((8, np.uint8), (16, np.uint16)):
            levels = 2**bits - 1
            stored = np.rint(exact * levels).astype(dtype)
            depth = model.predict(stored).depth
            off = np.abs(depth - wanted) / np.ptp(wanted)
            shown = ((stored / levels - DARKEST) / SPAN).clip(0, 1)
            tiles = [np.rint(shown * 255).astype(np.uint8), colored(depth, True), _grey(off * TIMES)]
            size = f"{off.mean():.2%} in the mean, {off.max():.1%} at most" if bits == 8 else f"{off.mean():.4%} and {off.max():.3%}"
            said = [f"{bits} bits, contrast x {1 / SPAN:.0f}", "its inverse depth", f"off by {size}"]
            rows.append(_row(tiles, said))
    return Image.fromarray(np.concatenate(rows))


def _gradient() -> np.ndarray:
    """A ball without edges over a gradient, 0..1."""
    down, across = np.mgrid[0:HEIGHT, 0:WIDTH] / HEIGHT
    light = 0.5 * down + 0.5 * np.exp(-((across - 0.7) ** 2 + (down - 0.5) ** 2) / 0.08)
    return np.stack([light, 0.9 * light, 0.8 * light], axis=-1)


def _rendered() -> np.ndarray:
    with Image.open(SCENE) as image:
        return np.asarray(image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)) / 255


def _grey(values: np.ndarray) -> np.ndarray:
    levels = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


def _row(tiles: list[np.ndarray], said: list[str]) -> np.ndarray:
    """Tiles beside each other, with a line below each."""
    width = WIDTH + GAP
    canvas = Image.new("RGB", (len(tiles) * width - GAP, HEIGHT + LETTER + 2 * GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTER - 2)
    for number, (tile, text) in enumerate(zip(tiles, said, strict=True)):
        canvas.paste(Image.fromarray(tile), (number * width, 0))
        pen.text((number * width, HEIGHT + GAP // 2), text, fill="black", font=font)
    return np.asarray(canvas)

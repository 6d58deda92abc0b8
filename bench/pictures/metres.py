"""A rendered scene with twelve known distances, three of them wrong, its calibrated depth, and how far that is from the truth."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import dpt
from dpt.inference import outputs
from dpt.inference.calibration import calibrate
from dpt.inference.drawing import colored
from dpt.scenes import rendering

from ._sheet import sheet

SEED, SIDE, KNOWN, WRONG, FARTHEST = 3, 300, 12, 3, 15.0


def draw() -> Image.Image:
    """The picture of docs/metres.md."""
    scene = rendering.render(rendering.split_seeds("test", SEED + 1)[SEED], SIDE)
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    depth, rng = model.predict(scene.image).depth, np.random.default_rng(0)
    rows, columns = np.nonzero(scene.depth < FARTHEST)
    chosen = rng.choice(len(rows), KNOWN, replace=False)
    x, y = columns[chosen], rows[chosen]
    metres = scene.depth[y, x].astype(np.float64)
    metres[:WRONG] *= (3, 0.4, 2)
    found = calibrate(depth, model.config.head, x, y, metres)
    marked = Image.fromarray(scene.image)
    pen, font = ImageDraw.Draw(marked), ImageFont.load_default(13)
    for number, (column, row, known) in enumerate(zip(x.tolist(), y.tolist(), metres.tolist(), strict=True)):
        colour = "red" if number < WRONG else "white"
        pen.ellipse((column - 3, row - 3, column + 3, row + 3), outline=colour, width=2)
        pen.text(
            (min(column + 6, SIDE - 40), row), f"{known:.1f}", fill=colour, font=font, anchor="lm", stroke_width=2, stroke_fill="black"
        )
    calibrated, far = found.metres(depth), scene.depth < FARTHEST
    off = np.median(np.abs(calibrated - scene.depth)[far] / scene.depth[far])
    panels = [(f"{KNOWN} known distances, {WRONG} of them wrong (red)", np.asarray(marked))]
    for text, map_ in ((f"calibrated by {found.used} of them; off by {off:.0%} in the median", calibrated), ("the truth", scene.depth)):
        colours = colored(torch.from_numpy(map_.clip(0, FARTHEST)), False, (0.0, FARTHEST)).numpy()
        panels.append((text, np.concatenate((colours, np.asarray(outputs.depth_scale(SIDE, ("0 m", f"{FARTHEST:g} m")))), axis=1)))
    return sheet([panels])

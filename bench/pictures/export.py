"""docs/export.png: a picture, its map by PyTorch and by ONNX Runtime, and their difference, many times as large as it is."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import dpt
from dpt.exporting import onnx_files
from dpt.exporting.graphs import PICTURES
from dpt.inference.images import load_image
from dpt.inference.outputs import colored

SIDE, GAP, LINE = 260, 12, 34
MODEL = "dpt-tiny-depth"


def draw() -> Image.Image:
    """The row of four, with what each is below it."""
    model = dpt.build(MODEL, weights="pretrained")
    image = load_image(PICTURES[0])
    wanted = model.predict(image).depth
    assert wanted is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        dpt.export(model, path, processing=True)
        found = onnx_files.session(path)(torch.from_numpy(np.array(image))[None])[0][0].numpy()
    apart = np.abs(found - wanted)
    share, inverse = apart.max() / np.ptp(wanted), model.config.head.inverse
    cells = [
        (image, "the picture, uint8"),
        (colored(wanted, inverse), f"PyTorch: {MODEL}, predict"),
        (colored(found, inverse), "ONNX Runtime, processing in the graph"),
        (np.repeat((255 * apart / apart.max()).astype(np.uint8)[..., None], 3, 2), f"their difference: white is {share:.1g} of the range"),
    ]
    sheet = Image.new("RGB", (len(cells) * (SIDE + GAP) + GAP, SIDE + LINE + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (pixels, told) in enumerate(cells):
        left = GAP + number * (SIDE + GAP)
        sheet.paste(Image.fromarray(pixels).resize((SIDE, SIDE)), (left, GAP))
        pen.text((left, SIDE + GAP + 8), told, "black", font)
    return sheet

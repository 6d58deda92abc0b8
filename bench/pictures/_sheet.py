"""Pictures side by side, each with a line of text below it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, LETTER = 8, 15


def sheet(rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> Image.Image:
    """Rows of (text, uint8 (H, W, 3)); those of a row are of one height."""
    widths = [sum(picture.shape[1] + GAP for _, picture in row) + GAP for row in rows]
    line = 2 * GAP + LETTER
    canvas = Image.new("RGB", (max(widths), sum(row[0][1].shape[0] + line for row in rows) + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LETTER)
    top = GAP
    for row in rows:
        left = GAP
        for text, picture in row:
            canvas.paste(Image.fromarray(picture), (left, top))
            draw.text((left, top + picture.shape[0] + GAP // 2), text, fill="black", font=font)
            left += picture.shape[1] + GAP
        top += row[0][1].shape[0] + line
    return canvas

"""Both eyes' views of an example, and both in one for red and cyan glasses."""

from __future__ import annotations

from PIL import Image

import dpt
from dpt.commands.demo import PICTURES
from dpt.inference.images import load_image
from dpt.inference.stereo import anaglyph, views

from ._sheet import sheet


def draw() -> Image.Image:
    """The picture of docs/stereo.md."""
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    left, right = views(load_image(PICTURES[0]), model.predict(PICTURES[0]).depth, model.config.head)
    return sheet([[("the left eye's picture", left), ("the right eye's", right), ("for red and cyan glasses", anaglyph(left, right))]])

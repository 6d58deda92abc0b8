"""A part of a rendered scene: its depth as the network sees the whole, with what tiles add, and the truth."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

import dpt
from dpt.evaluation.alignment import align
from dpt.inference.drawing import colored
from dpt.scenes import rendering

from ._sheet import sheet

SEED, SIDE, PART = 3, 768, (slice(250, 520), slice(20, 500))


def draw() -> Image.Image:
    """The picture of docs/tiles.md."""
    scene = rendering.render(rendering.split_seeds("test", SEED + 1)[SEED], SIDE)
    model, truth = dpt.build("dpt-tiny-depth", weights="pretrained"), torch.from_numpy(1 / scene.depth.astype(np.float64))
    maps = {"the truth": truth}
    for name, tiles in (("of the whole alone", False), ("refined by tiles", True)):
        maps[name] = align(torch.from_numpy(model.predict(scene.image, tiles=tiles).depth.astype(np.float64)), truth)
    part = truth[PART]
    ends = float(part.min()), float(part.max())
    drawn = {name: colored(found[PART].contiguous(), True, ends).numpy() for name, found in maps.items()}
    order = ("of the whole alone", "refined by tiles")
    return sheet([[("the picture", scene.image[PART]), ("the truth", drawn["the truth"])], [(name, drawn[name]) for name in order]])

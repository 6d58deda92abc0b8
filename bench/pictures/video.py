"""Three frames of a rendered clip: frame by frame and steady, and how much of what stands still changes from one to the next."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

import dpt
from dpt.inference.drawing import colored
from dpt.inference.steady import Steady
from dpt.scenes import rendering

from ._sheet import sheet

SEED, STEP, FRAMES, SHOWN = 0, 0.03, 16, (11, 12, 13)
SIDE = 200
STEEPER = 8  # times, that changes are drawn


def draw() -> Image.Image:
    """The picture of docs/video.md."""
    scenes = list(rendering.moving(rendering.split_seeds("test", 3)[SEED], FRAMES, STEP, SIDE))
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    alone = [model.predict(scene.image).depth for scene in scenes]
    steady = Steady(model.config.head)
    found = [steady(depth, scene.image) for depth, scene in zip(alone, scenes, strict=True)]
    low, high = np.min(found), np.max(found)
    spread = {
        "frame by frame": [(depth - depth.min()) / np.ptp(depth) for depth in alone],
        "of the clip": [(depth - low) / (high - low) for depth in found],
    }
    rows = [[(f"frame {number}", scenes[number].image) for number in SHOWN]]
    for name, maps in spread.items():
        rows.append([(name, colored(torch.from_numpy(maps[number]), True, (0.0, 1.0)).numpy()) for number in SHOWN])
    truth = [1 / scene.depth for scene in scenes]
    for number in SHOWN[1:]:
        still = np.abs(truth[number] - truth[number - 1]) < 0.01 * np.ptp(truth[0])
        for row, maps in zip(rows[1:], spread.values(), strict=True):
            change = np.where(still, np.abs(maps[number] - maps[number - 1]), 0)
            grey = (change * STEEPER * 255).clip(0, 255).astype(np.uint8)
            row.append((f"changed by {change[still].mean():.1%}", np.repeat(grey[..., None], 3, axis=2)))
    rows[0] += [(f"{number - 1} to {number}, what stands still", np.full_like(scenes[0].image, 255)) for number in SHOWN[1:]]
    return sheet(rows)

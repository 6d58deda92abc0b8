"""An example's points seen from the side, with flying pixels and without, and its normals."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

import dpt
from dpt.commands.demo import PICTURES
from dpt.inference.images import load_image
from dpt.inference.points import Intrinsics, as_distance, back_projected, flying, normals

from ._sheet import sheet

SIDE, TURN, LIFT = 384, math.radians(12), 0.1  # pixels; about the upright axis; of the middle distance


def draw() -> Image.Image:
    """The picture of docs/points.md."""
    picture = PICTURES[0]
    image, model = load_image(picture), dpt.build("dpt-tiny-depth", weights="pretrained")
    depth = as_distance(model.predict(picture).depth, model.config.head)
    grid = back_projected(depth, Intrinsics.of_fov(depth.shape))
    kept = ~flying(depth)
    shaded = ((normals(grid) + 1) * 127.5).round().astype(np.uint8)
    return sheet(
        [
            [("the picture", image), ("its normals", shaded)],
            [
                ("all its pixels as points, from the side", _seen(grid.reshape(-1, 3), image.reshape(-1, 3))),
                (f"without flying ones: {kept.mean():.0%} are left", _seen(grid[kept], image[kept])),
            ],
        ]
    )


def _seen(points: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Points by a camera that has gone around them; the nearest of a pixel is seen."""
    middle = np.array([0, LIFT, 1.0])
    cosine, sine = math.cos(TURN), math.sin(TURN)
    x, y, z = ((points - [0, 0, 1]) @ np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]]) + middle).T
    focal, ahead = SIDE * 0.9, z > 0.05
    column, row = (np.rint(focal * part[ahead] / z[ahead] + SIDE / 2).astype(int) for part in (x, y))
    inside = (column >= 0) & (column < SIDE - 1) & (row >= 0) & (row < SIDE - 1)
    order = np.argsort(-z[ahead][inside], kind="stable")
    canvas = np.full((SIDE, SIDE, 3), 24, np.uint8)
    for down, across in ((0, 0), (0, 1), (1, 0), (1, 1)):
        canvas[row[inside][order] + down, column[inside][order] + across] = colours[ahead][inside][order]
    return canvas

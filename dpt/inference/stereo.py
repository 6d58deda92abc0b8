"""Two eyes' views of one picture, from its depth; and both in one, for red and cyan glasses.

A pixel goes sideways by half of its disparity in each eye; where two come to lie on one place the nearer is seen. What no pixel comes to
lie on was hidden: it gets the colours of the farther of the two pixels beside it.
"""

from __future__ import annotations

import math

import numpy as np

from ..config import HeadConfig
from .deep import srgb
from .points import as_distance

DISPARITY = 0.03  # of the picture's width, between the farthest and the nearest
PLANE = 0.5  # of it what lies in the plane of the screen: 0 puts the farthest there, 1 the nearest
# Of the left and the right eye's red, green and blue to those of the anaglyph for red and cyan (Dubois 2001, for CRTs, as widely used).
ANAGLYPH = np.array(
    [
        [[0.4561, 0.500484, 0.176381], [-0.0400822, -0.0378246, -0.0157589], [-0.0152161, -0.0205971, -0.00546856]],
        [[-0.0434706, -0.0879388, -0.00155529], [0.378476, 0.73364, -0.0184503], [-0.0721527, -0.112961, 1.2264]],
    ]
)


def views(image: np.ndarray, depth: np.ndarray, head: HeadConfig, disparity: float = DISPARITY) -> tuple[np.ndarray, np.ndarray]:
    """The left and the right eye's picture, uint8 (H, W, 3), of a picture and its depth (H, W), of a head of depth.

    disparity: of the width, between the farthest and the nearest pixel; above 0 and below 0.5. ValueError otherwise, or for another map.
    """
    if not 0 < disparity < 0.5:
        raise ValueError(f"disparity={disparity:g}: it must be above 0 and below 0.5, of the picture's width")
    if image.shape[:2] != depth.shape:
        raise ValueError(f"a picture of {image.shape[1]}x{image.shape[0]} and depth of {depth.shape[1]}x{depth.shape[0]}")
    near = 1 / as_distance(depth, head).astype(np.float64).clip(1e-3)
    low, high = near.min(), near.max()
    shift = ((near - low) / ((high - low) or 1) - PLANE) * disparity * depth.shape[1] / 2
    return _seen(image, shift, 1), _seen(image, shift, -1)


def _seen(image: np.ndarray, shift: np.ndarray, side: int) -> np.ndarray:
    """The picture with its pixels moved by `side` times a shift (H, W), which is larger where they are nearer."""
    height, width = shift.shape
    rows = np.arange(height)[:, None]
    order = np.argsort(shift, axis=1, kind="stable")  # the nearer later, over the farther
    places = np.rint(np.take_along_axis(np.arange(width) + side * shift, order, axis=1)).astype(int)
    inside = (places >= 0) & (places < width)
    source = np.full((height, width), -1)
    across = np.broadcast_to(rows, places.shape)
    source[across[inside], places[inside]] = order[inside]
    known = source >= 0
    columns = np.arange(width)
    before = np.maximum.accumulate(np.where(known, columns, -1), axis=1)
    behind = np.minimum.accumulate(np.where(known, columns, width)[:, ::-1], axis=1)[:, ::-1]
    one, other = (np.take_along_axis(source, place.clip(0, width - 1), axis=1) for place in (before, behind))
    farther = [np.where(found, shift[rows, index.clip(0)], math.inf) for found, index in ((before >= 0, one), (behind < width, other))]
    chosen = np.where(farther[0] <= farther[1], one, other)
    found: np.ndarray = image[rows, chosen.clip(0)]
    return found


def anaglyph(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Both eyes' pictures in one, uint8 (H, W, 3), for glasses that are red on the left and cyan on the right; in linear light."""
    mixed = sum(_linear(image) @ matrix.T for image, matrix in zip((left, right), ANAGLYPH, strict=True))
    return (srgb(np.asarray(mixed)) * 255).round().astype(np.uint8)


def _linear(image: np.ndarray) -> np.ndarray:
    coded = image / 255
    found: np.ndarray = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    return found

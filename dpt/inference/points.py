"""A depth map as points and as a mesh: pixels put back where a pinhole camera saw them.

    X = (x - cx) / fx * Z      Y = (y - cy) / fy * Z      Z = depth      x right, y down, z away; pixels count from their middles

Between a near object and what is behind it a network's map has pixels of depths that nothing has, flying pixels: where depth, within a
window of 3x3 pixels, spans more than a share of itself, no point is made, and the mesh has a hole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ..config import HeadConfig

EDGE = 0.05  # of the depth that a window of 3x3 pixels may span
FOV = 55.0  # degrees, across the picture, where nothing is known of its camera
NEAREST, FARTHEST = 0.99, 0.02  # quantiles of inverse depth up to scale: what is nearer or farther is cut to them
VERTEX = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")])


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera, in pixels of the picture: focal lengths, and where the axis goes through it."""

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        for name in ("fx", "fy"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value:g}: a focal length is finite and above 0 pixels")
        for name in ("cx", "cy"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name):g}: a place is finite")

    @classmethod
    def of_fov(cls, size: tuple[int, int], degrees: float = FOV) -> Intrinsics:
        """Of a picture (height, width) whose width is seen under an angle; pixels are square, the axis goes through the middle."""
        if not 0 < degrees < 180:
            raise ValueError(f"a field of view of {degrees:g} degrees: it must be above 0 and below 180")
        return cls.of_focal(size, size[1] / 2 / math.tan(math.radians(degrees) / 2))

    @classmethod
    def of_focal(cls, size: tuple[int, int], focal: float) -> Intrinsics:
        """Of a picture (height, width) and its focal length in pixels; pixels are square, the axis goes through the middle."""
        height, width = size
        return cls(focal, focal, (width - 1) / 2, (height - 1) / 2)


def as_distance(depth: np.ndarray, head: HeadConfig) -> np.ndarray:
    """Depth (H, W), float32, of a head's map: metres as they are; one over inverse depth up to scale, cut to its quantiles `NEAREST` and
    `FARTHEST`, and depth up to scale, from its nearest on, both with a median of 1. How deep a scene of unknown shift is, is a guess.

    Raises:
        ValueError: a map of another task.
    """
    if head.task != "depth":
        raise ValueError(f"a map of {head.task} has no depth")
    if head.metric:
        return depth.astype(np.float32)
    if head.inverse:
        most, least = np.quantile(depth, NEAREST), np.quantile(depth, FARTHEST)
        distance = 1 / depth.clip(max(least, 0.02 * most, np.finfo(np.float32).tiny), max(most, np.finfo(np.float32).tiny))
    else:
        distance = depth - depth.min() + 0.1 * (np.ptp(depth) or 1)
    return (distance / np.median(distance)).astype(np.float32)


def flying(depth: np.ndarray, threshold: float = EDGE) -> np.ndarray:
    """Where depth (H, W) spans more than `threshold` times itself within 3x3 pixels, or is not a distance: bool (H, W)."""
    if not threshold > 0:
        raise ValueError(f"threshold={threshold:g}: it must be above 0")
    wrong = ~(np.isfinite(depth) & (depth > 0))
    known = np.where(wrong, np.nan, depth)
    padded = np.pad(known, 1, constant_values=np.nan)
    height, width = depth.shape
    around = [padded[down : down + height, across : across + width] for down in range(3) for across in range(3)]
    least, most = around[0], around[0]
    for one in around[1:]:
        least, most = np.fmin(least, one), np.fmax(most, one)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = wrong | (most > (1 + threshold) * least)
    return found


def back_projected(depth: np.ndarray, camera: Intrinsics) -> np.ndarray:
    """Points (H, W, 3), float32: x right, y down, z away, in the unit of depth (H, W)."""
    height, width = depth.shape
    z = depth.astype(np.float64)
    x = (np.arange(width) - camera.cx) / camera.fx * z
    y = (np.arange(height)[:, None] - camera.cy) / camera.fy * z
    return np.stack((x, y, z), axis=-1).astype(np.float32)


def normals(points: np.ndarray) -> np.ndarray:
    """Unit normals (H, W, 3), float32, of a grid of points, towards the camera; 0 where the points around lie in a line."""
    points = points.astype(np.float64)
    across = np.gradient(points, axis=1) if points.shape[1] > 1 else np.zeros_like(points)
    down = np.gradient(points, axis=0) if points.shape[0] > 1 else np.zeros_like(points)
    found = np.cross(down, across)  # of a wall before the camera (0, 0, -1)
    length = np.linalg.norm(found, axis=-1, keepdims=True)
    unit: np.ndarray = np.divide(found, length, out=np.zeros_like(found), where=length > 0)
    return unit.astype(np.float32)


def write_ply(file: BinaryIO, points: np.ndarray, colours: np.ndarray) -> None:
    """Points (N, 3) and colours uint8 (N, 3) as a binary PLY file, little-endian."""
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    kinds = {"<f4": "float", "|u1": "uchar"}
    header += [f"property {kinds[VERTEX[name].str]} {name}" for name in VERTEX.names or ()]
    vertices = np.empty(len(points), VERTEX)
    for index, name in enumerate(("x", "y", "z")):
        vertices[name] = points[:, index]
    for index, name in enumerate(("red", "green", "blue")):
        vertices[name] = colours[:, index]
    file.write("\n".join([*header, "end_header", ""]).encode("ascii"))
    file.write(vertices.tobytes())


def faces(kept: np.ndarray) -> np.ndarray:
    """Two triangles (F, 3) for each square of four kept pixels of a grid, bool (H, W): indices into the kept ones, in the order of rows;
    from the camera they turn anticlockwise."""
    index = np.cumsum(kept.ravel()).reshape(kept.shape) - 1
    whole = kept[:-1, :-1] & kept[:-1, 1:] & kept[1:, :-1] & kept[1:, 1:]
    above_left, above_right = index[:-1, :-1][whole], index[:-1, 1:][whole]
    below_left, below_right = index[1:, :-1][whole], index[1:, 1:][whole]
    first = np.stack((above_left, below_left, above_right), axis=-1)
    second = np.stack((above_right, below_left, below_right), axis=-1)
    return np.concatenate((first, second)).astype(np.int64)

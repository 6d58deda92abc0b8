"""Surface patterns of the procedural scenes: functions of the position on an object, and the rotations that orient them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Position (N, 3) in periods, width of a pixel there (N,) in periods, surface -> mix (N,) of the surface's two colours.
Pattern = Callable[[np.ndarray, np.ndarray, "Surface"], np.ndarray]


@dataclass(frozen=True)
class Surface:
    """A pattern between two colours, with its period in metres, its orientation and phases, and a stain of low frequency over it."""

    pattern: Pattern
    colours: np.ndarray  # (2, 3) in [0, 1]
    period: float
    axes: np.ndarray  # (3, 3) orthonormal rows
    phase: np.ndarray  # (3,) in [0, 1)
    waves: np.ndarray  # (8, 3) wave vectors of the noise, in radians per period
    stain: float

    def albedo(self, points: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """(N, 3) in [0, 1] at `points` (N, 3), metres along the object's own axes, where a pixel is `footprint` (N,) metres wide."""
        scaled = points @ self.axes.T / self.period + self.phase
        # A pattern finer than two pixels would alias: it fades to the mean of its colours.
        contrast = np.clip(2.0 - 4.0 * footprint / self.period, 0.0, 1.0)
        mix = 0.5 + (self.pattern(scaled, footprint / self.period, self) - 0.5) * contrast
        colour: np.ndarray = self.colours[0] + mix[:, None] * (self.colours[1] - self.colours[0])
        if self.stain:
            colour = colour * (1.0 - self.stain * noise(scaled * 0.23, footprint, self))[:, None]
        return colour


def _flat(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    return np.zeros(len(position))


def _edge(wave: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """A square wave in [0, 1] from a sine, its edges as wide as a pixel."""
    edge: np.ndarray = np.clip(0.5 + wave / (4.0 * math.pi * np.maximum(footprint, 1e-3)), 0.0, 1.0)
    return edge


def _checker(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    cells = 2.0 * _edge(np.sin(math.pi * position), footprint[:, None]) - 1.0
    mix: np.ndarray = 0.5 + 0.5 * cells.prod(axis=1)
    return mix


def _stripes(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    return _edge(np.sin(2.0 * math.pi * position[:, 0]), footprint)


def _gradient(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    mix: np.ndarray = 0.5 + 0.5 * np.sin(0.6 * position[:, 0] + 0.4 * position[:, 1])
    return mix


def noise(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    """Eight waves of rising frequency and falling weight, in the surface's directions."""
    waves = np.cos(position.astype(np.float32) @ surface.waves.T.astype(np.float32) + np.arange(8, dtype=np.float32))
    weights = 1.0 / np.linalg.norm(surface.waves, axis=1)
    mix: np.ndarray = np.clip(0.5 + 0.8 * (waves @ (weights / weights.sum())), 0.0, 1.0)
    return mix


def _marble(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    mix: np.ndarray = 0.5 + 0.5 * np.sin(2.0 * math.pi * (position[:, 0] + 1.5 * noise(0.4 * position, footprint, surface)))
    return mix


def _wood(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    along = position * np.array([0.08, 1.0, 1.0])
    rings = np.hypot(along[:, 1], along[:, 2]) + 0.7 * noise(along, footprint, surface)
    mix: np.ndarray = (2.0 * rings) % 1.0
    return mix


def _tiles(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    joint = np.abs(position % 1.0 - 0.5).max(axis=1)  # 0.5 in the joint between two tiles
    tone = np.sin(np.floor(position) @ np.array([12.9898, 78.233, 37.719])) % 0.25
    mix: np.ndarray = np.clip((joint - 0.45) / np.maximum(footprint, 0.01), 0.0, 1.0) * 0.7 + tone
    return mix


def _speckle(position: np.ndarray, footprint: np.ndarray, surface: Surface) -> np.ndarray:
    return _edge(noise(position, footprint, surface) - 0.6, 0.02 + footprint)


_PATTERNS: tuple[Pattern, ...] = (_flat, _flat, noise, _checker, _stripes, _gradient, _marble, _wood, _tiles, _speckle)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) in [0, 1]: two in five nearly grey."""
    saturation = rng.uniform(0.0, 0.25) if rng.random() < 0.4 else rng.uniform(0.25, 0.95)
    hue, value = rng.uniform(0.0, 6.0), rng.uniform(0.3, 1.0)
    ramp = np.clip(np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    colour: np.ndarray = value * (1.0 - saturation * (1.0 - ramp))
    return colour


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation matrix (3, 3), uniform."""
    columns, upper = np.linalg.qr(rng.standard_normal((3, 3)))
    columns = columns * np.sign(np.diag(upper))
    rotation: np.ndarray = columns * np.linalg.det(columns)
    return rotation


def random_surface(rng: np.random.Generator, period: tuple[float, float], upright: bool) -> Surface:
    """A random surface; `upright` keeps the pattern's axes along the object's own, as tiles and planks lie."""
    yaw = rng.choice([0.0, 0.5 * math.pi, rng.uniform(0.0, math.pi)])
    axes = rotation_z(yaw) if upright else random_rotation(rng)
    return Surface(
        pattern=_PATTERNS[rng.integers(len(_PATTERNS))],
        colours=np.stack([random_colour(rng), random_colour(rng)]),
        period=math.exp(rng.uniform(math.log(period[0]), math.log(period[1]))),
        axes=axes,
        phase=rng.uniform(0.1, 0.9, 3),
        waves=_directions(rng) * (2.0 * math.pi * 1.6 ** np.arange(-2.0, 6.0))[:, None],
        stain=rng.choice([0.0, rng.uniform(0.1, 0.5)]),
    )


def _directions(rng: np.random.Generator) -> np.ndarray:
    vectors = rng.standard_normal((8, 3))
    directions: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return directions


def tint(rng: np.random.Generator) -> Surface:
    """For objects that keep the colours of their own files: nearly white."""
    colour = 1.0 - rng.uniform(0.0, 0.35, 3) * rng.choice([0.0, 1.0])
    return Surface(_flat, np.stack([colour, colour]), 1.0, np.eye(3), np.zeros(3), np.ones((8, 3)), 0.0)


def rotation_z(angle: float) -> np.ndarray:
    """The rotation matrix (3, 3) about the vertical."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def quaternion(rotation: np.ndarray) -> list[float]:
    """Rotation matrix (3, 3) to a quaternion x, y, z, w (the eigenvector form, which has no special cases)."""
    m = rotation
    key = np.array(
        [
            [m[0, 0] - m[1, 1] - m[2, 2], 0.0, 0.0, 0.0],
            [m[1, 0] + m[0, 1], m[1, 1] - m[0, 0] - m[2, 2], 0.0, 0.0],
            [m[2, 0] + m[0, 2], m[2, 1] + m[1, 2], m[2, 2] - m[0, 0] - m[1, 1], 0.0],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], m[0, 0] + m[1, 1] + m[2, 2]],
        ]
    )
    values: list[float] = np.linalg.eigh(key)[1][:, -1].tolist()
    return values

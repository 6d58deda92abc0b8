"""Depth of a clip's frames without flicker: each map is brought to the ones before it.

Relative depth has a scale and a shift of its own in every frame. Both are fitted by least squares to a running mean of the maps before,
on what did not move: pixels are weighed by Tukey's biweight of their residuals (Beaton, Tukey 1974), and those whose colour has changed are
left out, unless too few have not, as where the camera moves. Behind a cut, where the colours of the whole are others or too little fits, a
frame begins a new mean, of the spread of the last one. Then a pixel that hardly differs from
the mean follows it by a part of the difference, so that noise goes too, and one that differs by more at once, so that what moves leaves no
trace. Metres have no scale and shift to be fitted and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import HeadConfig

LOOKED_AT = 1 << 15  # pixels, about, that a fit is made on
ROUNDS = 8  # of weighing anew
BIWEIGHT = 4.685  # deviations, beyond which a pixel counts nothing: 95 % as efficient as least squares on noise
DEVIATION = 1.4826
CHANGED = 24  # of 255: the mean change of a pixel's three colours beyond which it is said to have moved
SHARE = 0.3  # of the pixels that have to fit, and to be unchanged for the others to be left out
ALIKE = 0.5  # of two frames' histograms of 4x4x4 colours that has to be the same
FOLLOWED = 0.3  # of what a pixel differs from the mean by, where that is little; all of it from so many deviations on:
NOISE = 4.0


@dataclass(frozen=True)
class Fit:
    """What was done to a frame: `scale * map + shift`; `share` of its pixels fitted, and whether it began a new mean (a cut)."""

    scale: float
    shift: float
    share: float
    cut: bool


class Steady:
    """A clip's maps, one after the other; holds a map and a frame, however long the clip is.

    Attributes:
        held: the running mean and the last frame, None before the first; what a run that goes on where another stopped begins with.
    """

    def __init__(self, head: HeadConfig, held: tuple[np.ndarray, np.ndarray] | None = None):
        """ValueError for another head than of depth."""
        if head.task != "depth":
            raise ValueError(f"a map of {head.task} is not aligned: only depth is")
        self.aligns = not head.metric
        self.fit = Fit(1.0, 0.0, 1.0, cut=True)
        self.held = held

    def __call__(self, depth: np.ndarray, image: np.ndarray) -> np.ndarray:
        """The map (H, W), float32, brought to those before; `image`: its frame, uint8 (H, W, 3), of one size throughout.

        ValueError for a frame of another size.
        """
        if not self.aligns:
            return depth
        if self.held is None:
            self.held = depth.astype(np.float32), image
            return self.held[0]
        mean, frame = self.held
        if depth.shape != mean.shape or image.shape[:2] != depth.shape:
            raise ValueError(f"a frame of {depth.shape[1]}x{depth.shape[0]} behind one of {mean.shape[1]}x{mean.shape[0]}")
        step = max(1, round((depth.size / LOOKED_AT) ** 0.5))
        some = np.s_[step // 2 :: step, step // 2 :: step]
        still = np.abs(image[some].astype(np.int16) - frame[some]).mean(-1) <= CHANGED
        if still.mean() < SHARE:
            still = np.ones_like(still)
        pair = depth[some][still], mean[some][still]
        self.fit = aligned(*pair) if _alike(image[some], frame[some]) >= ALIKE else Fit(*_spread(*pair), 0.0, cut=True)
        found = (self.fit.scale * depth + self.fit.shift).astype(np.float32)
        if not self.fit.cut:
            apart = np.abs(found - mean)
            share = (apart / (NOISE * DEVIATION * float(np.median(apart[some])) + np.finfo(np.float32).tiny)).clip(FOLLOWED, 1)
            found = mean + share * (found - mean)
        self.held = found, image
        return found


def aligned(depth: np.ndarray, wanted: np.ndarray) -> Fit:
    """The robust fit of `depth` to `wanted`, (N,); where it is none, `depth` gets the median and the spread of `wanted`."""
    depth, wanted = depth.astype(np.float64), wanted.astype(np.float64)
    scale, shift = start = _spread(depth, wanted)
    if not (np.ptp(depth) > 0 and np.ptp(wanted) > 0):
        return Fit(*start, 0.0, cut=True)
    for _ in range(ROUNDS):
        residual = scale * depth + shift - wanted
        deviation = DEVIATION * np.median(np.abs(residual)) + 1e-6 * np.ptp(wanted)
        weight = np.clip(1 - (residual / (BIWEIGHT * deviation)) ** 2, 0, None) ** 2
        total = weight.sum()
        centre, level = (weight * depth).sum() / total, (weight * wanted).sum() / total
        variance = (weight * (depth - centre) ** 2).sum()
        scale = (weight * (depth - centre) * (wanted - level)).sum() / max(variance, np.finfo(float).tiny)
        shift = level - scale * centre
    share = float((np.abs(scale * depth + shift - wanted) <= 0.1 * np.ptp(wanted)).mean())
    fits = share >= SHARE and 0.2 * start[0] < scale < 5 * start[0]
    return Fit(float(scale), float(shift), share, cut=False) if fits else Fit(*start, share, cut=True)


def _alike(one: np.ndarray, other: np.ndarray) -> float:
    """The share of two frames' histograms that is the same."""
    counts = [np.bincount((image >> 6).reshape(-1, 3) @ (16, 4, 1), minlength=64) for image in (one, other)]
    return float(np.minimum(*counts).sum() / counts[0].sum())


def _spread(depth: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The scale and shift that give a map the median and the quartiles' distance of another."""
    (low, middle, high), (least, level, most) = (np.quantile(values, (0.25, 0.5, 0.75)) for values in (depth, wanted))
    scale = float((most - least) / (high - low)) if high > low and most > least else 1.0
    return scale, float(level - scale * middle)

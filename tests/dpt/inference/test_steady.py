"""Depth of a clip's frames without flicker: `dpt.inference.steady`."""

import numpy as np
import pytest

from dpt.inference.steady import Steady, aligned
from dpt.zoo import config_of

INVERSE, METRIC = config_of("dpt-large-midas").head, config_of("dpt-hybrid-nyu").head


def clip(frames: int = 40, *, walks: bool = True, flicker: float = 0.3, noise: float = 0.01, seed: int = 0):
    """(image, map as a network gives it, true map, what of it stands still): a wall, a slope, and a box that goes across the picture."""
    generator = np.random.default_rng(seed)
    texture = generator.integers(40, 200, (48, 64, 3)).astype(np.uint8)
    base = np.linspace(0.2, 1.0, 48)[:, None] + 0.3 * (np.arange(64) > 40)
    for number in range(frames):
        image, true, still = texture.copy(), base.copy(), np.ones((48, 64), bool)
        if walks:
            left = number % 50
            true[10:34, left : left + 14], image[10:34, left : left + 14] = 1.6, 250
            still[10:34, max(0, left - 1) : left + 15] = False
        scale, shift = 1 + flicker * generator.uniform(-1, 1), flicker * generator.uniform(-1, 1)
        seen = scale * (true + noise * generator.standard_normal(true.shape)) + shift
        yield image, seen.astype(np.float32), true, still


def change(maps: list[np.ndarray], still: list[np.ndarray]) -> float:
    """The mean absolute change of what stands still from frame to frame."""
    return float(np.mean([np.abs(b - a)[x & y].mean() for a, b, x, y in zip(maps, maps[1:], still, still[1:], strict=False)]))


@pytest.mark.parametrize("walks", [False, True])
def test_flicker_goes(walks):
    """Blind spot: a fit that follows what moves; the mean of the maps given in place of the map."""
    images, maps, truths, still = map(list, zip(*clip(walks=walks), strict=True))
    steady = Steady(INVERSE)
    found = [steady(depth, image) for depth, image in zip(maps, images, strict=True)]
    assert change(found, still) < 0.15 * change(maps, still)
    for map_, truth in zip(found[5:], truths[5:], strict=True):  # the box, too, is where it is now
        assert np.corrcoef(map_.ravel(), truth.ravel())[0, 1] > 0.995


def test_a_camera_that_moves():
    """Blind spot: every frame a cut, where no pixel keeps its colour; a scale that follows what comes into the picture."""
    generator = np.random.default_rng(2)
    texture = generator.integers(0, 256, (48, 200, 3)).astype(np.uint8)
    world = np.linspace(0.2, 1.0, 48)[:, None] + 0.4 * (np.sin(np.arange(200) / 9) > 0.6)
    frames = [(texture[:, 2 * n : 2 * n + 64], world[:, 2 * n : 2 * n + 64]) for n in range(40)]
    steady, maps, found, cuts = Steady(INVERSE), [], [], 0
    for image, true in frames:
        scale, shift = 1 + 0.3 * generator.uniform(-1, 1), 0.3 * generator.uniform(-1, 1)
        maps.append((scale * true + shift).astype(np.float32))
        found.append(steady(maps[-1], image))
        cuts += steady.fit.cut
    still = [np.abs(b - a) < 1e-9 for (_, a), (_, b) in zip(frames, frames[1:], strict=False)]
    errors = [np.mean([np.abs(b - a)[x].mean() for a, b, x in zip(of, of[1:], still, strict=False)]) for of in (found, maps)]
    assert cuts == 1 and errors[0] < 0.3 * errors[1], errors  # the first frame begins


def test_a_cut_begins_anew_within_the_same_range():
    """Blind spot: a new scene bent to the last one; a range of colours that jumps."""
    steady = Steady(INVERSE)
    for image, depth, _, _ in clip(10):
        last = steady(depth, image)
    other = np.random.default_rng(5).random((48, 64)).astype(np.float32)
    found = steady(50 * other + 300, np.full((48, 64, 3), 9, np.uint8))
    assert steady.fit.cut and np.corrcoef(found.ravel(), other.ravel())[0, 1] > 0.9999
    assert abs(np.median(found) - np.median(last)) < 0.2 and np.ptp(np.quantile(found, (0.25, 0.75))) < 2
    steady(70 * other + 10, np.full((48, 64, 3), 9, np.uint8))
    assert not steady.fit.cut


def test_depth_that_turns_round_is_a_cut():
    """Blind spot: a negative scale, which makes what is near far."""
    steady, (frames) = Steady(INVERSE), list(clip(2, walks=False, flicker=0))
    steady(frames[0][1], frames[0][0])
    steady(-frames[0][1], frames[0][0])
    assert steady.fit.cut and steady.fit.scale > 0


def test_flat_maps_and_metres():
    """Blind spot: a division by no spread; metres that are bent."""
    steady, image = Steady(INVERSE), np.zeros((48, 64, 3), np.uint8)
    for value in (1, 1, 3):
        assert np.isfinite(steady(np.full((48, 64), value, np.float32), image)).all()
    metres = [depth for _, depth, _, _ in clip(3)]
    keeps = Steady(METRIC)
    assert all(keeps(depth, image) is depth for depth in metres)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="a map of segmentation is not aligned"):
        Steady(config_of("dpt-base-ade20k").head)
    steady = Steady(INVERSE)
    steady(np.ones((4, 5), np.float32), np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="a frame of 6x4 behind one of 5x4"):
        steady(np.ones((4, 6), np.float32), np.zeros((4, 6, 3), np.uint8))


def test_what_has_no_range_fits_nothing():
    """Blind spot: a black frame that is fitted, and is then the whole clip's scale; a spread divided by nothing."""
    flat, slope = np.full(400, 3.0), np.linspace(0.0, 1.0, 400)
    for depth, wanted in ((flat, slope), (slope, flat), (flat, flat)):
        fit = aligned(depth, wanted)
        assert fit.cut and fit.share == 0 and fit.scale == 1
        assert fit.scale * np.median(depth) + fit.shift == pytest.approx(np.median(wanted))
    steady = Steady(INVERSE)
    maps = [depth for _, depth, _, _ in clip(4, walks=False, flicker=0)]
    image = np.zeros((48, 64, 3), np.uint8)
    found = [steady(depth, image) for depth in (maps[0], np.full_like(maps[0], 7), maps[1])]
    assert all(np.isfinite(one).all() for one in found)
    assert np.ptp(found[1]) == 0 and np.ptp(found[2]) == pytest.approx(np.ptp(maps[1]))

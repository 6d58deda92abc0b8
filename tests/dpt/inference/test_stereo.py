"""Two eyes' views of a picture from its depth: `dpt.inference.stereo`."""

import numpy as np
import pytest

from dpt.inference.stereo import anaglyph, views
from dpt.zoo import config_of

METRIC = config_of("dpt-hybrid-nyu").head
GREY = np.random.default_rng(0).integers(60, 120, (20, 100, 3)).astype(np.uint8)


def box() -> tuple[np.ndarray, np.ndarray]:
    """A white box at a metre before a wall at four."""
    image, depth = GREY.copy(), np.full((20, 100), 4.0, np.float32)
    image[5:15, 40:60], depth[5:15, 40:60] = 255, 1.0
    return image, depth


def edges(image: np.ndarray) -> tuple[int, int]:
    columns = np.flatnonzero((image[10] == 255).all(-1))
    return int(columns[0]), int(columns[-1])


def test_what_is_near_goes_apart():
    """Blind spot: eyes that are exchanged; a near object behind a far one; holes that keep the near object's colours."""
    image, depth = box()
    left, right = views(image, depth, METRIC, disparity=0.08)
    assert edges(left) == (42, 61) and edges(right) == (38, 57)  # a near thing lies farther right for the left eye
    for seen, shift in ((left, -2), (right, 2)):
        assert seen.shape == image.shape and not (seen[:5] == 255).any() and not (seen[15:] == 255).any()
        assert np.array_equal(seen[0, 10:90], image[0, 10 - shift : 90 - shift])
        assert (seen[10] < 255).all(-1).sum() == 80


def test_a_wall_is_the_picture_as_a_whole():
    """Blind spot: a division by no range of depth."""
    left, right = views(GREY, np.full((20, 100), 3.0, np.float32), METRIC)
    assert np.array_equal(left[:, 5:-5], GREY[:, 6:-4]) and np.array_equal(right[:, 5:-5], GREY[:, 4:-6])


def test_anaglyph():
    """Blind spot: glasses the wrong way round; grey that is coloured."""
    white, black = np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)
    red, cyan = anaglyph(white, black)[0, 0], anaglyph(black, white)[0, 0]
    assert red[0] > 200 and red[1:].max() < 40 and cyan[0] < 40 and cyan[1:].min() > 200
    assert anaglyph(white, white).min() > 240 and anaglyph(black, black).max() == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"disparity": 0.5}, "disparity=0.5: it must be above 0 and below 0.5"),
        ({"disparity": float("nan")}, "disparity=nan"),
        ({"depth": np.ones((20, 99), np.float32)}, "a picture of 100x20 and depth of 99x20"),
        ({"head": config_of("dpt-base-ade20k").head}, "a map of segmentation has no depth"),
    ],
)
def test_bad_input_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        views(**{"image": GREY, "depth": np.ones((20, 100), np.float32), "head": METRIC, **change})


@pytest.mark.parametrize("level", [0, 6, 60, 128, 250])
def test_grey_stays_grey(level):
    """Blind spot: matrices of light that are given grey levels; another curve back. Dubois' rows add up to 1 over both eyes."""
    grey = np.full((4, 5, 3), level, np.uint8)
    assert np.abs(anaglyph(grey, grey).astype(int) - level).max() <= 2


@pytest.mark.parametrize("disparity", [0, 0.5])
def test_disparities_at_the_bounds(disparity):
    with pytest.raises(ValueError, match=f"disparity={disparity:g}: it must be above 0 and below 0.5"):
        views(np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), np.float32), config_of("dpt-large-midas").head, disparity)

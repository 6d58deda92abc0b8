"""Depth of rendered clips with a moving camera: how much of what stands still flickers, and whether it is as near to the truth."""

import pytest

from bench.clips import CLIPS, flicker

pytest.importorskip("pybullet")


@pytest.mark.parametrize(("seed", "step"), CLIPS.items())
def test_what_stands_still_changes_half_as_much(seed, step):
    """Blind spot: a clip that is quiet because it is blurred or late. Frame by frame each map is spread over the colours by itself."""
    of_alone = flicker(seed, step)
    assert of_alone["change"] < 0.5 and of_alone["error"] < 1.05

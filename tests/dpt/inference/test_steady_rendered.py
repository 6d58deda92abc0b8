"""Depth of rendered clips with a moving camera: how much of what stands still flickers, and whether it is as near to the truth."""

import numpy as np
import pytest
import torch

import dpt
from dpt.evaluation.alignment import align
from dpt.inference.steady import Steady
from dpt.scenes import rendering

pytest.importorskip("pybullet")


@pytest.mark.parametrize(("seed", "step"), [(0, 0.03), (1, 0.01), (2, 0.03)])
def test_what_stands_still_changes_half_as_much(seed, step):
    """Blind spot: a clip that is quiet because it is blurred or late. Frame by frame each map is spread over the colours by itself."""
    scenes = list(rendering.moving(rendering.split_seeds("test", 3)[seed], 16, step, 160))
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    maps = [model.predict(scene.image).depth for scene in scenes]
    steady = Steady(model.config.head)
    found = [steady(depth, scene.image) for depth, scene in zip(maps, scenes, strict=True)]
    truth = [1 / scene.depth for scene in scenes]
    still = [np.abs(after - before) < 0.01 * np.ptp(truth[0]) for before, after in zip(truth, truth[1:], strict=False)]
    low, high = np.min(found), np.max(found)

    def change(spread: list[np.ndarray]) -> float:
        return float(np.mean([np.abs(b - a)[x].mean() for a, b, x in zip(spread, spread[1:], still, strict=False)]))

    alone = change([(depth - depth.min()) / np.ptp(depth) for depth in maps])
    assert change([(depth - low) / (high - low) for depth in found]) < 0.5 * alone

    def error(depths: list[np.ndarray]) -> float:
        pairs = [(depth, true) for depth, true in zip(depths, truth, strict=True)]
        fits = [align(*(torch.from_numpy(np.asarray(part, np.float64)) for part in pair)).numpy() for pair in pairs]
        return float(np.mean([np.abs(fit - true).mean() for fit, (_, true) in zip(fits, pairs, strict=True)]))

    assert error(found) < 1.05 * error(maps)

"""The metrics against values worked out by hand, and against torchmetrics."""

import math

import pytest
import torch

from dpt.evaluation.metrics import DepthMetrics, SegmentationMetrics


def test_a_perfect_inverse_depth_at_any_scale_is_perfect():
    """Blind spot: an alignment in depth instead of inverse depth."""
    depth = torch.rand(2, 8, 8, dtype=torch.float64) * 5 + 1
    metrics = DepthMetrics(10.0)
    metrics.update(3 / depth + 2, depth)
    assert metrics.compute() == pytest.approx({"absrel": 0, "rmse": 0, "delta1": 1}, abs=1e-9)


def test_a_constant_by_hand():
    """Blind spot: any of the three formulas. Depths 1 and 2 have the mean inverse 3/4, so both are estimated as 4/3."""
    metrics = DepthMetrics(10.0)
    metrics.update(torch.ones(1, 1, 2), torch.tensor([[[1.0, 2.0]]]))
    expected = {"absrel": (1 / 3 + 1 / 3) / 2, "rmse": ((1 / 9 + 4 / 9) / 2) ** 0.5, "delta1": 0}
    assert metrics.compute() == pytest.approx(expected)


def test_unknown_and_far_pixels_do_not_count():
    """Blind spot: zeros (unknown) or depths past max_depth that enter the fit or the mean."""
    depth = torch.tensor([[[1.0, 2.0, 0.0, 500.0, 4.0]]])
    metrics = DepthMetrics(10.0)
    metrics.update(torch.tensor([[[1.0, 0.5, 77.0, 77.0, 0.25]]]), depth)
    assert metrics.compute() == pytest.approx({"absrel": 0, "rmse": 0, "delta1": 1}, abs=1e-9)


def test_an_estimate_that_is_not_positive_becomes_max_depth():
    """Blind spot: negative or infinite depths after the alignment."""
    metrics = DepthMetrics(8.0)
    metrics.update(torch.tensor([[[0.0, 0.0, 1.0, 5.0]]]), torch.tensor([[[8.0, 8.0, 8.0, 1.0]]]))
    assert all(torch.isfinite(torch.tensor(list(metrics.compute().values()))))


def test_metres_are_taken_as_they_are():
    """Blind spot: an alignment that forgives a wrong scale; estimates of nothing or of more than the range. By hand: 2 is estimated for 1
    (AbsRel 1), 9 for 4 but the range ends at 8 (AbsRel 1), 0 for 1 counts as a millimetre (AbsRel 0.999), and beyond 8 nothing counts."""
    metrics = DepthMetrics(8.0, inverse=False)
    metrics.update(torch.tensor([[[2.0, 9.0, 0.0, 1.0, 1.0]]]), torch.tensor([[[1.0, 4.0, 1.0, 8.5, 0.0]]]))
    wanted = {"absrel": (1 + 1 + 0.999) / 3, "rmse": ((1 + 16 + 0.999**2) / 3) ** 0.5, "delta1": 0}
    assert metrics.compute() == pytest.approx(wanted)


@pytest.mark.parametrize("inverse", [True, False])
def test_the_sky_by_hand(inverse):
    """Blind spot: the sky in the averages; nearer counted as farther; a tie counted; the middle of all pixels or their farthest instead of
    the farthest tenth's. Of 30 known pixels the farthest three are predicted 1, 2 and 3: of the sky's -1, 1, 2, 2, 5 two are farther than
    2. An unknown pixel is neither, and a picture without a sky, or of nothing else, adds nothing."""
    known, inf = torch.arange(1.0, 31.0), float("inf")
    sky = torch.tensor([-1.0, 1.0, 2.0, 2.0, 5.0])
    nearness = torch.stack([torch.cat([known, sky, torch.tensor([-9.0])]), torch.arange(36.0), torch.arange(36.0)])[:, None]
    truth = torch.cat([1 / known, torch.full((5,), inf), torch.zeros(1)])
    truth = torch.stack([truth, torch.ones(36), torch.full((36,), inf)])[:, None]
    metrics = DepthMetrics(10.0, inverse)
    metrics.update(nearness if inverse else -nearness, truth)
    assert metrics.compute()["sky"] == pytest.approx(2 / 5) and len(metrics.rows) == 2
    assert math.isfinite(metrics.compute()["absrel"])
    if inverse:
        alone = DepthMetrics(10.0)
        alone.update(nearness[:1], truth[:1])
        assert alone.compute()["absrel"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("limit", [0, -1, 1e-3, float("nan")])
def test_the_range_is_positive(limit):
    """Blind spot: a range in which nothing is known."""
    with pytest.raises(ValueError, match=f"max_depth={limit}: it must be above"):
        DepthMetrics(limit)


def test_pictures_weigh_alike():
    """Blind spot: an average over pixels, in which a picture with few known pixels hardly counts."""
    metrics = DepthMetrics(10.0)
    metrics.update(torch.tensor([[[1.0, 0.5]], [[1.0, 1.0]]]), torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]]))
    assert metrics.compute()["absrel"] == pytest.approx((0 + 1 / 3) / 2)


def test_segmentation_equals_torchmetrics():
    """Blind spot: truth and prediction exchanged, ignored pixels counted, an absent class averaged as 0."""
    classification = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 5, (3, 20, 30), generator=generator)
    labels = torch.where(
        torch.rand(3, 20, 30, generator=generator) < 0.6, prediction, torch.randint(0, 4, (3, 20, 30), generator=generator)
    )
    labels[0, :4] = 255
    ours = SegmentationMetrics(7)
    ours.update(prediction, labels)
    jaccard = classification.MulticlassJaccardIndex(7, average="none", ignore_index=255)(prediction, labels)
    seen = ~ours.iou().isnan()
    assert seen.tolist() == [True] * 5 + [False] * 2
    assert ours.compute()["miou"] == pytest.approx(jaccard[seen].mean().item(), rel=1e-6)
    accuracy = classification.MulticlassAccuracy(7, average="micro", ignore_index=255)(prediction, labels).item()
    assert ours.compute()["accuracy"] == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.parametrize("metrics", [DepthMetrics(10.0), SegmentationMetrics(3)])
def test_nothing_seen_is_an_error(metrics):
    """Blind spot: a silent 0 or NaN for an empty data set."""
    with pytest.raises(ValueError, match="nothing to average"):
        metrics.compute()

"""The figures against values worked out by hand, against torchmetrics, and against mmsegmentation's own."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpt.config import HeadConfig
from dpt.evaluation.metrics import DEPTH_FIGURES, DepthScorer, LabelScorer, PairScorer
from dpt.evaluation.protocols import EIGEN, PROTOCOLS

INVERSE = HeadConfig(task="depth")
METRIC = replace(INVERSE, inverse=False)
RELATIVE = replace(METRIC, relative=True)
FOLDER, FOLDER_LABELS = PROTOCOLS["folder"]
(ADE20K,) = PROTOCOLS["ade20k"]
ORACLE = Path(__file__).parent / "oracles" / "iou_metric.py"


def classes(count: int) -> HeadConfig:
    return HeadConfig(task="segmentation", classes=tuple(map(str, range(count))), palette=((0, 0, 0),) * count)


def depth(predictions, truths, max_depth=10.0, head=INVERSE, protocol=FOLDER):
    """The figures of pictures (H, W), by default of the folder's protocol."""
    scorer = DepthScorer(protocol, head, max_depth)
    return scorer.figures([scorer.row(found, truth) for found, truth in zip(predictions, truths, strict=True)])


def labels(scorer, predictions, truths):
    return scorer.figures([scorer.row(found, truth) for found, truth in zip(predictions, truths, strict=True)])


def test_a_perfect_inverse_depth_at_any_scale_is_perfect():
    """Blind spot: an alignment in depth instead of inverse depth."""
    truth = torch.rand(2, 8, 8, dtype=torch.float64) * 5 + 1
    assert depth(3 / truth + 2, truth) == pytest.approx({"absrel": 0, "rmse": 0, "delta1": 1}, abs=1e-9)


def test_a_constant_by_hand():
    """Blind spot: any of the three formulas. Depths 1 and 2 have the mean inverse 3/4, so both are estimated as 4/3."""
    expected = {"absrel": (1 / 3 + 1 / 3) / 2, "rmse": ((1 / 9 + 4 / 9) / 2) ** 0.5, "delta1": 0}
    assert depth(torch.ones(1, 1, 2), torch.tensor([[[1.0, 2.0]]])) == pytest.approx(expected)


def test_every_figure_by_hand():
    """Blind spot: a formula that is another's: RMSE in the place of its square, a logarithm of another base, an error relative to the
    estimate, a mean squared where a square is meant. Estimates 2, 1, 4 and 1 of 1, 1, 5 and 1: errors 1, 0, 1 and 0, and ratios 2, 1,
    1.25, which is not within 1.25 and not beyond it, and 1."""
    estimate, truth = torch.tensor([2.0, 1, 4, 1], dtype=torch.float64), torch.tensor([1.0, 1, 5, 1], dtype=torch.float64)
    logs = [math.log(2), 0, math.log(4 / 5), 0]
    mean, square = sum(logs) / 4, sum(value * value for value in logs) / 4
    wanted = {
        "absrel": (1 + 1 / 5) / 4,
        "sqrel": (1 + 1 / 5) / 4,
        "rmse": math.sqrt((1 + 1) / 4),
        "rmselog": math.sqrt(square),
        "log10": (math.log10(2) + math.log10(5 / 4)) / 4,
        "silog": 100 * math.sqrt(square - mean**2),
        "delta1": 2 / 4,
        "delta2": 3 / 4,
        "delta3": 3 / 4,
        "bad1": 100 * 1 / 4,
    }
    assert {name: figure(estimate, truth).item() for name, figure in DEPTH_FIGURES.items()} == pytest.approx(wanted)
    steps = [DEPTH_FIGURES[f"delta{power}"](torch.tensor([1.24**power, 1.26**power]), torch.ones(2)).item() for power in (1, 2, 3)]
    assert steps == [0.5] * 3
    other = DEPTH_FIGURES["sqrel"](torch.tensor([8.0]), torch.tensor([4.0])).item()
    assert other == 16 / 4 and DEPTH_FIGURES["silog"](3 * truth, truth).item() == pytest.approx(0, abs=1e-5)
    assert set(EIGEN) <= set(DEPTH_FIGURES) and not DEPTH_FIGURES["silog"](truth / 3, truth).isnan()


def test_unknown_and_far_pixels_do_not_count():
    """Blind spot: zeros (unknown) or depths past max_depth that enter the fit or the mean."""
    truth = torch.tensor([[[1.0, 2.0, 0.0, 500.0, 4.0]]])
    found = depth(torch.tensor([[[1.0, 0.5, 77.0, 77.0, 0.25]]]), truth)
    assert found == pytest.approx({"absrel": 0, "rmse": 0, "delta1": 1}, abs=1e-9)


def test_an_estimate_that_is_not_positive_becomes_max_depth():
    """Blind spot: negative or infinite depths after the alignment."""
    found = depth(torch.tensor([[[0.0, 0.0, 1.0, 5.0]]]), torch.tensor([[[8.0, 8.0, 8.0, 1.0]]]), 8.0)
    assert all(torch.isfinite(torch.tensor(list(found.values()))))


def test_metres_are_taken_as_they_are():
    """Blind spot: an alignment that forgives a wrong scale; estimates of nothing or of more than the range. By hand: 2 is estimated for 1
    (AbsRel 1), 9 for 4 but the range ends at 8 (AbsRel 1), 0 for 1 counts as a millimetre (AbsRel 0.999), and beyond 8 nothing counts."""
    found = depth(torch.tensor([[[2.0, 9.0, 0.0, 1.0, 1.0]]]), torch.tensor([[[1.0, 4.0, 1.0, 8.5, 0.0]]]), 8.0, METRIC)
    wanted = {"absrel": (1 + 1 + 0.999) / 3, "rmse": ((1 + 16 + 0.999**2) / 3) ** 0.5, "delta1": 0}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("head", [INVERSE, METRIC])
def test_the_sky_by_hand(head):
    """Blind spot: the sky in the averages; nearer counted as farther; a tie counted; the middle of all pixels or their farthest instead of
    the farthest tenth's. Of 30 known pixels the farthest three are predicted 1, 2 and 3: of the sky's -1, 1, 2, 2, 5 two are farther than
    2. An unknown pixel is neither, and a picture without a sky, or of nothing else, adds nothing."""
    known, inf = torch.arange(1.0, 31.0), float("inf")
    sky = torch.tensor([-1.0, 1.0, 2.0, 2.0, 5.0])
    nearness = torch.stack([torch.cat([known, sky, torch.tensor([-9.0])]), torch.arange(36.0), torch.arange(36.0)])[:, None]
    truth = torch.cat([1 / known, torch.full((5,), inf), torch.zeros(1)])
    truth = torch.stack([truth, torch.ones(36), torch.full((36,), inf)])[:, None]
    predictions = nearness if head.inverse else -nearness
    found = depth(predictions, truth, head=head)
    assert found["sky"] == pytest.approx(2 / 5) and math.isfinite(found["absrel"])
    scorer = DepthScorer(FOLDER, head, 10.0)
    assert [scorer.row(*pair)[0] is None for pair in zip(predictions, truth, strict=True)] == [False, False, True]
    if head.inverse:
        assert depth(nearness[:1], truth[:1])["absrel"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("limit", [0, -1, 1e-3, float("nan")])
def test_the_range_is_positive(limit):
    """Blind spot: a range in which nothing is known."""
    with pytest.raises(ValueError, match=f"max_depth={limit}: it must be above"):
        DepthScorer(FOLDER, INVERSE, limit)


def test_pictures_weigh_alike():
    """Blind spot: an average over pixels, in which a picture with few known pixels hardly counts."""
    found = depth(torch.tensor([[[1.0, 0.5, 0]], [[1.0, 1.0, 1]]]), torch.tensor([[[1.0, 2.0, 0]], [[1.0, 2.0, 4 / 3]]]))
    assert found["absrel"] == pytest.approx((0 + (1 / 3 + 1 / 3 + 0) / 3) / 2)


def test_the_order_of_points_by_hand():
    """Blind spot: nearer taken for farther; rows for columns; a tie that counts as right; a mean over pictures with many pairs and few."""
    prediction = torch.tensor([[3.0, 1.0, 1.0], [2.0, 0.0, 5.0]])
    first = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 2]])  # 3 before 1: right; 1 before 3; 1 before 1
    second = torch.tensor([[1, 2, 0, 1]])  # 5 before 1
    (protocol,) = PROTOCOLS["midas-diw"]
    for head, sign in ((INVERSE, 1), (METRIC, -1)):
        scorer = PairScorer(protocol, head)
        rows = [scorer.row(sign * prediction, points) for points in (first, second)]
        assert rows == [(2, 3), (0, 1)] and scorer.figures(rows) == {"whdr": 2 / 4}


def test_segmentation_equals_torchmetrics():
    """Blind spot: truth and prediction exchanged, ignored pixels counted, an absent class averaged as 0."""
    classification = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 5, (3, 20, 30), generator=generator)
    truth = torch.where(torch.rand(3, 20, 30, generator=generator) < 0.6, prediction, torch.randint(0, 4, (3, 20, 30), generator=generator))
    truth[0, :4] = 255
    scorer = LabelScorer(FOLDER_LABELS, classes(7))
    found = labels(scorer, prediction, truth)
    jaccard = classification.MulticlassJaccardIndex(7, average="none", ignore_index=255)(prediction, truth)
    assert found["miou"] == pytest.approx(jaccard[:5].mean().item(), rel=1e-6)
    iou = [iou for iou, _ in scorer.per_class([scorer.row(*pair) for pair in zip(prediction, truth, strict=True)]).values()]
    assert [math.isnan(value) for value in iou] == [False] * 5 + [True] * 2
    accuracy = classification.MulticlassAccuracy(7, average="micro", ignore_index=255)(prediction, truth).item()
    assert found["accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_segmentation_is_mmsegmentations_to_the_last_digit():
    """Blind spot: classes that never occur, or only in one of the maps; sums that are exact where IoUMetric's, of float32, are not, so that
    the second decimal is another; rounding of the share instead of the percent. `oracles/iou_metric.py` ran IoUMetric."""
    spec = importlib.util.spec_from_file_location("iou_metric", ORACLE)
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    exact = {}
    with np.load(ORACLE.with_suffix(".npz")) as wanted:
        for name, (count, *case, repeats) in oracle.CASES.items():
            scorer = LabelScorer(replace(ADE20K, classes=count), classes(count))
            rows = [scorer.row(*map(torch.from_numpy, pair)) for pair in oracle.maps(count, *case)] * repeats
            found = scorer.figures(rows)
            assert list(found) == ["mIoU", "mAcc", "aAcc"]
            np.testing.assert_array_equal(np.float32(list(found.values())), wanted[name])
            np.testing.assert_array_equal(np.float32(list(scorer.per_class(rows).values())).T, wanted[f"{name} classes"])
            assert all(value == round(value, 2) for value in found.values())
            exact[name] = 100 * LabelScorer(FOLDER_LABELS, classes(count)).figures(rows)["accuracy"]
        assert round(exact["large"], 2) != wanted["large"][2].round(2)  # float32 does show there
        assert all(round(exact[name], 2) == pytest.approx(wanted[name][2]) for name in ("few", "absent", "many"))


@pytest.mark.parametrize(
    "scorer", [DepthScorer(FOLDER, INVERSE, 10.0), LabelScorer(ADE20K, classes(150)), PairScorer(PROTOCOLS["midas-diw"][0], INVERSE)]
)
def test_nothing_seen_is_an_error(scorer):
    """Blind spot: a silent 0 or NaN for an empty data set."""
    with pytest.raises(ValueError, match="nothing to average"):
        scorer.figures([])

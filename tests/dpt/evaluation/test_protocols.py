"""Each protocol's crops, ranges and alignments against values worked out by hand, and what is told of those it refuses."""

import json
import re
from dataclasses import replace

import pytest
import torch

from dpt.config import HeadConfig
from dpt.evaluation.crops import CROPS, rectangle
from dpt.evaluation.metrics import DEPTH_FIGURES, DepthScorer, scorer_of
from dpt.evaluation.protocols import PROTOCOLS, DepthProtocol, LabelProtocol, form_of, protocol_of
from dpt.evaluation.published import PUBLISHED, published
from dpt.zoo import CONFIGS

INVERSE = HeadConfig(task="depth")
METRIC = replace(INVERSE, inverse=False)
RELATIVE = replace(METRIC, relative=True)


def protocol(name: str):
    (found,) = PROTOCOLS[name]
    return found


def scored(name, prediction, truth, head=INVERSE, max_depth=None):
    scorer = DepthScorer(protocol(name), head, max_depth)
    return scorer.figures([scorer.row(torch.as_tensor(prediction), torch.as_tensor(truth))])


@pytest.mark.parametrize(
    ("name", "size", "rows", "columns"),
    [
        ("garg", (352, 1216), (143, 349), (43, 1172)),  # 143.65 349.15 43.71 1172.29
        ("garg", (375, 1242), (153, 371), (44, 1197)),  # 153.04 371.96 44.65 1197.35
        ("garg", (480, 640), (195, 476), (23, 616)),  # 195.89 476.11 23.01 616.99
        ("eigen", (352, 1216), (117, 321), (43, 1172)),  # 117.02 321.56
        ("nyu", (480, 640), (45, 471), (41, 601)),
        ("kitti", (375, 1242), (23, 375), (13, 1229)),
        ("kitti", (376, 1241), (24, 376), (12, 1228)),  # 25 columns too many: 12 of them on the left
        ("kitti", (352, 1216), (0, 352), (0, 1216)),
        (None, (3, 4), (0, 3), (0, 4)),
    ],
)
def test_crops_by_hand(name, size, rows, columns):
    """Blind spot: rounding to the nearest instead of down, height for width, a crop at the top."""
    assert rectangle(name, size) == (slice(*rows), slice(*columns))


@pytest.mark.parametrize(("name", "size"), [("nyu", (481, 640)), ("kitti", (351, 1242)), ("kitti", (375, 1215))])
def test_a_crop_that_does_not_fit_is_told(name, size):
    """Blind spot: figures of a crop that the picture does not have, counted from its other end."""
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]}"):
        rectangle(name, size)


@pytest.mark.parametrize(
    ("name", "head", "size", "rows", "columns"),
    [
        ("kitti-eigen", METRIC, (375, 1242), (153, 371), (44, 1197)),  # of the whole, which lies in KITTI's crop
        ("kitti-eigen-zoedepth", METRIC, (375, 1242), (23 + 143, 23 + 349), (13 + 43, 13 + 1172)),
        ("marigold-kitti", INVERSE, (375, 1242), (23 + 117, 23 + 321), (13 + 43, 13 + 1172)),
        ("midas-kitti", INVERSE, (375, 1242), (0, 375), (0, 1242)),
        ("nyu-eigen", METRIC, (480, 640), (45, 471), (41, 601)),
        ("marigold-nyu", INVERSE, (480, 640), (45, 471), (41, 601)),
        ("midas-nyu", INVERSE, (480, 640), (0, 480), (0, 640)),
        ("depth-anything-nyu", INVERSE, (480, 640), (0, 480), (0, 640)),
    ],
)
def test_where_a_protocol_looks(name, head, size, rows, columns):
    """Blind spot: Garg's crop of KITTI's crop where it is of the whole picture, or the other way round; pixels outside that count. The
    prediction is right in the rectangle and wrong everywhere else, and then wrong in one of its corners alone."""
    truth = torch.ones(size)
    truth[::2] = 2.0
    right = 1 / truth if head is INVERSE else truth.clone()
    seen = rectangle(protocol(name).cut, size)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    wrong = torch.where(inside, right, 9.0)
    good = "bad1" if "bad1" in protocol(name).figures else "absrel"
    assert scored(name, wrong[seen], truth, head)[good] == pytest.approx(0, abs=1e-6)
    for row, column in ((rows[0], columns[0]), (rows[1] - 1, columns[1] - 1)):
        spoiled = wrong.clone()
        spoiled[row, column] = 0.1
        assert scored(name, spoiled[seen], truth, head)[good] > 1e-6


RANGES = {  # name: metres between which truth counts, strictly
    "kitti-eigen": (1e-3, 80),
    "nyu-eigen": (1e-3, 10),
    "midas-kitti": (0, 80),
    "midas-nyu": (0, 10),
    "midas-tum": (0, 10),
    "midas-eth3d": (0, 72),
    "midas-sintel": (0, 72),
    "depth-anything-kitti": (0, 80),
    "depth-anything-nyu": (0, 10),
    "marigold-kitti": (1e-5, 80),
    "marigold-nyu": (1e-3, 10),
    "marigold-diode": (0.6, 350),
    "marigold-scannet": (1e-3, 10),
    "marigold-eth3d": (1e-5, float("inf")),
    "moge": (0, float("inf")),
}


@pytest.mark.parametrize("name", RANGES)
def test_what_truth_counts(name):
    """Blind spot: caps of another data set; truth at the cap that counts; unknown depth that counts."""
    row = replace(protocol(name), crop=None, cut=None)
    low, high = RANGES[name]
    top = 1e6 if high == float("inf") else high
    scorer = DepthScorer(row, METRIC if "metric" in row.alignments else INVERSE)
    edges = [0.0, low, low + 1e-4, (low + top) / 2, top * 0.999, high, high + 1]
    counts = [scorer.row(torch.ones(1, 1), torch.tensor([[value]], dtype=torch.float64))[0] is not None for value in edges]
    assert counts == [False, False, True, True, True, False, False]
    with pytest.raises(ValueError, match=f"max_depth=5: {name} says itself"):
        DepthScorer(row, METRIC, 5)


def test_the_same_prediction_by_each_alignment():
    """Blind spot: protocols that are one; a fit of depth where inverse depth is fitted; a cap that is forgotten. Truth 1, 2 and 4, whose
    inverses are 1, 1/2 and 1/4; inverse depth predicted 2, 1 and 1. By hand: means 4/3 and 7/12, variance sum 2/3, covariance sum
    5/12: scale 5/8, shift -1/4; fitted 1, 3/8 and 3/8; depth 1, 8/3 and 8/3."""
    prediction, truth = torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    absrel = (0 + 1 / 3 + 1 / 3) / 3
    for name in ("midas", "marigold", "folder"):
        row = PROTOCOLS[name][0]
        scorer = DepthScorer(row, INVERSE)
        assert scorer.figures([scorer.row(prediction, truth)])["absrel"] == pytest.approx(absrel)
    assert scored("midas", prediction, truth)["bad1"] == pytest.approx(200 / 3)
    in_disparity = (0 + abs(3 / 8 - 1 / 2) / (1 / 2) + abs(3 / 8 - 1 / 4) / (1 / 4)) / 3
    assert scored("depth-anything", prediction, truth)["absrel"] == pytest.approx(in_disparity)
    assert scored("moge", prediction, truth)["absrel"] == pytest.approx(absrel)
    metres = 1 / prediction  # of a metric model: inverted, they are the same
    assert scored("midas", metres, truth, METRIC)["absrel"] == pytest.approx(absrel)
    # In depth: means of 1/2, 1, 1 and 1, 2, 4 are 5/6 and 7/3, sums 1/6 and 2/3: scale 4, shift -1: 1, 3, 3
    for head in (METRIC, RELATIVE):
        assert scored("marigold", metres, truth, head)["absrel"] == pytest.approx((0 + 1 / 2 + 1 / 4) / 3)


def test_what_lies_beyond_is_clamped():
    """Blind spot: an inverse depth that is not positive after the fit: negative metres, whose ratio is then below 1.25; a clamp to another
    protocol's bound. Truth 1, 1, 1 and 10 predicted 2, 2, 3 and 0: means 7/4 and 31/40, sums 19/4 and 63/40, so the scale is 63/190."""
    prediction, truth = torch.tensor([[2.0, 2.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0, 10.0]])
    fitted = [31 / 40 + 63 / 190 * (value - 7 / 4) for value in (2, 2, 3, 0)]
    wanted = sum(abs(1 / value - depth) / depth for value, depth in zip(fitted, (1, 1, 1, 10), strict=True)) / 4
    assert scored("midas", prediction, truth, max_depth=80.0)["absrel"] == pytest.approx(wanted)
    # The fit of the two pixels that are known is half the prediction, and the third is then -20
    prediction, truth = torch.tensor([[1.0, 2.0, -40.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    for name, nearest in (("midas", 1 / 80), ("moge", 1 / 2), ("marigold", 1 / 80)):
        scorer = DepthScorer(protocol(name), INVERSE)
        valid = truth > 0
        estimate = scorer._estimate(prediction.double(), truth.double(), valid)
        assert estimate[0].tolist() == pytest.approx([2, 1, 1 / nearest])
    disparity = DepthScorer(protocol("depth-anything"), INVERSE)._estimate(prediction.double(), truth.double(), truth > 0)
    assert disparity[0].tolist() == pytest.approx([1 / 2, 1, 1 / 80])
    metres = torch.tensor([[1.0, 2.0, 1000.0, -5.0]], dtype=torch.float64)  # the fit of the two that are known is the prediction
    estimate = DepthScorer(protocol("marigold"), METRIC)._estimate(metres, metres, (metres > 0) & (metres < 80))
    assert estimate[0].tolist() == pytest.approx([1, 2, 80, 1e-5])
    unlimited = DepthScorer(protocol("marigold-eth3d"), INVERSE)._estimate(prediction.double(), truth.double(), truth > 0)
    assert unlimited[0, 2] == pytest.approx(1000)  # Marigold's least inverse depth


def test_marigold_fits_where_the_prediction_is_positive():
    """Blind spot: a fit that looks at what Marigold's passes over. Without the last pixel the fit is perfect, and that one then wrong."""
    prediction, truth = torch.tensor([[1.0, 0.5, 0.25, 0.0]]), torch.tensor([[1.0, 2.0, 4.0, 1.0]])
    assert scored("marigold", prediction, truth)["absrel"] == pytest.approx((0 + 0 + 0 + 79) / 4)
    assert scored("midas", prediction, truth)["absrel"] != pytest.approx(79 / 4, rel=0.1)


def test_metres_by_eigens_protocol_are_clamped_and_never_fitted():
    """Blind spot: NaN and infinity that leave no figure; a scale that is forgiven. ZoeDepth: infinite is the farthest, NaN the nearest."""
    inf, nan = float("inf"), float("nan")
    truth = torch.zeros(480, 640)
    truth[100, 100:104] = 5.0
    prediction = torch.full((480, 640), 1.0)
    prediction[100, 100:104] = torch.tensor([inf, nan, -3.0, 7.5])
    found = scored("nyu-eigen", prediction, truth, METRIC)
    assert found["absrel"] == pytest.approx((1 + 2 * (4.999 / 5) + 0.5) / 4)
    assert list(found) == list(protocol("nyu-eigen").figures)
    assert scored("nyu-eigen", 2 * truth, truth, METRIC)["absrel"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "model", "reason"),
    [
        ("kitti-eigen", "dpt-large-midas", "it measures metres, not inverse depth up to scale and shift"),
        ("nyu-eigen", "depth-anything-3-mono-large", "it measures metres, not depth up to scale and shift"),
        ("midas", "depth-anything-3-mono-large", "inverse depth up to scale and shift and metres, not depth up to scale and shift"),
        ("ade20k", "dpt-large-midas", "it measures segmentation, not depth"),
        ("ade20k", "dpt-tiny-scenes", "it is of 150 classes, and these are 9"),
        ("pascal-context", "dpt-base-ade20k", "it is of 59 classes, and these are 150"),
        ("pascal-context", "tipsv2-base", "it is of 59 classes, and these are 150"),
        ("midas-diw", "dpt-base-ade20k", "it measures depth, not segmentation"),
        ("moge", "depth-anything-3-mono-large", "not depth up to scale and shift"),
    ],
)
def test_what_cannot_be_asked_is_told(name, model, reason):
    """Blind spot: metres compared with what has no unit; classes compared by number."""
    with pytest.raises(ValueError, match=re.escape(f"{name} cannot be asked of {model}: ") + ".*" + re.escape(reason)):
        protocol_of(name, CONFIGS[model])


def test_the_task_that_is_meant_is_found():
    """Blind spot: the first task of a model of several, whatever the protocol measures."""
    model = CONFIGS["tipsv2-base"]
    for name, task in (("ade20k", "segmentation"), ("nyu-eigen", "depth"), ("folder", model.head.task)):
        found, head = protocol_of(name, model)
        assert head.task == found.task == task and head in model.heads
    relative = model.with_("head", inverse=True, bins=0)  # of three tasks; the reason is of the one that is meant
    with pytest.raises(ValueError, match="nyu-eigen cannot be asked of tipsv2-base: it measures metres, not inverse depth"):
        protocol_of("nyu-eigen", relative)
    with pytest.raises(ValueError, match="no protocol is named 'nyu-eige' .did you mean 'nyu-eigen'.*; the protocols are folder, ade20k"):
        protocol_of("nyu-eige", model)


def test_the_table_is_whole():
    """Blind spot: a figure without a formula, a crop that there is not, a name twice."""
    for name, rows in PROTOCOLS.items():
        assert len({row.task for row in rows}) == len(rows)
        for row in rows:
            assert row.name == name and row.said
            if isinstance(row, DepthProtocol):
                assert set(row.figures) <= {*DEPTH_FIGURES, "sky"} and set(row.alignments.values()) <= {"none", "inverse", "depth"}
                assert {row.crop, row.cut} <= {*CROPS, None} and set(row.alignments) <= {"inverse", "relative", "metric"}
            if isinstance(row, LabelProtocol):
                assert scorer_of(row, replace(CONFIGS["dpt-base-ade20k"].head)).figures
    assert [form_of(head) for head in (INVERSE, RELATIVE, METRIC)] == ["inverse", "relative", "metric"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop": "grag"}, "DepthProtocol.crop='grag': it must be one of garg, eigen, nyu, kitti, or None"),
        ({"figures": ()}, "DepthProtocol.figures=(): it must be a tuple of 1 to 16"),
        ({"alignments": {"metric": "median"}}, "it must be an alignment, none, inverse, depth, of some of inverse, relative, metric"),
        ({"farthest": 1e-4}, "DepthProtocol.farthest=0.0001: it must be above nearest=0.001"),
        ({"task": "segmentation"}, "DepthProtocol.task='segmentation': it must be one of depth"),
        ({"disparity": True}, "DepthProtocol.disparity=True: only what is fitted in inverse depth is compared there"),
    ],
)
def test_a_row_that_contradicts_itself_is_told(changes, said):
    """Blind spot: a protocol that is only wrong once it is asked for, after hours of predictions."""
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(protocol("nyu-eigen"), **changes)


def test_the_resizes_of_a_protocol():
    """Blind spot: MiDaS' resize for a model that is no MiDaS', or of one size; a configuration that is changed for good."""
    midas, anything, swin = (CONFIGS[name] for name in ("dpt-large-midas", "depth-anything-v2-small", "midas-3.1-swin2-tiny-256"))
    seen = protocol("midas-nyu").seen_by(midas).input
    assert (seen.rule, seen.output_mode, seen.output_align_corners) == ("upper_bound", "bilinear", False)
    assert protocol("midas-kitti").seen_by(midas).input.rule == "lower_bound" and midas.input.rule == "minimal"
    assert protocol("midas-nyu").seen_by(anything).input.rule == "lower_bound" == anything.input.rule
    assert protocol("midas-nyu").seen_by(swin).input.rule == "square"
    assert PROTOCOLS["folder"][0].seen_by(midas) is midas
    metric = protocol("nyu-eigen").seen_by(CONFIGS["dpt-hybrid-nyu"]).input
    assert (metric.rule, metric.output_mode, metric.output_align_corners) == ("minimal", "bilinear", True)


def test_what_was_published_has_its_row():
    """Blind spot: a model or protocol that is misspelt, so that nothing is ever shown; a figure the protocol does not have."""
    keys = [(row.model, row.protocol, row.scales_and_flips) for row in PUBLISHED]
    assert len(set(keys)) == len(keys)
    for row in PUBLISHED:
        found, _ = protocol_of(row.protocol, CONFIGS[row.model])
        assert set(row.figures) <= set(found.figures) and all(float(value) > 0 for value in row.figures.values())
        assert row.source.startswith("https://")
        assert json.dumps(row.figures)
    assert published("dpt-base-ade20k", "ade20k").figures == {"mIoU": "46.97"}
    assert published("dpt-base-ade20k", "ade20k", True).figures == {"mIoU": "48.34"}
    assert published("dpt-hybrid-kitti", "kitti-eigen").figures["silog"] == "8.282"
    assert published("dpt-hybrid-kitti", "kitti-eigen-zoedepth") is None and published("dpt-hybrid-ade20k", "ade20k") is None
    assert published("midas-3.1-beit-large-512", "midas-kitti").note and not published("dpt-large-midas", "midas-kitti").note
    assert published("depth-anything-v1-large", "depth-anything-diode").figures == {"absrel": "0.066", "delta1": "0.952"}

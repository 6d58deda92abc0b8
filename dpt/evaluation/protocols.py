"""What published figures were computed by: a protocol says which pictures, which part of them, how a prediction is brought to the truth's
scale, and which figures there are. Two protocols' figures of one name are not comparable. Nothing here needs PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..config import DPTConfig, HeadConfig
from ..rules import NAME, TEXT, TRUTH, Checked, Rule, instance_of, nearest, one_of, or_none, tuple_of, whole
from .crops import CROPS

MIN_DEPTH = 1e-3  # metres; an estimate below counts as this


_METRES = Rule("a number from 0, or infinite", lambda value: type(value) in (int, float) and value >= 0)
_CROP = or_none(one_of(*CROPS))


@dataclass(frozen=True)
class Protocol(Checked):
    """What all protocols say.

    Attributes:
        name: how it is asked for; `said` in words.
        figures: their names, in the order of the table.
        data, split: the kind of data set, one of `dpt.data`'s or "points", and which pictures of it.
        task: of the head that is measured.
        whole: pictures and truth are seen whole but for `cut`, though the data set may cut them by itself.
        cut: the crop (`crops.CROPS`) of pictures and truth before the network sees anything.
        rule: of the resize on the way in, for models whose own is "minimal": MiDaS' programs have that one, and its evaluation another.
        output: fields of `InputConfig` for the resize to the truth's size; without any it is the model's own.
    """

    name: str
    said: str
    figures: tuple[str, ...]
    data: str = "folder"
    split: str = "test"
    task: str = "depth"
    whole: bool = True
    cut: str | None = None
    rule: str | None = None
    output: Mapping[str, str | bool] = field(default_factory=dict)

    RULES: ClassVar[Mapping[str, Rule]] = {
        "name": NAME,
        "said": TEXT,
        "figures": tuple_of(NAME, 1, 16),
        "data": NAME,
        "split": NAME,
        "task": one_of("depth", "segmentation"),
        "whole": TRUTH,
        "cut": _CROP,
        "rule": or_none(NAME),
        "output": instance_of(dict),
    }

    def refusal(self, head: HeadConfig) -> str | None:
        """Why it cannot measure a head, in words; None if it can."""
        return None if head.task == self.task else f"it measures {self.task}, not {head.task}"

    def seen_by(self, config: DPTConfig) -> DPTConfig:
        """The configuration with the protocol's resizes."""
        changes: dict[str, str | bool] = dict(self.output)
        if self.rule is not None and config.input.rule == "minimal":
            changes["rule"] = self.rule
        return config.with_("input", **changes) if changes else config


@dataclass(frozen=True)
class LabelProtocol(Protocol):
    """Segmentation. `classes`: how many the model must have; None: as many as it has."""

    task: str = "segmentation"
    classes: int | None = None

    RULES: ClassVar[Mapping[str, Rule]] = {**Protocol.RULES, "task": one_of("segmentation"), "classes": or_none(whole(1, 1 << 16))}

    def refusal(self, head: HeadConfig) -> str | None:
        if self.classes in (None, len(head.classes)):
            return super().refusal(head)
        return super().refusal(head) or f"it is of {self.classes} classes, and these are {len(head.classes)}"


FORMS = {  # of a depth head's predictions, in words
    "inverse": "inverse depth up to scale and shift",
    "relative": "depth up to scale and shift",
    "metric": "metres",
}
ALIGNMENTS = ("none", "inverse", "depth")


def form_of(head: HeadConfig) -> str:
    """Which of `FORMS` a depth head predicts."""
    return "inverse" if head.inverse else "relative" if head.relative else "metric"


@dataclass(frozen=True)
class DepthProtocol(Protocol):
    """Depth, measured on each picture's known pixels, of which the figures' means over pictures are taken.

    Attributes:
        alignments: of each form of prediction (`form_of`), how it is brought to the truth: "none", metres as they are; "inverse", by the
            scale and shift that fit inverse depth to the true one by least squares, metres inverted first; "depth", the same of depth
            itself. What is not there is refused.
        nearest, farthest: metres: truth counts strictly between them, and estimates are clamped to them; None: `metrics.depth_limit`.
        inclusive: truth of `farthest` metres counts, too.
        least_disparity: 1 / m, to which inverse depth is clamped after the fit, if 1 / `farthest` is not above; None: that of the farthest
            truth that counts.
        positive: only where the prediction is positive the fit looks at it.
        disparity: the figures compare inverse depth, and nothing is converted to depth.
        crop: the part (`crops.CROPS`) that counts; of what is left of the truth by `cut`, or, `crop_of_whole`, of the whole truth.
    """

    alignments: Mapping[str, str] = field(default_factory=dict)
    nearest: float = 0.0
    farthest: float | None = None
    inclusive: bool = False
    least_disparity: float | None = 0.0
    positive: bool = False
    disparity: bool = False
    crop: str | None = None
    crop_of_whole: bool = False

    RULES: ClassVar[Mapping[str, Rule]] = {
        **Protocol.RULES,
        "task": one_of("depth"),
        "alignments": Rule(
            f"an alignment, {', '.join(ALIGNMENTS)}, of some of {', '.join(FORMS)}",
            lambda value: type(value) is dict and bool(value) and set(value) <= set(FORMS) and set(value.values()) <= set(ALIGNMENTS),
        ),
        "nearest": _METRES,
        "farthest": or_none(_METRES),
        "inclusive": TRUTH,
        "least_disparity": or_none(_METRES),
        "positive": TRUTH,
        "disparity": TRUTH,
        "crop": _CROP,
        "crop_of_whole": TRUTH,
    }

    def _conflicts(self) -> Iterable[tuple[bool, str]]:
        far = self.farthest
        yield far is not None and far <= self.nearest, f"farthest={far}: it must be above nearest={self.nearest}"
        others = self.disparity and set(self.alignments.values()) != {"inverse"}
        yield others, f"disparity=True: only what is fitted in inverse depth is compared there, not alignments={self.alignments}"

    def refusal(self, head: HeadConfig) -> str | None:
        if super().refusal(head) or form_of(head) in self.alignments:
            return super().refusal(head)
        return f"it measures {' and '.join(FORMS[form] for form in self.alignments)}, not {FORMS[form_of(head)]}"


@dataclass(frozen=True)
class PairProtocol(Protocol):
    """Depth, of which only the order of pairs of points is known: `dpt.evaluation.points`."""


EIGEN = ("delta1", "delta2", "delta3", "absrel", "sqrel", "rmse", "rmselog", "silog", "log10")
_ZOEDEPTH: Mapping[str, str | bool] = {"output_mode": "bilinear", "output_align_corners": True}
_MIDAS: Mapping[str, str | bool] = {"output_mode": "bilinear", "output_align_corners": False}
_DISPARITY = {"inverse": "inverse", "metric": "inverse"}

_FOLDER_DEPTH = DepthProtocol(
    "folder",
    "images/ beside depth/ or labels/, with the figures of trivial predictors",
    ("absrel", "rmse", "delta1", "sky"),
    alignments={"inverse": "inverse", "relative": "depth", "metric": "none"},
    whole=False,
    nearest=MIN_DEPTH,
    inclusive=True,
)
_FOLDER_LABELS = LabelProtocol("folder", _FOLDER_DEPTH.said, ("miou", "accuracy"), whole=False)
_ADE20K = LabelProtocol(
    "ade20k",
    "validation set of SceneParsing, as mmsegmentation's IoUMetric",
    ("mIoU", "mAcc", "aAcc"),
    data="ade20k",
    split="val",
    classes=150,
)
_PASCAL = replace(_ADE20K, name="pascal-context", said="validation set of its 59 classes, as IoUMetric", data="pascal-context", classes=59)
_KITTI = DepthProtocol(
    "kitti-eigen",
    "Eigen's test split, KITTI's crop, scored in Garg's crop of the whole picture: BTS' and isl-org's",
    EIGEN,
    data="kitti",
    cut="kitti",
    output=_ZOEDEPTH,
    alignments={"metric": "none"},
    nearest=MIN_DEPTH,
    farthest=80.0,
    crop="garg",
    crop_of_whole=True,
)
_KITTI_CUT = replace(
    _KITTI,
    name="kitti-eigen-zoedepth",
    said="the same, in Garg's crop of KITTI's: ZoeDepth's, Depth Anything's",
    crop_of_whole=False,
)
_NYU = replace(
    _KITTI,
    name="nyu-eigen",
    said="Eigen's test split, in his crop: BTS', isl-org's and ZoeDepth's",
    data="nyuv2",
    cut=None,
    farthest=10.0,
    crop="nyu",
    crop_of_whole=False,
)
_MIDAS_BASE = DepthProtocol(
    "midas",
    "fitted in inverse depth, compared in depth: of a folder, to --max-depth",
    ("bad1", "absrel"),
    rule="upper_bound",
    output=_MIDAS,
    alignments=_DISPARITY,
)
_DEPTH_ANYTHING = DepthProtocol(
    "depth-anything",
    "fitted and compared in inverse depth: of a folder, to --max-depth",
    ("absrel", "delta1"),
    alignments=_DISPARITY,
    disparity=True,
)
_MARIGOLD = DepthProtocol(
    "marigold",
    "fitted in inverse depth or, if that is predicted, in depth; clamped and compared in depth: of a folder, to --max-depth",
    ("absrel", "delta1"),
    alignments={"inverse": "inverse", "relative": "depth", "metric": "depth"},
    nearest=1e-5,
    least_disparity=1e-3,
    positive=True,
)
_MOGE = DepthProtocol(
    "moge",
    "fitted in inverse depth, not beyond the farthest truth, compared in depth: of a folder",
    ("absrel", "delta1"),
    alignments=_DISPARITY,
    farthest=float("inf"),
    least_disparity=None,
)


def _on(base: DepthProtocol, name: str, said: str, **changes: object) -> DepthProtocol:
    """A protocol on one data set."""
    return replace(base, name=f"{base.name}-{name}", said=f"the same of {said}", **changes)  # type: ignore[arg-type]


_PROTOCOLS: tuple[Protocol, ...] = (
    _FOLDER_DEPTH,
    _FOLDER_LABELS,
    _ADE20K,
    _PASCAL,
    _NYU,
    _KITTI,
    _KITTI_CUT,
    _MIDAS_BASE,
    PairProtocol("midas-diw", "share of pairs of points in the wrong order", ("whdr",), "points", rule="upper_bound", output=_MIDAS),
    _on(_MIDAS_BASE, "eth3d", "ETH3D, a folder, to 72 m", farthest=72.0),
    _on(_MIDAS_BASE, "sintel", "Sintel, a folder, to 72 m", farthest=72.0),
    _on(_MIDAS_BASE, "tum", "TUM, a folder, to 10 m", farthest=10.0),
    _on(_MIDAS_BASE, "kitti", "KITTI, to 80 m", data="kitti", farthest=80.0, rule="lower_bound"),
    _on(_MIDAS_BASE, "nyu", "NYUv2, to 10 m", data="nyuv2", farthest=10.0),
    _DEPTH_ANYTHING,
    _on(_DEPTH_ANYTHING, "kitti", "KITTI, to 80 m", data="kitti", farthest=80.0),
    _on(_DEPTH_ANYTHING, "nyu", "NYUv2, to 10 m", data="nyuv2", farthest=10.0),
    *(_on(_DEPTH_ANYTHING, data.lower(), f"{data}, a folder, to --max-depth") for data in ("Sintel", "DDAD", "ETH3D", "DIODE")),
    _MARIGOLD,
    _on(_MARIGOLD, "kitti", "KITTI's crop, in Eigen's, to 80 m", data="kitti", farthest=80.0, cut="kitti", crop="eigen"),
    _on(_MARIGOLD, "nyu", "NYUv2, in Eigen's crop, to 10 m", data="nyuv2", nearest=1e-3, farthest=10.0, crop="nyu"),
    _on(_MARIGOLD, "eth3d", "ETH3D, a folder", farthest=float("inf")),
    _on(_MARIGOLD, "scannet", "ScanNet, a folder, to 10 m", nearest=1e-3, farthest=10.0),
    _on(_MARIGOLD, "diode", "DIODE, a folder, from 0.6 to 350 m", nearest=0.6, farthest=350.0),
    _MOGE,
)
PROTOCOLS: dict[str, tuple[Protocol, ...]] = {  # by name, one a task
    name: tuple(protocol for protocol in _PROTOCOLS if protocol.name == name)
    for name in dict.fromkeys(protocol.name for protocol in _PROTOCOLS)
}


def protocol_of(name: str, config: DPTConfig) -> tuple[Protocol, HeadConfig]:
    """The protocol of this name that measures a model, and the first of its heads that it can measure.

    ValueError where there is none, with both names and the reason.
    """
    refusals: list[tuple[bool, str]] = []
    for head in config.heads:
        for protocol in named(name):
            reason = protocol.refusal(head)
            if reason is None:
                return protocol, head
            refusals.append((head.task != protocol.task, reason))
    raise ValueError(f"{name} cannot be asked of {config.name}: {min(refusals)[1]}")


def named(name: str) -> tuple[Protocol, ...]:
    """The protocols of a name, one a task; ValueError, with the nearest, where there is none."""
    if name not in PROTOCOLS:
        raise ValueError(f"no protocol is named {name!r}{nearest(name, PROTOCOLS)}; the protocols are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]

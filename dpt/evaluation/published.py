"""What the authors of checkpoints published of them, by model and protocol, each with its source. Nothing here is measured by this project.

Digits are those of the source. What was published for other options, scales and flips, than those of a measurement is not shown beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .protocols import EIGEN


@dataclass(frozen=True)
class Published:
    """Figures by their names in `metrics`, as text, with the digits of the source.

    `scales_and_flips`: of mmsegmentation's six scales, each flipped too, as `--tta` computes; else of the picture alone. `note`: what else
    is to be known.
    """

    model: str
    protocol: str
    figures: dict[str, str]
    source: str
    scales_and_flips: bool = False
    note: str = ""


_ISL = "https://github.com/isl-org/DPT/blob/main/EVALUATION.md"
_MIDAS = "https://github.com/isl-org/MiDaS#accuracy"
_DEPTH_ANYTHING = "https://github.com/LiheYoung/Depth-Anything#performance"
_MMSEGMENTATION = "https://github.com/open-mmlab/mmsegmentation/tree/main/configs/dpt"

_TRAINED = "the model was trained on this data set"
_MIDAS_SETS = ("diw", "eth3d", "sintel", "tum", "kitti", "nyu")
_MIDAS_FIGURES = ("whdr", "absrel", "absrel", "bad1", "bad1", "bad1")
_MIDAS_TABLE = {  # *: trained on it
    "dpt-large-midas": ".1082 .0888 .2697 9.97 8.46 8.32",
    "dpt-hybrid-midas": ".1106 .0934 .2741 10.89 11.56 8.69",
    "midas-3.1-beit-large-512": ".1137 .0659 .2366 6.13 11.56* 1.86*",
    "midas-3.1-beit-large-384": ".1239 .0667 .2545 7.17 9.84* 2.21*",
    "midas-3.1-swin2-large-384": ".1106 .0732 .2442 8.87 5.84* 2.92*",
    "midas-3.1-swin2-base-384": ".1095 .0790 .2404 8.93 5.97* 3.28*",
    "midas-3.1-swin2-tiny-256": ".1211 .1106 .2868 13.43 10.13* 5.55*",
}
_DEPTH_ANYTHING_SETS = ("kitti", "nyu", "sintel", "ddad", "eth3d", "diode")
_DEPTH_ANYTHING_TABLE = {  # AbsRel/delta1
    "depth-anything-v1-small": ".080/.936 .053/.972 .464/.739 .247/.768 .127/.885 .076/.939",
    "depth-anything-v1-base": ".080/.939 .046/.979 .432/.756 .232/.786 .126/.884 .069/.946",
    "depth-anything-v1-large": ".076/.947 .043/.981 .458/.760 .230/.789 .127/.882 .066/.952",
}


def _number(text: str) -> str:
    return f"0{text}" if text.startswith(".") else text


def _midas() -> Iterator[Published]:
    for model, row in _MIDAS_TABLE.items():
        for data, name, value in zip(_MIDAS_SETS, _MIDAS_FIGURES, row.split(), strict=True):
            figures = {name: _number(value.rstrip("*"))}
            yield Published(model, f"midas-{data}", figures, _MIDAS, note=_TRAINED if value.endswith("*") else "")


def _depth_anything() -> Iterator[Published]:
    for model, row in _DEPTH_ANYTHING_TABLE.items():
        for data, values in zip(_DEPTH_ANYTHING_SETS, row.split(), strict=True):
            absrel, delta1 = map(_number, values.split("/"))
            yield Published(model, f"depth-anything-{data}", {"absrel": absrel, "delta1": delta1}, _DEPTH_ANYTHING)


def _eigen(row: str) -> dict[str, str]:
    return dict(zip(EIGEN, map(_number, row.split()), strict=True))


PUBLISHED = (
    Published("dpt-base-ade20k", "ade20k", {"mIoU": "46.97"}, _MMSEGMENTATION),
    Published("dpt-base-ade20k", "ade20k", {"mIoU": "48.34"}, _MMSEGMENTATION, scales_and_flips=True),
    Published(
        "dpt-hybrid-ade20k",
        "ade20k",
        {"mIoU": "49.02", "aAcc": "83.11"},
        "https://arxiv.org/abs/2103.13413",
        scales_and_flips=True,
        note="multi-scale, by the authors' own program",
    ),
    Published("dpt-hybrid-kitti", "kitti-eigen", _eigen(".959 .995 .999 .062 .222 2.575 .092 8.282 .027"), _ISL),
    Published("dpt-hybrid-nyu", "nyu-eigen", _eigen(".904 .988 .998 .109 .054 .357 .129 9.521 .045"), _ISL),
    *_midas(),
    *_depth_anything(),
)


def published(model: str, protocol: str, scales_and_flips: bool = False) -> Published | None:
    """What was published of a model by this protocol and with such options; None if nothing was."""
    found = (row for row in PUBLISHED if (row.model, row.protocol, row.scales_and_flips) == (model, protocol, scales_and_flips))
    return next(found, None)

"""What a training does to its pictures at random, as data: `Augmentation`. Nothing here needs PyTorch or albumentations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from ..rules import TRUTH, Checked, Rule, number, one_of, or_none, tuple_of, whole

CROPS = ("share", "window")
_OF = {
    "share": ("smallest", "aspect"),
    "window": ("rotate", "scale", "ratio", "cat_max_ratio", "distortion"),
}  # what only one way of cropping has


@dataclass(frozen=True)
class Augmentation(Checked):
    """What is drawn anew for every sample. `dpt.data.transforms` does it, in the order of these fields.

    A crop is a `share` of the picture's area, resized to what the network sees; or a `window` of just that size, of the picture resized
    before by a random factor, or as it is. A window beyond the picture is filled with what is no target, and with the mean colour.
    """

    crop: str = "share"
    smallest: float = 0.35  # share: from this to 1 of the area
    aspect: float = 4 / 3  # share: largest factor between the crop's aspect and that of what the network sees
    rotate: float = 0.0  # window: degrees, at most, either way, before a window is cut; what comes in from outside is black and no target
    scale: tuple[int, int] | None = None  # window: as large as fits into this longer and shorter side times the factor; None: as it is
    ratio: tuple[float, float] = (1.0, 1.0)  # window: the factor on `scale` is from the first to the second
    cat_max_ratio: float = 1.0  # window: of ten, the first in which no class has this share of the labelled pixels
    flip: float = 0.5  # odds of the mirrored picture
    distortion: bool = False  # window: mmsegmentation's photometric distortion
    colour: float = 0.3  # largest relative change of brightness, contrast and saturation
    gamma: float = 0.0  # largest change of the exponent of the brightness; the next two are drawn together with it, for every other sample
    brightness: float = 0.0  # largest relative change of all channels
    tint: float = 0.0  # largest relative change of each channel

    RULES: ClassVar[Mapping[str, Rule]] = {
        "crop": one_of(*CROPS),
        "smallest": number("from 0.01 to 1", lambda value: 0.01 <= value <= 1),
        "aspect": number("from 1 to 10", lambda value: 1 <= value <= 10),
        "rotate": number("from 0 to 180", lambda value: 0 <= value <= 180),
        "scale": or_none(tuple_of(whole(1, 1 << 16), 2)),
        "ratio": tuple_of(number("from 0.01 to 100", lambda value: 0.01 <= value <= 100), 2),
        **dict.fromkeys(("cat_max_ratio", "flip"), number("from 0 to 1", lambda value: 0 <= value <= 1)),
        "distortion": TRUTH,
        **dict.fromkeys(("colour", "gamma", "brightness", "tint"), number("from 0 to 0.9", lambda value: 0 <= value <= 0.9)),
    }

    def _conflicts(self) -> Iterable[tuple[bool, str]]:
        defaults = {field.name: field.default for field in fields(self)}
        for kind, names in _OF.items():
            for name in names:
                value = getattr(self, name)
                yield (
                    self.crop != kind and value != defaults[name],
                    f"{name}={value}: only crop={kind!r} has it, and this one is {self.crop!r}",
                )
        yield self.ratio[0] > self.ratio[1], f"ratio={self.ratio}: the first must not be above the second"
        yield self.scale is None and self.ratio != (1.0, 1.0), f"ratio={self.ratio}: it is a factor on `scale`, which is None"
        yield self.distortion and self.colour > 0, f"colour={self.colour}: distortion changes the same, so one of them must be 0"

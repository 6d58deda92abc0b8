"""Names and colours of data sets' classes."""

from __future__ import annotations

import random

from . import ade20k

Palette = tuple[tuple[int, int, int], ...]


def palette(count: int) -> Palette:
    """Colours for classes: ADE20K's where there are as many as it has, else the same ones in every run."""
    if count == len(ade20k.PALETTE):
        return ade20k.PALETTE
    numbers = random.Random(0)
    return tuple((numbers.randrange(256), numbers.randrange(256), numbers.randrange(256)) for _ in range(count))

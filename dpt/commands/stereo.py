"""`dpt stereo`: both eyes' views of a picture, by its depth. What it takes and writes is told by its help, in `arguments`."""

from __future__ import annotations

import argparse
import functools
from typing import cast

import numpy as np
from PIL import Image

from ..inference.stereo import anaglyph, views
from ..system.disk import write_whole
from ..system.endings import printable
from .single import depth_of


def run(args: argparse.Namespace) -> int:
    """Run `dpt stereo`; returns the exit code. CommandError where nothing can be done."""
    result, depth, head = depth_of(args, "stereo")
    left, right = views(cast(np.ndarray, result.image), depth, head, args.disparity)
    seen = anaglyph(left, right) if args.anaglyph else np.concatenate((right, left) if args.crossed else (left, right), axis=1)
    write_whole(args.target, functools.partial(Image.fromarray(seen).save, format="PNG"))
    first = "right" if args.crossed else "left"
    kind = "for glasses, red on the left and cyan on the right" if args.anaglyph else f"the {first} eye's picture first"
    print(f"{printable(args.target)}: {seen.shape[1]}x{seen.shape[0]} pixels, {kind}")
    return 0

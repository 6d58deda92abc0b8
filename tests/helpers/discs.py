"""A small data set that a small model can learn: discs on coloured ground, with depth and labels."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dpt.zoo import CONFIGS


def write(root: Path, counts: dict[str, int], size: int = 64) -> Path:
    """`root` with folders of pairs for each split: class 7, nearer, on class 1 of dpt-tiny-scenes, each size x size."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    for split, count in counts.items():
        for folder in ("images", "depth", "labels"):
            (root / split / folder).mkdir(parents=True)
        for index in range(count):
            middle = rng.integers(size // 3, size - size // 3, 2)
            disc = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < size**2 / 20
            image = np.where(disc[..., None], rng.integers(0, 255, 3), rng.integers(0, 255, 3)).astype(np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{index}.png")
            Image.fromarray(np.where(disc, 1000, 4000 - 30 * rows).astype(np.uint16)).save(root / split / "depth" / f"{index}.png")
            Image.fromarray(np.where(disc, 7, 1).astype(np.uint8)).save(root / split / "labels" / f"{index}.png")
        (root / split / "dataset.json").write_text(json.dumps({"classes": CONFIGS["dpt-tiny-scenes"].head.classes}))
    return root

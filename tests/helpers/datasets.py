"""Tiny data sets in the layout of each kind, with made-up pictures: one function a kind, of the folder to write to and how many a split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (24, 32)
KITTI_SIZE = (360, 1224)  # a little more than the benchmark's crop
LISTED = {"nyuv2": "nyudepthv2_{}_files_with_gt.txt", "kitti": "kitti_eigen_{}_files_with_gt.txt"}
DATE, DRIVE = "2011_09_26", "2011_09_26_drive_0002_sync"


def picture(path: Path, seed: int, size: tuple[int, int] = SIZE, grey: bool = False) -> None:
    """A random picture, coarse enough for JPEG to keep."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4) if grey else (4, 4, 3), np.uint8)
    save(path, np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.NEAREST)))


def labels(path: Path, seed: int, classes: int, size: tuple[int, int] = SIZE) -> None:
    """Labels from 0 to `classes` as often as each other, 0 in the first pixel."""
    order = np.random.default_rng(seed).permutation(classes) + 1
    values = np.concatenate([[0], order])[np.arange(size[0] * size[1]) % (classes + 1)]
    save(path, values.reshape(size).astype(np.uint8))


def depth(path: Path, seed: int, scale: float, farthest: float, share: float = 1.0, size: tuple[int, int] = SIZE) -> None:
    """Depth of 1 metre to `farthest`, of 16 bits; a `share` of the pixels is known, and the rest 0."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(1, farthest, size) * scale
    save(path, np.where(rng.random(size) <= share, values, 0).astype(np.uint16))


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def folder(root: Path, count: int = 3) -> Path:
    """Pairs of our own, with labels of nine classes and depth in millimetres."""
    for split in ("train", "val", "test"):
        for index in range(count):
            picture(root / split / "images" / f"{index}.png", index)
            labels(root / split / "labels" / f"{index}.png", index, 8)
            depth(root / split / "depth" / f"{index}.png", index, 1000, 9)
        (root / split / "dataset.json").write_text(json.dumps({"depth_scale": 1000}))
    return root


def ade20k(root: Path, count: int = 3) -> Path:
    """The last picture of each split is grey."""
    base = root / "ADEChallengeData2016"
    for split, short in (("training", "train"), ("validation", "val")):
        for index in range(1, count + 1):
            name = f"ADE_{short}_{index:08}"
            picture(base / "images" / split / f"{name}.jpg", index, grey=index == count)
            labels(base / "annotations" / split / f"{name}.png", index, 150)
    return root


def pascal_context(root: Path, count: int = 3) -> Path:
    """As many pictures again belong to no split."""
    base, lists = root / "VOCdevkit" / "VOC2010", {"train": 2008, "val": 2009, None: 2010}
    for split, year in lists.items():
        names = [f"{year}_{index:06}" for index in range(1, count + 1)]
        for index, name in enumerate(names):
            picture(base / "JPEGImages" / f"{name}.jpg", index)
            labels(base / "SegmentationClassContext" / f"{name}.png", index, 59)
        if split is not None:
            path = base / "ImageSets" / "SegmentationContext" / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{name}\n" for name in names))
    return root


def nyuv2(root: Path, count: int = 3) -> Path:
    """Two scenes a split. The training list's lines start with a slash, as BTS' do, and leave a picture out."""
    for split, below, scenes in (("train", "sync", ("bath_0001", "cafe_0001a")), ("test", "official_splits/test", ("bathroom", "bedroom"))):
        lines = []
        for index in range(count + (split == "train")):
            scene = scenes[index % 2]
            picture(root / below / scene / f"rgb_{index:05}.jpg", index)
            depth(root / below / scene / f"sync_depth_{index:05}.png", index, 1000, 9)
            lines.append(f"{'/' * (split == 'train')}{scene}/rgb_{index:05}.jpg {scene}/sync_depth_{index:05}.png 518.8579\n")
        (root / LISTED["nyuv2"].format(split)).write_text("".join(lines[:count]))
    return root


def kitti(root: Path, count: int = 3) -> Path:
    """Sparse truth, in the annotated depth's two folders as they are unpacked; each list has a line more, of a picture without truth."""
    for split, drive in (("train", DRIVE), ("test", DRIVE.replace("0002", "0009"))):
        lines = []
        for index in range(count + 1):
            name = f"{index:010}.png"
            image, truth = f"{DATE}/{drive}/image_02/data/{name}", f"{drive}/proj_depth/groundtruth/image_02/{name}"
            picture(root / "raw" / image, index, KITTI_SIZE)
            if index < count:
                below = "val" if index % 2 else "train"
                depth(root / "data_depth_annotated" / below / truth, index, 256, 79, share=0.05, size=KITTI_SIZE)
            lines.append(f"{image} {truth if index < count else None} 721.5377\n")
        (root / LISTED["kitti"].format(split)).write_text("".join(lines))
    return root


WRITERS: dict[str, Callable[[Path, int], Path]] = {
    "folder": folder,
    "ade20k": ade20k,
    "pascal-context": pascal_context,
    "nyuv2": nyuv2,
    "kitti": kitti,
}

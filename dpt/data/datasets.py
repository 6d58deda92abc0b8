"""Data sets as they lie on the disk: `open_data`, and what it makes of each kind."""

from __future__ import annotations

import os
import reprlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..classes import Palette, palette
from ..config import HeadConfig
from ..inference.images import EXTENSIONS
from ..system.disk import open_regular, read_object
from .kinds import Kind, Split, kind_of
from .pairs import PairDataset
from .targets import DEPTH_READERS, DEPTH_SCALE, LABEL_READERS

TARGETS = {"depth": ("depth", DEPTH_READERS), "segmentation": ("labels", LABEL_READERS)}  # task -> folder, and its files' readers


def open_data(
    kind: str,
    root: str | Path,
    split: str | None,
    head: HeadConfig,
    *,
    depth_scale: float | None = None,
    reduce_zero_label: bool | None = None,
) -> PairDataset:
    """A split of a data set.

    Args:
        kind: one of `dpt.data.kinds.KINDS`, which say how each lies on the disk; `dpt data` prints it.
        root: the data set's folder.
        split: one of the kind's; of "folder" any folder in `root`, or None for `root` itself.
        head: of the model that the data is for.
        depth_scale, reduce_zero_label: as of `FolderDataset`; None is what the kind has.

    Raises:
        ValueError: no such kind or split, a layout that is another, pictures or targets that are missing, a malformed list, or a head whose
            task or classes are not the data's. A file that cannot be used is named when it is read.
    """
    row, root = kind_of(kind), Path(root)
    reading: dict[str, Any] = {"depth_scale": depth_scale, "reduce_zero_label": reduce_zero_label}
    if not row.splits:
        return FolderDataset(root if split is None else root / split, head, **reading)
    if head.task != row.task:
        raise ValueError(f"{kind} is for {row.task}, the model for {head.task}")
    names, images, targets = _listed(row, root, row.split(split))
    stated: dict[str, Any] = {"depth_scale": row.depth_scale, "reduce_zero_label": row.reduce_zero_label}
    stated.update({key: value for key, value in reading.items() if value is not None})
    return PairDataset(root, f"{kind} {split}", head, names, images, targets, classes=row.classes, crop=row.crop, **stated)


def _listed(kind: Kind, root: Path, split: Split) -> tuple[list[str], list[Path], list[Path]]:
    """The names, pictures and targets of a split, all of them there."""
    base = kind.base(root, split)
    if base is None:
        places = " or ".join(str(root / folder / split.marker) for folder in kind.folders)
        raise ValueError(f"{places} is missing; {kind.expected}")
    pictures, targets = ([path for name in folders if (path := base / name).is_dir()] for folders in (split.pictures, split.targets))
    listed = base / split.list if split.list is not None else None
    if listed is not None and (split.needed or listed.exists()):
        pairs, source = _lines(listed, split, kind), listed
    else:
        (source,) = pictures
        found = sorted(path.relative_to(source) for path in source.glob(split.pattern) if not path.name.startswith("."))
        pairs = [(str(path), str(path.with_name(f"{path.stem.replace(*split.names, 1)}.png"))) for path in found]
    if not pairs:
        raise ValueError(f"{source} has no picture; {kind.expected}")
    images, truths = (
        _there([pair[side] for pair in pairs], folders, base, what, kind)
        for side, (folders, what) in enumerate(((pictures, "pictures"), (targets, "targets")))
    )
    return [str(Path(picture).with_suffix("")) for picture, _ in pairs], images, truths


def _lines(path: Path, split: Split, kind: Kind) -> list[tuple[str, str]]:
    """The pictures and targets that a list has, as it names them, those without a target left out."""
    with open_regular(path) as file:
        content = file.read()
    try:
        lines = content.decode("utf-8").splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: not a text ({error})") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if (len(words) == 1) is not split.by_name:
            rule = "a name" if split.by_name else "a picture and its target, or None"
            raise ValueError(f"{path}: line {number} is {reprlib.repr(line)}: it must be {rule}; {kind.expected}")
        picture, target = (f"{words[0]}.jpg", f"{words[0]}.png") if split.by_name else (words[0].lstrip("/"), words[1].lstrip("/"))
        if target != "None":
            pairs.append((picture, target))
    return pairs


def _there(names: list[str], folders: list[Path], base: Path, what: str, kind: Kind) -> list[Path]:
    """The path of each name, in the first folder that has it."""
    found = [next((path for folder in folders if (path := folder / name).is_file()), None) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        places = " or ".join(map(str, folders)) or str(base)
        raise ValueError(f"{len(missing)} of {len(names)} {what} are missing, the first: {missing[0]} below {places}; {kind.expected}")
    return [path for path in found if path is not None]


class FolderDataset(PairDataset):
    """`images/NAME.*` with `depth/NAME.*` or `labels/NAME.png`.

    Args:
        root: the folder. Its `dataset.json`, if there is one, may state "classes" (their names), "depth_scale", "reduce_zero_label", and as
            "sky" the value in depth files that stands for the sky.
        head: of the model that the data is for.
        depth_scale: units a metre of integer depth; None is what dataset.json says, or 1000.
        reduce_zero_label: label 0 is "other" and k is class k - 1; None is what dataset.json says, or False.

    Raises:
        ValueError: no pictures, a picture without its target or with two, two pictures of one name, a malformed dataset.json, or
            classes that are not the model's. A file that cannot be used is named when it is read.
    """

    def __init__(
        self, root: str | Path, head: HeadConfig, *, depth_scale: float | None = None, reduce_zero_label: bool | None = None
    ) -> None:
        root = Path(root)
        stated = stated_in(root)
        if head.task not in TARGETS:
            raise ValueError(f"{root}: data sets have targets for {' and '.join(TARGETS)}, not for {head.task}")
        folder, readers = TARGETS[head.task]
        pictures, targets = _by_name(root / "images", EXTENSIONS), _by_name(root / folder, readers)
        names = sorted(pictures)
        super().__init__(
            root,
            root.name,
            head,
            names,
            [pictures[name] for name in names],
            [targets[name] for name in names if name in targets],
            classes=tuple(stated.get("classes", ())),
            depth_scale=depth_scale if depth_scale is not None else stated.get("depth_scale", DEPTH_SCALE),
            reduce_zero_label=reduce_zero_label if reduce_zero_label is not None else stated.get("reduce_zero_label", False),
            sky=stated.get("sky"),
        )
        if not pictures:
            raise ValueError(f"{root / 'images'} holds no picture: a data set is images/ beside depth/ or labels/")
        missing = [name for name in names if name not in targets]
        if missing:
            rule = f"a picture NAME.* has {folder}/NAME with {' or '.join(readers)}"
            raise ValueError(f"{len(missing)} pictures have no target, the first: {pictures[missing[0]]}; {rule}")


def stated_in(root: Path) -> dict[str, Any]:
    """What a folder's dataset.json states, checked; {} if there is none."""
    path = root / "dataset.json"
    if not os.path.lexists(path):
        return {}
    stated = read_object(path)
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "classes": (lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of names"),
        "depth_scale": (
            lambda value: type(value) in (int, float) and 0 < value <= sys.float_info.max,
            "a positive number, of units a metre",
        ),
        "sky": (lambda value: type(value) in (int, float), "a number, the value in depth files that stands for the sky"),
        "reduce_zero_label": (lambda value: isinstance(value, bool), "true or false"),
    }
    for key, (holds, what) in rules.items():
        if key in stated and not holds(stated[key]):
            raise ValueError(f"{path}: {key} is {reprlib.repr(stated[key])}: it is {what}")
    return stated


def _by_name(folder: Path, extensions: Collection[str]) -> dict[str, Path]:
    """The visible files of a folder by name without extension; ValueError where two have one name. Files of other kinds are warned of."""
    found, others = defaultdict(list), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and not path.name.startswith("."):
            if path.suffix.lower() in extensions:
                found[path.stem].append(path)
            else:
                others.append(path.name)
    for paths in found.values():
        if len(paths) > 1:
            raise ValueError(f"{' and '.join(map(str, paths))}: names without extension must differ, for picture and target share it")
    if others:
        known = ", ".join(sorted(extensions))
        warnings.warn(f"{folder}: {len(others)} files are left out, the first {others[0]}; known are {known}", stacklevel=3)
    return {name: paths[0] for name, paths in found.items()}


def classes_of(kind: str, folder: str | Path) -> tuple[tuple[str, ...], Palette]:
    """The classes of a kind of data, or those that the dataset.json of a folder of pairs states, and their colours; () where none are."""
    row = kind_of(kind)
    if row.classes:
        return row.classes, row.palette
    names = tuple(stated_in(Path(folder)).get("classes", ()))
    return names, palette(len(names))

"""How the data sets lie on the disk, as a table: `KINDS`. Nothing here needs PyTorch.

Counts are those that are published, and list files those of BTS and AdaBins, which ZoeDepth and others go on using.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..classes import Palette, ade20k, pascal_context
from ..rules import nearest

SPLITS = ("train", "val", "test")  # of folders of pairs


@dataclass(frozen=True)
class Split:
    """The pictures of a split, and where their targets lie.

    Attributes:
        pictures, targets: folders that paths are below, as seen from the data set's; a file is in the first that has it.
        pattern: which files of `pictures` are meant, where no list says so.
        names: what the start of a picture's name becomes in its target's, whose suffix is .png.
        list: a file in the data set's folder, of a line each: a picture, its target or None where there is none, and what more there is,
            the focal length, which is not read.
        by_name: a line of the list is a name without suffix.
        needed: without its list the split cannot be told.
        count: published, of pictures with a target.
    """

    pictures: tuple[str, ...]
    targets: tuple[str, ...]
    count: int
    pattern: str = "*.jpg"
    names: tuple[str, str] = ("", "")
    list: str | None = None
    by_name: bool = False
    needed: bool = True

    @property
    def marker(self) -> str:
        """What lies in the data set's folder if the split is there."""
        return self.list if self.list is not None and self.needed else self.pictures[0]


@dataclass(frozen=True)
class Kind:
    """One way of lying on the disk.

    Attributes:
        task: "depth" or "segmentation"; None: either.
        layout: what lies where, in words, a line each; where it comes from at last.
        folders: the data set's own, seen from what one is given: the first in which a split's pictures lie.
        splits: by name; two names may be of one. Folders of pairs have what folders there are.
        classes, palette, reduce_zero_label: of labels.
        depth_scale: of depth, units a metre.
        crop: height and width that pictures and targets are cut to, at the bottom and the middle; None: all of them.
    """

    task: str | None
    layout: str
    splits: Mapping[str, Split] = field(default_factory=dict)
    folders: tuple[str, ...] = (".",)
    classes: tuple[str, ...] = ()
    palette: Palette = ()
    reduce_zero_label: bool = False
    depth_scale: float = 1000.0
    crop: tuple[int, int] | None = None

    def split(self, name: str | None) -> Split:
        """ValueError for one that there is not."""
        if name is None or name not in self.splits:
            raise ValueError(f"no split is named {name!r}; the splits are {', '.join(self.splits)}")
        return self.splits[name]

    def base(self, root: Path, split: Split) -> Path | None:
        """The data set's own folder in the one that was given; None where the split is not there."""
        return next((root / folder for folder in self.folders if (root / folder / split.marker).exists()), None)

    @property
    def expected(self) -> str:
        """The layout in one line."""
        return "expected: " + "; ".join(line.strip() for line in self.layout.strip().splitlines())


def _both(train: Split, held_out: Split) -> dict[str, Split]:
    """Of a data set with two splits, of which one is validated and tested on."""
    return {"train": train, "test": held_out, "val": held_out}


_CONTEXT = Split(("JPEGImages",), ("SegmentationClassContext",), 4998, list="ImageSets/SegmentationContext/train.txt", by_name=True)
_NYU = Split(
    *(("sync",), ("sync",), 24231), pattern="*/rgb_*.jpg", names=("rgb_", "sync_depth_"), list="nyudepthv2_train_files_with_gt.txt"
)
_NYU_TEST = replace(
    _NYU,
    pictures=("official_splits/test",),
    targets=("official_splits/test",),
    count=654,
    list="nyudepthv2_test_files_with_gt.txt",
    needed=False,
)
_KITTI = Split(
    pictures=("raw", "."),
    targets=("gts", "data_depth_annotated/train", "data_depth_annotated/val", "."),
    count=23158,
    list="kitti_eigen_train_files_with_gt.txt",
)
_KITTI_TEST = replace(_KITTI, count=652, list="kitti_eigen_test_files_with_gt.txt")  # of 697 lines, 45 of which have no truth

KINDS: dict[str, Kind] = {
    "folder": Kind(
        task=None,
        layout="""
            {train,val,test}/images/NAME.*  pictures
            {train,val,test}/depth/NAME.{png,tif,npy,pfm}  16 bits, millimetres or by --depth-scale; or floats, metres; 0 unknown
            {train,val,test}/labels/NAME.png  a class each, 255 ignored; depth or labels, or both
            {train,val,test}/dataset.json  may state classes, depth_scale, reduce_zero_label, sky
            your own""",
    ),
    "ade20k": Kind(
        task="segmentation",
        layout="""
            ADEChallengeData2016/images/{training,validation}/NAME.jpg
            ADEChallengeData2016/annotations/{training,validation}/NAME.png  0 other, 1 to 150 a class each
            the scene parsing release, ADEChallengeData2016.zip of data.csail.mit.edu/places/ADEchallenge, not the full data set""",
        folders=("ADEChallengeData2016", "."),
        splits={
            "train": Split(("images/training",), ("annotations/training",), 20210),
            "val": Split(("images/validation",), ("annotations/validation",), 2000),
        },
        classes=ade20k.CLASSES,
        palette=ade20k.PALETTE,
        reduce_zero_label=True,
    ),
    "pascal-context": Kind(
        task="segmentation",
        layout="""
            VOCdevkit/VOC2010/JPEGImages/NAME.jpg
            VOCdevkit/VOC2010/SegmentationClassContext/NAME.png  0 background, 1 to 59 a class each
            VOCdevkit/VOC2010/ImageSets/SegmentationContext/{train,val}.txt  a NAME a line
            PASCAL VOC 2010; labels and lists are made of trainval_merged.json by mmsegmentation's tools/dataset_converters""",
        folders=("VOCdevkit/VOC2010", "VOC2010", "."),
        splits={"train": _CONTEXT, "val": replace(_CONTEXT, count=5105, list="ImageSets/SegmentationContext/val.txt")},
        classes=pascal_context.CLASSES,
        palette=pascal_context.PALETTE,
        reduce_zero_label=True,
    ),
    "nyuv2": Kind(
        task="depth",
        layout="""
            official_splits/test/SCENE/rgb_NNNNN.jpg, and sync_depth_NNNNN.png beside it  16 bits, millimetres
            sync/SCENE/rgb_NNNNN.jpg, and sync_depth_NNNNN.png beside it
            nyudepthv2_train_files_with_gt.txt  a line each: SCENE/rgb_NNNNN.jpg SCENE/sync_depth_NNNNN.png FOCAL
            nyudepthv2_test_files_with_gt.txt  the same; without it all of official_splits/test are taken
            Eigen's split as BTS prepares it; the lists are in train_test_inputs of AdaBins and ZoeDepth""",
        splits=_both(_NYU, _NYU_TEST),
    ),
    "kitti": Kind(
        task="depth",
        layout="""
            raw/DATE/DRIVE_sync/image_02/data/NNNNNNNNNN.png
            gts/DRIVE_sync/proj_depth/groundtruth/image_02/NNNNNNNNNN.png  16 bits, 256 a metre, 0 unknown; or as it is unpacked,
              data_depth_annotated/{train,val}/DRIVE_sync/...
            kitti_eigen_{train,test}_files_with_gt.txt  a line each: DATE/DRIVE_sync/image_02/data/NNNNNNNNNN.png, below raw;
              DRIVE_sync/proj_depth/groundtruth/image_02/NNNNNNNNNN.png, below gts, or None; FOCAL
            KITTI's raw data and annotated depth; the lists are in train_test_inputs of AdaBins and ZoeDepth""",
        splits=_both(_KITTI, _KITTI_TEST),
        depth_scale=256.0,
        crop=(352, 1216),
    ),
}


def kind_of(name: str) -> Kind:
    """The kind of a name; ValueError, with the nearest, where there is none."""
    if name not in KINDS:
        raise ValueError(f"no kind of data is named {name!r}{nearest(name, KINDS)}; the kinds are {', '.join(KINDS)}")
    return KINDS[name]


def guessed(root: str | Path) -> str:
    """The kind whose layout a folder has; ValueError where it has none's."""
    root = Path(root)
    for name, kind in KINDS.items():
        if any(kind.base(root, split) for split in kind.splits.values()):
            return name
    if any((root / split / "images").is_dir() for split in (".", *SPLITS)):
        return "folder"
    raise ValueError(f"{root} is laid out as no kind of data; the kinds are {', '.join(KINDS)}, and dpt data says how each lies")

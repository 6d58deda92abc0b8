"""Each kind of data set as it lies on the disk: what is read, which targets belong to which pictures, and how what is missing is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import dpt.data
from dpt.classes import ade20k, pascal_context
from dpt.config import HeadConfig, numbered_classes
from dpt.data.checking import checked
from dpt.data.datasets import FolderDataset
from dpt.data.kinds import KINDS, guessed, kind_of
from dpt.data.targets import IGNORE, TargetError
from dpt.inference.images import load_image
from dpt.zoo import CONFIGS

DEPTH = HeadConfig("depth")
HEADS = {"depth": DEPTH, "segmentation": HeadConfig("segmentation", numbered_classes(9), ((0, 0, 0),) * 9)}
LISTED = tuple(name for name, kind in KINDS.items() if kind.splits)


def head_of(kind: str) -> HeadConfig:
    row = KINDS[kind]
    return HeadConfig("segmentation", row.classes, row.palette) if row.task == "segmentation" else DEPTH


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> dict[str, Path]:
    """Each kind with three pictures a split, which no test changes."""
    return {kind: writer(tmp_path_factory.mktemp(kind), 3) for kind, writer in datasets.WRITERS.items()}


@pytest.fixture
def copied(laid_out, tmp_path):
    """A copy of a kind's data set, for a test to damage."""
    return lambda kind: Path(shutil.copytree(laid_out[kind], tmp_path / kind))


def opened(kind: str, root: Path, split: str = "train"):
    return dpt.data.open_data(kind, root, split, head_of(kind))


def test_every_kind_is_written_and_described(laid_out):
    """Blind spot: a kind that no test reads, or whose layout nobody can look up."""
    assert set(laid_out) == set(KINDS)
    for kind in KINDS.values():
        lines = kind.layout.strip().splitlines()
        assert len(lines) > 2 and all(line.startswith(" ") for line in lines[1:])


@pytest.mark.parametrize("kind", LISTED)
def test_all_splits_are_read_and_told_apart(laid_out, kind):
    """Blind spot: a split that holds another's pictures, or those of no split; a published number that is nobody's; names that repeat."""
    data = {split: opened(kind, laid_out[kind], split) for split in KINDS[kind].splits}
    for split, each in data.items():
        assert len(each) == 3 == len(set(each.names)) and each.name == f"{kind} {split}" and each.root == laid_out[kind]
        assert each.head == head_of(kind) and all(not Path(name).is_absolute() for name in each.names)
        for index in range(len(each)):
            picture, target = each[index]
            assert picture.dtype == np.uint8 and picture.shape == (*target.shape, 3)
            assert np.array_equal(each.picture(index), picture) and np.array_equal(each.target(index, picture.shape[:2]), target)
    held_out = "test" if "test" in data else "val"
    assert not set(data["train"].images) & set(data[held_out].images) and data["val"].images == data[held_out].images
    each.check(progress=False)


def test_published_numbers():
    """Blind spot: a count that was changed with the code. Of KITTI's 697 lines 45 have no truth."""
    counts = {name: [kind.splits["train"].count, kind.splits["val"].count] for name, kind in KINDS.items() if kind.splits}
    assert counts == {"ade20k": [20210, 2000], "pascal-context": [4998, 5105], "nyuv2": [24231, 654], "kitti": [23158, 652]}


@pytest.mark.parametrize(("kind", "classes"), [("ade20k", ade20k), ("pascal-context", pascal_context)])
def test_labels_start_behind_the_one_that_is_none(laid_out, kind, classes):
    """Blind spot: every class one off, or "other" and the background taken for one. The stored value less one, and 0 ignored."""
    data = opened(kind, laid_out[kind])
    for index in range(3):
        stored = np.array(Image.open(data.targets[index]))
        _, labels = data[index]
        assert stored.max() == len(classes.CLASSES) and labels[0, 0] == IGNORE
        assert np.array_equal(labels, np.where(stored == 0, IGNORE, stored.astype(int) - 1))
    assert len(classes.CLASSES) == len(set(classes.CLASSES)) == len(classes.PALETTE)


def test_pascal_contexts_classes():
    """Blind spot: a name that was left out, or the background among them: as the files count, in the order of the names."""
    names = pascal_context.CLASSES
    assert len(names) == 59 and list(names) == sorted(names) and "background" not in names
    assert (names[0], names[36], names[58]) == ("aeroplane", "person", "wood")


def test_grey_pictures_get_three_channels(laid_out):
    """Blind spot: ADE20K's few grey pictures, which end a training in its middle."""
    data = opened("ade20k", laid_out["ade20k"])
    assert Image.open(data.images[2]).mode == "L" and data[2][0].shape == (*datasets.SIZE, 3)


@pytest.mark.parametrize(("kind", "scale"), [("nyuv2", 1000), ("kitti", 256)])
def test_depth_is_metres(laid_out, kind, scale):
    """Blind spot: KITTI's 256ths taken for millimetres, NYU's millimetres for 256ths; unknown pixels that are 0 metres away."""
    data = opened(kind, laid_out[kind])
    stored = np.array(Image.open(data.targets[0])).astype(np.float32)
    _, depth = data[0]
    height, width = depth.shape
    left = (stored.shape[1] - width) // 2
    assert np.array_equal(depth, stored[-height:, left : left + width] / np.float32(scale))
    assert dpt.data.open_data(kind, data.root, "train", DEPTH, depth_scale=1).target(0).max() > 900


def test_kittis_benchmark_crop(laid_out):
    """Blind spot: a crop at the top, or of the picture alone; a picture that is no larger, cut to less."""
    data = opened("kitti", laid_out["kitti"])
    whole = load_image(data.images[0])
    assert whole.shape == (360, 1224, 3)
    picture, depth = data[0]
    assert np.array_equal(picture, whole[8:, 4:1220]) and picture.shape == (352, 1216, 3) and depth.shape == (352, 1216)
    assert np.array_equal(data.picture(0), picture) and np.array_equal(data.target(0, (352, 1216)), depth)
    with pytest.raises(TargetError, match=r"is \(352, 1216\), its picture \(360, 1224\): they must be the same size"):
        data.target(0, (360, 1224))
    data.crop = (361, 100)
    with pytest.raises(TargetError, match=r"0000000000\.png is \(360, 1224\): it is cut to \(361, 100\), and must not be smaller"):
        data.picture(0)


def test_kittis_truth_as_it_is_unpacked_and_moved(copied):
    """Blind spot: half of the split not found, for annotated depth comes in two folders and Eigen's split knows none."""
    root = copied("kitti")
    split = opened("kitti", root)
    assert {path.relative_to(root).parts[1] for path in split.targets} == {"train", "val"}
    for below in ("train", "val"):
        shutil.copytree(root / "data_depth_annotated" / below, root / "gts", dirs_exist_ok=True)
    assert {path.relative_to(root).parts[0] for path in opened("kitti", root).targets} == {"gts"}
    (root / "raw" / datasets.DATE).rename(root / datasets.DATE)
    (root / "raw").rmdir()
    assert opened("kitti", root).names == split.names


def test_pictures_without_truth_are_left_out(copied):
    """Blind spot: 45 of KITTI's 697 that end an evaluation, or count as perfect."""
    root = copied("kitti")
    path = root / datasets.LISTED["kitti"].format("test")
    assert len(path.read_text().splitlines()) == 4 and path.read_text().count(" None ") == 1
    assert [Path(name).name for name in opened("kitti", root, "test").names] == [f"{index:010}" for index in range(3)]


def test_nyus_test_split_needs_no_list(copied):
    """Blind spot: other pictures than the list's; a target of another scene."""
    root = copied("nyuv2")
    listed = opened("nyuv2", root, "test")
    (root / datasets.LISTED["nyuv2"].format("test")).unlink()
    found = opened("nyuv2", root, "test")
    assert set(zip(found.names, found.images, found.targets, strict=True)) == set(
        zip(listed.names, listed.images, listed.targets, strict=True)
    )
    assert set(found.names) == {"bathroom/rgb_00000", "bedroom/rgb_00001", "bathroom/rgb_00002"}


@pytest.mark.parametrize("kind", LISTED)
def test_a_data_set_may_be_given_by_its_own_folder(laid_out, kind):
    """Blind spot: VOCdevkit/VOC2010 that is asked for below VOCdevkit/VOC2010."""
    outer = opened(kind, laid_out[kind])
    for folder in KINDS[kind].folders:
        if (laid_out[kind] / folder).is_dir():
            assert opened(kind, laid_out[kind] / folder).images == outer.images


def test_folders_of_pairs(laid_out):
    """Blind spot: another way of reading what `FolderDataset` reads."""
    for split in ("train", "val", "test"):
        for head in HEADS.values():
            data = dpt.data.open_data("folder", laid_out["folder"], split, head)
            own = FolderDataset(laid_out["folder"] / split, head)
            assert (data.images, data.targets, data.names) == (own.images, own.targets, own.names) and len(data) == 3
            assert dpt.data.open_data("folder", laid_out["folder"] / split, None, head).images == data.images


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_guessed(laid_out, kind):
    """Blind spot: one kind taken for another."""
    assert guessed(laid_out[kind]) == kind


def test_what_is_no_data_set(tmp_path):
    """Blind spot: an empty folder that passes for one of pairs."""
    with pytest.raises(ValueError, match=r"is laid out as no kind of data; the kinds are folder, ade20k, .*dpt data says how"):
        guessed(tmp_path)
    with pytest.raises(ValueError, match=r"no kind of data is named 'ade20' \(did you mean 'ade20k'\?\); the kinds are folder, ade20k"):
        kind_of("ade20")


@pytest.mark.parametrize(
    ("kind", "split", "head", "message"),
    [
        ("ade20k", "test", None, r"no split is named 'test'; the splits are train, val"),
        ("ade20k", "train", DEPTH, "ade20k is for segmentation, the model for depth"),
        ("kitti", "train", CONFIGS["dpt-tiny-scenes"].head, "kitti is for depth, the model for segmentation"),
        ("ade20k", "train", CONFIGS["dpt-tiny-scenes"].head, "has 150 classes, the model 9: they must be the same"),
        ("folder", "train", HeadConfig("normals", kind="linear"), "data sets have targets for depth and segmentation, not for normals"),
    ],
)
def test_what_does_not_fit(laid_out, kind, split, head, message):
    """Blind spot: labels trained on as metres, or as another data set's classes."""
    with pytest.raises(ValueError, match=message):
        dpt.data.open_data(kind, laid_out[kind], split, head or head_of(kind))


def removed(name: str):
    def remove(root: Path) -> None:
        (path,) = root.glob(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def rewritten(name: str, content: str | bytes):
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


LISTS = "VOCdevkit/VOC2010/ImageSets/SegmentationContext/train.txt"


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        (
            "ade20k",
            removed("ADEChallengeData2016/images/training"),
            r"ADEChallengeData2016/images/training or .*images/training is missing; expected: ADEChallengeData2016/images/{training",
        ),
        (
            "ade20k",
            removed("ADEChallengeData2016/annotations/training/ADE_train_00000002.png"),
            r"1 of 3 targets are missing, the first: ADE_train_00000002\.png below .*annotations/training; expected",
        ),
        ("ade20k", removed("ADEChallengeData2016/annotations"), r"3 of 3 targets are missing, the first: ADE_train_00000001\.png below"),
        ("pascal-context", removed(LISTS), r"SegmentationContext/train\.txt or .* is missing; expected: VOCdevkit/VOC2010/JPEGImages"),
        ("pascal-context", rewritten(LISTS, "2008_000001\n2008_000009\n"), r"1 of 2 pictures are missing, the first: 2008_000009\.jpg"),
        ("pascal-context", rewritten(LISTS, "a\nb c\n"), r"train\.txt: line 2 is 'b c': it must be a name; expected"),
        ("pascal-context", rewritten(LISTS, "\n\n"), r"train\.txt has no picture; expected"),
        ("pascal-context", rewritten(LISTS, b"\xff\xfe\n"), r"train\.txt: not a text"),
        ("nyuv2", removed("nyudepthv2_train_files_with_gt.txt"), r"nyudepthv2_train_files_with_gt\.txt is missing; expected"),
        ("nyuv2", removed("sync/bath_0001/sync_depth_00000.png"), r"1 of 3 targets .*: bath_0001/sync_depth_00000\.png below .*sync;"),
        ("nyuv2", removed("sync"), r"3 of 3 pictures are missing, the first: bath_0001/rgb_00000\.jpg below"),
        (
            "kitti",
            rewritten("kitti_eigen_train_files_with_gt.txt", "\none.png\n"),
            r"gt\.txt: line 2 is 'one\.png': it must be a picture and its target, or None; expected: raw/DATE",
        ),
        ("kitti", removed("raw"), r"3 of 3 pictures are missing, the first: 2011_09_26/2011.*0000000000\.png below"),
        ("kitti", removed("data_depth_annotated/val"), r"1 of 3 targets are missing, .*0000000001\.png below .*data_depth_annotated/train"),
    ],
)
def test_what_is_missing_is_named_with_the_layout(copied, kind, damage, message):
    """Blind spot: a training on half of the data without a word; a FileNotFoundError hours later; an error that says not what to do."""
    root = copied(kind)
    damage(root)
    with pytest.raises(ValueError, match=message):
        opened(kind, root)


def reports(kind: str, root: Path, *splits: str, **options):
    return {(report.split, report.task): report for report in checked(kind, root, splits, progress=False, **options)}


def test_a_report_of_labels(copied):
    """Blind spot: ignored pixels in a share, a class that is counted as the next, one damaged file that hides the others."""
    root = copied("ade20k")
    base = root / "ADEChallengeData2016"
    names = [f"ADE_train_{index:08}" for index in (1, 2, 3)]
    size = (2, 4)
    for name, labels in zip(names, ([0, 1, 1, 2, 2, 2, 2, 150], [0] * 8, [1] * 8), strict=True):
        datasets.picture(base / "images/training" / f"{name}.jpg", 0, size)
        datasets.save(base / "annotations/training" / f"{name}.png", np.array(labels, np.uint8).reshape(size))
    (report,) = reports("ade20k", root, "train").values()
    assert (report.count, report.published, report.pixels, report.known) == (3, 20210, 24, 15)
    assert report.smallest == report.largest == size and report.problems == ["3 pictures: 20210 were published"]
    assert [report.classes[name] for name in ade20k.CLASSES[:3]] == [10, 4, 0] and report.classes["flag"] == 1
    datasets.save(base / "annotations/training" / f"{names[0]}.png", np.full(size, 151, np.uint8))
    (base / "images/training" / f"{names[2]}.jpg").write_bytes(b"")
    (report,) = reports("ade20k", root, "train").values()
    assert report.failed == 3 and report.pixels == 8 and report.known == 0
    assert "00000001.png: holds the label 151" in report.problems[1] and "00000003.jpg: the file is empty" in report.problems[2]


def test_a_report_of_depth(tmp_path):
    """Blind spot: unknown pixels at 0 metres, the sky in the mean, sizes in the other order."""
    (tmp_path / "depth").mkdir()
    (tmp_path / "dataset.json").write_text('{"sky": 65535, "depth_scale": 100}')
    for name, values in (("a", [[0, 100, 300]]), ("b", [[65535, 800], [0, 0]])):
        stored = np.array(values, np.uint16)
        datasets.save(tmp_path / "depth" / f"{name}.png", stored)
        datasets.picture(tmp_path / "images" / f"{name}.png", 0, stored.shape)
    (report,) = reports("folder", tmp_path).values()
    assert (report.split, report.task, report.count, report.published, report.failed) == ("", "depth", 2, None, 0)
    assert (report.pixels, report.known, report.sky, report.nearest, report.farthest, report.total) == (7, 3, 1, 1, 8, 12)
    assert (report.smallest, report.largest) == ((1, 3), (2, 2))
    (report,) = reports("folder", tmp_path, depth_scale=1000).values()
    assert report.farthest == pytest.approx(0.8)


def test_a_report_of_a_folder_with_both(laid_out):
    """Blind spot: labels that nobody checks where there is depth too; classes that have no names listed by the hundred."""
    found = reports("folder", laid_out["folder"])
    assert list(found) == [(split, task) for split in ("train", "val", "test") for task in ("depth", "segmentation")]
    assert all(report.failed == 0 and report.known == report.pixels for report in found.values())
    assert set(found["train", "segmentation"].classes) == {f"class {index}" for index in range(9)}
    (report,) = reports("folder", laid_out["folder"], "missing").values()
    assert report.failed == 1 and "missing/images holds no picture" in report.problems[0]


def test_problems_are_counted_and_the_first_are_named(tmp_path):
    """Blind spot: ten thousand lines, or none behind the first."""
    datasets.folder(tmp_path, 12)
    for path in (tmp_path / "val" / "depth").iterdir():
        path.write_bytes(b"")
    report = reports("folder", tmp_path, "val")["val", "depth"]
    assert report.failed == 12 and len(report.problems) == 10 and report.pixels == 0
    assert all("the file is empty" in problem for problem in report.problems)


@pytest.mark.parametrize("kind", LISTED)
def test_each_split_is_reported_once(laid_out, kind):
    """Blind spot: KITTI's and NYU's held-out pictures read twice, for they have two names."""
    found = reports(kind, laid_out[kind])
    assert [split for split, _ in found] == ["train", "test" if "test" in KINDS[kind].splits else "val"]
    assert all(report.failed == 1 and f"{report.published} were published" in report.problems[0] for report in found.values())

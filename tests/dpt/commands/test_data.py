"""`dpt data` as a user runs it: the layouts, a data set that is as it should be, and what is wrong with others."""

from __future__ import annotations

import datasets
import pytest
from PIL import Image

from dpt.commands import data, main
from dpt.data.checking import Report
from dpt.data.kinds import KINDS


@pytest.fixture
def run(capsys):
    """Exit code, stdout, stderr."""

    def call(*arguments):
        code = main.main(["data", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_the_layouts(run):
    """Blind spot: a kind that is not told, or whose lists are not."""
    code, out, err = run()
    assert code == 0 and not err and [line for line in out.splitlines() if not line.startswith(" ")] == list(KINDS)
    assert out.count("files_with_gt.txt") == 3 and "ImageSets/SegmentationContext" in out
    assert run("--kind", "kitti")[1].splitlines()[0] == "kitti" and "ade20k" not in run("--kind", "kitti")[1]


def test_a_good_folder(run, tmp_path):
    """Blind spot: a code other than 0; a guess that is not said to be one."""
    datasets.folder(tmp_path, 2)
    code, out, err = run("--check", tmp_path)
    assert code == 0 and not err
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path}: folder, by its layout" and lines[1] == "train, depth: 2 pictures"
    assert run("--check", tmp_path, "--kind", "folder")[1].splitlines()[0] == f"{tmp_path}: folder"
    only = run("--check", tmp_path, "--split", "val", "--split", "test")[1]
    assert "train" not in only.replace(str(tmp_path), "") and "val, depth" in only and "test, segmentation" in only


def test_a_damaged_data_set(run, tmp_path):
    """Blind spot: a code of 0; a split that is missing told as if nothing were there; ten thousand lines of errors."""
    datasets.ade20k(tmp_path, 13)
    base = tmp_path / "ADEChallengeData2016"
    for path in (base / "annotations" / "training").iterdir():
        Image.new("L", (5, 5)).save(path)
    code, out, err = run("--check", tmp_path)
    assert code == 1 and out.splitlines()[0] == f"{tmp_path}: ade20k, by its layout"
    assert "train, segmentation: 13 pictures, 20210 published" in out and "val, segmentation: 13 pictures, 2000 published" in out
    problems = err.splitlines()
    assert problems[0] == "train: 13 pictures: 20210 were published" and "train: and 4 more" in problems
    assert sum("ADE_train_" in line and "(5, 5), its picture (24, 32)" in line for line in problems) == 9
    (base / "images" / "training").rename(base / "images" / "elsewhere")
    code, out, err = run("--check", tmp_path)
    assert code == 1 and "images/training is missing; expected: ADEChallengeData2016" in err.replace(" or ", "\n") and "13 pictures" in out


def test_nothing_that_could_be_read(run, tmp_path):
    """Blind spot: a code of 1, as if part of it were good."""
    code, out, err = run("--check", tmp_path)
    assert code == 2 and not out and "is laid out as no kind of data" in err
    code, _, err = run("--check", tmp_path, "--kind", "nyuv2")
    assert code == 2 and "nyudepthv2_train_files_with_gt.txt is missing" in err and err.splitlines()[-1].endswith("could be read")


def test_a_report_in_words():
    """Blind spot: shares of all pixels instead of the labelled, classes in the order of their names, a mean over unknown pixels."""
    labels = Report("val", "segmentation", 2, 3, pixels=10, known=8, smallest=(2, 2), largest=(2, 3), classes={"a": 2, "b": 6, "c": 0})
    assert data.described(labels) == [
        "val, segmentation: 2 pictures, 3 published",
        "  2x2 to 2x3; 80.00% of the pixels known",
        "  b 75.00%, a 25.00%",
        "  1 of 3 classes in no picture",
    ]
    depth = Report("", "depth", 1, pixels=8, known=4, sky=2, smallest=(2, 4), largest=(2, 4), nearest=1, farthest=9, total=16)
    assert data.described(depth) == [
        "pictures, depth: 1 pictures",
        "  2x4 to 2x4; 50.00% of the pixels known, 25.00% sky",
        "  1.000 to 9.000 m, on average 4.000 m",
    ]

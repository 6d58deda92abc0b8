"""What `dpt evaluate` prints and writes of a protocol: the figures, beside what was published of the model with the same options."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import small
import torch
from PIL import Image

import dpt
from dpt.commands import main
from dpt.evaluation.scoring import scored
from dpt.model import DPT


@pytest.fixture
def data(tmp_path):
    """Two pictures with depth and labels."""
    root = tmp_path / "data"
    for folder in ("images", "depth", "labels"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(rng.integers(1000, 9000, (64, 64), dtype=np.uint16)).save(root / "depth" / f"{name}.png")
        Image.fromarray(rng.integers(0, 3, (64, 64), dtype=np.uint8)).save(root / "labels" / f"{name}.png")
    return root


def weights(tmp_path, name, **changes) -> str:
    """A small model of random weights under a named one's name."""
    torch.manual_seed(0)
    config = replace(small.config(name, **changes), name=name).with_("input", size=(64, 64))
    path = tmp_path / f"{name}.safetensors"
    dpt.save(DPT(config), path)
    return str(path)


def evaluated(tmp_path, weights, data, *options):
    path = tmp_path / "figures.json"
    assert main.main(["evaluate", "--weights", weights, "--data", str(data), "--device", "cpu", "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


def test_figures_stand_beside_the_published_ones(tmp_path, data, capsys):
    """Blind spot: the figures of other options beside these; a source that is not told; a figure that is not the one that was written."""
    model = weights(tmp_path, "dpt-large-midas")
    report = evaluated(tmp_path, model, data, "--protocol", "midas-tum")
    lines = capsys.readouterr().out.splitlines()
    assert report["published"] == {"figures": {"bad1": "9.97"}, "source": "https://github.com/isl-org/MiDaS#accuracy"}
    assert report["protocol"] == "midas-tum" and report["model"] == "dpt-large-midas" and report["pictures"] == 2
    figures = report["figures"]["dpt-large-midas"]
    assert lines[0] == "dpt-large-midas, midas-tum, 2 pictures"
    assert [line.split() for line in lines[1:]] == [
        ["measured", "published"],
        ["bad1", f"{figures['bad1']:.2f}", "9.97"],
        ["absrel", f"{figures['absrel']:.4f}"],
        ["published,", "of", "its", "authors'", "weights:", "https://github.com/isl-org/MiDaS#accuracy"],
    ]
    assert report["versions"]["dpt"] == dpt.__version__ and report["versions"]["torch"] == torch.__version__
    for options in (["--flip"], ["--tta"], ["--slide", "--window", "32"], ["--scales", "1", "2"]):
        other = evaluated(tmp_path, model, data, "--protocol", "midas-tum", *options)
        assert "published" not in other and other["options"] != report["options"]
        assert other["figures"] != report["figures"]  # the options reach the model
        assert "published" not in capsys.readouterr().out


def test_segmentation_has_its_classes(tmp_path, data, capsys, monkeypatch):
    """Blind spot: figures of single scale beside those of many; classes that never occur written as NaN, which JSON has not."""
    model = weights(tmp_path, "dpt-base-ade20k", classes=150)
    for options, published in (([], "46.97"), (["--scales", "0.5", "0.75", "1", "1.25", "1.5", "1.75", "--flip"], "48.34")):
        report = evaluated(tmp_path, model, data, "--protocol", "ade20k", "--kind", "folder", *options)
        figures = report["figures"]["dpt-base-ade20k"]
        assert list(figures) == ["mIoU", "mAcc", "aAcc"] and report["published"]["figures"] == {"mIoU": published}
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["class", "IoU", "Acc"] and len(lines) == 1 + 150 + 1 + 1 + 1 + 3 + 1
        row = lines[-4].split()
        assert row == ["mIoU", f"{figures['mIoU']:.2f}", published]
        seen = [value["Acc"] for value in report["classes"].values() if value["Acc"] is not None]
        assert len(report["classes"]) == 150 and len(seen) == 3 and np.mean(seen) == pytest.approx(figures["mAcc"], abs=0.011)
        for line, (name, values) in zip(lines[1:], report["classes"].items(), strict=False):
            assert line.startswith(name) and line.split()[-1] == ("nan" if values["Acc"] is None else f"{values['Acc']:.2f}")


@pytest.mark.parametrize(
    ("protocol", "kind", "model", "classes"),
    [
        ("ade20k", "ade20k", "dpt-base-ade20k", 150),
        ("pascal-context", "pascal-context", "dpt-base-ade20k", 59),
        ("kitti-eigen", "kitti", "dpt-hybrid-kitti", 0),
        ("depth-anything-kitti", "kitti", "dpt-large-midas", 0),
        ("midas-nyu", "nyuv2", "dpt-large-midas", 0),
    ],
)
def test_data_sets_are_read_as_they_lie(tmp_path, capsys, monkeypatch, protocol, kind, model, classes):
    """Blind spot: the training's pictures; labels that are not reduced, depth in another unit; KITTI cut by its crop where the protocol
    looks at the whole. The figures are those of the split, worked out here from the files' truth."""
    root = datasets.WRITERS[kind](tmp_path / "data", 3)
    heard = []

    def hear(model, data, *rest, **more):
        heard.append(data)
        return scored(model, data, *rest, **more)

    monkeypatch.setattr("dpt.commands.evaluate.scored", hear)
    report = evaluated(tmp_path, weights(tmp_path, model, classes=classes or 5), root, "--protocol", protocol)
    assert report["pictures"] == 3 and report["protocol"] == protocol
    assert all(value is not None and np.isfinite(value) for value in report["figures"][model].values())
    (data,) = heard
    data.crop = None  # KITTI's, which the protocol has seen the whole in spite of
    split = {"ade20k": "val", "pascal-context": "2009_", "kitti": "_0009_", "nyuv2": "official_splits/test"}[kind]
    assert all(split in str(path) for path in data.images)
    for index, path in enumerate(data.targets):
        stored = np.array(Image.open(path)).astype(float)
        truth = np.where(stored == 0, 255, stored - 1) if classes else stored / {"kitti": 256, "nyuv2": 1000}[kind]
        np.testing.assert_allclose(data.target(index), truth, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--protocol", "nyu-eigen", "--kind", "folder"], "nyu-eigen cannot be asked of dpt-large-midas: it measures metres"),
        (["--protocol", "midas-tum", "--max-depth", "5"], "max_depth=5.0: midas-tum says itself that depth counts to 10 m"),
        (["--protocol", "midas-diw", "--kind", "folder"], "--kind folder: midas-diw is measured on points"),
        (["--protocol", "midas", "--kind", "points"], "--kind points: midas is measured on folder"),
        (["--protocol", "midas", "--scales", "0"], "'0': it must be a number above 0"),
        (["--protocol", "midas", "--train-data", "a"], "--train-data is for --protocol folder"),
        (["--protocol", "mida"], "argument --protocol: no protocol is named 'mida' (did you mean 'midas'?)"),
    ],
)
def test_what_cannot_be_done_is_told_at_once(tmp_path, data, capsys, options, said):
    """Blind spot: a traceback; hours of evaluation before it is told; half a file."""
    path = tmp_path / "figures.json"
    command = ["evaluate", "--weights", weights(tmp_path, "dpt-large-midas"), "--data", str(data), "--json", str(path), *options]
    try:
        assert main.main(command) == 2
    except SystemExit as ended:
        assert ended.code == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1 and not path.exists()

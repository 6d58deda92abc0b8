"""What is evaluated is what is predicted, at the size of the truth; and the command around it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from small import small
from torch import nn

import dpt
from dpt.commands import main
from dpt.config import HALF, InputConfig
from dpt.data.datasets import FolderDataset
from dpt.evaluation.metrics import DepthScorer, LabelScorer, depth_limit
from dpt.evaluation.protocols import PROTOCOLS
from dpt.evaluation.scoring import evaluate, trivial_predictors
from dpt.inference.images import load_image
from dpt.zoo import CONFIGS

DEPTH, SCENES = CONFIGS["dpt-tiny-depth"], CONFIGS["dpt-tiny-scenes"]
METRIC = DEPTH.with_("head", inverse=False, activation="sigmoid", max_depth=10.0)
SIZES = [(48, 64), (192, 256), (48, 64), (90, 40)]


@pytest.fixture
def folder(tmp_path):
    """Pictures of three sizes. Their grey is their depth, 25 levels a metre from 1 to 10, and their class; a corner is unknown."""
    for name in ("images", "depth", "labels"):
        (tmp_path / name).mkdir()
    for index, (height, width) in enumerate(SIZES):
        metres = 1 + (np.indices((height, width)).sum(0) // (8 + index) + index) % 10
        unknown = np.indices((height, width)).sum(0) < 12
        Image.fromarray((25 * metres).astype(np.uint8)).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(np.where(unknown, 0, 1000 * metres).astype(np.uint16)).save(tmp_path / "depth" / f"{index}.png")
        Image.fromarray(np.where(unknown, 255, (metres - 1) % 9).astype(np.uint8)).save(tmp_path / "labels" / f"{index}.png")
    return tmp_path


class Oracle(nn.Module):
    """A model that sees pictures as they are and computes `function(grey level in 0..255)`; it keeps the shapes it was given."""

    def __init__(self, config, function):
        super().__init__()
        self.config = replace(config, input=InputConfig(mean=HALF, std=HALF, size=(48, 48), multiple=1, rule="short_side", mode="bilinear"))
        self.function, self.shapes, self.parameter = function, [], nn.Parameter(torch.zeros(()))
        self.head = small("dpt-tiny-scenes").head

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.function((x.mean(1) / 2 + 0.5) * 255)


def only(folder, *indices):
    """The same with these pictures alone."""
    for index in set(range(len(SIZES))) - set(indices):
        (folder / "images" / f"{index}.png").unlink()
    return folder


def test_true_metres_score_nothing(folder):
    """Blind spot: metres aligned as if they had no scale, inverted, or clamped short of the truth (AbsRel 0.49 to 1.5)."""
    data = FolderDataset(only(folder, 0, 2), METRIC.head)
    perfect = {"absrel": 0, "rmse": 0, "delta1": 1}
    assert evaluate(Oracle(METRIC, lambda grey: grey / 25), data, progress=False) == pytest.approx(perfect, abs=1e-5)
    half = evaluate(Oracle(METRIC, lambda grey: grey / 50), data, progress=False)
    assert half["absrel"] == pytest.approx(0.5, abs=1e-5) and half["delta1"] == 0
    inverse = FolderDataset(folder, DEPTH.head)
    assert evaluate(Oracle(DEPTH, lambda grey: 7 * 25 / grey + 3), inverse, progress=False) == pytest.approx(perfect, abs=1e-5)
    assert evaluate(Oracle(DEPTH, lambda grey: grey / 25), inverse, progress=False)["absrel"] > 0.1


def test_depth_is_bounded(folder):
    """Blind spot: a model of rooms that is blamed for what is beyond its range, or a range that was asked for and ignored."""
    data = FolderDataset(only(folder, 0), METRIC.head)
    wrong_beyond_5 = Oracle(METRIC, lambda grey: torch.where(grey > 5.5 * 25, 0, grey / 25))
    assert evaluate(wrong_beyond_5, data, max_depth=5.0, progress=False)["absrel"] == pytest.approx(0, abs=1e-5)
    assert evaluate(wrong_beyond_5, data, progress=False)["absrel"] > 0.3
    unbounded, inverse = replace(METRIC.head, activation="relu", max_depth=1.0), replace(METRIC.head, inverse=True)
    assert [depth_limit(head) for head in (METRIC.head, DEPTH.head, unbounded, inverse)] == [10.0, 80.0, 80.0, 80.0]
    assert depth_limit(METRIC.head, 3.0) == 3.0


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("dpt-base-ade20k", (512, 688)), ("dpt-large-midas", (288, 384)), ("dpt-large-ade20k", (352, 480)), ("dpt-tiny-depth", (192, 256))],
)
def test_the_network_sees_what_prediction_shows_it(folder, name, wanted):
    """Blind spot: a 192x256 picture squashed to the bound of the sizes, 512x2048 or 384x384; another resize than prediction's."""
    model, seen = small(name, classes=9), []
    head = model.config.head
    data = FolderDataset(only(folder, 1), head)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    evaluate(model, data, progress=False)
    model.predict(data.images[0])
    assert [tuple(x.shape) for x in seen] == [(1, 3, *wanted)] * 2 and torch.equal(*seen)


def test_figures_are_of_the_predictions_at_the_size_of_the_truth(folder):
    """Blind spot: maps or truth resized before they are compared; a picture scored against another's truth in a batch."""
    model = pictures.lively_model(SCENES.with_("input", size=(32, 32)))
    data = FolderDataset(folder, SCENES.head)
    scorer, rows = LabelScorer(PROTOCOLS["folder"][1], data.head), []
    for path in data.images:
        stored = torch.from_numpy(np.array(Image.open(folder / "labels" / path.name))).long()
        rows.append(scorer.row(torch.from_numpy(model.predict(path).labels), stored))
    for batch_size in (1, 3):
        assert evaluate(model, data, batch_size, progress=False) == pytest.approx(scorer.figures(rows), abs=2e-3)
    depth = pictures.lively_model(DEPTH.with_("input", size=(32, 32)))
    data, rows = FolderDataset(folder, DEPTH.head), []
    scorer = DepthScorer(PROTOCOLS["folder"][0], data.head)
    for path in data.images:
        stored = np.array(Image.open(folder / "depth" / path.name)) / 1000
        rows.append(scorer.row(torch.from_numpy(depth.predict(path, flip=True).depth), torch.from_numpy(stored)))
    assert evaluate(depth, data, 2, progress=False, flip=True) == pytest.approx(scorer.figures(rows), rel=1e-3)


def test_equal_sizes_share_a_batch(folder):
    """Blind spot: a batch size that is accepted and ignored."""
    model = Oracle(METRIC, lambda grey: grey)
    evaluate(model, FolderDataset(folder, METRIC.head), 4, progress=False)
    assert model.shapes == [(4, 3, 48, 64), (4, 3, 108, 48)]  # 192x256 is seen at 48x64 too; both are filled up


def test_trivial_predictors(folder):
    """Blind spot: a baseline that is no baseline. The commonest class and the median are worked out from the files."""
    labels, metric, inverse = (FolderDataset(folder, head) for head in (SCENES.head, METRIC.head, DEPTH.head))
    stored = np.concatenate([np.array(Image.open(path)).ravel() for path in labels.targets])
    (name, commonest), image = *trivial_predictors(labels, None).items(), load_image(labels.images[3])
    assert name == "commonest class" and (commonest(image) == np.bincount(stored[stored != 255]).argmax()).all()
    assert commonest(image).shape == image.shape[:2]
    metres = np.concatenate([np.array(Image.open(path)).ravel() for path in metric.targets])
    ((name, median),) = trivial_predictors(metric, metric).items()
    assert name == "median" and (median(image) == np.median(metres[metres > 0]) / 1000).all()
    predictors = trivial_predictors(inverse, None)
    assert (predictors["row"](image)[:, 0] == np.arange(image.shape[0])).all() and (predictors["constant"](image) == 1).all()
    truth = iter([1 / np.maximum(inverse.target(index), 0.5) for index in range(len(inverse))])
    perfect, constant = (evaluate(model, inverse, progress=False) for model in (lambda image: next(truth), predictors["constant"]))
    assert perfect["delta1"] == pytest.approx(1) and constant["delta1"] < 0.9


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "metric.safetensors"
    dpt.save(pictures.lively_model(METRIC.with_("input", size=(32, 32))), path)
    return path


def test_the_command(folder, weights, tmp_path, capsys):
    """Blind spot: an option that is not passed on; a file of figures that is not the figures."""
    command = ["evaluate", "--weights", str(weights), "--data", str(folder), "--json", str(tmp_path / "a.json")]
    found = []
    for options in ([], ["--depth-scale", "256"], ["--max-depth", "4"], ["--batch-size", "2"]):
        assert main.main([*command, *options]) == 0
        report = json.loads((tmp_path / "a.json").read_text())
        assert report["pictures"] == 4 and list(report["figures"]) == ["dpt-tiny-depth", "median"]
        assert f"absrel {report['figures']['dpt-tiny-depth']['absrel']:.4f}" in capsys.readouterr().out
        found.append(report["figures"]["dpt-tiny-depth"]["absrel"])
    assert len(set(found[:3])) == 3 and found[3] == pytest.approx(found[0], rel=1e-3)


def test_what_the_command_prints(folder, weights, tmp_path, capsys):
    """Blind spot: figures that are another predictor's, or of other truth than the model's; a training set that is asked for and not
    learnt from."""
    train = tmp_path / "train"
    for name, picture in (("images", np.zeros((2, 2), np.uint8)), ("depth", np.full((2, 2), 2000, np.uint16))):
        (train / name).mkdir(parents=True)
        Image.fromarray(picture).save(train / name / "0.png")
    command = ["evaluate", "--weights", str(weights), "--data", str(folder), "--max-depth", "8", "--json", str(tmp_path / "a.json")]
    truth = [np.array(Image.open(folder / "depth" / f"{index}.png")) / 1000 for index in range(4)]
    everything = np.concatenate([metres[metres > 0] for metres in truth])
    truth = [metres[(metres > 0) & (metres <= 8)] for metres in truth]
    for options, median in (([], np.median(everything)), (["--train-data", str(train)], 2)):
        assert main.main([*command, *options]) == 0
        figures = json.loads((tmp_path / "a.json").read_text())["figures"]
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(figures) == ["dpt-tiny-depth", "median"]
        for line, metrics in zip(lines, figures.values(), strict=True):
            assert line.split()[1:] == [word for name, value in metrics.items() for word in (name, f"{value:.4f}")]
        assert figures["median"]["absrel"] == pytest.approx(np.mean([np.mean(abs(median - metres) / metres) for metres in truth]))
    files = set(tmp_path.iterdir())
    assert main.main([*command[:5]]) == 0 and set(tmp_path.iterdir()) == files and len(capsys.readouterr().out.splitlines()) == 2


def test_trivial_predictors_learn_from_the_first_pictures(folder, monkeypatch):
    """Blind spot: all of a large training set read for a baseline."""
    monkeypatch.setattr("dpt.evaluation.scoring.COUNTED", 1)
    Image.fromarray(np.full(SIZES[0], 2000, np.uint16)).save(folder / "depth" / "0.png")
    data = FolderDataset(folder, METRIC.head)
    known = [metres[metres > 0] for metres in map(data.target, range(len(data)))]
    found = trivial_predictors(data, None)["median"](load_image(data.images[0]))
    assert found[0, 0] == 2 != np.median(np.concatenate(known))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "images" / "2.png").write_bytes(b"x"), r"images/2\.png: not a picture"),
        (lambda root: (root / "depth" / "3.png").write_bytes(b"x"), r"depth/3\.png: "),
        (lambda root: (root / "depth" / "1.png").unlink(), r"1 pictures have no target, the first: .*images/1\.png"),
        (lambda root: [path.unlink() for path in (root / "depth").iterdir()], "4 pictures have no target"),
        (lambda root: [Image.new("I;16", SIZES[i][::-1]).save(root / f"depth/{i}.png") for i in range(4)], "nothing to average"),
    ],
)
def test_the_command_says_what_is_wrong(folder, weights, tmp_path, capsys, spoil, message):
    """Blind spot: a traceback; figures of the pictures that happened to be whole."""
    spoil(folder)
    assert main.main(["evaluate", "--weights", str(weights), "--data", str(folder), "--json", str(tmp_path / "a.json")]) == 2
    assert not (tmp_path / "a.json").exists()
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert re.search(message, errors)


def test_a_file_of_figures_that_cannot_be_written_is_told_first(folder, weights, tmp_path, capsys, monkeypatch):
    """Blind spot: hours of evaluation whose figures are then lost; a file that was there half written over."""
    monkeypatch.setattr("dpt.commands.evaluate.scored", lambda *_, **__: pytest.fail("evaluated"))
    (tmp_path / "a.json").mkdir()
    (tmp_path / "file").write_text("")
    for name, rule in (("a.json", "is a folder"), ("file/a.json", "file")):
        assert main.main(["evaluate", "--weights", str(weights), "--data", str(folder), "--json", str(tmp_path / name)]) == 2
        errors = capsys.readouterr().err
        assert str(tmp_path / name.removesuffix("/a.json")) in errors and rule in errors and errors.count("\n") == 1

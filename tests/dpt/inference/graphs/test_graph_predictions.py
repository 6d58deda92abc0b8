"""`predict` and `dpt predict` through CUDA graphs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_graphs import in_threads
from PIL import Image
from small import small, wide

import dpt
from dpt.commands.main import main
from dpt.inference.prediction import predict_iter
from dpt.training import runs

PICTURE = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
METRES = np.random.default_rng(1).uniform(1, 5, (2, 24, 32)).astype(np.float32)
PREDICTED = {
    "depth": ("dpt-large-midas", {}),
    "labels": ("dpt-tiny-scenes", {"probability": True}),
    "three tasks": ("tipsv2-base", {}),
    "flipped windows": ("dpt-tiny-depth", {"window": 32, "stride": 32, "flip": True}),
    "prompt": ("prompt-depth-anything-small", {}),
}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", PREDICTED)
def test_predictions_replay(card, kind, fast):
    """Blind spot: a prediction without the graphs, by another graph than its picture's or prompt's, and one that asked for none."""
    name, options = PREDICTED[kind]
    with torch.inference_mode(False):
        model = dpt.accelerate(wide(name)) if fast else wide(name)
    model.config = model.config.with_("input", size=(64, 64))
    pictures = [PICTURE[number % 2] for number in range(5)]
    if kind == "prompt":
        options = {"prompt": [METRES[number % 2] for number in range(5)]}
    wanted = model.predict(pictures, graph=False, **options)
    assert not card.captures
    found = model.predict(pictures, **options)
    assert len(card.captures) >= 1 and sum(graph.replays for graph in card.alive()) >= 4
    assert_predictions(found, wanted)
    assert not torch.equal(*(torch.from_numpy(one.depth if one.depth is not None else one.labels) for one in found[:2]))
    replays = sum(graph.replays for graph in card.alive())
    assert_predictions(dpt.graphed(model).predict(pictures, **options), wanted)
    assert len(card.captures) == len(card.alive()) and sum(graph.replays for graph in card.alive()) > replays


def assert_predictions(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        for field in ("depth", "labels", "probability", "normals"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_predictions_of_a_model_in_training(card):
    """Blind spot: modes that are not put back, and a graph that is lost or not made because the model trains between predictions."""
    with torch.inference_mode(False):
        model = small("dpt-tiny-depth").train()
    for _ in range(4):
        model.predict(PICTURE[0])
        assert all(module.training for module in model.modules())
    assert len(card.captures) == 1 and card.alive()[0].replays == 3


def test_threads_predict(card):
    """Blind spot: pictures of one thread in another's maps."""
    with torch.inference_mode(False):
        model = wide()
    wanted = [model.predict(picture, graph=False).depth for picture in PICTURE]

    def work(number):
        def run():
            for result in predict_iter(model, [PICTURE[number]] * 6):
                np.testing.assert_array_equal(result.prediction.depth, wanted[number])

        return run

    in_threads(work(0), work(1))
    assert len(card.captures) == 1 and card.alive()[0].replays == 11


@pytest.mark.parametrize("option", [[], ["--no-graph"]])
def test_the_command_replays(card, tmp_path, option, capsys):
    """Blind spot: a command that runs without, one that cannot be told to, and a stopwatch that no longer sees the network."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(PICTURE[number % 2]).save(folder / f"{number}.png")
    with torch.inference_mode(False):
        assert main(["predict", str(folder), "-o", str(tmp_path / "out"), "--model", "dpt-tiny-depth", "--device", "cpu", *option]) == 0
    assert len(card.captures) == (not option)
    assert "network" in (said := capsys.readouterr().out) and " 0.0 ms" not in said


@pytest.mark.parametrize("option", [[], ["--no-graph"]])
def test_an_evaluation_replays(card, tmp_path, option):
    """Blind spot: the other command."""
    for name, values in (("images", PICTURE[0]), ("depth", np.full((64, 64), 2000, np.uint16))):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(values).save(tmp_path / name / f"{number}.png")
    with torch.inference_mode(False):
        assert main(["evaluate", "dpt-tiny-depth", "--data", str(tmp_path), "--device", "cpu", *option]) == 0
    assert len(card.captures) == (not option)


def test_a_training_keeps_no_graphs(monkeypatch):
    """Blind spot: a validation after which a training has less memory than before."""
    told = []
    recipe = SimpleNamespace(batch_size=2, accumulate=1, max_depth=None)
    prediction = SimpleNamespace(depth=None, labels=None)
    model = SimpleNamespace(predict=lambda image, graph=True: told.append(graph) or prediction)
    config = SimpleNamespace(head=SimpleNamespace(task="depth"))
    training = SimpleNamespace(recipe=recipe, place=SimpleNamespace(world=1), protocol=SimpleNamespace(name="folder"), config=config)
    training.evaluated, training.validation = lambda: model, [(PICTURE[0], None)]
    monkeypatch.setattr(runs, "evaluate", lambda *args, graph=True, **options: told.append(graph))
    runs.Training.validate(training)
    assert len(list(runs.Training._examples(training, model))) == 1 and told == [False, False]

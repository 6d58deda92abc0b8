"""transformers' models at their published sizes: the committed comparison, and that the comparison compares."""

import json

import pytest
from theirs import CASES

import dpt
from bench import published

# Its random binomials have a large temperature, which makes much of what Winograd's convolutions round more: 1.5 to 1.9 times by then.
FARTHER = {"zoedepth-nyu-kitti": 2.5}
RECORD = json.loads(published.RECORD.read_text(encoding="utf-8"))


def test_the_page_is_of_the_file():
    """Blind spot: a page that was not written anew."""
    assert published.main(["--check"]) == 0


def test_every_class_was_compared_and_gave_what_it_gave():
    """Blind spot: a class that was left out, or whose fast form is farther from float64 than upstream's at its published size."""
    assert [model["published as"] for model in RECORD["models"]] == list(published.MODELS)
    assert {model["class"] for model in RECORD["models"]} == {type(case.model()).__name__ for case in CASES.values()}
    for model in RECORD["models"]:
        most = FARTHER.get(model["published as"], 2.0) * model["untouched"]
        assert model["difference"] < most and model["fused"] > 4 and model["spread"] > 0.01, model["published as"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_comparison_that_can_fail(monkeypatch, broken):
    """Blind spot: a model that is compared with itself."""
    case = CASES["depth-anything"]
    monkeypatch.setattr(published, "MODELS", {"small": (case.make, case.side)})
    if broken:
        accelerate = dpt.accelerate

        def breaking(model):
            accelerate(model).backbone.encoder.layer[0].mlp.fc1.weight.mul_(1.01)
            return model

        monkeypatch.setattr(dpt, "accelerate", breaking)
    found = published.compared("small")
    assert found["fused"] == case.fused and (found["difference"] > 2 * found["untouched"]) == broken

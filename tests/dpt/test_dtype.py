"""Half precision in prediction, on a CPU. Blind spots: GPUs, whose kernels round in other places; trained weights but for the carried."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import config, randomise, small
from torch import nn

import dpt
from dpt import factory
from dpt.commands import main
from dpt.commands.arguments import DTYPES
from dpt.inference.images import load_image
from dpt.inference.resizing import resize_and_normalise
from dpt.model import DPT
from dpt.nets.functional import LastConv2d, LastLinear
from dpt.zoo import CONFIGS

ROOT = Path(__file__).parents[2]
PICTURES = sorted((Path(dpt.__file__).parent / "examples").glob("*.png"))
AUDIT = {record["name"]: record for record in json.loads((ROOT / "docs" / "precision.json").read_text())["models"]}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MARGIN = 2  # over the audit's figures, which are of the network's map and of one processor; an error of a kind is many times as large
CARRIED = [name for name, found in CONFIGS.items() if found.carried]
HEADS = [  # of each kind of head and of what follows it
    "dpt-large-midas",
    "dpt-hybrid-kitti",
    "dpt-base-ade20k",
    "depth-anything-v2-metric-hypersim-small",
    "depth-anything-3-mono-large",
    "dpt-dinov2-small-nyu",
    "zoedepth-nk",
    "chmv2",
    "tipsv2-base",
]


@pytest.mark.parametrize("asked", [torch.float64, torch.int8, "bfloat16", np.float16, 16], ids=str)
def test_other_dtypes_are_refused(asked):
    """Blind spot: a model of eight bits without a word, or text that PyTorch explains; a refusal after a download."""
    said = "it must be one of torch.float32, torch.float16, torch.bfloat16, or None"
    for make in (
        lambda: dpt.build("dpt-tiny-depth", dtype=asked),
        lambda: dpt.load("nowhere.pth", dtype=asked),
        lambda: dpt.Predictor("dpt-tiny-depth", dtype=asked, device="cpu"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            make()
        assert f"dtype={asked!r}" in str(caught.value)


def test_the_command_takes_the_same(capsys):
    """Blind spot: two lists of three names."""
    assert {getattr(torch, name) for name in DTYPES} == set(factory.DTYPES)
    with pytest.raises(SystemExit, match="2"):
        main.main(["predict", "a.jpg", "-o", "out", "--dtype", "float64"])
    assert "'float64' (choose from 'float32', 'float16', 'bfloat16')" in capsys.readouterr().err


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CARRIED)
def test_predictions_are_near_float32s(name, dtype, fast):
    """Blind spot: half precision that is off by more than its roundings; a dtype that is dropped on the way, whose error would be none."""
    exact = dpt.build(name, weights="pretrained", fast=fast)
    half = dpt.build(name, weights="pretrained", fast=fast, dtype=HALVES[dtype])
    audit = AUDIT[name]["rounded"]["nothing else"][dtype]
    unit = torch.finfo(HALVES[dtype]).eps / 2
    assert audit["rms"] < 4 * unit  # the audit's own figures are those of roundings: a handful of units, of some hundred layers
    off, labels = [], []
    for expected, found in zip(exact.predict(PICTURES), half.predict(PICTURES), strict=True):
        if expected.depth is None:
            labels.append((expected.labels != found.labels).mean())
        else:
            assert found.depth.dtype == np.float32
            off.append((found.depth - expected.depth, expected.depth))
    if labels:
        share = AUDIT[name]["last layer"]["half"][dtype]["labels"]
        assert 0 < np.mean(labels) <= MARGIN * share
        return
    apart, of = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*off, strict=True))
    assert unit / 100 < np.abs(apart).max() / np.abs(of).max() <= MARGIN * audit["largest"]
    assert np.sqrt(np.square(apart).mean() / np.square(of).mean()) <= MARGIN * audit["rms"]


@pytest.mark.parametrize("dtype", HALVES)
def test_all_ways_lead_to_the_same(dtype, tmp_path):
    """Blind spot: a way in that drops the dtype or runs another."""
    expected = dpt.build("dpt-tiny-depth", weights="pretrained", dtype=HALVES[dtype]).predict(PICTURES[0]).depth
    file = tmp_path / "mine.safetensors"
    dpt.save(dpt.build("dpt-tiny-depth", weights="pretrained"), file)
    predictor = dpt.Predictor(weights=file, device="cpu", dtype=HALVES[dtype])
    arguments = ["predict", str(PICTURES[0]), "-o", str(tmp_path), "--model", "dpt-tiny-depth", "--dtype", dtype, "--device", "cpu"]
    assert main.main(arguments) == 0
    np.testing.assert_array_equal(np.load(next(tmp_path.glob("*.npy"))), expected)
    np.testing.assert_array_equal(dpt.load(file, dtype=HALVES[dtype]).predict(PICTURES[0]).depth, expected)
    np.testing.assert_array_equal(predictor({"path": np.array([str(PICTURES[0])], object)})["depth"][0], expected)


@pytest.mark.parametrize("options", [{}, {"tta": True}, {"window": 96, "stride": 96}], ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_pictures_are_prepared_in_float32(dtype, options):
    """Blind spot: a resize, or the normalisation, of numbers that are rounded already: a grey level at 200 would be one of 8 bits."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, model in (("exact", small()), ("half", small().to(HALVES[dtype]))):
        model.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
        model.predict(PICTURES[0], **options)
    assert len(seen["exact"]) == len(seen["half"])
    for exact, half in zip(seen["exact"], seen["half"], strict=True):
        assert exact.dtype == torch.float32 and half.dtype == HALVES[dtype] and torch.equal(exact.to(half.dtype), half)
    image, size = load_image(PICTURES[0]), config().input
    assert not torch.equal(resize_and_normalise(image, size, dtype=HALVES[dtype]).float(), resize_and_normalise(image, size))


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", HEADS)
def test_maps_are_float32_and_logits_the_models(name, dtype, fast):
    """Blind spot: a head whose last layer or what follows it rounds: all its depths would be numbers of half precision."""
    model = randomise(DPT(config(name, classes=7))).to(HALVES[dtype])
    side = 4 * model.config.encoder.patch_size
    with torch.inference_mode():
        found = (dpt.accelerate(model) if fast else model)(torch.randn(1, 3, side, side).to(HALVES[dtype]))
    maps = found if isinstance(found, dict) else {model.config.head.task: found}
    for task, values in maps.items():
        assert values.dtype == (HALVES[dtype] if task == "segmentation" else torch.float32)
        if task != "segmentation":
            inner = values[values != 0]
            rounded = (inner.to(HALVES[dtype]).float() == inner).float().mean()
            assert len(inner) and rounded < 0.5, (task, float(rounded))


def test_the_last_layers_are_pytorchs_in_float32():
    """Blind spot: other numbers in float32 or float64; a bias or a product that is rounded in half precision; autocast passed over."""
    x = torch.randn(2, 8, 5, 7)
    for last, plain, seen in ((LastConv2d(8, 3, 1), nn.Conv2d(8, 3, 1), x), (LastLinear(8, 3), nn.Linear(8, 3), x.movedim(1, -1))):
        plain.load_state_dict(last.state_dict())
        assert torch.equal(last(seen), plain(seen)) and torch.equal(last.double()(seen.double()), plain.double()(seen.double()))
        for half in HALVES.values():
            low = last.float().to(half)
            exact = plain.float()
            exact.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
            assert torch.equal(low(seen.to(half)), exact(seen.to(half).float()))
        last, plain = last.float(), plain.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(last(seen), plain(seen).float())

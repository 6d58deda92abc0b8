"""`dpt train`, of each kind of data, by its recipe: the named models made small."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import discs
import pytest
import torch
from PIL import Image
from small import config, randomise

import dpt
from dpt.classes import pascal_context
from dpt.commands import main
from dpt.training.recipes import RECIPES
from dpt.zoo import CONFIGS

OF_DATA = {name: recipe for name, recipe in RECIPES.items() if recipe.data != "folder"}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A recipe's models, small ones, and a file with what it starts from."""

    def made(recipe) -> str:
        classes = len(CONFIGS[recipe.model].head.classes)
        chosen = replace(config(recipe.model, classes=max(classes, 5)), name=recipe.model)
        monkeypatch.setitem(CONFIGS, recipe.model, chosen)
        if recipe.start_from in CONFIGS:
            source = config(recipe.start_from, classes=max(len(CONFIGS[recipe.start_from].head.classes), 5))
            dpt.save(randomise(dpt.DPT(source)), tmp_path / "start.safetensors")
            return str(tmp_path / "start.safetensors")
        encoder = randomise(dpt.DPT(chosen)).encoder.state_dict()  # a ViT of timm's
        torch.save({key.replace("patch_embed.", "patch_embed.proj."): value for key, value in encoder.items()}, tmp_path / "start.pth")
        return str(tmp_path / "start.pth")

    return made


@pytest.mark.parametrize("name", OF_DATA)
def test_each_recipe_trains_on_its_kind_of_data(name, small, tmp_path, capsys):
    """Blind spot: a recipe whose augmentation, classes, loss or protocol is not for its data, or whose weights do not fit."""
    recipe = OF_DATA[name]
    start = small(recipe)
    datasets.WRITERS[recipe.data](tmp_path / "data", 3)
    for path in (tmp_path / "data").glob("official_splits/*/*/*"):  # of NYUv2, whose crop is of pictures of one size
        Image.open(path).resize((640, 480), Image.Resampling.NEAREST).save(path)
    patch = CONFIGS[recipe.model].encoder.patch_size
    changes = [
        f"start_from={start}",
        f"crop={4 * patch},{4 * patch}",
        "steps=2",
        "batch_size=2",
        "validate_every=2",
        "warmup=1",
        "log_every=1",
    ]
    if recipe.augmentation.scale is not None:
        changes.append(f"augmentation.scale={16 * patch},{4 * patch}")
    command = [
        "train",
        name,
        "--data",
        str(tmp_path / "data"),
        "-o",
        str(tmp_path / "run"),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--no-fast",
    ]
    assert main.main([*command, "--set", *changes]) == 0
    figures = json.loads(capsys.readouterr().out)
    labels = CONFIGS[recipe.model].head.task == "segmentation"
    assert set(figures) >= {"step", *(("mIoU", "mAcc", "aAcc") if labels else ("delta1", "absrel", "rmse", "silog"))}
    losses = [row["loss"] for row in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if "loss" in row]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    trained, started = dpt.load(tmp_path / "run" / "best.safetensors"), torch.load(start) if recipe.start_from not in CONFIGS else None
    assert trained.config.head.classes == (pascal_context.CLASSES if recipe.classes == "data" else CONFIGS[recipe.model].head.classes)
    key = "encoder.blocks.1.attn.qkv.weight"
    before = started[key.removeprefix("encoder.")] if started else dpt.load(start).state_dict()[key]
    moved = (trained.state_dict()[key] - before).abs().max()
    assert 0 < moved < 0.01  # the weights that it starts from, two small steps on


def test_a_data_sets_own_classes(tmp_path, small):
    """Blind spot: a head of other classes than the data states, or named so; a checkpoint that a later run cannot go on from."""
    data = discs.write(tmp_path / "data", {"train": 4, "val": 2})
    names = ["ground", "a", "b", "c", "d", "e", "f", "disc"]
    for split in ("train", "val"):
        (data / split / "dataset.json").write_text(json.dumps({"classes": names}))
    start = small(RECIPES["ade20k-160k"])
    changes = [f"start_from={start}", "model=dpt-base-ade20k", "classes=data", "crop=64,64", "batch_size=2", "checkpoint_every=1"]
    command = ["train", "scenes", "--data", str(data), "-o", str(tmp_path / "run"), "--workers", "0", "--device", "cpu", "--set", *changes]
    assert main.main([*command, "steps=1"]) == 0
    model = dpt.load(tmp_path / "run" / "model.safetensors")
    assert model.config.head.classes == tuple(names) and model.config.name == "scenes"
    assert model.predict(data / "val" / "images" / "0.png").labels.max() < 8


def test_a_dry_run_trains_nothing(tmp_path, capsys):
    """Blind spot: a dry run that leaves a folder, or says less than what is asked: the recipe as --set takes it, data, memory."""
    data = discs.write(tmp_path / "data", {"train": 4, "val": 2})
    before = set(tmp_path.rglob("*"))
    command = ["train", "scenes", "--data", str(data), "-o", str(tmp_path / "run"), "--dry-run", "--set", "batch_size=4", "accumulate=2"]
    assert main.main(command) == 0
    said = capsys.readouterr().out
    recipe = RECIPES["scenes"].with_changes(["batch_size=4", "accumulate=2"])
    assert said.startswith(recipe.as_text()) and "2 pictures of 192x192 at a time" in said
    assert "4 pictures to learn from, 2 to validate on" in said
    (line,) = (line for line in said.splitlines() if line.startswith("saved for the backward"))
    plain, fast = map(float, line.split()[-2:])
    assert 0 < fast < plain
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ade20k-160k", "--data", "DATA"], "ADEChallengeData2016/images/training or .* is missing; expected: ADEChallengeData2016"),
        (["scenes", "--data", "DATA", "--set", "batch_size=5"], "holds 4 pictures, a batch is 5"),
        (["scenes", "--data", "DATA", "--set", "batch_sise=5"], "no field 'batch_sise' .did you mean 'batch_size'"),
        (["scenes", "--data", "DATA", "--set", "model=dpt-tiny-depth", "classes=data"], "predicts depth, which has no classes"),
        (["scenes", "--data", "DATA", "--set", "data=kitty"], "no kind of data is named 'kitty'"),
        (["scenes", "--data", "DATA", "--set", "protocol=ade20k", "batch_size=2"], "ade20k cannot be asked of dpt-tiny-scenes"),
        (["tipsv2-base", "--data", "DATA"], "cannot be trained: its tasks are"),
        (["scenes", "--data", "DATA", "--set", "batch_size=2", "start_from=nowhere.pth"], "nowhere.pth"),
    ],
)
def test_what_cannot_be_trained_is_said(words, message, tmp_path, capsys, monkeypatch):
    """Blind spot: a mistake that is found after hours, or that leaves a folder of a run."""
    monkeypatch.chdir(tmp_path)
    data = discs.write(tmp_path / "data", {"train": 4, "val": 2})
    recipe, *rest = (str(data) if word == "DATA" else word for word in words)
    assert main.main(["train", recipe, "-o", "run", "--device", "cpu", *rest]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not Path("run", "checkpoint.pt").exists()

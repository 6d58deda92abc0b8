"""That a training which was killed ends bit for bit as one that was not, alone and with several processes."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import both_ways
import discs
import pytest
import torch
import torchrun

import dpt
from dpt.data.augmentation import Augmentation
from dpt.data.datasets import FolderDataset
from dpt.training import runs
from dpt.training.recipes import Recipe
from dpt.training.runs import Training
from dpt.zoo import CONFIGS

SCENES = CONFIGS["dpt-tiny-scenes"]
ALL = Recipe(  # everything that has a state or draws at random
    model="dpt-tiny-scenes",
    name="all",
    crop=(32, 32),
    steps=7,
    batch_size=4,
    accumulate=2,
    warmup=2,
    layer_decay=0.9,
    drop_path=0.5,
    checkpointing=True,
    ema=0.9,
    coarse=0.5,
    coarse_size=(16, 32),
    log_every=3,
    validate_every=4,
    checkpoint_every=1,
    keep_every=3,
    augmentation=Augmentation(smallest=0.5),
)
WAYS = {
    "adamw": ALL,
    "sgd, no average": replace(ALL, optimizer="sgd", ema=None, accumulate=1, checkpointing=False),
    "float16": replace(ALL, amp="float16", steps=3, validate_every=3, learning_rate=1e-5),
    "bfloat16": replace(ALL, amp="bfloat16", steps=3, validate_every=3),
}


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return discs.write(tmp_path_factory.mktemp("data"), {"train": 6, "val": 2}, 48)


def training(root: Path, directory: Path, recipe: Recipe) -> Training:
    train, validation = (FolderDataset(root / split, SCENES.head) for split in ("train", "val"))
    return Training(recipe, train, validation, directory, workers=0)


def same(one, other) -> bool:
    """Whether two checkpoints hold the same, bit for bit, but for the clock's."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "seconds")
    return one == other


def without_clock(path: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in ("seconds", "pictures_per_second", "memory")} for row in rows]


def same_runs(one: Path, other: Path) -> bool:
    states = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (one, other)]
    weights = [dpt.load(path / name).state_dict() for path in (one, other) for name in ("model.safetensors", "best.safetensors")]
    return same(*states) and same(*weights[::2]) and same(*weights[1::2]) and without_clock(one) == without_clock(other)


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_steps(data, tmp_path, monkeypatch, way):
    """Blind spot: a model, optimiser, rate, sample, random number, scaler, average or sum of losses that a checkpoint has not. Killed in
    the middle of writing one, and between two."""
    recipe, chance = WAYS[way], random.Random(way)
    training(data, tmp_path / "whole", recipe).run()
    for deadly in sorted(chance.sample(range(1, recipe.steps + 1), 2)):
        run = training(data, tmp_path / "killed", replace(recipe))
        step, save = run._take_step, run.save

        def take(batches, step=step, run=run, deadly=deadly):
            if run.step == deadly and chance.random() < 0.5:
                raise Killed
            return step(batches)

        def write(save=save, run=run, deadly=deadly):
            if run.step == deadly:
                monkeypatch.setattr(torch, "save", lambda state, file: (file.write(b"half"), (_ for _ in ()).throw(Killed)))
            save()

        run._take_step, run.save = take, write
        with pytest.raises(Killed):
            run.run()
        monkeypatch.undo()
        assert not list((tmp_path / "killed").glob("*.part"))
    last = training(data, tmp_path / "killed", recipe)
    assert last.step >= deadly - 1
    last.run()
    assert same_runs(tmp_path / "whole", tmp_path / "killed")
    kept = {path.name for path in (tmp_path / "killed").glob("checkpoint*.pt")}
    assert kept == {"checkpoint.pt", *(f"checkpoint-{step:07d}.pt" for step in range(3, recipe.steps + 1, 3))}


@pytest.fixture(scope="module")
def ways(data, tmp_path_factory):
    """The runs of `both_ways.py`."""
    out = tmp_path_factory.mktemp("ways")
    torchrun.ended(torchrun.started(2, str(Path(both_ways.__file__)), str(data), str(out)))
    return out


def test_two_processes_of_which_one_is_killed(data, tmp_path, ways):
    """Blind spot: what only the first process saves and each has of its own; a process that waits for one that is gone. torchrun starts
    both again, and they go on."""
    chance, out = random.Random(), tmp_path / "run"  # another step and process in every run of the tests
    words = ["-m", "dpt", "train", "scenes", "--data", str(data), "-o", str(out), "--device", "cpu", "--workers", "0", "--set"]
    process, deadly = torchrun.started(2, *words, *both_ways.CHANGES, restarts=1), chance.randrange(1, 6)
    while process.poll() is None and (reached(out) < deadly or (rank := torchrun.of_rank(process, chance.randrange(2))) is None):
        time.sleep(0.01)
    os.kill(rank, signal.SIGKILL)
    torchrun.ended(process)
    assert json.loads((out / "run.json").read_text())["resumed_at"] >= deadly
    assert same_runs(ways / "whole", out)


def test_processes_with_folders_of_their_own_are_told(data, tmp_path, monkeypatch):
    """Blind spot: processes that go on from different steps, and wait for each other until they are stopped."""
    recipe = replace(ALL, steps=2)
    training(data, tmp_path, recipe).run()
    for found, told in (((True, False), "find a checkpoint: True, False"), ((2, 0), "go on from step: 2, 0")):
        monkeypatch.setattr(runs, "gathered", lambda value, found=found: list(found) if type(value) is type(found[0]) else [value])
        with pytest.raises(ValueError, match=f"{tmp_path}: the processes {told}; they must share one folder"):
            training(data, tmp_path, recipe)


def reached(out: Path) -> int:
    """The step of the last checkpoint."""
    path = out / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def test_shards_give_what_copies_give(data, ways):
    """Blind spot: FSDP2's shards that are saved as shards, averaged wrongly, or started from other numbers; a checkpoint of theirs that no
    other run can take up."""
    one, other = (torch.load(ways / way / "checkpoint.pt", weights_only=True) for way in ("ddp", "fsdp"))
    for part in ("model", "average"):
        assert one[part].keys() == other[part].keys()
        for key, value in one[part].items():
            torch.testing.assert_close(other[part][key], value, rtol=1e-4, atol=1e-6, msg=key)
    rows = [without_clock(ways / way)[0] for way in ("ddp", "fsdp")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    alone = training(data, ways / "fsdp", both_ways.RECIPE)
    assert alone.step == 3 and same(alone.model.state_dict(), other["model"])


def test_shards_killed(ways):
    """Blind spot: a shard that is taken up as another process's."""
    assert same_runs(ways / "fsdp", ways / "killed")

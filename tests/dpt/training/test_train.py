"""What a training sees and learns, and that one that is killed loses no more than a checkpoint interval."""

import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import discs
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from small import randomise
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dpt
from dpt.commands.main import parser_of
from dpt.data.augmentation import Augmentation
from dpt.data.crops import Crops
from dpt.data.datasets import FolderDataset
from dpt.evaluation.protocols import PROTOCOLS
from dpt.training import logs, states
from dpt.training.objective import normalised_inverse, objective
from dpt.training.optimization import rate
from dpt.training.recipes import Recipe
from dpt.training.runs import Training
from dpt.zoo import CONFIGS

ROOT = Path(__file__).parents[3]
DEPTH, SCENES = CONFIGS["dpt-tiny-depth"], CONFIGS["dpt-tiny-scenes"]
METRIC = DEPTH.with_("head", inverse=False, activation="sigmoid", max_depth=5.0)
HEADS = {config.head.task: config.head for config in (DEPTH, SCENES)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return discs.write(tmp_path_factory.mktemp("data"), {"train": 6, "val": 3})


def dataset(root, split="train", task="segmentation"):
    return FolderDataset(root / split, HEADS[task])


def crops(root, task="segmentation", augmentation=None):
    return Crops(dataset(root, task=task), SCENES.input, augmentation or Augmentation())


def recipe(**changes) -> Recipe:
    return replace(
        Recipe(model="dpt-tiny-scenes", crop=(64, 64), steps=4, batch_size=2, warmup=1, validate_every=2, checkpoint_every=1), **changes
    )


def training(root, directory, **changes) -> Training:
    chosen = recipe(**changes)
    task = CONFIGS[chosen.model].head.task
    return Training(chosen, dataset(root, "train", task), dataset(root, "val", task), directory, workers=0)


def test_samples_are_normalised_and_in_metres(data):
    """Blind spot: millimetres taken for metres, BGR, a wrong mean."""
    still = Augmentation(smallest=1, aspect=1, flip=0, colour=0)
    image, labels = crops(data, augmentation=still)[0, 0, (96, 96)]
    assert image.shape == (3, 96, 96) and labels.shape == (96, 96) and labels.dtype == torch.int64
    assert set(labels.unique().tolist()) == {1, 7}
    pixel = np.array(Image.open(data / "train" / "images" / "0.png"))[0, 0]
    assert image[:, 0, 0].tolist() == pytest.approx(((pixel / 255 - 0.5) / 0.5).tolist(), abs=1e-5)
    _, depth = crops(data, "depth", still)[0, 0, (96, 96)]
    assert depth[0, 0].item() == pytest.approx(4.0) and depth.min().item() == pytest.approx(1.0)


def test_samples_depend_on_seed_epoch_and_index_alone(data):
    """Blind spot: a global random state, which a resumed run does not share."""
    one, two = crops(data), crops(data)
    two[3, 1, (64, 64)]
    key, later = (5, 2, (64, 64)), (6, 2, (64, 64))
    assert torch.equal(one[key][0], two[key][0])
    assert not torch.equal(one[key][0], one[later][0])


def test_normalised_inverse_by_hand():
    """Blind spot: unknown pixels that set the range. Depths 1, 2, 4 have inverses 1, 1/2, 1/4, so 1, 1/3, 0."""
    depth = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]])
    assert normalised_inverse(depth, depth > 0).flatten().tolist() == pytest.approx([1, 1 / 3, 0, 0])


@pytest.mark.parametrize("terminate", [os.kill, os.killpg])
def test_terminated_with_workers(data, tmp_path, terminate):
    """Blind spot: the end of a batch job in the middle of a training: its workers, half a checkpoint, a traceback of each process. Some
    systems tell the process, others all of its processes."""
    command = [sys.executable, "-m", "dpt", "train", "scenes", "--data", str(data), "-o", str(tmp_path / "run"), "--no-fast"]
    command += ["--workers", "2", "--set", "steps=9999", "batch_size=2", "crop=64,64", "checkpoint_every=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    while not (tmp_path / "run" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    terminate(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and errors.endswith("\ndpt train: terminated\n") and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):  # nobody is left of its session
        os.killpg(process.pid, 0)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "run.json", "tensorboard"}
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 1


def test_terminated_between_two_words_of_a_worker(data, tmp_path):
    """Blind spot: a signal while a batch is handed over: the worker's thread that shares it prints a traceback of the cut connection."""
    code = """
import multiprocessing.connection, os, signal, sys
from dpt.commands import main
process, answer, answers = os.getpid(), multiprocessing.connection.answer_challenge, []
def interrupted(*arguments):
    answers.append(1)
    if os.getpid() == process and len(answers) == 3:
        os.kill(process, signal.SIGTERM)
    return answer(*arguments)
multiprocessing.connection.answer_challenge = interrupted
sys.exit(main.main(sys.argv[1:]))
"""
    command = ["train", "scenes", "--data", str(data), "-o", str(tmp_path / "run"), "--workers", "1"]
    command += ["--set", "steps=9999", "batch_size=2", "crop=64,64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 143 and ended.stderr.endswith("\ndpt train: terminated\n") and "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """A training, and the checkpoint after one of its four steps. Made once: a training for each checkpoint takes a second."""
    run = training(data, tmp_path_factory.mktemp("run"))
    run.recipe = replace(run.recipe, steps=1)
    run.run()
    run.recipe = replace(run.recipe, steps=4)
    state = torch.load(run.checkpoint, weights_only=True) | {"recipe": asdict(run.recipe)}
    torch.save(state, run.checkpoint)
    run.step = 0
    states.resume(run)
    assert run.step == 1
    return run, state


def without(state, removed):
    return {key: value for key, value in state.items() if key != removed}


def other_shapes(state):
    """The optimiser's averages of another model's parameters."""
    return state | {"optimizer": {name: values | {"exp_avg": torch.zeros(3)} for name, values in state["optimizer"].items()}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state, path: path.write_bytes(b""),
        lambda state, path: path.write_bytes(b"these are words"),
        lambda state, path: (torch.save(state, path), os.truncate(path, path.stat().st_size // 2)),
        lambda state, path: path.write_bytes(pickle.dumps(print)),
        lambda state, path: torch.save({"recipe": print}, path),
        lambda state, path: torch.save([1, 2], path),
        lambda state, path: torch.save(torch.zeros(3), path),
        lambda state, path: torch.save({}, path),
        *(lambda state, path, key=key: torch.save(without(state, key), path) for key in states.KEYS),
        *(lambda state, path, key=key: torch.save(state | {key: "x"}, path) for key in states.KEYS if key != "recipe"),
        *(lambda state, path, key=key: torch.save(state | {key: [1]}, path) for key in states.KEYS if key != "recipe"),
        lambda state, path: torch.save(state | {"step": 9}, path),
        lambda state, path: torch.save(state | {"since": 2}, path),
        lambda state, path: torch.save(state | {"more": 1}, path),
        lambda state, path: torch.save(state | {"average": state["model"]}, path),
        lambda state, path: torch.save(state | {"optimizer": {}}, path),
        lambda state, path: torch.save(state | {"model": {key: value[None] for key, value in state["model"].items()}}, path),
        lambda state, path: torch.save(other_shapes(state), path),
        lambda state, path: path.write_bytes(safetensors.torch.save({"a": torch.zeros(3)})),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_that_is_none(resumed, spoil):
    """Blind spot: a traceback from anywhere in PyTorch, or a training that goes on from nonsense; the file changed."""
    run, state = resumed
    path = run.checkpoint
    spoil(state, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"^{path}: not a checkpoint \([^\n]{{,200}}\): [^\n]*remove it, or give another folder$"):
        states.resume(run)
    assert path.read_bytes() == before


def test_what_is_in_the_way_is_told_before_anything_is_trained(data, tmp_path):
    """Blind spot: a log that cannot be written, hours later; a checkpoint that is none and is written over."""
    (tmp_path / "a" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a/log\.jsonl is a folder: a file is to be written there"):
        training(data, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint.pt").write_bytes(b"words")
    with pytest.raises(ValueError, match=r"b/checkpoint\.pt: not a checkpoint"):
        training(data, tmp_path / "b")
    (tmp_path / "c").write_bytes(b"a file")
    with pytest.raises(OSError, match="/c"):
        training(data, tmp_path / "c")


def test_another_recipe_is_refused(data, tmp_path):
    """Blind spot: two recipes mixed in one folder."""
    training(data, tmp_path, steps=1).run()
    with pytest.raises(ValueError, match="another recipe"):
        training(data, tmp_path, steps=2)


def test_classes_of_another_data_set_are_refused(data, tmp_path):
    """Blind spot: labels that mean something else."""
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "dataset.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    with pytest.raises(ValueError, match="has 2 classes, the model 9"):
        training(tmp_path / "data", tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("task", "spoil", "message"),
    [
        ("segmentation", lambda root: Image.new("L", (64, 64), 9).save(root / "labels" / "2.png"), r"labels/2\.png: holds the label 9"),
        ("segmentation", lambda root: (root / "labels" / "1.png").write_bytes(b"x"), r"labels/1\.png: "),
        ("depth", lambda root: Image.new("L", (64, 64), 9).save(root / "depth" / "0.png"), r"depth/0\.png: holds 8-bit integers"),
    ],
)
def test_targets_are_read_before_anything_is_trained(data, tmp_path, split, task, spoil, message):
    """Blind spot: a label outside the classes that ends a training with a traceback, hours later."""
    shutil.copytree(data, tmp_path / "data")
    spoil(tmp_path / "data" / split)
    with pytest.raises(ValueError, match=message):
        training(tmp_path / "data", tmp_path / "run", model=f"dpt-tiny-{'scenes' if task == 'segmentation' else task}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": (64, 60)}, r"crop=\(64, 60\): .* multiples of the patch size 16"),
        ({"crop": (0, 64)}, r"Recipe.crop=\(0, 64\)"),
        ({"coarse": 0.5, "coarse_size": (100, 96)}, r"coarse_size=\(100, 96\)"),
        ({"model": "dpt-tiny-depth"}, "was read for the head"),
        ({"batch_size": 7}, "holds 6 pictures, a batch is 7: it must be at most that many"),
    ],
)
def test_a_recipe_fits_its_model(data, tmp_path, changes, message):
    """Blind spot: an error from inside the encoder after the data was read; a model of depth that learns labels."""
    samples = dataset(data), dataset(data, "val")
    with pytest.raises(ValueError, match=message):
        Training(recipe(**changes), *samples, tmp_path / "run", workers=0)
    assert not (tmp_path / "run").exists()


def test_the_crop_is_the_recipes(data, tmp_path):
    """Blind spot: the bound of a model's inputs, 512x2048 for dpt-base-ade20k, taken for what a training sees; one patch refused."""
    run = training(data, tmp_path, crop=(16, 80))
    assert {tuple(images.shape[2:]) for images, _ in run._batches()} == {(16, 80)}
    crops = {name: Recipe.of(name).crop for name in dpt.models()}
    assert crops["dpt-base-ade20k"] == (512, 512) and crops["dpt-large-midas"] == (384, 384) and crops["dpt-tiny-depth"] == (192, 192)


def test_the_auxiliary_head_trains(data, tmp_path, monkeypatch):
    """Blind spot: a head that is in the checkpoint as it was initialised; a weight that is not applied."""
    auxiliary = SCENES.with_("head", auxiliary=True)
    monkeypatch.setitem(CONFIGS, SCENES.name, auxiliary)
    monkeypatch.setitem(HEADS, "segmentation", auxiliary.head)
    run = training(data, tmp_path)
    samples = crops(data)
    images, labels = map(torch.stack, zip(*(samples[0, index, (64, 64)] for index in range(4)), strict=True))
    run.model.eval()
    with torch.no_grad():
        main, deeper = (F.cross_entropy(logits, labels, ignore_index=255) for logits in run.model.forward_auxiliary(images))
        assert run._loss(images, labels).item() == pytest.approx((main + 0.2 * deeper).item(), rel=1e-5)
    before = run.model.auxiliary_head.classifier.weight.detach().clone()
    run.run()
    assert not torch.equal(before, run.model.auxiliary_head.classifier.weight)


def test_what_cross_entropy_is_averaged_over():
    """Blind spot: pixels without a label that count in a mean, as in mmsegmentation's, and not in others. Of three pixels two have a label,
    and all classes are as likely: ln 9 each."""
    labels = torch.tensor([[[0, 7, 255]]])
    for over, share in (("labelled", 1), ("all", 2 / 3)):
        loss = objective(SCENES.head, recipe(averaged_over=over), [torch.zeros(1, 9, 1, 3)], labels)
        assert loss.item() == pytest.approx(share * math.log(9))


def test_a_batch_without_labels_costs_nothing(data, tmp_path):
    """Blind spot: a mean over no pixel, NaN, that ends the training."""
    run = training(data, tmp_path)
    loss = run._loss(torch.zeros(2, 3, 64, 64), torch.full((2, 64, 64), 255))
    assert loss.item() == 0


def test_a_metric_model_learns_metres(data, tmp_path, monkeypatch):
    """Blind spot: metres that are learnt as inverse depth up to scale; truth beyond the model's range that takes part."""
    monkeypatch.setitem(CONFIGS, DEPTH.name, METRIC)
    monkeypatch.setitem(HEADS, "depth", METRIC.head)
    run = training(data, tmp_path, model=DEPTH.name)
    truth = torch.full((1, 32, 32), 2.0)
    truth[0, :16] = 50.0  # beyond the model's range
    run.model.eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32)
        found = run.model(x)
        error = (found[0, 16:].log() - math.log(2)).double()
        wanted = (error.square().mean() - 0.5 * error.mean() ** 2).sqrt().item()
        assert run._loss(x, truth).item() == pytest.approx(wanted, rel=1e-4)
        nearer = training(data, tmp_path / "nearer", model=DEPTH.name, max_depth=1.5)
        assert nearer._loss(x, truth).item() == pytest.approx(0, abs=1e-5)  # nothing is known up to there


@pytest.mark.parametrize("head", [DEPTH.head, METRIC.head], ids=["inverse", "metres"])
def test_the_sky_is_learnt_as_inverse_depth_0(data, tmp_path, monkeypatch, head):
    """Blind spot: a sky that is left out, as it is of metres and where the recipe says so, or that makes the loss infinite. The loss of
    inverse depth is that of a target whose last rows are as good as infinitely far."""
    monkeypatch.setitem(CONFIGS, DEPTH.name, replace(DEPTH, head=head))
    monkeypatch.setitem(HEADS, "depth", head)
    seen = training(data, tmp_path, model=DEPTH.name, max_depth=1e9, batch_size=2)
    left_out = training(data, tmp_path / "out", model=DEPTH.name, max_depth=1e9, sky=False)
    left_out.model.load_state_dict(seen.model.state_dict())
    x, truth = torch.randn(1, 3, 32, 32), 1 + torch.rand(1, 32, 32)
    truth[0, 24:] = torch.inf
    with torch.no_grad():
        found = [run._loss(x, truth).item() for run in (seen, left_out)]
        unknown = seen._loss(x, truth.where(truth.isfinite(), torch.zeros(()))).item()
        far = seen._loss(x, truth.clamp_max(1e8)).item()
    assert found[1] == pytest.approx(unknown, rel=1e-4)
    assert found[0] == pytest.approx(far if head.inverse else unknown, rel=1e-4) and abs(far - unknown) > 1e-3


def test_a_map_of_its_own_size_learns_at_the_targets(data, tmp_path, monkeypatch):
    """Blind spot: an error of shapes, or a target resized to the map instead, where a head has a size of its own: 64x64 of 48x48."""
    head = replace(METRIC.head, upsample=2)
    monkeypatch.setitem(CONFIGS, DEPTH.name, replace(METRIC, head=head))
    monkeypatch.setitem(HEADS, "depth", head)
    run = training(data, tmp_path, model=DEPTH.name)
    randomise(run.model)  # a map that is far from flat
    x, truth = torch.randn(1, 3, 48, 48), 0.1 + torch.rand(1, 48, 48)
    with torch.no_grad():
        found = run.model(x)
        assert found.shape == (1, 64, 64)
        error = (F.interpolate(found[None], size=(48, 48), mode="bilinear")[0].log() - truth.log()).double()
        wanted = (error.square().mean() - 0.5 * error.mean() ** 2).sqrt().item()
        assert run._loss(x, truth).item() == pytest.approx(wanted, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_training(data, tmp_path):
    """Blind spot: hours of NaN, saved over the last good checkpoint."""
    run = training(data, tmp_path, steps=3)
    run._loss = lambda images, targets: run.model.head.classifier.bias.sum() * torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        run.run()
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("head", [DEPTH.head, METRIC.head], ids=["inverse", "metres"])
def test_depth_training_lowers_its_loss(data, tmp_path, monkeypatch, head):
    """Blind spot: gradients that do not reach the encoder, or a loss that is not minimised. The same pictures before and after."""
    monkeypatch.setitem(CONFIGS, DEPTH.name, replace(DEPTH, head=head))
    monkeypatch.setitem(HEADS, "depth", head)
    steps = {"steps": 80, "warmup": 10, "validate_every": 80, "checkpoint_every": 80}
    run = training(data, tmp_path, model="dpt-tiny-depth", learning_rate=1e-3, **steps)
    weight = run.model.encoder.blocks[0].attn.qkv.weight
    pictures = crops(data, "depth")
    images, depths = map(torch.stack, zip(*(pictures[0, index, (64, 64)] for index in range(len(pictures))), strict=True))
    before = weight.detach().clone(), run._loss(images, depths).item()
    run.run()
    run.model.train()
    assert run._loss(images, depths) < 0.8 * before[1]
    assert not torch.equal(before[0], weight)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (CONFIGS["dpt-tiny-depth"], {"encoder", "fusion", "head"}),
        (CONFIGS["dpt-tiny-scenes"], {"encoder", "fusion"}),
        (CONFIGS["dpt-tiny-scenes"].with_("decoder", batch_norm=True), {"encoder"}),
    ],
    ids=["same", "another head", "another decoder"],
)
def test_start_from_takes_over_what_fits(data, tmp_path, source, parts):
    """Blind spot: a recipe whose initialisation is ignored, or that asks another decoder or head for weights it does not have."""
    source = dpt.build(source)
    dpt.save(source, tmp_path / "first.safetensors")
    second = training(data, tmp_path / "second", model="dpt-tiny-depth", start_from=str(tmp_path / "first.safetensors")).model
    taken, given = second.state_dict(), source.state_dict()

    def fits(part):
        return all(key in given and torch.equal(taken[key], given[key]) for key in taken if key.startswith(part))

    assert {part for part in ("encoder", "fusion", "head") if fits(part)} == parts


def test_a_licence_before_weights_to_start_from(data, tmp_path, monkeypatch):
    """Blind spot: a training that says which option is missing, and has none."""
    source = dpt.build("dpt-tiny-depth")
    dpt.save(source, tmp_path / "first.safetensors")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    restricted = replace(CONFIGS["dpt-tiny-depth"], source=(tmp_path / "first.safetensors").as_uri(), licence="CC-BY-NC-4.0")
    monkeypatch.setitem(CONFIGS, "restricted", restricted)
    with pytest.raises(ValueError, match="CC-BY-NC-4.0.*--accept-license"):
        training(data, tmp_path / "second", model="dpt-tiny-depth", start_from="restricted")
    chosen = recipe(model="dpt-tiny-depth", start_from="restricted")
    sets = (dataset(data, split, "depth") for split in ("train", "val"))
    second = Training(chosen, *sets, tmp_path / "second", workers=0, accept_license=True).model
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in source.state_dict().items())
    assert "--accept-license" in {option for action in parser_of("train")._actions for option in action.option_strings}


def test_the_first_steps_see_coarse_pictures(data, tmp_path):
    """Blind spot: a coarse size that is never used, or never left, also after a resumption."""
    run = training(data, tmp_path, steps=4, coarse=0.5, coarse_size=(32, 48))
    assert [tuple(images.shape[2:]) for images, _ in run._batches()] == [(32, 48)] * 2 + [(64, 64)] * 2
    run.step = 2
    assert [tuple(targets.shape[1:]) for _, targets in run._batches()] == [(64, 64)] * 2


def test_gradients_are_clipped(data, tmp_path):
    """Blind spot: one bad batch that throws the model away. By the norm that the optimiser sees."""
    run = training(data, tmp_path, steps=2, clip=1e-3)
    norms: list[float] = []

    def seen(*_) -> None:
        norms.append(torch.cat([each.grad.flatten() for each in run.model.parameters() if each.grad is not None]).norm().item())

    run.optimizer.register_step_pre_hook(seen)
    run.run()
    assert norms == pytest.approx([1e-3] * 2, rel=1e-3)


def test_what_is_written_when(data, tmp_path):
    """Blind spot: a log of one batch's loss, or of all since the start; a validation or a checkpoint too many, or not at the end."""
    run = training(data, tmp_path, steps=5, log_every=2, validate_every=3, checkpoint_every=4)
    losses, saved, loss, save = [], [], run._loss, run.save

    def noted(images, targets):
        value = loss(images, targets)
        losses.append(value.item())
        return value

    run._loss = noted
    run.save = lambda: (saved.append((run.step, run.seconds)), save())
    last = run.run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    trained, validated = [row for row in rows if "rate" in row], [row for row in rows if "miou" in row]
    assert rows[-1] == last and [row["step"] for row in trained] == [2, 4, 5] and [step for step, _ in saved] == [4, 5]
    windows = losses[:2], losses[2:4], losses[4:]
    assert [row["loss"] for row in trained] == pytest.approx([sum(window) / len(window) for window in windows])
    assert [row["rate"] for row in trained] == pytest.approx([1e-3 * rate(run.recipe, step - 1) for step in (2, 4, 5)])
    assert [row["step"] for row in validated] == [3, 5] and set(last) == {"step", "seconds", "miou", "accuracy"}
    seconds = [row["seconds"] for row in rows]
    assert 0 < seconds[0] and seconds == sorted(seconds) and seconds[-1] <= round(saved[-1][1], 1)
    assert set(trained[0]) == {"step", "seconds", "loss", "rate", "gradient", "pictures_per_second", "memory"}
    assert 0.05 < trained[0]["memory"] < 50 and trained[0]["pictures_per_second"] < 2 * 2 / 0.01


def test_the_clock_of_a_training(data, tmp_path, monkeypatch):
    """Blind spot: validations that count as training, whose pictures a second then fall with each of them; seconds that begin again. A step
    takes a second here, and a validation a hundred."""
    run = training(data, tmp_path, steps=6, log_every=2, validate_every=3)
    clock, step = [0.0], run._take_step
    monkeypatch.setattr("dpt.training.runs.time", SimpleNamespace(monotonic=lambda: clock[0]))  # no other thread's clock

    def take(batches):
        clock[0] += 1
        return step(batches)

    def validate():
        clock[0] += 100
        return {"miou": 0.5, "accuracy": 0.5}

    run._take_step, run.validate = take, validate
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["seconds"]) for row in rows] == [(2, 2), (3, 103), (4, 104), (6, 106), (6, 206)]
    assert [row["pictures_per_second"] for row in rows if "rate" in row] == [2.0] * 3


def test_what_a_run_leaves(data, tmp_path):
    """Blind spot: a recipe or versions that nobody can look up; a curve, a picture or TensorBoard's file that is not written; a model that
    was not the best."""
    run = training(data, tmp_path, steps=4, validate_every=2, saved_dtype="float16", keep_every=2)
    figures = iter([{"miou": 0.5, "accuracy": 0.1}, {"miou": 0.25, "accuracy": 0.9}])
    states_then = []

    def validate():
        states_then.append({key: value.clone() for key, value in run.model.state_dict().items()})
        return next(figures)

    run.validate = validate
    run.run()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    files = {"checkpoint.pt", "checkpoint-0000002.pt", "checkpoint-0000004.pt", "model.safetensors", "best.safetensors"}
    assert names == files | {"run.json", "log.jsonl", "curve.png", "pictures/step-0000002.png", "pictures/step-0000004.png"}
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["recipe"] == json.loads(json.dumps(asdict(run.recipe)))
    assert described["packages"]["torch"] == torch.__version__.split("+")[0] or described["packages"]["torch"] == torch.__version__
    assert described["data"]["train"]["pictures"] == 6 and described["resumed_at"] == 0 and described["processes"] == 1
    assert re.fullmatch(r"[0-9a-f]{40}\+?", described["commit"]) if (ROOT / ".git").exists() else described["commit"] is None
    for name, then in (("best", states_then[0]), ("model", states_then[1])):
        weights = safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        floats = [key for key, value in weights.items() if value.is_floating_point()]
        assert floats and all(torch.equal(weights[key], then[key].half()) for key in floats)
    curve, sheet = (Image.open(tmp_path / name) for name in ("curve.png", "pictures/step-0000004.png"))
    assert curve.width > 600 and sheet.size == (3 * 64, 3 * 68)
    (events,) = (tmp_path / "tensorboard").iterdir()
    accumulator = EventAccumulator(str(events)).Reload()
    assert [(each.step, each.value) for each in accumulator.Scalars("validation/miou")] == [(2, 0.5), (4, 0.25)]
    assert "training/loss" in accumulator.Tags()["scalars"] and accumulator.Tags()["images"] == ["predictions"]


def test_pictures_are_drawn_when_the_recipe_says(data, tmp_path):
    """Blind spot: pictures at validations alone, whatever was asked for."""
    training(data, tmp_path, steps=5, validate_every=3, pictures_every=2).run()
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"step-{step:07d}.png" for step in (2, 4, 5)]


@pytest.mark.parametrize("wanted", [True, False])
def test_whose_statistics_norms_have_is_the_recipes(data, tmp_path, monkeypatch, wanted):
    """Blind spot: norms that are exchanged whatever the recipe says, or never."""
    asked = []
    monkeypatch.setattr("dpt.training.runs.with_synchronised_norms", lambda model, device: asked.append(device) or model)
    training(data, tmp_path, sync_batch_norm=wanted)
    assert asked == [torch.device("cpu")] * wanted


def test_without_tensorboard(data, tmp_path, monkeypatch):
    """Blind spot: a training that asks for a package that only shows it."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    training(data, tmp_path, steps=1).run()
    assert not (tmp_path / "tensorboard").exists() and (tmp_path / "log.jsonl").exists()


def test_an_axis_a_unit(tmp_path, monkeypatch):
    """Blind spot: metres, shares, percent and a gradient of thousands on one axis, of which one is then a flat line; an empty axis."""
    seen = {}
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (seen.update(figure=figure), saved(figure, *a, **k)))
    names = {name for protocols in PROTOCOLS.values() for protocol in protocols for name in protocol.figures}
    trained = {"loss": 9.0, "rate": 1e-3, "gradient": 1e3, "pictures_per_second": 20.0, "memory": 8.0}
    rows = [{"step": 1, "seconds": 1, **trained}, {"step": 1, "seconds": 2, **dict.fromkeys(names, 0.5)}]
    logs.draw_curve(rows, tmp_path / "curve.png", "name")
    shown = {axis.get_ylabel(): {line.get_label() for line in axis.lines} for axis in seen["figure"].axes}
    alone = {"loss": "loss", "learning rate": "rate", "gradient's norm": "gradient", "pictures a second": "pictures_per_second"}
    assert shown == {unit: {name} for unit, name in alone.items()} | {
        "GB": {"memory"},
        "metres": {"rmse", "sqrel"},
        "percent": {"mIoU", "mAcc", "aAcc", "bad1"},
        "100 x ln": {"silog"},
        "ln": {"rmselog"},
        "log10": {"log10"},
        "share": {"absrel", "delta1", "delta2", "delta3", "miou", "accuracy", "sky", "whdr"},
    }


def test_an_epoch_sees_each_picture_once(data, tmp_path):
    """Blind spot: pictures drawn with replacement, or in one order for ever; an order that a resumed run does not go on with."""
    run = training(data, tmp_path, steps=8)
    keys = [key for batch in run._batches().batch_sampler for key in batch]
    epochs = [[index for epoch, index, _ in keys if epoch == number] for number in range(3)]
    assert [sorted(epoch) for epoch in epochs[:2]] == [list(range(6))] * 2 and len(epochs[2]) == 4 and len(keys) == 16
    assert epochs[0] != epochs[1]
    run.step = 4
    assert [key for batch in run._batches().batch_sampler for key in batch] == keys[8:]
    other = training(data, tmp_path / "other", steps=3, seed=1)
    assert [key for batch in other._batches().batch_sampler for key in batch] != keys[:6]

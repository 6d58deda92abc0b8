"""Models of several tasks: one pass through the network gives them all, and each is predicted and written as a model of it alone would."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from small import config as small_config
from small import small
from torch import nn

import dpt
from dpt.commands.main import main
from dpt.config import DPTConfig, HeadConfig, TaskConfig
from dpt.inference import outputs
from dpt.inference.options import Options
from dpt.inference.prediction import Prediction, predict
from dpt.training.objective import trained_config
from dpt.training.recipes import Recipe

FULL = small_config("tipsv2-base", classes=3).with_("input", size=(28, 28), grey_levels=False)
HEADS = {head.task: head for head in FULL.heads}
MAPS = {
    "depth": lambda x: 2 + x.mean(1),
    "segmentation": lambda x: x,
    # towards where the picture is brighter, and towards the eye
    "normals": lambda x: torch.stack(
        [(x.mean(1)[..., -7:] - x.mean(1)[..., :7]).mean((1, 2), keepdim=True).expand_as(x[:, 0]), x[:, 0], 1 + x[:, 1]], 1
    ),
}


class Stub(nn.Module):
    """A model that computes `MAPS` of some tasks on the normalised picture, and counts."""

    def __init__(self, *tasks: str):
        super().__init__()
        first, *others = (HEADS[task] for task in tasks)
        self.config = dataclasses.replace(FULL, head=first, further=tuple(TaskConfig(FULL.decoder, head) for head in others))
        self.parameter, self.runs, self.head = nn.Parameter(torch.zeros(())), 0, SimpleNamespace()
        self.further = {head.task: SimpleNamespace(head=SimpleNamespace()) for head in others}

    def forward(self, x):
        self.runs += 1
        found = {head.task: MAPS[head.task](x) for head in self.config.heads}
        return found if self.config.further else found[self.config.head.task]


OPTIONS = [{}, {"flip": True}, {"tta": True}, {"window": 28, "stride": 14, "scales": [2.0]}, {"slide": True, "tta": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_as_if_it_were_alone(options):
    """Blind spot: a task that gets another's maps, or the last scale's; the network run once for each."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    every = Stub("depth", "segmentation", "normals")
    found = predict(every, [picture, picture[:, :50]], batch_size=2, **options)
    for task, name in (("depth", "depth"), ("segmentation", "labels"), ("normals", "normals")):
        alone = Stub(task)
        for one, other in zip(found, predict(alone, [picture, picture[:, :50]], batch_size=2, **options), strict=True):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            empty = {field: getattr(other, field) for field in ("depth", "labels", "normals") if field != name}
            assert not any(value is not None for value in empty.values()) and other.size == one.size
        if task == "normals":
            assert alone.runs <= every.runs  # windows of depth are aligned to the whole, which is a run more
        if task == "depth":
            assert alone.runs == every.runs


def test_normals_of_a_mirrored_picture():
    """Blind spot: the x axis of a mirrored picture, which points the other way; a mean of unit vectors, which is shorter."""
    ramp = np.repeat(np.linspace(0, 255, 60).astype(np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    plain, both = (predict(Stub("normals"), ramp, flip=flip).normals for flip in (False, True))
    assert plain.dtype == np.float32 and plain.shape == (40, 60, 3) and (plain[..., 0] > 0.1).all()
    np.testing.assert_allclose(both, plain, atol=1e-5)
    for normals in (plain, predict(Stub("normals"), ramp, tta=True).normals):
        np.testing.assert_allclose(np.linalg.norm(normals, axis=2), 1, atol=1e-6)


def test_probability_is_of_the_task_that_has_it():
    """Blind spot: a probability that is refused because labels are not the first task."""
    picture = pictures.scene()
    found = predict(Stub("depth", "segmentation"), picture, probability=True)
    assert found.probability.shape == picture.shape[:2] and found.probability.dtype == np.float32
    with pytest.raises(ValueError, match="predicts depth and normals"):
        Options.of(Stub("depth", "normals").config, probability=True)


NORMALS = np.array([[[0, 0, 1], [1, 0, 0]], [[0, -1, 0], [np.nan, 0, 0]]], np.float32)


def test_normals_in_files(tmp_path):
    """Blind spot: axes in another order, -1 that wraps around, bytes of another range than 0..255. By hand."""
    record = {"source": ["a.jpg", 1, 2]}
    paths = outputs.write(tmp_path / "a", np.zeros((2, 2, 3), np.uint8), Prediction(normals=NORMALS), HEADS["normals"], record=record)
    assert [path.name for path in paths] == ["a_color.jpg", "a.npy", "a.png"]
    np.testing.assert_array_equal(np.load(paths[1]), NORMALS)
    assert Image.open(paths[0]).size == (4, 2)
    assert np.array(Image.open(paths[2])).tolist() == [[[128, 128, 255], [255, 128, 128]], [[128, 0, 128], [128, 128, 128]]]
    assert outputs.is_done(paths, record) and outputs.of_others(paths) is None


def test_names_of_several_tasks_fit():
    """Blind spot: a name that is too long only with the task behind it."""
    config = FULL
    name = outputs.result_name("x" * 300, config.name, outputs.separate_tasks(config))
    for head in config.heads:
        for path in outputs.result_paths(outputs.stem_of(Path(name), head, config), head, further=["pfm"]):
            assert len(path.name) <= outputs.NAME_BYTES
    one = dataclasses.replace(config, further=())
    assert outputs.separate_tasks(one) == [] and outputs.stem_of(Path("a"), one.head, one) == Path("a")


def test_the_command_writes_what_there_is(tmp_path, capsys):
    """Blind spot: one task's file over another's of the same name; a second run that does all again, or takes a part for the whole."""
    dpt.save(small("tipsv2-base"), tmp_path / "model.safetensors")
    (tmp_path / "photos").mkdir()
    Image.fromarray(pictures.scene()).save(tmp_path / "photos" / "a.png")
    arguments = ["predict", str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--weights", str(tmp_path / "model.safetensors")]

    def run(*more: str) -> str:
        assert main([*arguments, "--device", "cpu", *more]) == 0
        return capsys.readouterr().out

    assert "1 done" in run()
    name = "a_small tipsv2-base"
    endings = ["depth.npy", "depth.png", "depth_color.jpg", "normals.npy", "normals.png", "normals_color.jpg", "segmentation.png"]
    written = [*endings, "segmentation_overlay.jpg"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}_{ending}" for ending in written]
    assert np.array(Image.open(tmp_path / "out" / f"{name}_normals.png")).shape == pictures.scene().shape
    assert "1 done before" in run()
    (tmp_path / "out" / f"{name}_normals.png").unlink()
    assert "1 done," not in (told := run()) and "1 done before" not in told and "1 done" in told
    (tmp_path / "out" / f"{name}_segmentation.png").write_bytes(b"somebody's")
    assert main([*arguments, "--device", "cpu"]) == 1 and "segmentation.png was not made by dpt predict" in capsys.readouterr().err


def test_configurations_of_several_tasks():
    """Blind spot: one task twice, of which a prediction holds one; a decoder in another precision."""
    task = TaskConfig(FULL.decoder, HEADS["depth"])
    with pytest.raises(ValueError, match="the tasks are depth, depth, of which each must be another"):
        dataclasses.replace(FULL, further=(task,))
    half = TaskConfig(dataclasses.replace(FULL.decoder, float32=True), HEADS["normals"])
    with pytest.raises(ValueError, match="float32 is of all decoders, or of none"):
        dataclasses.replace(FULL, further=(half,))
    with pytest.raises(ValueError, match=r"DPTConfig\.further=.*each a TaskConfig"):
        dataclasses.replace(FULL, further=(HEADS["normals"],))
    with pytest.raises(ValueError, match=r"TaskConfig\.head=None: it must be a HeadConfig"):
        TaskConfig(FULL.decoder, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda further: "many", "further is a str: it must be a list"),
        (lambda further: [1], r"further\[0\] is a int: it must be an object"),
        (lambda further: [{"decoder": further[0]["decoder"]}], r"further\[0\]\.head is missing"),
        (lambda further: [{**further[0], "colour": 1}], r"further\[0\]\.colour=1: no such field"),
        (lambda further: [{**further[0], "head": {"task": "flow"}}], r"HeadConfig\.task='flow'"),
    ],
)
def test_a_file_states_its_tasks(change, message):
    """Blind spot: a traceback, or a model without them, from a file whose further tasks are damaged."""
    import json

    from dpt.config import config_from

    values = json.loads(json.dumps(dataclasses.asdict(FULL)))
    assert config_from(values) == FULL
    with pytest.raises(ValueError, match=message):
        config_from({**values, "further": change(values["further"])})


def test_a_training_has_one_task(tmp_path):
    """Blind spot: a dictionary that reaches the loss."""
    with pytest.raises(ValueError, match="tipsv2-base cannot be trained: its tasks are depth, segmentation, normals"):
        trained_config(Recipe.of("tipsv2-base"), tmp_path)


def test_made_of_the_first_task_alone():
    """Blind spot: `further` that changes what a model of one task gives."""
    one: DPTConfig = dataclasses.replace(FULL, further=())
    model = dpt.model.DPT(one)
    assert isinstance(model(torch.rand(1, 3, 28, 42)), torch.Tensor) and not hasattr(model, "further")
    assert isinstance(HEADS["depth"], HeadConfig) and one.heads == (HEADS["depth"],)

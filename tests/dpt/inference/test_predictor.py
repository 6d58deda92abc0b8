"""`dpt.Predictor` on batches of rows, and in Ray Data's actors. Blind spots: GPUs; several machines."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from small import config, randomise, small

import dpt
from dpt.classes import palette
from dpt.config import numbered_classes

ROOT = Path(__file__).parents[3]
GREY = pictures.luma(pictures.scene(40, 30))
SEVERAL_TASKS = config("tipsv2-base", classes=3)
MANY_CLASSES = config("dpt-base-ade20k").with_("head", classes=numbered_classes(257), palette=palette(257))
CLEAR = np.dstack([pictures.scene(30, 40), np.full((30, 40), 128, np.uint8)])


def saved(model: dpt.DPT, folder: Path) -> Path:
    dpt.save(model, folder / f"{model.config.name}.safetensors")
    return folder / f"{model.config.name}.safetensors"


def column(*values: object) -> np.ndarray:
    """An object array of one value a row."""
    found = np.empty(len(values), object)
    for row, value in enumerate(values):
        found[row] = value
    return found


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model() -> dpt.DPT:
    return pictures.lively_model(config("dpt-large-midas"))


@pytest.fixture(scope="module")
def predictor(model, tmp_path_factory) -> dpt.Predictor:
    return dpt.Predictor(model.config, weights=saved(model, tmp_path_factory.mktemp("weights")), device="cpu", batch_size=2)


def test_each_row_has_its_own_map(predictor, model, tmp_path):
    """Blind spot: rows out of step, from each column of pictures: arrays of one size and of several, grey and transparent ones, contents of
    files, paths; a column of the batch's that is lost."""
    images = [pictures.scene(), GREY, CLEAR, pictures.scene()[::-1].copy()]
    wanted = [model.predict(image).depth for image in images]
    assert not np.allclose(wanted[0], wanted[3], rtol=1e-2)
    files = [tmp_path / f"{index}.png" for index in range(4)]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(png(image))
    names = np.array([str(file) for file in files])
    batches = [
        {"image": column(*images), "path": names},
        {"bytes": column(*map(png, images)), "path": names},
        {"path": names, "number": np.arange(4)},
    ]
    for batch in batches:
        rows = predictor(batch)
        assert rows.keys() == {*batch, "depth", "error"} and list(rows["error"]) == [""] * 4
        assert all(rows[name] is values for name, values in batch.items())
        for found, depth in zip(rows["depth"], wanted, strict=True):
            np.testing.assert_allclose(found, depth, rtol=1e-4, atol=1e-6)
    same = np.stack([images[0], images[3]])
    same.flags.writeable = False  # as Ray's are
    for found, depth in zip(predictor({"image": same})["depth"], (wanted[0], wanted[3]), strict=True):
        np.testing.assert_allclose(found, depth, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_read_is_a_row_too(predictor):
    """Blind spot: a job that one picture ends; a row without its reason, or with the name of none; the rows behind it one too early."""
    good = png(pictures.scene())
    rows = predictor({"bytes": column(b"", good, None, b"text", good[:60], good), "path": np.array(list("abcdef"))})
    assert [bool(error) for error in rows["error"]] == [True, False, True, True, True, False]
    assert rows["error"][0] == "a: the file is empty" and rows["error"][3].startswith("d: not a picture") and "NoneType" in rows["error"][2]
    sizes = [depth.shape for depth in rows["depth"]]
    assert sizes == [(0, 0), (48, 64), (0, 0), (0, 0), (0, 0), (48, 64)]
    assert {depth.dtype for depth in rows["depth"]} == {np.dtype("float32")}
    (error,) = predictor({"image": np.zeros((1, 4, 4, 2), np.uint8)})["error"]
    assert error == "the array: 1, 3 or 4 channels are wanted, not the shape (4, 4, 2)"
    assert len(predictor({"path": np.array([], object)})["depth"]) == 0


@pytest.mark.parametrize(("of", "dtype"), [(SEVERAL_TASKS, np.uint8), (MANY_CLASSES, np.int16)], ids=["several-tasks", "many-classes"])
def test_every_task_has_its_column(of, dtype, tmp_path):
    """Blind spot: a task left out; an empty map of another type or number of sides than the others, beside which Arrow has no place."""
    model = randomise(dpt.DPT(of))
    predictor = dpt.Predictor(weights=saved(model, tmp_path), device="cpu", probability=True)
    rows, prediction = predictor({"bytes": column(png(GREY), b"")}), model.predict(GREY, probability=True)
    columns = {"depth": "depth", "segmentation": "labels", "normals": "normals"}
    assert rows.keys() == {"bytes", "probability", "error", *(columns[head.task] for head in of.heads)}
    for name in rows.keys() - {"bytes", "error"}:
        wanted = getattr(prediction, name)
        np.testing.assert_allclose(rows[name][0], wanted, rtol=1e-4, atol=1e-5)
        assert rows[name][1].size == 0 and rows[name][1].ndim == wanted.ndim and rows[name][1].dtype == wanted.dtype
    assert rows["labels"][0].dtype == dtype


def test_a_prompt_is_a_column(tmp_path):
    """Blind spot: one sensor's depth for all pictures, or that of another; a model that needs one and gets none."""
    model = small("prompt-depth-anything-small")
    predictor = dpt.Predictor(model.config, weights=saved(model, tmp_path), device="cpu", batch_size=2)
    images = [pictures.scene(), pictures.scene()[::-1].copy()]
    prompts = np.random.default_rng(0).uniform(1, 4, (2, 6, 8)).astype(np.float32)
    rows = predictor({"image": np.stack(images), "prompt": prompts})
    for depth, image, prompt in zip(rows["depth"], images, prompts, strict=True):
        np.testing.assert_allclose(depth, model.predict(image, prompt=prompt).depth, rtol=1e-4)
    with pytest.raises(ValueError, match=r"\['image'\]: small prompt-depth-anything-small needs 'prompt'"):
        predictor({"image": np.stack(images)})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tat": True}, TypeError, "'tat' .did you mean 'tta'"),
        ({"prompt": "depth.npy"}, TypeError, "'prompt'"),
        ({"batch_size": 0}, ValueError, "batch_size is a positive integer, not 0"),
        ({"scales": [0]}, ValueError, "scales are positive numbers"),
        ({"probability": True}, ValueError, "probability is of the winning class"),
        ({"weights": None, "name": None}, ValueError, "name=None, weights=None"),
        ({"weights": None, "name": "dpt-large-mida"}, ValueError, "dpt-large-mida"),
        ({"weights": "missing.safetensors"}, FileNotFoundError, "missing.safetensors"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(predictor, options, error, message):
    """Blind spot: an option that is passed over, or refused only with the first batch, on another machine."""
    arguments = {**predictor.__reduce__()[0].keywords, **options}
    with pytest.raises(error, match=message):
        dpt.Predictor(**arguments)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"picture": column(1)}, r"\['picture'\]: it needs one of image, bytes, path"),
        ({"path": column("a"), "depth": column(1)}, "'depth' already"),
    ],
)
def test_columns_that_are_missing_or_taken(predictor, batch, message):
    """Blind spot: a truth in the column `depth` that is overwritten."""
    with pytest.raises(ValueError, match=message):
        predictor(batch)


def test_it_is_sent_to_other_processes(model, tmp_path):
    """Blind spot: an object that cannot be pickled, or that forgets how it was made."""
    path = saved(model, tmp_path)
    first = dpt.Predictor(model.config, weights=path, device="cpu", fast=True, dtype=torch.float16, flip=True)
    second = pickle.loads(pickle.dumps(first))
    assert {parameter.dtype for parameter in second.model.parameters()} == {torch.float16}
    assert any(row.fused for row in dpt.fast_report(second.model))
    batch = {"image": pictures.scene()[None]}
    depth, wanted = second(batch)["depth"][0], first(batch)["depth"][0]
    np.testing.assert_array_equal(depth, wanted)
    assert not np.array_equal(wanted, first.model.predict(batch["image"][0]).depth) and np.isfinite(wanted).all()
    assert len(pickle.dumps(first)) < path.stat().st_size / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the processes of a cluster of Ray's run: on this machine, and with four processors as it counts them, two for
    actors and the others for reading and writing."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1")):
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("cluster")
        patch.chdir(folder)
        how = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        ray.init(num_cpus=4, object_store_memory=100 << 20, **how)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield folder
        ray.shutdown()


def descendants(process: int) -> list[int]:
    """All processes that one has started, and that these have."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:  # a thread that has ended
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def kill_one_at_work(over: threading.Event, killed: list[int]) -> None:
    """SIGKILL to the first of Ray's actors that is seen to have a batch."""
    while not over.wait(0.01):
        for process in descendants(os.getpid()):
            try:
                title = Path(f"/proc/{process}/cmdline").read_bytes()
            except OSError:
                continue
            if re.match(rb"ray::MapWorker\(MapBatches\(Predictor\)\)\.submit", title):
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                return


def test_the_readmes_example_with_an_actor_killed(folder):
    """Blind spot: an example that nobody ran; pictures that are lost, or there twice, with the actor that had them."""
    (block,) = re.findall(r"```python\n(import ray\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    parquet = importlib.import_module("pyarrow.parquet")  # which an installation without Ray has not
    photos = folder / "photos"
    photos.mkdir()
    for index in range(40):
        Image.fromarray(np.roll(pictures.scene(48 + index % 3, 64), index, axis=1)).save(photos / f"{index:02}.png")
    (photos / "broken.jpg").write_bytes(b"text")
    over, killed = threading.Event(), []
    killer = threading.Thread(target=kill_one_at_work, args=(over, killed))
    killer.start()
    try:
        exec(block, {})
    finally:
        over.set()
        killer.join()
    assert len(killed) == 1
    rows = sorted(parquet.read_table(folder / "maps").to_pylist(), key=lambda row: row["path"])
    assert [Path(row["path"]).name for row in rows] == sorted(path.name for path in photos.iterdir())
    assert rows[-1]["error"].startswith("photos/broken.jpg: not a picture")
    assert rows[-1]["depth"].shape == (0, 0)
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    for row in rows[:-1]:
        assert row.keys() == {"path", "depth", "error"} and row["error"] == ""
        np.testing.assert_allclose(row["depth"], model.predict(row["path"]).depth, rtol=1e-3)

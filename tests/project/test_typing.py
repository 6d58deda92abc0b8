"""What a type checker makes of a user's program: mypy, strict, on one that is right and on one that is wrong in every line."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpt
from dpt.inference.options import Choices, Options, PredictOptions
from dpt.inference.prediction import predict_iter

ROOT = Path(__file__).parents[2]
HEAD = """
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from typing_extensions import assert_type

import dpt

model = dpt.build("dpt-tiny-depth", weights="pretrained")
"""
RIGHT = """
assert_type(model, dpt.DPT)
assert_type(model.eval().to("cuda"), dpt.DPT)
assert_type(model(torch.zeros(1, 3, 192, 192)), torch.Tensor)
assert_type(model.config, dpt.DPTConfig)
assert_type(model.config.with_("encoder", attention="xformers"), dpt.DPTConfig)
assert_type(dpt.models(), list[str])
assert_type(dpt.zoo.CONFIGS["dpt-tiny-depth"], dpt.DPTConfig)
assert_type(dpt.load("dpt-base.pth", fast=True, device="cuda", dtype=torch.float16), dpt.DPT)
assert_type(dpt.load(Path("mine.safetensors"), model.config), dpt.DPT)
assert_type(dpt.build(model.config, fast=True, device=torch.device("cpu"), attention="sdpa"), dpt.DPT)
assert_type(dpt.load(nn.Linear(3, 3)), dpt.DPT)  # for one of transformers'
dpt.to_transformers(model, "dpt").save_pretrained("theirs")
assert_type(dpt.export(model, "mine.onnx", size=(192, 192), processing=True).files, tuple[Path, ...])
dpt.save(model, "mine.safetensors", torch.float16)

picture = np.asarray(Image.open("scene.png"))
assert_type(model.predict("scene.png"), dpt.Prediction)
assert_type(model.predict(Path("scene.png")), dpt.Prediction)
assert_type(model.predict(picture), dpt.Prediction)
assert_type(model.predict(torch.zeros(3, 8, 8)), dpt.Prediction)
assert_type(model.predict(Image.open("scene.png")), dpt.Prediction)
with open("scene.png", "rb") as file:
    assert_type(model.predict(file, max_pixels=1 << 20), dpt.Prediction)
assert_type(model.predict(["a.png", "b.png"], batch_size=2, tta=True), list[dpt.Prediction])
assert_type(model.predict(Path("photos").glob("*.png")), list[dpt.Prediction])
assert_type(model.predict((picture, picture), slide=True, window=192, stride=(128, 128)), list[dpt.Prediction])
prediction = model.predict("scene.png", scales=[0.5, 1], flip=True, probability=False)
assert_type(prediction.size, tuple[int, int])
if prediction.depth is not None:
    assert_type(prediction.depth, np.ndarray)

assert_type(dpt.accelerate(model, strict=True), dpt.DPT)
assert_type(dpt.accelerate(nn.Sequential(model)), nn.Sequential)
assert_type(dpt.graphed(model, most=4), dpt.DPT)
assert_type(model.predict("scene.png", graph=False), dpt.Prediction)
report = dpt.fast_report(model)
assert_type([row.name for row in report if row.fused], list[str])
print(report)
predictor = dpt.Predictor("dpt-tiny-depth", device="cpu", dtype=torch.float16, batch_size=4, flip=True)
assert_type(predictor({"image": picture[None]}), dict[str, np.ndarray])
assert_type(predictor.model, dpt.DPT)
try:
    dpt.load("Intel/dpt-large")
except dpt.CheckpointError as error:
    print(error)
"""
WRONG = """
dpt.biuld()
dpt.build(3)
dpt.build(wieghts="pretrained")
dpt.build(weights="pretrained", device=0.5)
dpt.load(3)
dpt.load("mine.safetensors", dtype="float16")
dpt.save(nn.Linear(3, 3), "mine.safetensors")
dpt.save(model, None)
dpt.to_transformers(nn.Linear(3, 3), "dpt")
dpt.to_transformers(model)
dpt.models(3)
dpt.accelerate("dpt-tiny-depth")
dpt.accelerate(nn.Sequential(model)).predict("scene.png").depth.mean()
dpt.fast_report(model)[0].speed
dpt.graphed(model, most="4")
dpt.DPT("dpt-tiny-depth")
dpt.DPTConfig("mine")
dpt.Prediction(depth=3)
dpt.Predictor("dpt-tiny-depth", tat=True)
dpt.Predictor(weights=3)
dpt.Predictor("dpt-tiny-depth")([picture])
model("scene.png")
model.predict(3)
model.predict([3])
model.predict("scene.png", batch="2")
model.predict("scene.png", batch_size="2")
model.predict("scene.png", scales=0.5)
model.predict("scene.png", window="192")
model.predict("scene.png").map
model.predict("scene.png").depth.mean()
model.predict(["scene.png"]).depth
model.predict("scene.png")[0]
model.config.name = "mine"
depth: str = model(torch.zeros(1, 3, 192, 192))
names: list[int] = dpt.models()
other: dpt.Prediction = dpt.load("mine.safetensors")
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory) -> dict[str, dict[int, list[str]]]:
    """What mypy says of the two programs: errors by file and line. What it made of PyTorch's hints is kept for the next run."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "right.py").write_text(HEAD + RIGHT)
    (folder / "wrong.py").write_text(HEAD + WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += [f"--cache-dir={ROOT / '.mypy_cache' / 'users'}", "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    found: dict[str, dict[int, list[str]]] = {"right.py": {}, "wrong.py": {}}
    for file, line, message in re.findall(r"^(.*?):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        found[file].setdefault(int(line), []).append(message)
    return found


def test_a_right_program_is_accepted(complaints):
    """Blind spot: a public name whose type a checker cannot see, or sees wrongly; one that no program here uses."""
    assert complaints["right.py"] == {}
    assert all(f"dpt.{name}" in RIGHT for name in dpt.__all__)


def test_each_mistake_is_told(complaints):
    """Blind spot: a name whose type is Any, with which every mistake passes."""
    first = HEAD.count("\n") + 2
    assert sorted(complaints["wrong.py"]) == list(range(first, first + len(WRONG.strip().splitlines())))


def test_a_type_checker_knows_every_option():
    """Blind spot: an option of predict that runs, and that a checker refuses."""
    of_options = set(inspect.signature(Options.of).parameters) - {"config"}
    assert set(Choices.__annotations__) == of_options
    of_predicting = {
        name for name, parameter in inspect.signature(predict_iter).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert set(PredictOptions.__annotations__) == of_options | of_predicting

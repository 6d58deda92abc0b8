"""What the commands that run a model share: --device, --fast, --verbose, and what is said of the carried models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from small import config, randomise

import dpt
from dpt import devices
from dpt.commands import main, running
from dpt.system.endings import CommandError
from dpt.training.runs import Training
from dpt.zoo import CONFIGS, PARAMETERS

ROOT = Path(__file__).parents[3]
DEPTH = replace(config("dpt-tiny-depth", embed_dim=64, num_heads=2).with_("input", size=(32, 32)), name="dpt-tiny-depth")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "depth.safetensors"
    dpt.save(randomise(dpt.DPT(DEPTH)), path)
    return str(path)


@pytest.fixture
def small(monkeypatch):
    """The named model is a small one, and training draws no curves."""
    monkeypatch.setitem(CONFIGS, "dpt-tiny-depth", DEPTH)
    monkeypatch.setattr("dpt.training.logs.draw_curve", lambda *arguments: None)


@pytest.fixture
def data(tmp_path):
    """A data set of two pictures, which is its own train/ and val/."""
    root = tmp_path / "data"
    for folder in ("images", "depth"):
        (root / folder).mkdir(parents=True)
    for name in "ab":
        Image.fromarray(pictures.scene()).save(root / "images" / f"{name}.png")
        Image.fromarray((1000 + np.indices((48, 64)).sum(0) * 20).astype(np.uint16)).save(root / "depth" / f"{name}.png")
    for split in ("train", "val"):
        (root / split).symlink_to(root)
    return root


def commands(data: Path, weights: str, out: Path) -> dict[str, list[str]]:
    return {
        "predict": ["predict", str(data / "images"), "-o", str(out), "--weights", weights],
        "evaluate": ["evaluate", "--data", str(data), "--weights", weights, "--json", str(out) + ".json"],
        "train": [
            *("train", "scenes-depth", "--data", str(data), "-o", str(out), "--workers", "0"),
            *("--set", f"start_from={weights}", "crop=32,32", "steps=2", "batch_size=1", "coarse=0", "log_every=1"),
        ],
        "demo": ["demo", "-o", str(out)],
    }


def outcome(command: str, out: Path) -> np.ndarray:
    """What a command computed."""
    if command == "predict":
        return np.stack([np.load(path) for path in sorted(out.glob("*.npy"))])
    if command == "evaluate":
        return np.array(list(json.loads(Path(f"{out}.json").read_text())["figures"]["dpt-tiny-depth"].values()))
    return np.array([row["loss"] for row in rows_of(out) if "loss" in row])


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", ["predict", "evaluate", "train"])
def test_fast_is_the_same_on_other_modules(command, small, data, weights, tmp_path, monkeypatch, capsys):
    """Blind spot: an option that does not reach the model, or changes more than rounding; a report nobody asked for, or none."""
    models = []
    monkeypatch.setattr(running, "report", lambda model, report=running.report: (models.append(model), report(model)))
    found, said = {}, {}
    for options in ([], ["-v"], ["--fast", "--verbose"], ["--no-fast", "-v"]):
        out = tmp_path / f"out{len(found)}"
        assert main.main([*commands(data, weights, out)[command], "--device", "cpu", *options]) == 0
        key = " ".join(options)
        found[key], said[key] = outcome(command, out), capsys.readouterr().err
    assert "run fused" not in said[""] and all(said[key].count("run fused") == 1 for key in list(said)[1:])
    assert "\n0 of " in said["-v"] and "\n0 of " in said["--no-fast -v"] and re.search(r"\n(\d+) of \1 run fused", said["--fast --verbose"])
    assert [type(model.head).__name__ for model in models] == ["DepthHead", "FastDepthHead", "DepthHead"]
    assert found[""].size and np.isfinite(found[""]).all() and (found[""] == found["-v"]).all()
    np.testing.assert_allclose(found["--fast --verbose"], found[""], rtol=1e-5)


def test_a_training_goes_on_fused_where_it_ended_plain(small, data, weights, tmp_path, capsys):
    """Blind spot: fast as a part of the recipe, or a checkpoint that only the modules read that wrote it."""
    command = [*commands(data, weights, tmp_path / "run")["train"], "steps=4", "checkpoint_every=2", "validate_every=2"]
    logs = []
    for first, then in (("--no-fast", "--no-fast"), ("--fast", "--no-fast"), ("--no-fast", "--fast")):
        command[command.index("-o") + 1] = str(tmp_path / f"run {first} {then}")
        run = [*command, "--device", "cpu"]
        save = Training.save

        def die(self, save=save):
            save(self)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "save", die)
            assert main.main([*run, first]) == 130
        assert main.main([*run, then]) == 0
        capsys.readouterr()
        logs.append((rows_of(tmp_path / f"run {first} {then}"), json.loads((tmp_path / f"run {first} {then}" / "run.json").read_text())))
    losses = [[row["loss"] for row in rows if "loss" in row] for rows, _ in logs]
    assert all(len(found) == 4 and described["resumed_at"] == 2 for found, (_, described) in zip(losses, logs, strict=True))
    assert all(described["recipe"] == logs[0][1]["recipe"] for _, described in logs)
    for found in losses[1:]:
        np.testing.assert_allclose(found, losses[0], rtol=1e-5)


def test_fast_by_default_on_cuda_where_triton_is():
    """Blind spot: --no-fast on CUDA, or --fast on a CPU, overruled by the default; the default an error where Triton is missing."""
    assert [devices.runs_fast(asked, device) for device in (CPU, CUDA) for asked in (None, True, False)] == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]


def test_without_triton(weights, data, tmp_path):
    """Blind spot: commands that need Triton, with `--fast` or without; others that find what stood in for it. One process, which cannot
    import it."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from dpt import devices
from dpt.commands.main import main
print([devices.runs_fast(asked, torch.device("cuda")) for asked in (None, False)])
command = sys.argv[1:]
print([main([*command, "--overwrite", *options]) for options in (["--no-fast"], ["-v"], ["--fast", "-v"])])
try:
    import triton
except ImportError:
    print([name for name in sys.modules if name.startswith("triton.")])
"""
    command = commands(data, weights, tmp_path / "out")["predict"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True, timeout=300)
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and lines[0] == "[False, False]" and lines[-2:] == ["[0, 0, 0]", "[]"], process.stderr
    assert re.search(r"\n(\d+) of \1 run fused", process.stderr) and "Traceback" not in process.stderr


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99", "cpu:x"])
@pytest.mark.parametrize("command", ["predict", "evaluate", "train", "demo"])
def test_a_device_that_cannot_be_used(command, device, data, weights, tmp_path, capsys):
    """Blind spot: a traceback from PyTorch, by one command or another; a device without values; work begun before it is tried."""
    assert main.main([*commands(data, weights, tmp_path / "out")[command], "--device", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dpt {command}: --device {device} cannot be used: ") and not (tmp_path / "out").exists()


def test_the_device_is_found(monkeypatch):
    """Blind spot: a GPU that is there and not used, or one that is not there and is."""
    tried = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: (tried.append(device.type), torch.ones(1))[1])
    for cuda, mps in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=cuda: value)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda value=mps: value)
        running.device_of("auto")
    running.device_of("cuda:1")
    assert tried == ["cuda", "mps", "cpu", "cuda"]
    assert all(main.parser_of(name).get_default("device") == "auto" for name in ("predict", "evaluate", "train", "demo"))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: (_ for _ in ()).throw(RuntimeError("CUDA out of memory\nmore")))
    with pytest.raises(CommandError, match="^--device cpu cannot be used: CUDA out of memory$"):
        running.device_of("auto")


def test_each_process_takes_a_device_of_its_own(monkeypatch):
    """Blind spot: all of torchrun's processes on the first GPU, or holding memory there; one more than there are GPUs; a GPU that was named
    taken for another. GPUs are made up."""
    tried = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: (tried.append(str(device)), torch.ones(1))[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert [str(running.device_of(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == tried == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK=2: this machine has 2 devices"):
        running.device_of("auto")


@pytest.mark.parametrize(
    ("options", "who"),
    [
        ([], "dpt-tiny-depth and dpt-tiny-scenes know"),
        (["--model", "dpt-tiny-scenes", "--model", "dpt-large-midas"], "dpt-tiny-scenes knows"),
        (["--model", "dpt-large-midas"], None),
        (["--model", "dpt-tiny-depth", "--weights", "WEIGHTS"], None),  # which may have learnt anything
        (["--weights", "WEIGHTS"], None),
    ],
)
def test_the_carried_models_know_scenes(options, who, small, data, weights, tmp_path, monkeypatch, capsys):
    """Blind spot: a user who takes the carried models for models of photographs; the same said for each picture, or of others."""
    monkeypatch.setattr(running.factory, "build", lambda name, weights, accept_license, files=weights, **how: dpt.load(files, **how))
    argv = ["predict", str(data / "images"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main.main([*argv, *(weights if option == "WEIGHTS" else option for option in options), "--overwrite"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "photographs" in line]
    assert len(said) == (who is not None)
    if who:
        assert said[0].startswith(f"dpt predict: {who} rendered scenes, not photographs; ") and "dpt info" in said[0]
        offered = [CONFIGS[name] for name in re.findall(r"--model (\S+)", said[0])]  # of each task the smallest that anybody may use
        assert [config.head.task for config in offered] == ["depth", "segmentation"]
        assert not any(config.carried or config.restricted for config in offered)
        others = [name for name, config in CONFIGS.items() if not config.carried and not config.restricted and config.head.task == "depth"]
        assert PARAMETERS[offered[0].name] == min(PARAMETERS[name] for name in others)


def test_a_file_is_told_apart(weights, capsys):
    """Blind spot: `dpt info FILE`, whose imports the list of models does without."""
    assert main.main(["info", weights]) == 0
    parameters = sum(parameter.numel() for parameter in dpt.DPT(DEPTH).parameters())
    assert f"{weights}: dpt layout, dpt-tiny-depth " in (said := capsys.readouterr().out) and f" {parameters / 1e6:.1f} M " in said


@pytest.mark.parametrize(
    ("processors", "processes", "wanted"), [(1, None, 1), (2, None, 1), (16, None, 8), (16, "4", 3), (4, "8", 1), (None, None, 1)]
)
def test_how_many_read_for_a_training(processors, processes, wanted, monkeypatch):
    """Blind spot: a training that waits for one reader on a large machine, or whose readers crowd out each other."""
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert running.readers() == wanted

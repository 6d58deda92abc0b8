"""`dpt predict` as a user runs it, with random weights. Blind spots: Windows; Ctrl-C at any moment; downloads; CUDA and MPS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dpt
from dpt import cli, inputs, outputs, predict_command
from dpt.config import CONFIGS
from dpt.predict import Prediction

from . import pictures

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights per carried model, which are small and quick on small pictures."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for name in predict_command.CARRIED:
        paths[name] = folder / f"{name}.safetensors"
        dpt.save(pictures.lively_model(CONFIGS[name].with_("input", size=(32, 32))), paths[name])
    return paths


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.png"):
        Image.fromarray(pictures.scene()).save(folder / name)
    return folder


@pytest.fixture
def run(weights, capsys, tmp_path):
    """Run `dpt predict` in this process: exit code, stdout, stderr."""

    def call(*arguments, model="dpt-tiny-depth", out=tmp_path / "out"):
        capsys.readouterr()
        code = cli.main(["predict", *map(str, arguments), "-o", str(out), "--weights", str(weights[model])])
        return code, *capsys.readouterr()

    return call


def _process(*arguments, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dpt", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_users_run(weights, photos, tmp_path):
    """Blind spot: what only a fresh process shows: imports, the entry point, output streams, exit codes."""
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:400])
    (photos / "notes.txt").write_text("not a picture, and no business of ours")
    out = tmp_path / "new" / "out"
    first = _process("predict", photos, "-o", out, "--weights", weights["dpt-tiny-scenes"], "--device", "cpu")
    assert first.returncode == 1, first.stderr
    assert _names(out) == {f"{name}_dpt-tiny-scenes{end}" for name in "ab" for end in (".png", "_overlay.jpg")}
    assert "broken.jpg" in first.stderr and "1 file that is no picture (notes.txt)" in first.stderr and "Traceback" not in first.stderr
    assert "2 done" in first.stdout and "1 failed" in first.stdout and str(out) in first.stdout
    (photos / "broken.jpg").unlink()
    second = _process("predict", photos, "-o", out, "--weights", weights["dpt-tiny-scenes"], "--device", "cpu")
    assert second.returncode == 0 and "0 done, 2 done before" in second.stdout


def test_help_and_usage():
    """Blind spot: help that needs PyTorch's import or a model; argparse's own exit code changed."""
    shown = _process("--help")
    assert shown.returncode == 0 and "predict" in shown.stdout
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", "--help"])
    assert caught.value.code == 0
    for arguments in ([], ["predict"], ["nothing"], ["predict", "a.jpg"], ["predict", "a.jpg", "-o", "out", "--dtype", "int8"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_every_command_can_be_asked_for_help(capsys):
    """Blind spot: a table entry whose module is missing or has no arguments."""
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        assert caught.value.code == 0 and f"dpt {name}" in capsys.readouterr().out


def test_interrupt_leaves_nothing_half_written(weights, tmp_path):
    """Blind spot: Ctrl-C. One signal to one process, somewhere in the middle of two hundred pictures."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for number in range(200):
        Image.fromarray(pictures.scene()).save(folder / f"{number:03}.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dpt", "predict", str(folder), "-o", str(out), "--weights", str(weights["dpt-tiny-depth"])]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it, and so do their children
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("002_*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert not list(out.glob(".*"))
    finished = list(out.glob("*.png"))
    assert 3 <= len(finished) < 200
    for path in finished:
        with Image.open(path) as image:
            image.load()
        assert np.load(path.with_suffix(".npy")).shape == (48, 64)


def test_both_models_by_default(weights, photos, tmp_path, monkeypatch, capsys):
    """Blind spot: only one model runs, their files collide, or a bad file is named once per model. `build` is replaced: the carried
    weights themselves are tested elsewhere."""
    asked = []

    def build(name, weights, device, dtype, files=weights):
        asked.append((name, weights, device.type, dtype))
        return dpt.load(files[name])

    monkeypatch.setattr(predict_command.factory, "build", build)
    (photos / "c.jpg").write_bytes(b"")
    assert cli.main(["predict", str(photos), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert asked == [(name, "pretrained", "cpu", torch.float32) for name in predict_command.CARRIED]
    ends = ("dpt-tiny-depth.png", "dpt-tiny-depth.npy", "dpt-tiny-depth_color.jpg", "dpt-tiny-scenes.png", "dpt-tiny-scenes_overlay.jpg")
    assert _names(tmp_path / "out") == {f"{name}_{end}" for name in "ab" for end in ends}
    assert capsys.readouterr().err.count("c.jpg: the file is empty") == 1


def test_results_are_the_predictions(run, weights, photos, tmp_path):
    """Blind spot: options that do not reach the model; a result beside the wrong picture."""
    Image.fromarray(pictures.scene()[::-1, ::-1].copy()).save(photos / "b.png")
    model = dpt.load(weights["dpt-tiny-depth"])
    assert run(photos, "--flip", "--scales", 0.5, 1, "--pfm", "--batch-size", 2)[0] == 0
    for name in ("a.jpg", "b.png"):
        stem = tmp_path / "out" / f"{name[0]}_dpt-tiny-depth"
        wanted = model.predict(photos / name, flip=True, scales=(0.5, 1.0)).depth
        np.testing.assert_allclose(np.load(f"{stem}.npy"), wanted, rtol=1e-3)
        assert Path(f"{stem}.pfm").read_bytes() == outputs.pfm_bytes(np.load(f"{stem}.npy"))
    assert not np.allclose(wanted, model.predict(photos / name).depth, rtol=0.01)
    assert not np.allclose(wanted, model.predict(photos / "a.jpg", flip=True, scales=(0.5, 1.0)).depth, rtol=0.01)


@pytest.mark.parametrize("options", [["--tta", "--no-flip"], ["--slide"], ["--window", 16, "--stride", 8], ["--dtype", "bfloat16"]])
def test_options_run(run, photos, options, tmp_path):
    """Blind spot: an option's name or type that does not reach `predict`. That it does what it says is tested there."""
    assert run(photos / "a.jpg", *options)[0] == 0
    record = outputs.read_record(tmp_path / "out" / "a_dpt-tiny-depth.png")
    name = options[0].lstrip("-")
    assert record[name] == (True if name in ("tta", "slide") else options[1])


def test_skipping(run, photos, tmp_path):
    """Blind spot: done work repeated, or stale work kept: other options, a missing file, a broken PNG, an interrupted run."""
    out = tmp_path / "out"
    png, npy = out / "a_dpt-tiny-depth.png", out / "a_dpt-tiny-depth.npy"
    assert run(photos / "a.jpg")[0] == 0
    for arguments, change, done in [
        ([], lambda: None, 0),
        ([], lambda: os.utime(photos / "a.jpg"), 0),  # the content is the same
        (["--overwrite"], lambda: None, 1),
        (["--flip"], lambda: None, 1),
        (["--flip"], lambda: None, 0),
        (["--flip", "--pfm"], lambda: None, 1),
        (["--flip"], npy.unlink, 1),
        (["--flip"], png.unlink, 1),  # the others are an interrupted run's
    ]:
        change()
        code, output, errors = run(photos / "a.jpg", *arguments)
        assert code == 0 and f"{done} done" in output and ("done before" in output) == (not done), (arguments, output, errors)
    assert npy.exists() and png.exists()


def test_nothing_of_another_origin_is_replaced(run, photos, tmp_path):
    """Blind spot: a second run over another folder, or a file of the user's own, overwritten without a word."""
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    Image.fromarray(pictures.scene()[::-1].copy()).save(other / "a.jpg")
    assert run(photos / "a.jpg")[0] == 0
    png = out / "a_dpt-tiny-depth.png"
    before = png.read_bytes()
    code, output, errors = run(other / "a.jpg", photos / "b.png")
    assert code == 1 and "another picture" in errors and "--overwrite" in errors and "1 done" in output
    assert png.read_bytes() == before
    assert run(other / "a.jpg", "--overwrite")[0] == 0 and png.read_bytes() != before
    outputs.write(
        out / "a_dpt-tiny-depth", pictures.scene(), Prediction(depth=np.zeros((48, 64), np.float32)), CONFIGS["dpt-tiny-depth"].head
    )
    assert run(photos / "a.jpg")[0] == 1  # written by the library, without a record
    Image.new("L", (4, 4)).save(png)
    before = png.read_bytes()
    code, _, errors = run(photos / "a.jpg")
    assert code == 1 and "not made by dpt" in errors and png.read_bytes() == before


def test_bad_files_among_good(run, photos, tmp_path):
    """Blind spot: each kind of bad file, in one run with good ones after it."""
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, (write, _) in pictures.BAD.items():
        write(bad / name)
    code, output, errors = run(*(bad / name for name in pictures.BAD), photos, tmp_path / "no*thing.jpg", "--batch-size", 4)
    assert code == 1 and "2 done" in output and "Traceback" not in errors
    named = [name for name in pictures.BAD if name != "folder.jpg"]  # a folder is not read as a picture, and is empty
    assert all(f"{name}: " in errors for name in (*named, "folder.jpg", "no*thing.jpg"))
    assert f"{len(pictures.BAD) + 1} failed" in output
    assert {name[0] for name in _names(tmp_path / "out")} == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "no pictures found"),
        (["PHOTOS", "--model", "dpt-huge"], "dpt-huge"),
        (["PHOTOS", "--model", "dpt-tiny-depth", "--model", "dpt-tiny-scenes", "--weights", "w"], "--weights"),
        (["PHOTOS", "--weights", "missing.pt"], "missing.pt"),
        (["PHOTOS", "--model", "dpt-tiny-depth", "--weights", "PHOTOS/a.jpg"], "a.jpg"),
        (["PHOTOS", "--device", "abacus"], "abacus"),
        (["PHOTOS", "--batch-size", "0"], "--batch-size"),
        (["PHOTOS", "--scales", "-1"], "scales"),
        (["PHOTOS", "--window", "33"], "multiples of 16"),
    ],
)
def test_usage_errors(weights, photos, tmp_path, capsys, arguments, message):
    """Blind spot: a traceback, another exit code, or a message that does not name the value."""
    arguments = [argument.replace("PHOTOS", str(photos)) for argument in arguments]
    if "--weights" not in arguments:
        arguments += ["--weights", str(weights["dpt-tiny-depth"])]
    assert cli.main(["predict", *arguments, "-o", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors


def test_output_that_cannot_be_written(run, photos, tmp_path, monkeypatch):
    """Blind spot: a file where the folder should be; a disk that fills up, simulated by an OSError."""
    (tmp_path / "file").write_text("in the way")
    code, _, errors = run(photos, out=tmp_path / "file")
    assert code == 2 and "cannot write to" in errors
    code, _, errors = run(photos, out=tmp_path / "file" / "below")
    assert code == 2 and "cannot write to" in errors

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.np, "save", full)
    code, _, errors = run(photos)
    assert code == 1 and "No space left" in errors and not _names(tmp_path / "out")


def test_clashing_names(run, photos, tmp_path):
    """Blind spot: a.jpg and a.png, or a.jpg of two folders, write the same files."""
    Image.fromarray(pictures.scene()[::-1].copy()).save(photos / "a.png")
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(pictures.scene()[:, ::-1].copy()).save(other / "a.jpg")
    assert run(photos, other / "a.jpg", photos / "a.png", "--device", "cpu")[0] == 0  # a.png is given twice
    names = {name.removesuffix("_dpt-tiny-depth.npy") for name in _names(tmp_path / "out") if name.endswith(".npy")}
    assert names == {"b", "a_png", "photos_a_jpg", "other_a_jpg"}


def test_unique_names():
    """Blind spot: a longer name that is another picture's plain one; names that differ in case only."""
    places = ["x/a.jpg", "x/a.png", "x/a_jpg.png", "x/A.webp", "y/x/a.jpg", "z/x/a.jpg", "x/sub/a.jpg", "x/.hidden"]
    found = [inputs.Found(Path(place), Path(Path(place).name)) for place in places]
    found[6] = inputs.Found(Path("x/sub/a.jpg"), Path("sub/a.jpg"))  # found in the folder x
    names = inputs.unique_names(found)
    assert names == ["x_a_jpg_2", "a_png", "a_jpg", "A_webp", "x_a_jpg_3", "x_a_jpg_4", "sub/a", ".hidden"]
    found = [inputs.Found(Path(place), Path(Path(place).name)) for place in ("x/a.jpg", "x/a.png", "x/a_jpg.png")]
    assert inputs.unique_names(found) == ["x_a_jpg", "a_png", "a_jpg"]


def test_finding(photos, tmp_path):
    """Blind spot: hidden files, subfolders without --recursive, upper-case extensions, patterns, own results as inputs."""
    (photos / "sub").mkdir()
    for name in ("sub/c.JPG", ".hidden.png", "d[1].jpg"):
        Image.fromarray(pictures.scene()).save(photos / name)
    (photos / "notes.txt").write_text("")

    def found(*arguments, **options):
        pictures_found, missing, _ = inputs.find([str(argument) for argument in arguments], **options)
        return sorted(picture.place.as_posix() for picture in pictures_found), missing

    assert found(photos) == (["a.jpg", "b.png", "d[1].jpg"], [])
    assert found(photos, recursive=True) == (["a.jpg", "b.png", "d[1].jpg", "sub/c.JPG"], [])
    assert found(photos / "*.png", photos / "b.png") == (["b.png"], [])
    assert found(photos / "d[1].jpg") == (["d[1].jpg"], [])  # a name before a pattern
    assert found(photos / "notes.txt", photos / "*.gif") == (["notes.txt"], [str(photos / "*.gif")])
    assert found(photos / "**" / "*.JPG") == (["c.JPG"], [])


def test_pillow_does_not_warn(run, tmp_path, recwarn):
    """Blind spot: warnings about EXIF data, with a line of Pillow's source and without the picture, among a run's output."""
    pictures.damaged_exif(tmp_path / "a.jpg")
    assert run(tmp_path / "a.jpg")[0] == 0
    assert not [warning for warning in recwarn if "EXIF" in str(warning.message)]


def test_max_pixels(run, photos, tmp_path):
    """Blind spot: the option that does not reach the decoder, a limit that is not a number of pixels."""
    code, output, errors = run(photos, "--max-pixels", 3071)
    assert code == 1 and "2 failed" in output and "a.jpg: 64x48 pixels" in errors and "--max-pixels" in errors
    assert run(photos, "--max-pixels", 3072)[0] == 0
    code, _, errors = run(photos, "--max-pixels", 0)
    assert code == 2 and "--max-pixels is a positive number, not 0" in errors


def test_own_results_are_not_inputs(run, photos, tmp_path):
    """Blind spot: results written into the folder of the pictures become the next run's pictures."""
    assert run(photos, out=photos)[0] == 0
    code, output, _ = run(photos, out=photos)
    assert code == 0 and "0 done, 2 done before" in output
    assert len(inputs.find([str(photos / "*.*g")])[0]) == 2

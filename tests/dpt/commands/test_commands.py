"""`dpt predict` as a user runs it, with random weights. Blind spots: Windows; Ctrl-C at any moment; downloads; CUDA and MPS."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from staged import stage

import dpt
from dpt.commands import main, picture_paths, predict, running
from dpt.inference import drawing, images, maps, outputs
from dpt.inference.prediction import Prediction
from dpt.zoo import CONFIGS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights per carried model, which are small and quick on small pictures."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for name in predict.CARRIED:
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
        code = main.main(["predict", *map(str, arguments), "-o", str(out), "--weights", str(weights[model])])
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
        main.main(["predict", "--help"])
    assert caught.value.code == 0
    for arguments in ([], ["predict"], ["nothing"], ["predict", "a.jpg"], ["predict", "a.jpg", "-o", "out", "--dtype", "int8"]):
        with pytest.raises(SystemExit) as caught:
            main.main(arguments)
        assert caught.value.code == 2


def test_every_command_can_be_asked_for_help(capsys):
    """Blind spot: a table entry whose module is missing or has no arguments."""
    for name in main.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main.main([name, "--help"])
        assert caught.value.code == 0 and f"dpt {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_leaves_nothing_half_written(weights, tmp_path, number, word):
    """Blind spot: Ctrl-C, and the end of a batch job. One signal to one process, somewhere in the middle of two hundred pictures."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for index in range(200):
        Image.fromarray(pictures.scene()).save(folder / f"{index:03}.png")
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
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors.endswith(f"\ndpt predict: {word}\n") and "Traceback" not in errors
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

    def build(name, weights, device, dtype, fast, accept_license, files=weights):
        assert not accept_license
        asked.append((name, weights, device.type, dtype, fast))
        return dpt.load(files[name])

    monkeypatch.setattr(running.factory, "build", build)
    (photos / "c.jpg").write_bytes(b"")
    assert main.main(["predict", str(photos), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "4 done, 1 failed, of 3 pictures by 2 models" in said.out
    rate = r"(?m)^dpt-tiny-(depth|scenes): 2 pictures, [\d.e+]+ a second end to end, [\d.e+]+ of the network alone$"
    assert re.findall(rate, said.out) == ["depth", "scenes"]
    assert asked == [(name, "pretrained", "cpu", torch.float32, False) for name in predict.CARRIED]
    ends = ("dpt-tiny-depth.png", "dpt-tiny-depth.npy", "dpt-tiny-depth_color.jpg", "dpt-tiny-scenes.png", "dpt-tiny-scenes_overlay.jpg")
    assert _names(tmp_path / "out") == {f"{name}_{end}" for name in "ab" for end in ends}
    assert said.err.count("c.jpg: the file is empty") == 1


def test_results_are_the_predictions(run, weights, photos, tmp_path):
    """Blind spot: options that do not reach the model; a result beside the wrong picture."""
    Image.fromarray(pictures.scene()[::-1, ::-1].copy()).save(photos / "b.png")
    model = dpt.load(weights["dpt-tiny-depth"])
    assert run(photos, "--flip", "--scales", 0.5, 1, "--pfm", "--batch-size", 2)[0] == 0
    for name in ("a.jpg", "b.png"):
        stem = tmp_path / "out" / f"{name[0]}_dpt-tiny-depth"
        wanted = model.predict(photos / name, flip=True, scales=(0.5, 1.0)).depth
        np.testing.assert_allclose(np.load(f"{stem}.npy"), wanted, rtol=1e-3)
        assert Path(f"{stem}.pfm").read_bytes() == maps.pfm_bytes(np.load(f"{stem}.npy"))
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
    try:
        code = main.main(["predict", *arguments, "-o", str(tmp_path / "out")])
    except SystemExit as ended:  # by the parser
        code = ended.code
    errors = capsys.readouterr().err
    assert code == 2 and len(errors.splitlines()) <= 2  # one of an argument, one of them all
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

    monkeypatch.setattr(outputs, "_write_bytes", full)
    code, _, errors = run(photos)
    assert code == 1 and "a_dpt-tiny-depth.npy: No space left on device: free some space" in errors and errors.count("dpt predict:") == 1
    beside = {"b_dpt-tiny-depth_color.jpg"}  # which another thread may have begun
    assert _names(tmp_path / "out") - beside == {"a_dpt-tiny-depth_color.jpg"}  # whole
    monkeypatch.undo()
    code, output, _ = run(photos)
    assert code == 0 and "2 done" in output  # the next run goes on


@pytest.mark.parametrize("end", [".npy", ".pfm", "_color.jpg", ".png"])
def test_a_users_own_file_is_not_replaced(run, photos, tmp_path, end):
    """Blind spot: an array or a picture of the user's own, without our PNG beside it, that has the name of a result."""
    out = tmp_path / "out"
    out.mkdir()
    mine = out / f"a_dpt-tiny-depth{end}"
    mine.write_bytes(b"mine")
    code, output, errors = run(photos, "--pfm")
    assert code == 1 and "1 done" in output and f"{mine} was not made by dpt predict; --overwrite replaces it" in errors
    assert mine.read_bytes() == b"mine" and {name for name in _names(out) if name.startswith("a_")} == {mine.name}
    code, output, _ = run(photos, "--pfm", "--overwrite")
    assert code == 0 and "2 done" in output and mine.read_bytes() != b"mine"
    assert run(photos, "--pfm")[0] == 0


def test_a_folder_or_a_link_in_the_way_is_one_pictures_failure(run, photos, tmp_path):
    """Blind spot: one name that cannot be written ends the run of all; a link followed to what it points to."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    (out / "a_dpt-tiny-depth.npy" / "mine").mkdir(parents=True)
    victim.write_bytes(b"precious")
    (out / "b_dpt-tiny-depth.png").symlink_to(victim)
    code, output, errors = run(photos)
    assert code == 1 and "0 done" in output and "2 failed" in output and errors.count("was not made by dpt predict") == 2
    code, output, errors = run(photos, "--overwrite")
    assert code == 1 and "1 done" in output and f"{photos / 'a.jpg'}: {out / 'a_dpt-tiny-depth.npy'}: Is a directory" in errors
    assert victim.read_bytes() == b"precious" and not (out / "b_dpt-tiny-depth.png").is_symlink()
    assert (out / "a_dpt-tiny-depth.npy" / "mine").is_dir() and not list(out.glob(".*"))


def test_names_and_paths_that_are_too_long(run, photos, tmp_path):
    """Blind spot: 75 letters of Japanese, whose results have no name; a path beyond what the system takes ends the run."""
    for name in ("x" * 225, "x" * 251, "写" * 75, "写" * 83):
        Image.fromarray(pictures.scene()).save(photos / f"{name}.png")
    code, output, _ = run(photos)
    assert code == 0 and "6 done" in output and len(_names(tmp_path / "out")) == 18
    code, output, _ = run(photos)
    assert code == 0 and "0 done, 6 done before" in output
    below = tmp_path / "deep"
    while len(str(below)) < 3900:
        below /= "d" * 100
    below /= "d" * (4030 - len(str(below)))  # room for short names up to 4095
    below.mkdir(parents=True)
    code, output, errors = run(photos, out=below)
    assert code == 1 and "2 done" in output and errors.count(": File name too long: choose a folder with a shorter path") == 4


def test_a_picture_that_goes_away_meanwhile(run, photos, monkeypatch):
    """Blind spot: a picture that is deleted between its prediction and its record ends the run."""
    identity = predict._identity

    def gone(path, *rest):
        if Path(path).name == "a.jpg":
            (photos / "a.jpg").unlink()
        return identity(path, *rest)

    monkeypatch.setattr(predict, "_identity", gone)
    code, output, errors = run(photos)
    assert code == 1 and "1 done" in output and "a.jpg: No such file or directory" in errors


@pytest.mark.parametrize("model", ["dpt-tiny-depth", "dpt-tiny-scenes"])
def test_a_device_draws_the_same_files(run, photos, tmp_path, monkeypatch, model):
    """Blind spot: a GPU that is not asked to draw, or whose pictures the writers draw again; another picture's colours. It is a CPU."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(photos / "c.png")
    assert run(photos, "--device", "cpu", model=model, out=tmp_path / "cpu")[0] == 0
    told = stage(monkeypatch)
    monkeypatch.setattr(outputs, "_tensor", lambda values: pytest.fail("drawn by a writer"))
    code, output, _ = run(photos, "--device", "cpu", model=model, out=tmp_path / "staged")
    assert code == 0 and "3 done" in output and told[:3] == ["recorded 0", "recorded 1", "waited 0"]
    assert _names(tmp_path / "cpu") == _names(tmp_path / "staged") != set()
    for name in _names(tmp_path / "cpu"):
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "staged" / name).read_bytes(), name


def test_a_picture_too_large_for_memory(run, photos, monkeypatch):
    """Blind spot: a MemoryError of NumPy while results are drawn, or PyTorch's RuntimeError, end the run of all pictures."""
    full, calls = (
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        iter("a-b-"),
    )

    def colored(depth, inverse, ends, drawn=drawing.colored):
        match next(calls, None):
            case "a":
                raise MemoryError
            case "b":
                raise RuntimeError(full)
        return drawn(depth, inverse, ends)

    monkeypatch.setattr(drawing, "colored", colored)
    for _ in "ab":
        code, output, errors = run(photos, "--overwrite")
        assert code == 1 and "1 done" in output and "memory ran out" in errors and "alloc_cpu" not in errors
    forward, first = dpt.DPT.forward, iter("a")

    def failing(self, x):
        if next(first, None):
            raise RuntimeError(full)
        return forward(self, x)

    monkeypatch.setattr(dpt.DPT, "forward", failing)
    code, output, errors = run(photos, "--overwrite")
    assert code == 1 and "1 done" in output and "a.jpg: memory ran out" in errors and "alloc_cpu" not in errors

    def broken(self, x):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(dpt.DPT, "forward", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):  # no fault of a picture
        run(photos, "--overwrite")


def test_too_many_open_files_is_no_pictures_fault(run, photos):
    """Blind spot: a million pictures named as unreadable for want of a descriptor."""
    held, before = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert run(photos / "a.jpg")[0] == 0
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, before[1]))

        def stems(*arguments, make=outputs.result_paths):  # the first thing after the model was read
            while not held or held[-1] is not None:
                try:
                    held.append(open(os.devnull))
                except OSError:
                    held.append(None)
            return make(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(outputs, "result_paths", stems)
            code, _, errors = run(photos, "--overwrite")
    finally:
        for file in filter(None, held):
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert code == 1 and errors.count("dpt predict:") == 1 and "Too many open files: raise" in errors


def test_two_runs_at_once(weights, photos, tmp_path, monkeypatch):
    """Blind spot: two processes, here two threads, that write the same files and clear each other's away; main outside the main thread."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    for number in range(8):
        Image.fromarray(pictures.scene()).save(photos / f"{number}.png")
    out, codes = tmp_path / "out", []
    arguments = ["predict", str(photos), "-o", str(out), "--weights", str(weights["dpt-tiny-depth"])]
    threads = [threading.Thread(target=lambda: codes.append(main.main(arguments))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0] and len(_names(out)) == 30 and not list(out.glob(".*"))
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            image.load()
        assert np.load(path.with_suffix(".npy")).shape == (48, 64)


def test_what_a_killed_run_left_is_cleared_up(run, photos, tmp_path):
    """Blind spot: temporary files that pile up, in the folder of results and in those below it."""
    (photos / "sub").mkdir()
    Image.fromarray(pictures.scene()).save(photos / "sub" / "c.png")
    (tmp_path / "out" / "sub").mkdir(parents=True)
    for folder in (tmp_path / "out", tmp_path / "out" / "sub"):
        (folder / ".dpt-0123456789abcdef.part").write_bytes(b"half")
    assert run(photos, "--recursive")[0] == 0
    assert not list((tmp_path / "out").rglob(".*"))


def test_names_are_shown_and_not_obeyed(run, photos):
    """Blind spot: a file name that clears the screen or is no UTF-8, in a line of its own or in the options' errors."""
    for name in (b"\xff\x1b[2J.png", b"e\nf.png"):
        (photos / os.fsdecode(name)).write_bytes(b"x")
    code, _, errors = run(photos)
    assert code == 1 and r"\udcff\x1b[2J.png" in errors and r"e\nf.png" in errors and "\x1b[2J" not in errors


def test_clashing_names(run, photos, tmp_path):
    """Blind spot: a.jpg and a.png, or a.jpg of two folders, write the same files."""
    Image.fromarray(pictures.scene()[::-1].copy()).save(photos / "a.png")
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(pictures.scene()[:, ::-1].copy()).save(other / "a.jpg")
    assert run(photos, other / "a.jpg", photos / "a.png", "--device", "cpu")[0] == 0  # a.png is given twice
    names = {name.removesuffix("_dpt-tiny-depth.npy") for name in _names(tmp_path / "out") if name.endswith(".npy")}
    assert names == {"b", "a_png", "photos_a_jpg", "other_a_jpg"}


def test_finding(photos, tmp_path):
    """Blind spot: hidden files, subfolders without --recursive, upper-case extensions, patterns, own results as inputs."""
    (photos / "sub").mkdir()
    for name in ("sub/c.JPG", ".hidden.png", "d[1].jpg"):
        Image.fromarray(pictures.scene()).save(photos / name)
    (photos / "notes.txt").write_text("")

    def found(*arguments, **options):
        pictures_found, missing, _ = picture_paths.find([str(argument) for argument in arguments], **options)
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
    with pytest.raises(SystemExit):
        run(photos, "--max-pixels", 0)
    assert images.MAX_PIXELS == 178956970  # as the help says


def test_own_results_are_not_inputs(run, photos, tmp_path):
    """Blind spot: results written into the folder of the pictures become the next run's pictures."""
    assert run(photos, out=photos)[0] == 0
    code, output, _ = run(photos, out=photos)
    assert code == 0 and "0 done, 2 done before" in output
    assert len(picture_paths.find([str(photos / "*.*g")])[0]) == 2

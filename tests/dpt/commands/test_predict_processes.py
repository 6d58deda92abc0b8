"""`dpt predict` in several processes, as torchrun starts them, on a CPU. Blind spots: GPUs; several machines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pictures
import pytest
from PIL import Image

import dpt
from dpt.commands import main
from dpt.zoo import CONFIGS

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TORCHRUN = ("torch.distributed.run", "--standalone", "--monitor-interval", "0.1")
DEADLINE = 120.0  # seconds


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "depth.safetensors"
    dpt.save(pictures.lively_model(CONFIGS["dpt-tiny-depth"].with_("input", size=(32, 32))), path)
    return path


def command(folder: Path, out: Path, weights: Path) -> list[str]:
    return ["predict", str(folder), "-o", str(out), "--weights", str(weights), "--device", "cpu"]


def started(*arguments: str, **environment: str) -> subprocess.Popen:
    how = {"env": {**ENVIRONMENT, **environment}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *map(str, arguments)], **how)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_more_processes_than_pictures_one_of_which_is_broken(weights, tmp_path):
    """Blind spot: a process without a picture; one that ends with a code for its broken picture, at which torchrun ends the others, whose
    pictures are then missing; what is true for all said by each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"")
    Image.fromarray(pictures.scene(2000, 3000)).save(folder / "b.png")  # takes a second, of which the first process needs nothing
    (folder / "notes.txt").write_text("no picture")
    process = started(*TORCHRUN, "--nproc-per-node", "3", "-m", "dpt", *command(folder, tmp_path / "out", weights))
    said, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1, errors
    assert said.count("dpt predict: 1 done, 1 failed; ") == said.count("dpt predict") == 1 and "dpt-tiny-depth: 1 picture, " in said
    assert errors.count("a.jpg: the file is empty") == errors.count("notes.txt") == 1
    assert main.main(command(folder, tmp_path / "alone", weights)) == 1
    assert content(tmp_path / "out") == content(tmp_path / "alone") and len(content(tmp_path / "alone")) == 3


def test_a_process_is_killed(weights, tmp_path):
    """Blind spot: pictures that are lost, half written or done again where one of two processes is killed in the middle and torchrun starts
    both anew; files that one process would have written otherwise."""
    folder, out, number = tmp_path / "photos", tmp_path / "out", 120
    folder.mkdir()
    for index in range(number):
        Image.fromarray(np.roll(pictures.scene(), index, axis=1)).save(folder / f"{index:03}.png")
    arguments = command(folder, out, weights)
    process = started(*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "-m", "dpt", *arguments)
    until, done = time.monotonic() + DEADLINE, []
    while len(done) < 9 and time.monotonic() < until:
        time.sleep(0.01)
        done = sorted(out.glob("*.png"))
    before = {path: path.stat().st_mtime_ns for path in done}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (last,) = (int(child) for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes())
    os.kill(last, signal.SIGKILL)
    said, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    (line,) = (line for line in said.splitlines() if line.startswith("dpt predict: "))
    counts = [int(word) for word in line.replace(",", " ").split() if word.isdecimal()]
    assert sum(counts) == number and len(before) <= counts[1] < number and " done before; " in line  # done, and done before
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main.main(command(folder, tmp_path / "alone", weights)) == 0
    assert content(out) == content(tmp_path / "alone") and len(content(out)) == 3 * number


def test_another_process_has_ended(weights, tmp_path):
    """Blind spot: a process that waits for ever for one that is gone, or ends with a traceback; its own pictures are there all the same."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(pictures.scene()).save(folder / f"{name}.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outs = [tmp_path / "out", folder / "a.png" / "out"]  # of which the second cannot be made
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    both = [started("dpt", *command(folder, out, weights), RANK=str(rank), **group) for rank, out in enumerate(outs)]
    errors = [process.communicate(timeout=DEADLINE)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2] and "Traceback" not in "".join(errors)
    assert errors[0].endswith("dpt predict: another process of this run has ended\n") and "cannot write to" in errors[1]
    assert {path.suffix for path in outs[0].iterdir()} == {".png", ".npy", ".jpg"}

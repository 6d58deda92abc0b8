"""Files whole or not at all. Blind spots: Windows; network file systems, whose locks may mean less; a real loss of power."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dpt.system import disk

NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)


@contextmanager
def full_after(size: int):
    """No file can grow beyond this many bytes: a full disk that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, MemoryError, ZeroDivisionError, OSError])
def test_whole_or_not_at_all(tmp_path, failure):
    """Blind spot: an interrupted write leaves half a file, its temporary file, or destroys the previous one."""
    path = tmp_path / "a.npy"
    path.write_bytes(b"before")

    def writer(file):
        file.write(b"half")
        assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2
        raise failure

    with pytest.raises(failure):
        disk.write_whole(path, writer)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path] and not disk._unfinished
    disk.write_whole(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path] and not disk._unfinished


@pytest.mark.parametrize(
    "writer",
    [
        lambda file: torch.save({"a": torch.zeros(100_000), "b": torch.ones(3)}, file),
        lambda file: np.save(file, np.zeros(100_000)),
        lambda file: Image.fromarray(NOISE).save(file, "JPEG"),
        lambda file: Image.fromarray(NOISE).save(file, "PNG"),
        lambda file: Figure().savefig(file, format="png"),
        lambda file: [file.write(b"x" * 100) for _ in range(1000)],
    ],
    ids=["torch", "numpy", "jpeg", "png", "matplotlib", "plain"],
)
@pytest.mark.parametrize("size", [10, 2000])
def test_a_full_disk_is_told_whoever_writes(tmp_path, writer, size):
    """Blind spot: PyTorch's RuntimeError, Pillow's and NumPy's OSErrors without a number; a message about the temporary file."""
    path = tmp_path / "a"
    with full_after(size), pytest.raises(OSError) as caught:
        disk.write_whole(path, writer)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path)) and not list(tmp_path.iterdir())
    disk.write_whole(path, writer)
    assert path.stat().st_size > size


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Blind spot: a link where the temporary file is to be, or the final one, and what it points to overwritten."""
    victim, path = tmp_path / "victim", tmp_path / "a"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    disk.write_whole(path, lambda file: file.write(b"new"))
    assert not path.is_symlink() and path.read_bytes() == b"new" and victim.read_bytes() == b"precious"
    names = []
    for _ in range(2):
        disk.write_whole(path, lambda file: names.extend(found.name for found in tmp_path.glob(".dpt-*")))
    assert len(set(names)) == 2
    path.write_bytes(b"new")
    monkeypatch.setattr(os, "urandom", lambda size: b"\1" * size)
    planted = tmp_path / f".dpt-{'01' * 8}.part"
    for target in (victim, tmp_path / "nothing"):
        planted.symlink_to(target)
        with pytest.raises(FileExistsError, match="/a'"):
            disk.write_whole(path, lambda file: file.write(b"newer"))
        planted.unlink()  # still there
    assert victim.read_bytes() == b"precious" and not (tmp_path / "nothing").exists() and path.read_bytes() == b"new"


def test_what_is_in_the_way_is_named(tmp_path):
    """Blind spot: an error that names the temporary file, and leaves it; what a folder at a result's name holds."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for name, error in (("folder", IsADirectoryError), ("missing/a", FileNotFoundError), ("file/a", NotADirectoryError)):
        with pytest.raises(error) as caught:
            disk.write_whole(tmp_path / name, lambda file: file.write(b"x"))
        assert caught.value.filename == str(tmp_path / name)
    for name in ("x" * 256, "/".join(["y" * 200] * 30)):
        with pytest.raises(OSError) as caught:
            disk.write_whole(tmp_path / name, lambda file: file.write(b"x"))
        assert caught.value.errno == errno.ENAMETOOLONG
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "mine", "file"} and not disk._unfinished
    disk.write_whole(tmp_path / ("x" * 255), lambda file: file.write(b"x"))  # room for the temporary file's name


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_have_the_mode_of_new_files(tmp_path, mask):
    """Blind spot: a temporary file's mode, which lets nobody else read the result."""
    before = os.umask(mask)
    try:
        disk.write_whole(tmp_path / "a", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_leftovers(tmp_path):
    """Blind spot: temporary files of killed runs that pile up; those of live ones removed, or a user's file of a similar name."""

    def name(number: int):
        return tmp_path / f".dpt-{number:016x}.part"

    name(1).write_bytes(b"half")
    name(2).write_bytes(b"being written")
    name(3).symlink_to(tmp_path / "victim")
    name(4).mkdir()
    for other in (".dpt-1.part", "dpt-0000000000000001.part", ".dpt-0000000000000001.part.mine", ".a.part", "victim"):
        (tmp_path / other).write_bytes(b"")
    kept = {path.name for path in tmp_path.iterdir()} - {name(1).name}
    with open(name(2), "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        disk.prepare(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == kept
    disk.prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept - {name(2).name}
    disk.prepare(tmp_path / "new" / "folder")
    disk.remove_leftovers(tmp_path / "nothing")
    with pytest.raises(OSError):
        disk.prepare(tmp_path / "victim")


def test_a_temporary_file_that_was_taken_for_a_leftover(tmp_path, monkeypatch):
    """Blind spot: `prepare` of another run between a temporary file's creation and its lock: before the lock, or with it."""
    lock, ways = disk._lock, iter(["removed", "locked"])

    def late(file):
        way = next(ways, None)
        if way == "removed":
            disk.remove_leftovers(tmp_path)
        return way != "locked" and lock(file)

    monkeypatch.setattr(disk, "_lock", late)
    monkeypatch.setattr(disk, "remove_leftovers", lambda folder: [path.unlink() for path in tmp_path.iterdir()])
    disk.write_whole(tmp_path / "a", lambda file: file.write(b"x"))
    assert (tmp_path / "a").read_bytes() == b"x" and next(ways, None) is None


def test_many_at_once(tmp_path):
    """Blind spot: two runs into one folder, each of which clears up in the middle of the other's writing."""
    problems, going = [], threading.Event()
    going.set()

    def write(number: int):
        try:
            for turn in range(60):
                content = bytes([number]) * 5000
                disk.write_whole(tmp_path / f"{turn % 3}", lambda file, content=content: file.write(content), durable=False)
        except BaseException as error:
            problems.append(error)

    def clear():
        while going.is_set():
            disk.prepare(tmp_path)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    cleaner = threading.Thread(target=clear)
    for thread in (cleaner, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    going.clear()
    cleaner.join()
    assert not problems and {path.name for path in tmp_path.iterdir()} == set("012")
    assert all(len(set(path.read_bytes())) == 1 and path.stat().st_size == 5000 for path in tmp_path.iterdir())


def test_only_regular_files_are_opened(tmp_path):
    """Blind spot: a pipe that is waited for without end; a device; descriptors that stay open."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            disk.open_regular(path)
    with disk.open_regular(tmp_path / "link") as file:
        assert file.read() == b"x"
    assert len(os.listdir("/proc/self/fd")) == before

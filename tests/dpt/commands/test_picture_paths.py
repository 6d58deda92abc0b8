"""What a command line's folders, patterns and links mean. Blind spots: Windows; file systems that do not tell an entry's type."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpt.commands import picture_paths
from dpt.inference import outputs
from dpt.inference.prediction import Prediction
from dpt.zoo import CONFIGS

HEAD = CONFIGS["dpt-tiny-depth"].head


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """photos/a.jpg, as the working directory sees it; nothing that is found is opened unless it may be a result."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def places(*arguments: object, **options) -> list[str]:
    return [picture.place.as_posix() for picture in picture_paths.find([str(argument) for argument in arguments], **options).pictures]


def note(*arguments: object, **options) -> str:
    return "\n".join(picture_paths.find([str(argument) for argument in arguments], **options).notes)


def test_what_is_left_out_is_named(photos):
    """Blind spot: a folder of HEIC or of videos of which nothing is said; a note of a thousand names; hidden files named."""
    for name in ("e.txt", "d.pdf", "c", "b.psd", "v.MOV", ".hidden", ".hidden.txt"):
        (photos / name).touch()
    (photos / "b.heic").touch()
    assert places(photos) == ["a.jpg", "b.heic"]
    assert note(photos) == (
        "photos: left out: 4 files that are no pictures (b.psd, c, d.pdf, ...); 1 video (v.MOV); "
        "1 folder, as --recursive is not given (sub)"
    )
    assert "folder" not in note(photos, recursive=True)
    (photos / "sub" / "w.mkv").touch()
    assert "2 videos (sub/w.mkv, v.MOV)" in note(photos, recursive=True)
    found = picture_paths.find(["photos/a.jpg", "photos/v.MOV", "photos/e.txt"])
    assert len(found.pictures) == 3 and not found.notes  # named: reading them says what they are


def test_results_are_left_out_and_counted(photos):
    """Blind spot: depth as .npy named as no picture; a picture whose comment only looks like a record's, or that has it far behind."""
    outputs.write(
        photos / "a_m", np.zeros((4, 5, 3), np.uint8), Prediction(depth=np.ones((4, 5), np.float32)), HEAD, further=["pfm"], record={}
    )
    (photos / "own.npy").touch()
    Image.new("RGB", (3, 2)).save(photos / "b.jpg", comment="dpt is what made this")
    assert places(photos) == ["a.jpg", "b.jpg"] == places(photos / "*.jpg", photos / "*.png")
    assert "1 file that is no picture (own.npy); 4 results of dpt predict (a_m.npy, a_m.pfm, a_m.png, ...)" in note(photos)
    assert note(photos / "*.png") == "photos/*.png: left out: 1 result of dpt predict (a_m.png)"
    assert places(photos / "a_m.png") == ["a_m.png"]


def test_a_link_is_a_picture_of_its_own(photos):
    """Blind spot: a picture and a link to it taken for one; a path that is given twice, in two spellings, taken for two."""
    (photos / "link.jpg").symlink_to("a.jpg")
    (photos / "other.png").symlink_to("link.jpg")
    Path("album").symlink_to("photos")
    assert places(photos) == ["a.jpg", "link.jpg", "other.png"]
    assert places(photos, photos / "link.jpg", "./photos/../photos", photos.absolute(), "album", "album/*.png", "photos//a.jpg") == places(
        photos
    )
    assert places(photos / "sub" / ".." / "a.jpg", photos) == places(photos)


def test_links_that_lead_nowhere(photos):
    """Blind spot: dangling or circular links without a word, or a traceback; where nothing else is there, too."""
    (photos / "gone.jpg").symlink_to("nothing.jpg")
    (photos / "p.jpg").symlink_to("q.jpg")
    (photos / "q.jpg").symlink_to("p.jpg")
    (photos / "notes").symlink_to("/nothing/at/all")
    assert places(photos) == ["a.jpg"]
    assert "4 links that lead nowhere (gone.jpg, notes, p.jpg, ...)" in note(photos)
    assert note(photos / "[gp]*.jpg") == "photos/[gp]*.jpg: left out: 2 links that lead nowhere (gone.jpg, p.jpg)"
    found = picture_paths.find(["photos/p.jpg", "photos/g*"])
    assert not found.pictures and len(found.missing) == len(found.notes) == 2


def test_recursion_follows_links_once_in_a_chain(photos):
    """Blind spot: an ancestor walked until the path is too long; two folders that hold links to each other; a linked folder left out."""
    (photos / "sub" / "b.png").write_bytes(b"x")
    Path("elsewhere").mkdir()
    Path("elsewhere/c.jpg").touch()
    (photos / "far").symlink_to("../elsewhere")
    Path("elsewhere/back").symlink_to("../photos")
    (photos / "self").symlink_to(".")
    (photos / "sub" / "top").symlink_to("../..")
    found = places(photos, recursive=True)
    assert found[:4] == ["a.jpg", "far/c.jpg", "sub/b.png", "sub/top/elsewhere/c.jpg"] and len(set(found)) == len(found) == 4
    assert "links back to folders that they lie in (far/back, self, sub/top/elsewhere/back, ...)" in note(photos, recursive=True)
    assert places(photos) == ["a.jpg"]


def test_patterns_below_folders_end(photos):
    """Blind spot: ** that goes in circles (two links: for ever), hidden folders, a ** at the end, one inside a name."""
    for name in ("x", "y"):
        (photos / "sub" / name).symlink_to("..")
    (photos / ".thumbnails").mkdir()
    for place in (".thumbnails/t.jpg", "sub/b.jpg", "sub/c.png"):
        (photos / place).write_bytes(b"x")
    assert places("photos/**/*.jpg") == ["a.jpg", "b.jpg"] == places(photos.absolute() / "**" / "*.jpg")
    assert places("**/*.png") == ["c.png"]
    assert places("photos/**") == ["a.jpg", "b.jpg", "c.png"]
    assert places("photos/s**/*.png") == ["c.png"]
    assert places("ph*/sub", recursive=True) == ["b.jpg", "c.png", "x/a.jpg", "y/a.jpg"]


@pytest.mark.parametrize(
    "name", ["\n.jpg", "\x1b[31m.jpg", "tab\t.png", "\udcff\udcfe.jpg", "..x.jpg", "a.jpg ", "-o.jpg", "é" * 100 + ".jpg"]
)
def test_names_of_all_kinds(photos, name):
    """Blind spot: bytes that are no UTF-8, control characters, names that look like options."""
    (photos / "sub" / name).write_bytes(b"x")
    for _ in places(photos / "sub"), note(photos / "sub"), places("photos/**"), places(photos, recursive=True):
        pass
    hidden, picture = name.startswith("."), name.endswith(("jpg", "png"))
    found = picture_paths.find(["photos/sub"])
    assert [found_picture.path for found_picture in found.pictures] == [photos / "sub" / name] * (picture and not hidden)
    assert len(picture_paths.unique_names(found.pictures)) == len(found.pictures)
    assert (name in "".join(found.notes)) == (not picture)


@pytest.mark.parametrize(
    "argument", ["", "\0", "a\0*", "**\0", "*\udcff", "[", "a" * 5000, "a/" * 3000 + "*", "photos/a.jpg/", "photos/a.jpg/*"]
)
def test_arguments_that_mean_nothing(photos, argument):
    """Blind spot: a traceback from a name that no file can have."""
    assert picture_paths.find([argument]) == ([], [argument], [])


def test_pipes_and_sockets_are_no_pictures(photos):
    """Blind spot: a folder's pipe is opened and waits for ever."""
    os.mkfifo(photos / "pipe.png")
    (photos / "link.jpg").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("photos/socket.jpg")
        assert places(photos) == ["a.jpg"] and "3 files that are no pictures (link.jpg, pipe.png, socket.jpg)" in note(photos)


def test_unique_names():
    """Blind spot: a longer name that is another picture's plain one; names that differ in case only."""
    places = ["x/a.jpg", "x/a.png", "x/a_jpg.png", "x/A.webp", "y/x/a.jpg", "z/x/a.jpg", "x/sub/a.jpg", "x/.hidden"]
    found = [picture_paths.Found(Path(place), Path(Path(place).name)) for place in places]
    found[6] = picture_paths.Found(Path("x/sub/a.jpg"), Path("sub/a.jpg"))  # found in the folder x
    names = picture_paths.unique_names(found)
    assert names == ["x_a_jpg_2", "a_png", "a_jpg", "A_webp", "x_a_jpg_3", "x_a_jpg_4", "sub/a", ".hidden"]
    found = [picture_paths.Found(Path(place), Path(Path(place).name)) for place in ("x/a.jpg", "x/a.png", "x/a_jpg.png")]
    assert picture_paths.unique_names(found) == ["x_a_jpg", "a_png", "a_jpg"]


def test_what_cannot_be_opened_is_no_result(photos):
    """Blind spot: a pipe or a file of another user left out as a result of ours, so that its owner never hears why it is missing."""
    os.mkfifo(photos / "pipe.png")
    assert places(f"{photos}/*.png") == ["pipe.png"] and not note(f"{photos}/*.png")


def test_folders_that_may_not_be_read(photos, monkeypatch):
    """Blind spot: one closed folder ends the search, or is passed over. Simulated: root may read all."""
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert places(photos, recursive=True) == ["a.jpg"]
    assert note(photos, recursive=True) == "photos: left out: 1 folder that may not be read (sub)"
    assert picture_paths.find(["photos/sub"]) == ([], ["photos/sub"], ["photos/sub: left out: 1 folder that may not be read (.)"])


def test_folders_deeper_than_any_recursion(photos):
    """Blind spot: a recursion for each level."""
    depth = 1100
    deepest = photos.joinpath(*["d"] * depth)
    for level in range(1, depth + 1):
        os.mkdir(photos.joinpath(*["d"] * level))
    (deepest / "deep.jpg").touch()
    try:
        assert places(photos, recursive=True) == ["a.jpg", "d/" * depth + "deep.jpg"]
    finally:  # pytest's own removal is such a recursion
        (deepest / "deep.jpg").unlink()
        for level in range(depth, 0, -1):
            os.rmdir(photos.joinpath(*["d"] * level))


def test_few_files_are_opened(photos, monkeypatch):
    """Blind spot: every picture of a million opened and its header taken apart to see whether it is a result."""
    for name in ("b.jpg", "c.tif", "d.png", "e.txt"):
        (photos / name).write_bytes(b"x")
    opened, records = [], []
    monkeypatch.setattr(picture_paths, "open_regular", lambda path: opened.append(os.path.basename(path)) or open(path, "rb"))
    monkeypatch.setattr(picture_paths, "read_record", records.append)
    assert places(photos) == ["a.jpg", "b.jpg", "c.tif", "d.png"]
    assert sorted(opened) == ["a.jpg", "b.jpg", "d.png"] and not records

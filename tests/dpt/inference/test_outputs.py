"""Result files. Blind spots: whether the colours please; viewers other than Pillow and NumPy; Windows' file locks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pictures
import pytest
from PIL import Image

from dpt.classes import ade20k
from dpt.commands import demo
from dpt.commands.main import main
from dpt.inference import images, maps, outputs
from dpt.inference.prediction import Prediction
from dpt.zoo import CONFIGS

RELATIVE, ADE = CONFIGS["dpt-tiny-depth"].head, CONFIGS["dpt-base-ade20k"].head
SCENES = CONFIGS["dpt-tiny-scenes"].head
METRIC = dataclasses.replace(RELATIVE, inverse=False)
DEPTH = np.linspace(3, 7, 48 * 64, dtype=np.float32).reshape(48, 64)


def _labels(height: int, width: int, *classes: int) -> np.ndarray:
    """Upright bands, one a class, the first the widest."""
    edges = [0, *range(width - len(classes) + 1, width), width]
    labels = np.empty((height, width), np.uint8)
    for index, (left, right) in enumerate(zip(edges, edges[1:], strict=False)):
        labels[:, left:right] = classes[index]
    return labels


def test_depth_files(tmp_path):
    """Blind spot: 8-bit depth, a .npy that was scaled, files not as promised, a lost record."""
    record = {"model": "m", "scales": [0.5, 1], "window": None}
    stem = tmp_path / "new" / "a.b_model"
    paths = outputs.write(stem, pictures.scene(), Prediction(depth=DEPTH), RELATIVE, further=["pfm"], record=record)
    assert paths == outputs.result_paths(stem, RELATIVE, further=["pfm"]) and all(path.is_file() for path in paths)
    assert [path.name for path in paths] == ["a.b_model_color.jpg", "a.b_model.npy", "a.b_model.pfm", "a.b_model.png"]
    assert {path.name for path in stem.parent.iterdir()} == {path.name for path in paths}  # nothing else, no temporary file
    np.testing.assert_array_equal(np.load(paths[1]), DEPTH)
    with Image.open(paths[3]) as image:
        values = np.array(image)
    assert values.dtype == np.uint16 and values[0, 0] == 0 and values[-1, -1] == 65535
    np.testing.assert_allclose(values / 65535 * 4 + 3, DEPTH, atol=4 / 65535)
    with Image.open(paths[0]) as image:
        assert image.size == (128, 48)
        left = np.array(image)[:, :64]
    assert np.abs(np.subtract(pictures.quarters(left), pictures.quarters(pictures.scene()))).max() <= 12
    contents = {path.suffix: path.read_bytes() for path in paths[1:3]}
    record["files"] = {suffix: [len(content), zlib.crc32(content)] for suffix, content in contents.items()}
    assert outputs.read_record(paths[3]) == outputs.read_record(paths[0]) == record


def test_pfm_layout(tmp_path):
    """Blind spot: rows from the top, big-endian bytes, width and height swapped. Against the format's bytes, by hand."""
    depth = np.float32([[1, 2, 3], [-4, 5.5, 6]])
    content = maps.pfm_bytes(depth)
    assert content[:12] == b"Pf\n3 2\n-1.0\n"
    np.testing.assert_array_equal(np.frombuffer(content[12:], "<f4"), [-4, 5.5, 6, 1, 2, 3])


def test_depth_png_of_another_scale(tmp_path):
    """Blind spot: KITTI's depth in millimetres, which ends at 65 m, where its files have 256ths of a metre."""
    depth = np.float32([[1.5, 80], [0.004, 300]])
    head = dataclasses.replace(METRIC, depth_scale=256.0)
    paths = outputs.write(tmp_path / "a", np.zeros((2, 2, 3), np.uint8), Prediction(depth=depth), head)
    np.testing.assert_array_equal(np.asarray(Image.open(paths[-1])), [[384, 20480], [1, 65535]])


def test_metres_are_told(tmp_path, monkeypatch):
    """Blind spot: a map of metres that looks like one up to scale and shift; 256ths that a reader takes for millimetres."""
    said = []
    monkeypatch.setattr(outputs, "depth_scale", lambda height, ends: said.append(ends) or Image.new("RGB", (10, height)))
    picture, kitti = np.zeros((*DEPTH.shape, 3), np.uint8), dataclasses.replace(METRIC, depth_scale=256.0)
    unknown = np.where(DEPTH > 6, np.float32(np.nan), DEPTH)
    for name, head, depth, told in (
        ("metres", METRIC, DEPTH, "metres times 1000"),
        ("kitti", kitti, unknown, "metres times 256"),
        ("nothing", METRIC, np.full_like(DEPTH, np.nan), "metres times 1000"),
        ("inverse", RELATIVE, DEPTH, "inverse depth: the farthest 0, the nearest 65535"),
        ("relative", dataclasses.replace(METRIC, relative=True), DEPTH, "relative depth: the nearest 0, the farthest 65535"),
    ):
        view, *_, png = outputs.write(tmp_path / name, picture, Prediction(depth), head)
        assert Image.open(png).text["depth"] == told
        assert Image.open(view).width == 2 * 64 + (10 if name in ("metres", "kitti") else 0)
    assert said == [("3 m", "7 m"), ("3 m", "6 m")]
    monkeypatch.undo()
    wide, narrow = (outputs.depth_scale(48, ends).width for ends in (("3.25 m", "77.5 m"), ("near", "far")))
    assert wide > narrow


def test_depth_scale():
    """Blind spot: a scale that is upside down, of other colours than the maps', of another height, or without its names."""
    scale = np.array(outputs.depth_scale(300))
    assert len(scale) == 300
    column = next(index for index in range(scale.shape[1]) if (scale[:, index] != 255).any())
    wanted = outputs.colored(np.linspace(1, 0, 300, dtype=np.float32)[:, None], True)
    np.testing.assert_array_equal(scale[:, column], wanted[:, 0])
    right = scale[:, column + 12 :].astype(int).sum(2) < 100
    assert right[:30].any() and right[-30:].any() and not right[40:-40].any()


def test_the_demo_picture(tmp_path, monkeypatch, capsys):
    """Blind spot: columns of different sizes; a legend inside the pictures, or without a class that they have; maps of another picture."""
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "PICTURES", demo.PICTURES[:2])
    seconds = iter([0.25, 0.35, 0.5, 0.5])
    monkeypatch.setattr(demo, "_seconds", lambda model, image: next(seconds))
    assert main(["demo", "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "dpt-tiny-depth: 300 ms a picture of 384x384 (median of 2)\ndpt-tiny-scenes: 500 ms" in said
    with Image.open(tmp_path / "demo.png") as sheet:
        sheet = np.array(sheet.convert("RGB"))
    present = set()
    for row, path in enumerate(demo.PICTURES):
        picture = images.load_image(path)
        side = len(picture)
        depth = np.load(tmp_path / f"{path.stem}_dpt-tiny-depth.npy")
        labels = np.array(Image.open(tmp_path / f"{path.stem}_dpt-tiny-scenes.png"))
        rows = sheet[row * side : (row + 1) * side]
        np.testing.assert_array_equal(rows[:, :side], picture)
        np.testing.assert_array_equal(rows[:, side : 2 * side], outputs.colored(depth, True))
        between = outputs.depth_scale(side)
        np.testing.assert_array_equal(rows[:, 2 * side : 2 * side + between.width], np.array(between))
        tinted = np.array(outputs.tinted(picture, labels, SCENES))
        np.testing.assert_array_equal(rows[:, 2 * side + between.width : 3 * side + between.width], tinted)
        present |= set(np.unique(labels).tolist())
    colors, counts = np.unique(sheet[2 * side :].reshape(-1, 3), axis=0, return_counts=True)
    swatches = {tuple(color) for color in colors[counts >= 100].tolist()} & set(SCENES.palette)
    assert swatches == {SCENES.palette[index] for index in present}


def test_the_demos_seconds(monkeypatch):
    """Blind spot: a time told that is another clock's, or that of nothing."""
    clock = [10.0]
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: clock[0]))  # no other thread's clock

    class Model:
        def predict(self, image):
            clock[0] += image

    assert demo._seconds(Model(), 0.25) == 0.25


def test_label_files(tmp_path):
    """Blind spot: labels stretched or palette-mapped in the PNG; an int16 map written as 8 bits."""
    labels = _labels(48, 64, 2, 149, 0)
    paths = outputs.write(tmp_path / "a", pictures.scene(), Prediction(labels=labels), ADE)
    assert [path.name for path in paths] == ["a_overlay.jpg", "a.png"]
    with Image.open(paths[1]) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.array(image), labels)
    many = dataclasses.replace(ADE, classes=tuple(map(str, range(300))), palette=((1, 2, 3),) * 300)
    wide = np.int16([[0, 299], [256, 1]])
    paths = outputs.write(tmp_path / "b", np.zeros((2, 2, 3), np.uint8), Prediction(labels=wide), many)
    with Image.open(paths[1]) as image:
        np.testing.assert_array_equal(np.array(image), wide)


@pytest.mark.parametrize(("height", "width"), [(75, 100), (1, 1), (20, 3300), (40, 900), (900, 40)])
def test_overlay(height, width):
    """Blind spot: a legend that covers the picture, leaves it, overlaps itself, or is too small; classes that are not there.
    That letters are readable is judged by their height and by ink beside each swatch, not by reading."""
    classes = (4, 2, 44) if width > 1 else (4,)
    labels = _labels(height, width, *classes)
    picture = np.zeros((height, width, 3), np.uint8)
    canvas = np.array(outputs.with_legend(outputs.tinted(picture, labels, ADE), outputs.legend(labels, ADE))).astype(int)
    np.testing.assert_allclose(canvas[height // 2, 0], np.array(ade20k.PALETTE[4]) * 0.55, atol=1)
    legend = canvas[height:]
    letter = min(max(max(height, width) // 45, 12), 72)
    swatches = [np.argwhere((legend == ade20k.PALETTE[index]).all(2)) for index in classes]
    for swatch in swatches:
        (top, left), (bottom, right) = swatch.min(0), swatch.max(0)
        assert bottom - top >= letter - 2 and right - left >= letter - 2
        text = legend[top : bottom + 1, right + letter // 2 : right + 6 * letter]
        assert (text.sum(2) < 100).mean() > 0.05
    assert swatches == sorted(swatches, key=lambda swatch: tuple(swatch.min(0)))  # the largest class first
    colors, counts = np.unique(legend.reshape(-1, 3), axis=0, return_counts=True)
    filled = {tuple(color) for color in colors[counts >= (letter - 2) ** 2].tolist()} - {(255, 255, 255), (0, 0, 0)}
    assert filled == {ade20k.PALETTE[index] for index in classes}
    assert (canvas[:, -1] == 255).all() or canvas.shape[1] == width


def test_the_legend_by_hand():
    """Blind spot: shares of something else than the picture, the smallest class first, equal ones in any order; letters of one size in
    pictures of all sizes."""
    labels = np.repeat(np.uint8([3, 0, 8, 5]), [1, 5, 3, 1]).reshape(2, 5)
    names, palette = SCENES.classes, SCENES.palette
    wanted = [(f"{names[0]} 50.0%", palette[0]), (f"{names[8]} 30.0%", palette[8])]
    assert outputs.legend(labels, SCENES) == [*wanted, (f"{names[3]} 10.0%", palette[3]), (f"{names[5]} 10.0%", palette[5])]
    sizes = {(100, 100): 12, (540, 20): 12, (20, 585): 13, (900, 1800): 40, (3240, 9): 72, (9, 9000): 72}
    assert {size: outputs.letter_height(Image.new("L", size)) for size in sizes} == sizes


def test_all_classes_fit_a_small_picture():
    """Blind spot: 150 entries beyond the canvas of a 100-pixel picture."""
    labels = np.arange(75 * 100).reshape(75, 100) % 150
    tinted = outputs.tinted(np.zeros((75, 100, 3), np.uint8), labels.astype(np.uint8), ADE)
    canvas = np.array(outputs.with_legend(tinted, outputs.legend(labels, ADE)))
    colors, counts = np.unique(canvas[75:].reshape(-1, 3), axis=0, return_counts=True)
    swatches = {tuple(color) for color in colors[counts >= 100].tolist()}
    assert swatches >= set(ade20k.PALETTE)


def test_very_wide_pictures(tmp_path):
    """Blind spot: JPEG's limit of 65535 pixels a side, which two pictures side by side reach sooner."""
    depth = np.zeros((2, 40_000), np.float32)
    paths = outputs.write(tmp_path / "a", np.zeros((2, 40_000, 3), np.uint8), Prediction(depth=depth), RELATIVE)
    with Image.open(paths[0]) as view, Image.open(paths[2]) as data:
        assert view.width == outputs.MAX_VIEW_SIDE and data.width == 40_000


SOURCE = {"source": ["a.jpg", 3, 4]}


def _write(stem, record=SOURCE, **options):
    return outputs.write(stem, pictures.scene(), Prediction(depth=DEPTH), METRIC, record=record, **options)


def test_what_a_run_left_at_any_moment_is_known_as_ours(tmp_path, monkeypatch):
    """Blind spot: the rest of a run that was killed taken for the user's own, so that it is never completed; or for a result."""
    whole, earlier = outputs.write_whole, SOURCE | {"flip": True}
    for count, over in itertools.product(range(5), (False, True)):  # files written before the end; over what other options gave
        stem, calls = tmp_path / f"{count}{over}", itertools.count()
        paths = _write(stem, earlier, further=["pfm"]) if over else outputs.result_paths(stem, METRIC, further=["pfm"])

        def write_some(*arguments, calls=calls, count=count, **options):
            if next(calls) == count:
                raise KeyboardInterrupt
            whole(*arguments, **options)

        monkeypatch.setattr(outputs, "write_whole", write_some)
        if count < 4:
            with pytest.raises(KeyboardInterrupt):
                _write(stem, further=["pfm"])
        else:
            _write(stem, further=["pfm"])
        monkeypatch.setattr(outputs, "write_whole", whole)
        assert outputs.of_others(paths) is None
        assert outputs.is_done(paths, SOURCE) == (count == 4)
        assert outputs.is_done(paths, earlier) == (over and count == 0)


@pytest.mark.parametrize("suffix", ["_color.jpg", ".npy", ".pfm", ".png"])
def test_what_is_the_users_is_known_as_such(tmp_path, suffix):
    """Blind spot: only the PNG looked at; a user's array of the same size, a link, a folder or a pipe at a result's name."""
    stem = tmp_path / "a"
    paths = outputs.result_paths(stem, METRIC, further=["pfm"])
    path = tmp_path / f"a{suffix}"
    ways = {
        "alone": lambda: path.write_bytes(b"mine"),
        "changed": lambda: (_write(stem, further=["pfm"]), path.write_bytes(path.read_bytes()[::-1])),
        "emptied": lambda: (_write(stem, further=["pfm"]), path.write_bytes(b"")),
        "folder": lambda: (_write(stem, further=["pfm"]), path.unlink(), path.mkdir()),
        "pipe": lambda: (_write(stem, further=["pfm"]), path.unlink(), os.mkfifo(path)),
        "dangling link": lambda: path.symlink_to(tmp_path / "nowhere"),
    }
    for way, make in ways.items():
        for other in paths:
            other.rmdir() if other.is_dir() else other.unlink(missing_ok=True)
        make()
        assert outputs.of_others(paths) == path and not (way == "emptied" and outputs.is_done(paths, SOURCE)), way


def test_a_result_that_is_not_whole_is_not_done(tmp_path):
    """Blind spot: a .npy that a loss of power has left empty, one that is gone, a JPEG of another run."""
    for spoil in (
        lambda paths: os.truncate(paths[1], 100),
        lambda paths: paths[1].unlink(),
        lambda paths: paths[0].unlink(),
        lambda paths: paths[2].write_bytes(b""),
        lambda paths: paths[0].write_bytes(_write(tmp_path / "b", SOURCE | {"flip": True})[0].read_bytes()),
    ):
        paths = _write(tmp_path / "a")
        assert outputs.is_done(paths, SOURCE) and not outputs.is_done(paths, {"source": ["a.jpg", 3, 5]})
        spoil(paths)
        assert not outputs.is_done(paths, SOURCE)
    assert not outputs.is_done(outputs.result_paths(tmp_path / "a", METRIC, further=["pfm"]), SOURCE)


def test_the_record_comes_first_and_last(tmp_path, monkeypatch):
    """Blind spot: the PNG, which says that a picture is done, written before the rest; a file before the record that knows it."""
    order = []
    whole = outputs.write_whole
    monkeypatch.setattr(outputs, "write_whole", lambda path, *rest, **options: (order.append(path.suffix), whole(path, *rest, **options)))
    _write(tmp_path / "a", further=["pfm"])
    assert order == [".jpg", ".npy", ".pfm", ".png"]


def _png_with(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + pictures.chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)) + b"".join(chunks)


def _comment(text: bytes) -> bytes:
    return _png_with(pictures.chunk(b"tEXt", b"comment\0" + text))


BOMB = b"comment\0\0" + zlib.compress(b"dpt {" + bytes(1 << 26))
RECORDS_OF_OTHERS = {
    "text.png": b"dpt {}",
    "empty.png": b"",
    "not_json.png": _comment(b"dpt {not json"),
    "not_json.jpg": b"\xff\xd8\xff\xfe" + struct.pack(">H", 15) + b"dpt {not json",
    "nested.png": _comment(b'dpt {"a":' + b"[" * 30_000),
    "digits.png": _comment(b'dpt {"a":' + b"1" * 9_000 + b"}"),
    "latin.png": _comment(b'dpt {"a":"\xe9"}'),
    "long.png": _comment(b'dpt {"a":"' + b"x" * (1 << 17) + b'"}'),
    "compressed.png": _png_with(pictures.chunk(b"zTXt", BOMB)),
    "international.png": _png_with(pictures.chunk(b"iTXt", b"comment\0\1\0\0\0" + BOMB[9:])),
    "other_key.png": _png_with(pictures.chunk(b"tEXt", b"Comment\0dpt {}")),
    "claims.png": _png_with(struct.pack(">I", (1 << 32) - 1) + b"tEXt"),
    "chunks.png": _png_with(pictures.chunk(b"teSt", b"") * 1000, pictures.chunk(b"tEXt", b"comment\0dpt {}")),
    "after_pixels.png": _png_with(pictures.chunk(b"IDAT", b""), pictures.chunk(b"tEXt", b"comment\0dpt {}")),
    "segments.jpg": b"\xff\xd8" + b"\xff\xe5\x00\x02" * 1000 + b"\xff\xfe\x00\x08dpt {}",
    "short.jpg": b"\xff\xd8\xff\xfe\xff\xffdpt {",
    "negative.jpg": b"\xff\xd8\xff\xfe\x00\x01dpt {}",
    **{
        f"types{index}.png": _comment(b"dpt " + json.dumps(record).encode())
        for index, record in enumerate(
            [
                {"source": "abc"},
                {"source": 3},
                {"source": []},
                {"source": ["a", 1]},
                {"source": ["a", 1, 2, 3]},
                {"source": [None, 1, 2]},
                {"source": ["a", "1", 2]},
                {"source": ["a", True, 2]},
                {"source": None},
                {"files": []},
                {"files": {".npy": 3}},
                {"files": {".npy": [1, 2.0]}},
                {"files": {".npy": None}},
            ]
        )
    },
}


def test_records_of_others(tmp_path):
    """Blind spot: a stranger's comment, a damaged or missing file taken for ours, or raising; a pipe that is waited for."""
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "comment.jpg", comment="dpt of nothing")
    for name, content in RECORDS_OF_OTHERS.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    names = ("plain.png", "comment.jpg", "missing.png", ".", "pipe.png", "loop.png", "a\0b", "x" * 300, *RECORDS_OF_OTHERS)
    assert {name: record for name in names if (record := outputs.read_record(tmp_path / name)) is not None} == {}
    (tmp_path / "good.png").write_bytes(_comment(b'dpt {"source": ["a", 1, 2], "else": [[]]}'))
    assert outputs.read_record(tmp_path / "good.png") == {"source": ["a", 1, 2], "else": [[]]}
    (tmp_path / "good.jpg").write_bytes(b"\xff\xd8" + b"\xff\xe5\x00\x02" + b"\xff\xfe\x00\x08dpt {}")  # behind a segment of nothing
    assert outputs.read_record(tmp_path / "good.jpg") == {}


def test_long_names(tmp_path):
    """Blind spot: names of more bytes than letters; letters cut in two; two names that become one; another name in every run."""
    names = [
        "x" * 225,
        "x" * 226,
        "x" * 250 + "1",
        "x" * 250 + "2",
        "写" * 75,
        "写" * 83,
        "a" + "写" * 83,
        "ß" * 120,
        "é" * 118 + "\udcff" * 9,
    ]
    for model in ("dpt-tiny-depth", "m" * 250, "写" * 80):
        made = [outputs.result_name(name, model) for name in names]
        assert len(set(made)) == len(names) and made == [outputs.result_name(name, model) for name in names]
        for name in made:
            name.encode("utf-8")
            for path in _write(tmp_path / name, further=["pfm"])[-1:]:
                assert path.is_file()
    room = 255 - len("_overlay.jpg_m")  # bytes of a picture's name, at most
    assert outputs.result_name("x" * room, "m") == "x" * room + "_m" and len(outputs.result_name("x" * (room + 1), "m")) <= room + 2
    assert outputs.result_name("x" * 225, "m") == "x" * 225 + "_m" and outputs.result_name("a", "dpt-tiny-depth") == "a_dpt-tiny-depth"
    assert outputs.result_name("x" * 250 + "1", "dpt-tiny-depth").endswith("_dpt-tiny-depth")

"""Data sets as people have them: formats of pictures, depth and labels, names, and what must be refused by name."""

from __future__ import annotations

import json
import os
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image

from dpt.config import numbered_classes
from dpt.data.augmentation import Augmentation
from dpt.data.crops import Crops
from dpt.data.datasets import FolderDataset
from dpt.data.targets import IGNORE, TargetError, class_labels, read_depth, read_labels
from dpt.inference.images import load_image
from dpt.inference.resizing import preprocess
from dpt.zoo import CONFIGS

DEPTH, SCENES = CONFIGS["dpt-tiny-depth"], CONFIGS["dpt-tiny-scenes"]
STILL = Augmentation(smallest=1, aspect=1, flip=0, colour=0)
METRES = np.array([[0.5, 1.25, 0], [40, 7.75, 60.5]], dtype=np.float32)  # exact in millimetres and in 256ths


def write(root: Path, **folders: dict) -> Path:
    """A data set: images={"a.png": writer or array}, depth=..., labels=..., and description={...} for its dataset.json,
    which may also be text, bytes, or None for a folder of that name."""
    for folder, files in folders.items():
        if folder == "description":
            if files is None:
                (root / "dataset.json").mkdir()
                continue
            content = files if isinstance(files, str | bytes) else json.dumps(files)
            (root / "dataset.json").write_bytes(content if isinstance(content, bytes) else content.encode())
            continue
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if callable(content):
                content(root / folder / name)
            else:
                Image.fromarray(content).save(root / folder / name)
    return root


def grey(value: int = 0, height: int = 2, width: int = 3) -> np.ndarray:
    return np.full((height, width), value, np.uint8)


def colour(height: int = 2, width: int = 3) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


FILES = {**pictures.COLOR, **pictures.GREY_FILES, **pictures.RIGHT_HALF_WHITE}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_training_sees_every_picture_as_a_prediction_does(tmp_path):
    """Blind spot: 16-bit grey that becomes white, EXIF orientation, transparency; formats that are left out in silence."""
    names = {f"{number}{Path(name).suffix}": writer for number, (name, writer) in enumerate(FILES.items())}
    labels = {f"{Path(name).stem}.png": grey(1, pictures.HEIGHT, pictures.WIDTH) for name in names}
    data = FolderDataset(write(tmp_path, images=names, labels=labels), SCENES.head)
    assert len(data) == len(FILES) and {path.name for path in data.images} == set(names)
    smaller = replace(SCENES.input, size=(24, 24), multiple=1)
    for index, path in enumerate(data.images):
        wanted, content = preprocess(load_image(path), smaller)
        seen, _ = Crops(data, smaller, STILL)[0, index, content]
        assert np.array_equal(data[index][0], load_image(path))
        torch.testing.assert_close(seen, wanted[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"images": {"a.jpg": colour(), "a.png": colour()}, "labels": {"a.png": grey()}}, r"images/a\.jpg and .*images/a\.png: names"),
        ({"images": {"a.webp": colour(), "a.tif": colour()}, "labels": {"a.png": grey()}}, r"a\.tif and .*a\.webp: names"),
        ({"images": {"a.png": colour(), "b.png": colour()}, "labels": {"a.png": grey()}}, r"1 pictures have no target.*images/b\.png"),
        ({"images": {"a.png": colour()}, "depth": {"a.png": grey()}}, r"no target.*labels/NAME with \.png"),
        ({"images": {}, "labels": {"a.png": grey()}}, "holds no picture"),
        ({"labels": {"a.png": grey()}}, "holds no picture"),
    ],
)
def test_pairs_that_are_none(tmp_path, folders, message):
    """Blind spot: two pictures that share one target; a training on half the pictures without a word."""
    with pytest.raises(ValueError, match=message):
        FolderDataset(write(tmp_path, **folders), SCENES.head)


def test_a_check_ends_at_the_first_target_that_cannot_be_used(tmp_path, monkeypatch):
    """Blind spot: an hour of reading before the first file is named."""
    names = [f"{index:03}.png" for index in range(100)]
    root = write(tmp_path, images=dict.fromkeys(names, colour()), labels=dict.fromkeys(names, grey()))
    Image.fromarray(grey(9)).save(root / "labels" / names[0])
    data, read = FolderDataset(root, SCENES.head), []
    target = data.target
    monkeypatch.setattr(data, "target", lambda index: (read.append(index), time.sleep(0.01), target(index))[-1])
    with pytest.raises(TargetError, match=names[0]):
        data.check()
    assert len(read) < 50


def test_two_targets_for_one_picture(tmp_path):
    """Blind spot: whichever comes first."""
    targets = {"a.png": METRES.astype(np.uint16), "a.npy": lambda path: np.save(path, METRES)}
    with pytest.raises(ValueError, match=r"a\.npy and .*a\.png: names without extension must differ"):
        FolderDataset(write(tmp_path, images={"a.png": colour()}, depth=targets), DEPTH.head)


def test_what_lies_beside_the_pictures(tmp_path):
    """Blind spot: another program's hidden files taken for pictures; a format that is not known left out in silence; dots in names."""
    hidden = {".DS_Store.png": lambda path: path.write_bytes(b"x"), "._a.b.png": lambda path: path.write_bytes(b"x")}
    files = {"a.b.png": colour(), "C.JPG": colour(), "b.psd": lambda path: path.write_bytes(b"x"), **hidden}
    root = write(tmp_path, images=files, labels={"a.b.png": grey(), "C.png": grey()})
    with pytest.warns(UserWarning, match=r"images: 1 files are left out, the first b\.psd"):
        data = FolderDataset(root, SCENES.head)
    assert data.names == ["C", "a.b"]


def pfm(order: str, scale: float = 1.0):
    """A writer of METRES / scale as a Portable Float Map, rows from the bottom up."""
    sign = "-" if order == "<" else ""
    return lambda path: path.write_bytes(f"Pf\n3 2\n{sign}{scale}\n".encode() + (METRES[::-1] / scale).astype(f"{order}f4").tobytes())


def npy(dtype: str, scale: float = 1.0):
    return lambda path: np.save(path, (METRES * scale).astype(dtype))


def picture(dtype: str, scale: float = 1.0):
    return lambda path: Image.fromarray((METRES * scale).astype(dtype)).save(path)


@pytest.mark.parametrize(
    ("name", "writer", "scale"),
    [
        ("a.png", picture("u2", 1000), None),
        ("a.png", picture("u2", 256), 256),
        ("a.tif", picture("u2", 1000), None),
        ("a.tiff", picture("i4", 5000), 5000),
        ("a.tif", picture("f4"), 256),  # floats are metres whatever the scale
        ("a.npy", npy("f4"), None),
        ("a.npy", npy("f2"), 256),
        ("a.npy", npy(">f8"), None),
        ("a.npy", npy("u2", 1000), None),
        ("a.npy", npy("i8", 4), 4),
        ("a.pfm", pfm("<"), None),
        ("a.pfm", pfm(">"), 7),
        ("a.PFM", pfm("<", 0.5), None),
    ],
)
def test_depth_files(tmp_path, name, writer, scale):
    """Blind spot: KITTI's 256ths taken for millimetres, rows upside down, the byte order, floats divided by the scale."""
    root = write(tmp_path, images={"a.png": colour()}, depth={name: writer})
    for data in (
        FolderDataset(root, DEPTH.head, depth_scale=scale),
        FolderDataset(write(root, description={"depth_scale": scale or 1000}), DEPTH.head),
    ):
        depth = data[0][1]
        assert depth.dtype == np.float32
        np.testing.assert_array_equal(depth, METRES)


def test_depth_that_is_unknown(tmp_path):
    """Blind spot: NaN, infinity or a negative depth that takes part in a loss."""
    np.save(tmp_path / "a.npy", np.array([[np.nan, np.inf, -np.inf], [-1, 0, 1e300]]))
    assert read_depth(tmp_path / "a.npy").tolist() == [[0, 0, 0], [0, 0, 0]]
    np.save(tmp_path / "b.npy", np.array([[-5, 0, 1000]]))
    assert read_depth(tmp_path / "b.npy").tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("stored", "sky", "wanted"),
    [
        (np.array([[0, 1000, 65535]], np.uint16), 65535, [[0, 1, np.inf]]),
        (np.array([[0, 1000, 65535]], np.uint16), None, [[0, 1, np.float32(65.535)]]),
        (np.array([[0, 1000, 65535]], np.uint16), 0, [[np.inf, 1, np.float32(65.535)]]),
        (np.array([[np.nan, 1, -1]], np.float32), -1, [[0, 1, np.inf]]),
    ],
)
def test_the_sky_is_infinitely_far(tmp_path, stored, sky, wanted):
    """Blind spot: the sky's value taken for metres, or divided by the scale before it is looked for."""
    description = {} if sky is None else {"sky": sky}
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / "a.npy", stored)
    data = FolderDataset(write(tmp_path, images={"a.png": colour()}, description=description), DEPTH.head)
    assert data.target(0).tolist() == wanted and data.target(0).dtype == np.float32


def raw(content: bytes):
    return lambda path: path.write_bytes(content)


def cut(writer):
    def write_half(path: Path) -> None:
        writer(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write_half


BAD_DEPTH = {
    "bytes.png": (picture("u1"), "8-bit integers"),
    "palette.png": (lambda path: Image.new("P", (3, 2)).save(path), "8-bit integers"),
    "bits.png": (lambda path: Image.new("1", (3, 2)).save(path), "bool"),
    "colour.png": (lambda path: Image.new("RGB", (3, 2)).save(path), "mode RGB"),
    "colour16.png": (pictures.rgb16, "mode RGB"),
    "alpha.png": (lambda path: Image.new("LA", (3, 2)).save(path), "mode LA"),
    "cut.png": (cut(pictures.GREY_FILES["grey16.png"]), "."),
    "cut.tif": (cut(picture("f4")), "."),
    "jpeg.png": (lambda path: Image.new("L", (3, 2)).save(path, "JPEG"), "not a picture"),
    "empty.tif": (raw(b""), "empty"),
    "cut.npy": (cut(npy("f8")), "."),
    "empty.npy": (raw(b""), "."),
    "complex.npy": (npy("c8"), "complex64"),
    "objects.npy": (lambda path: np.save(path, np.array([{}], dtype=object)), "pickle"),
    "archive.npy": (lambda path: np.savez(path.open("wb"), METRES), "archive"),
    "channels.npy": (lambda path: np.save(path, METRES[..., None]), r"shape \(2, 3, 1\)"),
    "nothing.npy": (lambda path: np.save(path, METRES[:0]), r"shape \(0, 3\)"),
    "colour.pfm": (raw(b"PF\n1 1\n-1\n" + bytes(12)), "starts with Pf"),
    "cut.pfm": (cut(pfm("<")), "bytes after the header"),
    "long.pfm": (raw(b"Pf\n1 1\n-1\n" + bytes(5)), "bytes after the header"),
    "header.pfm": (raw(b"Pf\n1\n-1\n" + bytes(4)), "cannot be decoded"),
    "zero.pfm": (raw(b"Pf\n1 1\n0\n" + bytes(4)), "scale"),
    "endless.pfm": (raw(b"Pf\n" + b"1" * 1000 + b" 1\n-1\n"), "cannot be decoded"),
    "huge.npy": (
        lambda path: np.lib.format.write_array_header_1_0(
            path.open("wb"), {"descr": "<f8", "fortran_order": False, "shape": (1 << 30, 1 << 30)}
        ),
        ".",
    ),
    "folder.npy": (Path.mkdir, "a folder"),
    **{f"pipe{extension}": (os.mkfifo, "a pipe") for extension in (".npy", ".pfm", ".png", ".tif")},
    "missing.png": (lambda path: None, "No such file"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", BAD_DEPTH)
def test_depth_that_is_none(tmp_path, name):
    """Blind spot: a coloured picture of depth taken for depth, executed pickles, tracebacks from inside a decoder."""
    writer, message = BAD_DEPTH[name]
    writer(tmp_path / name)
    with pytest.raises(TargetError, match=rf"{name}: .*{message}"):
        read_depth(tmp_path / name)


@pytest.mark.parametrize("scale", [0, -1000, float("nan"), float("inf")])
def test_a_scale_is_positive(tmp_path, scale):
    """Blind spot: infinite or negative metres."""
    root = write(tmp_path, images={"a.png": colour()}, depth={"a.png": picture("u2")})
    with pytest.raises(ValueError, match=f"depth_scale={scale}: it is a positive number"):
        FolderDataset(root, DEPTH.head, depth_scale=scale)


@pytest.mark.parametrize(
    ("name", "file", "wanted"),
    [
        ("1 bit", pictures.png(4, 1, 1, 0, bytes([0, 0b01010000])), [0, 1, 0, 1]),
        ("2 bits", pictures.png(4, 1, 2, 0, bytes([0, 0b00011011])), [0, 1, 2, 3]),
        ("4 bits", pictures.png(4, 1, 4, 0, bytes([0, 0x07, 0x8F])), [0, 7, 8, 15]),
        ("8 bits", pictures.png(4, 1, 8, 0, bytes([0, 0, 7, 8, 255])), [0, 7, 8, 255]),
        ("16 bits", pictures.png(4, 1, 16, 0, b"\0" + struct.pack(">4H", 0, 7, 255, 300)), [0, 7, 255, 300]),
    ],
)
def test_labels_of_every_bit_depth(tmp_path, name, file, wanted):
    """Blind spot: Pillow stretches 2 and 4 bits to 0..255, so that class 1 becomes 85 or 17."""
    (tmp_path / "a.png").write_bytes(file)
    labels = read_labels(tmp_path / "a.png")
    assert labels.dtype == np.int64 and labels.tolist() == [wanted]


def test_labels_of_a_palette_are_its_indices(tmp_path):
    """Blind spot: colours taken for classes."""
    image = Image.fromarray(np.array([[0, 3, 8]], np.uint8)).convert("L")
    image.putpalette([7 * value % 256 for value in range(768)])
    image.save(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png").tolist() == [[0, 3, 8]]


def labelled(tmp_path, *labels: int, **description) -> FolderDataset:
    """A data set of one picture with these labels in a row."""
    row = np.array([labels], np.uint8)
    folders = {"images": {"a.png": colour(*row.shape)}, "labels": {"a.png": row}}
    return FolderDataset(write(tmp_path, **folders, description=description), SCENES.head)


@pytest.mark.parametrize(
    ("stored", "reduce", "wanted"),
    [
        ((0, 1, 8, 255), False, [0, 1, 8, IGNORE]),
        ((0, 1, 9, 255), True, [IGNORE, 0, 8, IGNORE]),
        ((0, 1, 8, 255), None, [0, 1, 8, IGNORE]),
    ],
)
def test_reduce_zero_label(tmp_path, stored, reduce, wanted):
    """Blind spot: "other" taken for the first class, every class one off, 255 that becomes class 254. Nine classes, by hand."""
    data = labelled(tmp_path, *stored, **({} if reduce is None else {"reduce_zero_label": reduce}))
    assert data[0][1].tolist() == [wanted] and data[0][1].dtype == np.int64
    other = FolderDataset(data.root, SCENES.head, reduce_zero_label=not reduce)  # the argument goes before the file
    assert other.reduce_zero_label is not bool(reduce)


@pytest.mark.parametrize(
    ("stored", "reduce", "message"),
    [
        ((0, 9), False, r"a\.png: holds the label 9: labels are 0 to 8, a class each, and 255 .*; if 0 means 'other'.*reduce_zero_label"),
        ((0, 9, 17), False, r"a\.png: holds the label 9: labels are 0 to 8[^;]*$"),
        ((254, 1), False, r"a\.png: holds the label 254"),
        ((10, 1), True, r"a\.png: holds the label 10: labels are 1 to 9, a class each, and 0 or 255 where there is none$"),
    ],
)
def test_labels_outside_the_classes(tmp_path, stored, reduce, message):
    """Blind spot: an IndexError from inside the loss, or a class that is scored as another."""
    data = labelled(tmp_path, *stored, **({} if reduce is None else {"reduce_zero_label": reduce}))
    for read in (lambda: data[0], data.check):
        with pytest.raises(TargetError, match=message):
            read()


def test_a_negative_label_is_none():
    """Blind spot: a TIFF in a .png's clothes, whose -1 passes for the last class, or for no class."""
    with pytest.raises(TargetError, match=r"a\.png: holds the label -1"):
        class_labels(np.array([[0, -1]]), 9, False, "a.png")


def test_a_colour_picture_is_no_label(tmp_path):
    """Blind spot: the red channel, or a shape error far from the file."""
    root = write(tmp_path, images={"a.png": colour()}, labels={"a.png": colour()})
    with pytest.raises(TargetError, match=r"labels/a\.png: a picture of mode RGB"):
        FolderDataset(root, SCENES.head)[0]


@pytest.mark.parametrize("task", ["depth", "labels"])
def test_a_target_of_another_size(tmp_path, task):
    """Blind spot: broadcasting, cropping or resizing in silence; a picture that EXIF turns against its target."""
    target = np.ones((pictures.HEIGHT, pictures.WIDTH), np.uint16 if task == "depth" else np.uint8)
    root = write(tmp_path, images={"a.jpg": pictures.turned(6), "b.png": colour(4, 5)}, **{task: {"a.png": target, "b.png": target}})
    data = FolderDataset(root, (DEPTH if task == "depth" else SCENES).head)
    assert data[0][0].shape[:2] == data[0][1].shape  # stored as 64x48, shown as 48x64
    with pytest.raises(TargetError, match=rf"{task}/b\.png is \(48, 64\), its picture \(4, 5\): they must be the same size"):
        data[1]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", r"dataset\.json: not JSON"),
        ("[1]", r"dataset\.json: holds a list, not a JSON object"),
        ("", r"dataset\.json: not JSON"),
        ('{"a":' + "[" * 30_000, r"dataset\.json: not JSON"),
        (b'{"classes": ["\xff"]}', r"dataset\.json: not JSON .*utf-8"),
        (None, r"not a regular file: '.*dataset\.json'"),  # a folder
        ({"classes": "abc"}, r"classes is 'abc': it is a list of names"),
        ({"classes": [1, 2]}, r"classes is \[1, 2\]: it is a list of names"),
        ({"depth_scale": "1000"}, r"depth_scale is '1000': it is a positive number"),
        ({"depth_scale": True}, r"depth_scale is True: it is a positive number"),
        ({"depth_scale": 0}, r"depth_scale is 0: it is a positive number"),
        ('{"depth_scale": NaN}', r"depth_scale is nan: it is a positive number"),
        ('{"depth_scale": 1' + "0" * 400 + "}", r"depth_scale is 10*\.\.\.0*: it is a positive number"),
        ({"sky": "far"}, r"sky is 'far': it is a number"),
        ({"reduce_zero_label": 1}, r"reduce_zero_label is 1: it is true or false"),
        ({"classes": ["cat", "dog"]}, r"has 2 classes, the model 9: they must be the same"),
        ({"classes": [*SCENES.head.classes[:8], "dog"]}, r"class 8 of .* is 'dog', the model's '\w+': they must be the same"),
        ({"classes": SCENES.head.classes[::-1]}, r"class 0 of .* is '\w+', the model's '\w+': they must be the same"),
    ],
)
def test_a_description_that_does_not_fit(tmp_path, description, message):
    """Blind spot: labels that mean something else, in number or by name."""
    root = write(tmp_path, images={"a.png": colour()}, labels={"a.png": grey()}, description=description)
    with pytest.raises((ValueError, OSError), match=message):
        FolderDataset(root, SCENES.head)


def test_classes_that_fit(tmp_path):
    """Blind spot: a model whose file had no names refused for the numbers it got instead; a depth model asked for classes."""
    root = write(tmp_path, images={"a.png": colour()}, labels={"a.png": grey()}, depth={"a.png": METRES.astype(np.uint16)})
    write(root, description={"classes": list(SCENES.head.classes), "extra": 1})
    ours, theirs = (replace(SCENES.head, classes=names) for names in (numbered_classes(9), tuple(f"LABEL_{index}" for index in range(9))))
    for head in (SCENES.head, ours, theirs, DEPTH.head):
        assert len(FolderDataset(root, head)) == 1
    many = SCENES.with_("head", classes=numbered_classes(256), palette=((0, 0, 0),) * 256).head
    with pytest.raises(ValueError, match="256 classes: label files tell at most 255 apart"):
        FolderDataset(root, many)

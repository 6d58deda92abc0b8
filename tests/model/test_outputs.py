"""Result files. Blind spots: whether the colours please; viewers other than Pillow and NumPy; Windows' file locks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from dpt import ade20k, demo, images, outputs
from dpt.cli import main
from dpt.config import CONFIGS
from dpt.predict import Prediction

from . import pictures

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
    paths = outputs.write(stem, pictures.scene(), Prediction(depth=DEPTH), RELATIVE, pfm=True, record=record)
    assert paths == outputs.result_paths(stem, RELATIVE, pfm=True) and all(path.is_file() for path in paths)
    assert [path.name for path in paths] == ["a.b_model.npy", "a.b_model.pfm", "a.b_model_color.jpg", "a.b_model.png"]
    assert {path.name for path in stem.parent.iterdir()} == {path.name for path in paths}  # nothing else, no temporary file
    np.testing.assert_array_equal(np.load(paths[0]), DEPTH)
    with Image.open(paths[3]) as image:
        values = np.array(image)
    assert values.dtype == np.uint16 and values[0, 0] == 0 and values[-1, -1] == 65535
    np.testing.assert_allclose(values / 65535 * 4 + 3, DEPTH, atol=4 / 65535)
    with Image.open(paths[2]) as image:
        assert image.size == (128, 48)
        left = np.array(image)[:, :64]
    assert np.abs(np.subtract(pictures.quarters(left), pictures.quarters(pictures.scene()))).max() <= 12
    assert outputs.read_record(paths[3]) == outputs.read_record(paths[2]) == record


def test_pfm_layout(tmp_path):
    """Blind spot: rows from the top, big-endian bytes, width and height swapped. Against the format's bytes, by hand."""
    depth = np.float32([[1, 2, 3], [-4, 5.5, 6]])
    content = outputs.pfm_bytes(depth)
    assert content[:12] == b"Pf\n3 2\n-1.0\n"
    np.testing.assert_array_equal(np.frombuffer(content[12:], "<f4"), [-4, 5.5, 6, 1, 2, 3])


def test_depth_png_values():
    """Blind spot: constant depth divides by zero, NaN spreads, metres clipped or wrapped. Values by hand."""
    nan, inf = np.nan, np.inf
    for depth, inverse, wanted in [
        ([[2, 2, 2]], True, [[0, 0, 0]]),
        ([[0, 0, 0]], True, [[0, 0, 0]]),
        ([[1, 2, 3]], True, [[0, 32768, 65535]]),
        ([[-1, nan, 3, inf, -inf, 1]], True, [[0, 0, 65535, 0, 0, 32768]]),
        ([[nan, inf]], True, [[0, 0]]),
        ([[0.0014, 1.5, 65.535, 80, -3, nan, inf]], False, [[1, 1500, 65535, 65535, 0, 0, 0]]),
        ([[1e-30, 2e-30]], True, [[0, 65535]]),
        ([[-3e38, 3e38]], True, [[0, 65535]]),
    ]:
        with np.errstate(all="raise"):
            values = outputs.depth_to_uint16(np.float32(depth), inverse)
        assert values.dtype == np.uint16
        np.testing.assert_array_equal(values, wanted)


def test_colors():
    """Blind spot: near and far swapped between inverse depth and metres; a constant map; what is not finite."""
    ramp = np.float32([[1, 2, 3, np.nan]])
    inverse, metres = outputs.colored(ramp, True).astype(int), outputs.colored(ramp, False).astype(int)
    assert inverse[0, 2].sum() > inverse[0, 1].sum() > inverse[0, 0].sum()
    np.testing.assert_array_equal(inverse[0, [2, 1, 0]], metres[0, :3])
    np.testing.assert_array_equal(inverse[0, 3], [128] * 3)
    assert len(np.unique(outputs.colored(np.ones((3, 3), np.float32), True).reshape(-1, 3), axis=0)) == 1
    assert (outputs.colored(np.full((2, 2), np.nan, np.float32), True) == 128).all()


def test_colours_are_those_of_the_whole(monkeypatch):
    """Blind spot: a seam between strips of rows, each spread over its own depths; the last strip, which is shorter; a far away NaN."""
    depth = np.random.default_rng(0).normal(size=(37, 11)).astype(np.float32)
    depth[3, 4], depth[36, 10] = np.nan, np.inf
    found = []
    for pixels in (1, 55, 1 << 16):
        monkeypatch.setattr(outputs, "STRIP_PIXELS", pixels)
        found.append([outputs.colored(depth, True), outputs.depth_to_uint16(depth, True), outputs.depth_to_uint16(depth, False)])
    for other in found[1:]:
        assert all(np.array_equal(one, two) for one, two in zip(found[0], other, strict=True))
    known = depth[np.isfinite(depth)].astype(np.float64)
    wanted = np.rint((depth.astype(np.float64) - known.min()) / (known.max() - known.min()) * 65535)
    np.testing.assert_array_equal(found[0][1][np.isfinite(depth)], wanted[np.isfinite(depth)])


def test_depth_scale():
    """Blind spot: a scale that is upside down, of other colours than the maps', of another height, or without its names."""
    scale = np.array(outputs.depth_scale(300))
    assert len(scale) == 300
    column = next(index for index in range(scale.shape[1]) if (scale[:, index] != 255).any())
    wanted = outputs.colored(np.linspace(1, 0, 300, dtype=np.float32)[:, None], True)
    np.testing.assert_array_equal(scale[:, column], wanted[:, 0])
    right = scale[:, column + 12 :].astype(int).sum(2) < 100
    assert right[:30].any() and right[-30:].any() and not right[40:-40].any()


def test_the_demo_picture(tmp_path, monkeypatch):
    """Blind spot: columns of different sizes; a legend inside the pictures, or without a class that they have; maps of another picture."""
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "PICTURES", demo.PICTURES[:2])
    assert main(["demo", "-o", str(tmp_path)]) == 0
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
    canvas = np.array(outputs.overlay(picture, labels, ADE)).astype(int)
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


def test_all_classes_fit_a_small_picture():
    """Blind spot: 150 entries beyond the canvas of a 100-pixel picture."""
    labels = np.arange(75 * 100).reshape(75, 100) % 150
    canvas = np.array(outputs.overlay(np.zeros((75, 100, 3), np.uint8), labels.astype(np.uint8), ADE))
    colors, counts = np.unique(canvas[75:].reshape(-1, 3), axis=0, return_counts=True)
    swatches = {tuple(color) for color in colors[counts >= 100].tolist()}
    assert swatches >= set(ade20k.PALETTE)


def test_very_wide_pictures(tmp_path):
    """Blind spot: JPEG's limit of 65535 pixels a side, which two pictures side by side reach sooner."""
    depth = np.zeros((2, 40_000), np.float32)
    paths = outputs.write(tmp_path / "a", np.zeros((2, 40_000, 3), np.uint8), Prediction(depth=depth), RELATIVE)
    with Image.open(paths[1]) as view, Image.open(paths[2]) as data:
        assert view.width == outputs.MAX_VIEW_SIDE and data.width == 40_000


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_whole_or_not_at_all(tmp_path, failure):
    """Blind spot: an interrupted write leaves half a file, its temporary file, or destroys the previous one."""
    path = tmp_path / "a.npy"
    path.write_bytes(b"before")

    def writer(file):
        file.write(b"half")
        assert path.read_bytes() == b"before"
        raise failure

    with pytest.raises(failure):
        outputs.write_whole(path, writer)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    outputs.write_whole(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_png_comes_last(tmp_path, monkeypatch):
    """Blind spot: the PNG, which says that a picture is done, written before the rest."""
    order = []
    whole = outputs.write_whole
    monkeypatch.setattr(outputs, "write_whole", lambda path, writer: (order.append(path.suffix), whole(path, writer)))
    outputs.write(tmp_path / "a", pictures.scene(), Prediction(depth=DEPTH), METRIC, pfm=True)
    assert order == [".npy", ".pfm", ".jpg", ".png"]


def test_records_of_others(tmp_path):
    """Blind spot: a stranger's comment, a damaged or missing file taken for ours, or raising."""
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "comment.jpg", comment="dpt of nothing")
    (tmp_path / "text.png").write_text("dpt {}")
    for name in ("plain.png", "comment.jpg", "text.png", "missing.png", "."):
        assert outputs.read_record(tmp_path / name) is None

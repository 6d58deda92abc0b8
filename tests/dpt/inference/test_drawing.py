"""Maps as pixels and colours. Blind spot: a GPU's arithmetic, of which PyTorch promises that it rounds as a CPU's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from dpt.inference import drawing, outputs
from dpt.inference.prediction import Prediction
from dpt.zoo import CONFIGS

RELATIVE, ADE = CONFIGS["dpt-tiny-depth"].head, CONFIGS["dpt-base-ade20k"].head
METRIC = dataclasses.replace(RELATIVE, inverse=False)
NORMALS = next(head for head in CONFIGS["tipsv2-base"].heads if head.task == "normals")
MANY = dataclasses.replace(
    ADE, classes=tuple(map(str, range(300))), palette=tuple((i % 256, 7 * i % 256, 31 * i % 256) for i in range(300))
)


def _random(*shape: int) -> np.ndarray:
    return (20 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


def _unknown(values: np.ndarray) -> np.ndarray:
    values[3, 4:9], values[20], values[21] = np.nan, np.inf, -np.inf
    return values


SIZE = (61, 83)
MAPS = {  # by name: the head, and the map
    "inverse": (RELATIVE, _random(*SIZE)),
    "relative": (dataclasses.replace(METRIC, relative=True), _random(*SIZE)),
    "metres": (METRIC, 5 * np.abs(_random(*SIZE))),
    "256ths": (dataclasses.replace(METRIC, depth_scale=256.0), 5 * np.abs(_random(*SIZE))),
    "inverse, not all known": (RELATIVE, _unknown(_random(*SIZE))),
    "metres, not all known": (METRIC, _unknown(_random(*SIZE))),
    "constant": (RELATIVE, np.full(SIZE, 2.5, np.float32)),
    "nothing known": (RELATIVE, np.full(SIZE, np.nan, np.float32)),
    "as large as can be": (RELATIVE, np.where(_random(*SIZE) > 0, np.float32(3e38), np.float32(-3e38))),
    "labels": (ADE, np.random.default_rng(0).integers(0, 150, SIZE).astype(np.uint8)),
    "labels of 16 bits": (MANY, np.random.default_rng(0).integers(0, 300, SIZE).astype(np.int16)),
    "normals": (NORMALS, _unknown(_random(*SIZE, 3) / 60)),
}
FIELDS = {"depth": "depth", "segmentation": "labels", "normals": "normals"}


def _spread(depth: np.ndarray) -> np.ndarray:
    finite = np.isfinite(depth)
    low, high = (float(edge(depth, where=finite, initial=start)) for edge, start in ((np.min, np.inf), (np.max, -np.inf)))
    values = depth.astype(np.float64)
    values[~finite] = np.nan
    return (values - low) / (high - low if high > low else 1)


def _by_numpy(found: np.ndarray, image: np.ndarray, head) -> dict[str, np.ndarray]:
    """What NumPy and Pillow drew, of which every file before had its bytes."""
    if head.task == "segmentation":
        colours = np.take(np.asarray(head.palette, dtype=np.uint8), found, axis=0)
        return {"colours": np.array(Image.blend(Image.fromarray(image), Image.fromarray(colours), 0.55))}
    if head.task == "normals":
        colours = np.nan_to_num((found.astype(np.float32) + 1) / 2, nan=0.5, posinf=0.5, neginf=0.5).clip(0, 1)
        return {"colours": np.rint(colours * 255).astype(np.uint8)}
    from matplotlib import colormaps

    values = found.astype(np.float64) if head.metric else _spread(found)
    values = np.nan_to_num(values * (head.depth_scale if head.metric else 65535), nan=0, posinf=0, neginf=0)
    table, near = np.rint(colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8), _spread(found)
    unknown, near = np.isnan(near), near if head.inverse else 1 - near
    colours = np.take(table, np.rint(np.where(unknown, 0, near) * 255).astype(np.uint8), axis=0)
    colours[unknown] = 128
    return {"pixels": np.rint(values.clip(0, 65535)).astype(np.uint16), "colours": colours}


@pytest.mark.parametrize("name", MAPS)
def test_files_keep_their_bytes(tmp_path, name):
    """Blind spot: one level in a million pixels, from float32 where it was float64, another rounding of halves, or another order of sums;
    what a GPU drew put under another name, or drawn again."""
    head, found = MAPS[name]
    image = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    prediction, wanted = Prediction(**{FIELDS[head.task]: found}), _by_numpy(found, image, head)
    for what, of in drawing.drawn(torch.from_numpy(found), torch.from_numpy(image), head).items():
        assert of.numpy().dtype == wanted[what].dtype
        np.testing.assert_array_equal(of.numpy(), wanted[what])
    here = outputs.write(tmp_path / "here", image, prediction, head, further=["pfm"])
    before = outputs.write(tmp_path / "before", image, prediction, head, further=["pfm"], drawn=wanted)
    assert [path.read_bytes() for path in here] == [path.read_bytes() for path in before]
    others = {what: 255 - of for what, of in wanted.items()}
    changed = outputs.write(tmp_path / "changed", image, prediction, head, further=["pfm"], drawn=others)
    drawn_in = {".jpg", ".png"} - ({".png"} if head.task == "segmentation" else set())
    assert {path.suffix for path, other in zip(here, changed, strict=True) if path.read_bytes() != other.read_bytes()} >= drawn_in


def test_a_tint_is_pillows():
    """Blind spot: a rounding of the tint that shows with few pairs of levels. All 65 536 are here."""
    levels = np.arange(256, dtype=np.uint8)
    image = np.repeat(levels[:, None, None], 256, 1).repeat(3, 2)  # (256, 256, 3): one level a row
    labels = np.repeat(levels[None], 256, 0)
    grey = tuple((level, level, level) for level in range(256))
    for opacity in (0.55, 0.3, 1.0):
        found = drawing.tinted(torch.from_numpy(image), torch.from_numpy(labels), grey, opacity)
        wanted = Image.blend(Image.fromarray(image), Image.fromarray(np.ascontiguousarray(image.transpose(1, 0, 2))), opacity)
        np.testing.assert_array_equal(found.numpy(), np.array(wanted))


@pytest.mark.parametrize("name", [name for name, (head, _) in MAPS.items()])
@pytest.mark.parametrize("elements", [1, 500, 1 << 24])
def test_strips(monkeypatch, name, elements):
    """Blind spot: a seam between strips of rows, each spread over its own depths; the last strip, which is shorter."""
    head, found = MAPS[name]
    image = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    monkeypatch.setitem(drawing.STRIP_ELEMENTS, "cpu", elements)
    made, wanted = drawing.drawn(torch.from_numpy(found), torch.from_numpy(image), head), _by_numpy(found, image, head)
    assert made.keys() == wanted.keys() and all(np.array_equal(made[what].numpy(), wanted[what]) for what in wanted)


def test_nothing_is_changed():
    """Blind spot: work in place on the map itself, which is written after it was drawn."""
    for head, found in MAPS.values():
        image = torch.zeros(*SIZE, 3, dtype=torch.uint8)
        given = torch.from_numpy(found.copy())
        drawing.drawn(given, image, head)
        assert np.array_equal(given.numpy(), found, equal_nan=found.dtype.kind == "f") and not image.any()


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
        values = drawing.depth_to_uint16(torch.tensor(depth, dtype=torch.float32), inverse)
        assert values.dtype == torch.uint16 and values.tolist() == wanted


def test_colors():
    """Blind spot: near and far swapped between inverse depth and metres; a constant map; what is not finite."""
    ramp = np.float32([[1, 2, 3, np.nan]])
    inverse, metres = (outputs.colored(ramp, inverse).astype(int) for inverse in (True, False))
    assert inverse[0, 2].sum() > inverse[0, 1].sum() > inverse[0, 0].sum()
    np.testing.assert_array_equal(inverse[0, [2, 1, 0]], metres[0, :3])
    np.testing.assert_array_equal(inverse[0, 3], [128] * 3)
    assert len(np.unique(outputs.colored(np.ones((3, 3), np.float32), True).reshape(-1, 3), axis=0)) == 1
    assert (outputs.colored(np.full((2, 2), np.nan, np.float32), True) == 128).all()

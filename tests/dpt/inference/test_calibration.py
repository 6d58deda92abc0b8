"""Depth known up to scale and shift, to metres, by pixels whose distance is known: `dpt.inference.calibration`."""

import numpy as np
import pytest
from PIL import Image

from dpt.config import HeadConfig
from dpt.inference.calibration import FARTHEST, calibrate, read_known
from dpt.inference.images import ImageError
from dpt.zoo import config_of

INVERSE = config_of("dpt-large-midas").head
METRIC = config_of("dpt-hybrid-nyu").head
RELATIVE = next(c.head for c in map(config_of, ("depth-anything-3-mono-large",)) if c.head.relative)


def scene(head: HeadConfig, seed: int = 0, shape: tuple[int, int] = (60, 80)) -> tuple[np.ndarray, np.ndarray]:
    """(map, metres) of a slope with a box before it."""
    generator = np.random.default_rng(seed)
    metres = np.linspace(1.5, 40, shape[0])[:, None] + generator.random(shape)
    metres[20:40, 30:60] = 2.0
    known = 1 / metres if head.inverse else metres
    return ((known - 0.03) / 0.0007).astype(np.float32), metres


def known(metres: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y, x = generator.integers(0, metres.shape[0], count), generator.integers(0, metres.shape[1], count)
    return x, y, metres[y, x]


@pytest.mark.parametrize("head", [INVERSE, RELATIVE], ids=["inverse", "relative"])
@pytest.mark.parametrize("count", [2, 3, 10, 5000])
def test_exact_distances_give_the_scene(head, count):
    """Blind spot: inverse depth fitted as depth; x for y; a shift that is left out."""
    depth, metres = scene(head)
    found = calibrate(depth, head, *known(metres, count))
    assert (found.given, found.used) == (count, count) and found.residual < 1e-3
    np.testing.assert_allclose(found.metres(depth), metres, rtol=2e-3)


@pytest.mark.parametrize("count", [6, 30, 4000])
def test_wrong_distances_are_found(count):
    """Blind spot: a fit that two in five wrong distances move."""
    depth, metres = scene(INVERSE)
    x, y, distances = known(metres, count)
    wrong = np.arange(count) % 5 < 2
    wrong[0] = wrong[1] = False
    distances = np.where(wrong, 0.3 + 30 * np.random.default_rng(3).random(count), distances)
    found = calibrate(depth, INVERSE, x, y, distances)
    np.testing.assert_allclose(found.metres(depth), metres, rtol=0.02)
    assert found.used <= count - wrong.sum() + 0.05 * count


def test_noise_is_averaged():
    """Blind spot: the line of two pixels taken for the fit."""
    depth, metres = scene(INVERSE)
    x, y, distances = known(metres, 2000)
    noisy = 1 / (1 / distances + 0.01 * np.random.default_rng(1).standard_normal(2000)).clip(0.005)
    found = calibrate(depth, INVERSE, x, y, noisy)
    assert abs(found.scale / 0.0007 - 1) < 0.02 and found.used > 1800 and 0 < found.residual < 5


def test_between_pixels_and_beyond_the_scene():
    """Blind spot: places that are rounded; a distance behind infinity."""
    depth = (np.arange(5, dtype=np.float32) * np.ones((4, 1), np.float32) + 1) / 10
    found = calibrate(depth, INVERSE, np.array([0.5, 3.5]), np.array([2.5, 1]), np.array([1 / 0.15, 1 / 0.45]))
    assert found.scale == pytest.approx(1) and found.shift == pytest.approx(0, abs=1e-6)
    assert found.metres(np.array([[0.0, -1.0, 2.0]])).tolist() == [[FARTHEST, FARTHEST, 0.5]]


SLOPE = np.linspace(1, 2, 20, dtype=np.float32).reshape(4, 5)


@pytest.mark.parametrize(
    ("head", "x", "y", "metres", "says"),
    [
        (METRIC, [0, 1], [0, 1], [1, 2], "a map of metres is not calibrated"),
        (config_of("dpt-base-ade20k").head, [0, 1], [0, 1], [1, 2], "a map of segmentation is not calibrated"),
        (INVERSE, [0], [0], [1], "1 known distance: a scale and a shift need two"),
        (INVERSE, [], [], [], "0 known distances"),
        (INVERSE, [0, 5], [0, 1], [1, 2], "x=5, y=1 is outside the picture: x is 0 to 4 and y 0 to 3"),
        (INVERSE, [0, float("nan")], [0, 1], [1, 2], "x=nan, y=1 is outside"),
        (INVERSE, [0, 1], [0, 1], [1, 0], "metres=0: a distance is finite and above 0"),
        (INVERSE, [0, 1], [0, 1], [1, float("inf")], "metres=inf: a distance"),
        (INVERSE, [2, 2], [1, 1], [1, 2], "the map is the same at all known distances"),
        (INVERSE, [0, 4], [0, 3], [1, 2], "what is farther is nearer in it"),
        (RELATIVE, [0, 4], [0, 3], [2, 1], "what is farther is nearer in it"),
    ],
)
def test_bad_input_is_named(head, x, y, metres, says):
    with pytest.raises(ValueError, match=says):
        calibrate(SLOPE, head, np.array(x, float), np.array(y, float), np.array(metres, float))


def test_files(tmp_path):
    """Blind spot: a first row of names that is taken for a pixel or a pixel for names; rows and columns of a sparse map."""
    rows = "3,1,2.5\n 0, 2 ,10\n\n"
    for index, text in enumerate((rows, "x,y,metres\n" + rows, "\ufeffX, Y, Metres\r\n" + rows.replace("\n", "\r\n"))):
        path = tmp_path / f"{index}.csv"
        path.write_bytes(text.encode())
        assert [column.tolist() for column in read_known(path, (4, 5))] == [[3, 0], [1, 2], [2.5, 10]]
    sparse = np.zeros((4, 5), np.float32)
    sparse[1, 3], sparse[2, 0] = 2.5, 10
    np.save(tmp_path / "sparse.npy", sparse)
    Image.fromarray((1000 * sparse).astype(np.uint16)).save(tmp_path / "sparse.png")
    for name in ("sparse.npy", "sparse.png"):
        assert [column.tolist() for column in read_known(tmp_path / name, (4, 5))] == [[3, 0], [1, 2], [2.5, 10]]
    with pytest.raises(ImageError, match="is 5x4: a sparse map is as large as its picture, 4x5"):
        read_known(tmp_path / "sparse.npy", (5, 4))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"1,2\n", "row 1 is '1,2': a row is x,y,metres"),
        (b"x,y,metres\n1,2,far\n", "row 2 is '1,2,far'"),
        (b"x;y;metres\n", "row 1 is 'x;y;metres'"),
        (b"\xff\xfe1", "0xff"),
    ],
)
def test_a_file_that_is_none(text, says, tmp_path):
    (tmp_path / "known.csv").write_bytes(text)
    with pytest.raises(ImageError, match=says):
        read_known(tmp_path / "known.csv", (4, 5))

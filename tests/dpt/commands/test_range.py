"""`dpt predict --range` and `--calibrate`: what the numbers and colours of its files mean."""

import json

import numpy as np
import pytest
from PIL import Image

from dpt.commands.demo import PICTURES
from dpt.commands.main import main

PICTURE = str(PICTURES[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of plain results of two pictures, and their depths."""
    out = tmp_path_factory.mktemp("plain")
    assert main(["predict", *map(str, PICTURES[:2]), "-o", str(out), "--model", "dpt-tiny-depth"]) == 0
    return out, [np.load(out / f"{path.stem}_dpt-tiny-depth.npy") for path in PICTURES[:2]]


def test_range_is_one_for_all_pictures(tmp_path, plain):
    """Blind spot: a range that is read and each picture's own that is used, in the PNG or in the colours; ends that are not cut to."""
    _, depths = plain
    low, high = (float(np.quantile(np.stack(depths), share)) for share in (0.2, 0.8))
    command = ["predict", *map(str, PICTURES[:2]), "-o", str(tmp_path), "--model", "dpt-tiny-depth"]
    assert main([*command, f"--range={high},{low}"]) == 0
    for path, depth in zip(PICTURES[:2], depths, strict=True):
        png = Image.open(tmp_path / f"{path.stem}_dpt-tiny-depth.png")
        wanted = np.rint((np.clip(depth.astype(np.float64), low, high) - low) / (high - low) * 65535)
        assert np.abs(np.asarray(png).astype(int) - wanted).max() <= 1
        assert png.text["depth"] == f"inverse depth: {low:.9g} and less 0, {high:.9g} and more 65535"
        view = np.asarray(Image.open(tmp_path / f"{path.stem}_dpt-tiny-depth_color.jpg").convert("RGB")).astype(int)
        coloured = view[:, depth.shape[1] : 2 * depth.shape[1]]
        assert coloured[depth < low].mean() < 12 and coloured[depth > high].mean() > 150  # inferno's ends, black and a light yellow


def test_other_ranges_are_done_again(tmp_path, capsys):
    """Blind spot: results of another range that are taken for done; the same one that is not."""
    command = ["predict", PICTURE, "-o", str(tmp_path), "--model", "dpt-tiny-depth"]
    told = []
    for more in ([], ["--range", "0.1,0.9"], ["--range", "0.9,0.1"], ["--range", "0.1,0.8"]):
        assert main([*command, *more]) == 0
        told.append(capsys.readouterr().out.splitlines()[-1])
    assert ["1 done before" in line for line in told] == [False, False, True, False]


@pytest.mark.parametrize("text", ["1", "1,1", "1,nan", "a,b", "1,2,3"])
def test_ranges_that_are_none(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["predict", PICTURE, "-o", str(tmp_path / "out"), "--range", text])
    assert ended.value.code == 2 and repr(text) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_calibrated_depth_is_in_metres(tmp_path, plain, capsys):
    """Blind spot: metres in one of the files alone, or drawn as inverse depth; a wrong known distance that is believed."""
    _, (inverse, _) = plain
    metres = 1 / (0.4 * inverse.astype(np.float64) + 0.05)
    places = np.random.default_rng(0).integers(0, inverse.shape, (20, 2))
    rows = [[column, row, metres[row, column]] for row, column in places.tolist()]
    rows[3][2] *= 5
    known = tmp_path / "known.csv"
    known.write_text("x,y,metres\n" + "".join(f"{x},{y},{z}\n" for x, y, z in rows))
    command = ["predict", PICTURE, "-o", str(tmp_path / "out"), "--model", "dpt-tiny-depth", "--calibrate", str(known)]
    assert main(command) == 0
    assert "19 of 20 known distances used" in capsys.readouterr().err
    stem = f"{PICTURES[0].stem}_dpt-tiny-depth"
    found = np.load(tmp_path / "out" / f"{stem}.npy")
    assert found.dtype == np.float32 and np.allclose(found, metres, rtol=1e-4)
    png = Image.open(tmp_path / "out" / f"{stem}.png")
    assert png.text["depth"] == "metres times 1000" and np.abs(np.asarray(png) / 1000 - found).max() <= 0.0006
    assert json.loads(png.text["comment"][4:])["calibrate"][0] == "known.csv"
    view = np.asarray(Image.open(tmp_path / "out" / f"{stem}_color.jpg").convert("L")).astype(int)[:, found.shape[1] : 2 * found.shape[1]]
    assert view[found <= np.quantile(found, 0.05)].mean() > view[found >= np.quantile(found, 0.95)].mean() + 50
    known.write_text(known.read_text().replace("x,y,metres\n", ""))  # another file: not done before
    assert main(command) == 0 and "1 done before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([str(PICTURES[1]), "--model", "dpt-tiny-depth"], "--calibrate is of one picture, and 2 are given"),
        (["--model", "dpt-tiny-scenes"], "--calibrate is of depth, which dpt-tiny-scenes has not"),
        (["--model", "dpt-tiny-depth"], "1 known distance: a scale and a shift need two"),
    ],
)
def test_calibrations_that_cannot_be(arguments, said, tmp_path, capsys):
    known = tmp_path / "known.csv"
    known.write_text("10,10,2\n")
    assert main(["predict", PICTURE, *arguments, "-o", str(tmp_path / "out"), "--calibrate", str(known)]) in (1, 2)
    assert said in capsys.readouterr().err
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))

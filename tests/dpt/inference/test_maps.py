"""Maps as .exr and .tiff, read by what did not write them. Blind spot: the programs that people open them with."""

from __future__ import annotations

import sys

import exr_files
import numpy as np
import pictures
import pytest
from PIL import Image

from dpt.commands import arguments
from dpt.commands.main import main
from dpt.inference import maps, outputs
from dpt.inference.prediction import Prediction
from dpt.zoo import CONFIGS

pytest.importorskip("OpenEXR")
DEPTH = np.random.default_rng(0).normal(3, 2, (37, 50)).astype(np.float32).round(1)
DEPTH[0, :3] = np.inf, np.nan, -1e30
HEADS = {
    "metres": CONFIGS["depth-anything-v2-metric-vkitti-small"].head,
    "inverse depth, up to scale and shift: larger is nearer": CONFIGS["dpt-tiny-depth"].head,
    "depth, up to scale and shift: larger is farther": CONFIGS["depth-anything-3-mono-large"].head,
}


@pytest.mark.parametrize("meaning", HEADS)
def test_depth_as_exr(meaning):
    """Blind spot: halves in place of floats, another channel's name, a map that is compressed with loss, numbers of which nobody knows
    what they are. The file is read by hand."""
    channels, attributes = exr_files.read(maps.exr_bytes(DEPTH, HEADS[meaning]))
    assert list(channels) == ["Z"] and channels["Z"].dtype == np.float32
    np.testing.assert_array_equal(channels["Z"], DEPTH)
    assert attributes["depth"].decode() == meaning
    assert maps.exr_bytes(np.asfortranarray(DEPTH), HEADS[meaning]) == maps.exr_bytes(DEPTH, HEADS[meaning])


def test_normals_as_exr():
    """Blind spot: x, y and z exchanged, which in the file stand in the alphabet's order; a view of every third number, which OpenEXR writes
    as if it were contiguous."""
    (head,) = (head for head in CONFIGS["tipsv2-base"].heads if head.task == "normals")
    normals = np.random.default_rng(1).normal(size=(9, 14, 3)).astype(np.float32)
    channels, attributes = exr_files.read(maps.exr_bytes(normals, head))
    assert sorted(channels) == ["N.X", "N.Y", "N.Z"] and b"unit vectors" in attributes["normals"]
    np.testing.assert_array_equal(np.stack([channels[f"N.{axis}"] for axis in "XYZ"], axis=-1), normals)


@pytest.mark.parametrize("meaning", HEADS)
def test_depth_as_tiff(tmp_path, meaning):
    """Blind spot: 16 bits, bytes or a scale in place of the numbers. The file is read by tifffile."""
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "a.tiff").write_bytes(maps.tiff_bytes(DEPTH[:, ::-1], HEADS[meaning]))
    with tifffile.TiffFile(tmp_path / "a.tiff") as file:
        found = file.pages[0].asarray()
        assert file.pages[0].description == meaning and len(file.pages) == 1
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, DEPTH[:, ::-1])


def test_further_files_are_a_list(tmp_path):
    """Blind spot: one kind for all, a kind that is not in the record and so never done, an unknown one that is passed over."""
    head, prediction, source = HEADS["metres"], Prediction(depth=DEPTH), {"source": ["a.jpg", 1, 2]}
    paths = outputs.write(tmp_path / "a", np.zeros((37, 50, 3), np.uint8), prediction, head, further=["tiff", "exr"], record=source)
    assert [path.name for path in paths] == ["a_color.jpg", "a.npy", "a.exr", "a.tiff", "a.png"]
    assert outputs.read_record(paths[-1])["files"].keys() == {".npy", ".exr", ".tiff"}
    assert outputs.is_done(paths, source) and outputs.of_others(paths) is None
    assert not outputs.is_done(outputs.result_paths(tmp_path / "a", head, ["pfm", "exr", "tiff"]), source)
    assert len(outputs.result_paths(tmp_path / "a", head)) == 3
    for spoil in (lambda: paths[2].write_bytes(b"mine"), paths[2].unlink):
        spoil()
        assert not outputs.is_done(paths, source)
        assert outputs.of_others(paths) == (paths[2] if paths[2].exists() else None)
    labels = CONFIGS["dpt-tiny-scenes"].head
    assert outputs.result_paths(tmp_path / "a", labels, ["exr"]) == outputs.result_paths(tmp_path / "a", labels)
    with pytest.raises(ValueError, match="further files are pfm, exr, tiff, not 'tif'"):
        outputs.result_paths(tmp_path / "a", head, ["tif"])


def test_what_an_earlier_run_wrote_stays_known(tmp_path):
    """Blind spot: an .exr, and then a .tiff beside it, and then the .exr taken for somebody else's; or for done, of another map."""
    head, source, picture = HEADS["metres"], {"source": ["a.jpg", 1, 2]}, np.zeros((37, 50, 3), np.uint8)
    both = outputs.result_paths(tmp_path / "a", head, ["exr", "tiff"])
    for kind in ("exr", "tiff"):
        outputs.write(tmp_path / "a", picture, Prediction(depth=DEPTH), head, further=[kind], record=source)
    assert outputs.is_done(both, source) and outputs.of_others(both) is None
    for changed, record in ((DEPTH + 1, source), (DEPTH, source | {"flip": True})):
        outputs.write(tmp_path / "a", picture, Prediction(depth=DEPTH), head, further=["exr", "tiff"], record=source)
        outputs.write(tmp_path / "a", picture, Prediction(depth=changed), head, further=["tiff"], record=record)
        assert not outputs.is_done(both, record) and outputs.of_others(both) == both[2]


def test_the_options_are_the_files():
    """Blind spot: a kind of file without an option, or an option that writes nothing."""
    assert list(arguments.FURTHER) == list(maps.FURTHER)
    assert {f".{name}" for name in maps.FURTHER} == set(maps.WRITERS) - {".npy"} <= set(outputs.SUFFIXES["depth"])


@pytest.fixture
def run(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(pictures.scene()).save(folder / "a.png")

    def run(*options: str) -> tuple[int, str, str]:
        code = main(["predict", str(folder), "-o", str(folder), "--model", "dpt-tiny-depth", "--device", "cpu", *options])
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_them(run, tmp_path):
    """Blind spot: an option that does not reach the writer; in a second run its files taken for pictures, which TIFF and EXR
    might be."""
    assert run("--pfm", "--exr", "--tiff")[0] == 0
    stem = tmp_path / "photos" / "a_dpt-tiny-depth"
    depth = np.load(f"{stem}.npy")
    channels, attributes = exr_files.read(stem.with_suffix(".exr").read_bytes())
    np.testing.assert_array_equal(channels["Z"], depth)
    assert attributes["depth"].startswith(b"inverse depth")
    np.testing.assert_array_equal(np.array(Image.open(f"{stem}.tiff")), depth)
    assert stem.with_suffix(".pfm").exists()
    code, output, errors = run("--exr", "--tiff", "--pfm")
    assert code == 0 and "0 done, 1 done before" in output and "6 results of dpt predict" in errors
    (pattern,) = (str(tmp_path / "photos" / name) for name in ["*.tiff"])
    assert main(["predict", pattern, "-o", str(tmp_path / "out"), "--device", "cpu"]) == 2  # there are no pictures


def test_a_missing_package_is_told_before_any_work(run, tmp_path, monkeypatch):
    """Blind spot: hours of predictions, and then no file can be written; or the option of another kind of file refused too."""
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    monkeypatch.setattr("dpt.commands.predict.picture_paths.find", None)  # nothing is looked for
    code, output, errors = run("--exr")
    assert code == 2 and output == "" and errors.startswith("dpt predict: an .exr needs OpenEXR: pip install '.[exr]'")
    assert errors.count("\n") == 1 and [path.name for path in (tmp_path / "photos").iterdir()] == ["a.png"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    assert run("--tiff", "--pfm")[0] == 0

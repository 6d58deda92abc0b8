"""`dpt points`, as a user calls it."""

import re

import numpy as np
import pytest
from PIL import Image

from dpt.commands.demo import PICTURES
from dpt.commands.main import main

PICTURE = str(PICTURES[0])
trimesh = pytest.importorskip("trimesh")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["points", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_points_of_a_picture(tmp_path, capsys):
    """Blind spot: colours of other pixels; points that are not where the camera saw them; a threshold that is not obeyed."""
    out = tmp_path / "scene.ply"
    code, told, _ = said(capsys, PICTURE, "-o", str(out), "--fov", "90")
    assert code == 0 and "90 degrees wide" in told
    image = np.asarray(Image.open(PICTURE).convert("RGB"))
    kept, of = map(int, re.search(r"(\d+) of (\d+) pixels", told).groups())
    read = trimesh.load(out)
    assert of == image.shape[0] * image.shape[1] and len(read.vertices) == kept > 0.5 * of
    x, y, z = read.vertices.T
    height, width = image.shape[:2]
    column = np.rint(x / z * width / 2 + (width - 1) / 2).astype(int)
    row = np.rint(y / z * width / 2 + (height - 1) / 2).astype(int)
    assert np.array_equal(read.colors[:, :3], image[row, column]) and len(set(zip(row, column, strict=True))) == kept
    said(capsys, PICTURE, "-o", str(out), "--threshold", "10")
    assert len(trimesh.load(out).vertices) == of


def test_a_mesh_is_read_by_another(tmp_path, capsys):
    """Blind spot: a mesh on its head, or behind the viewer; colours or faces that are left out."""
    gltf = pytest.importorskip("pygltflib")
    out, shaded = tmp_path / "scene.glb", tmp_path / "normals.png"
    code, told, _ = said(capsys, PICTURE, "-o", str(out), "--intrinsics", "200,210,128,120", "--normals", str(shaded))
    kept = int(re.search(r"(\d+) of", told)[1])
    assert code == 0 and "the camera of --intrinsics" in told
    read = gltf.GLTF2().load(str(out))
    (primitive,) = read.meshes[0].primitives
    assert primitive.mode in (None, 4) and primitive.attributes.COLOR_0 is not None
    places, corners = read.accessors[primitive.attributes.POSITION], read.accessors[primitive.indices]
    assert places.count == kept and corners.count > 3 * kept
    assert places.max[2] < 0 and places.min[1] < 0 < places.max[1]
    assert Image.open(shaded).size == Image.open(PICTURE).size


def test_calibrated(tmp_path, capsys):
    """Blind spot: known distances that are read and not used."""
    known, out = tmp_path / "known.csv", tmp_path / "scene.ply"
    said(capsys, PICTURE, "-o", str(out), "--threshold", "10")
    before = trimesh.load(out).vertices[:, 2]
    width = Image.open(PICTURE).size[0]
    near, far = int(before.argmin()), int(before.argmax())
    known.write_text(f"x,y,metres\n{near % width},{near // width},2\n{far % width},{far // width},7\n")
    code, told, err = said(capsys, PICTURE, "-o", str(out), "--threshold", "10", "--calibrate", str(known))
    assert code == 0 and "metres" in told and "2 of 2 known distances used; off by " in err
    after = trimesh.load(out).vertices[:, 2]
    assert after[near] == pytest.approx(2, rel=1e-3) and after[far] == pytest.approx(7, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "scene.obj"], "DST must end in .ply or .glb"),
        (["-o", "scene.ply", "--fov", "180"], "'180': it must be above 0 and below 180"),
        (["-o", "scene.ply", "--intrinsics", "1,2,3"], "'1,2,3': it must be four numbers, fx,fy,cx,cy"),
        (["-o", "scene.ply", "--fov", "60", "--intrinsics", "1,2,3,4"], "the camera is told once"),
        (["-o", "scene.ply", "--model", "dpt-base-ade20k"], "dpt-base-ade20k has no depth: its task is segmentation"),
        (["-o", "scene.ply", "--calibrate", "nothing.csv"], "nothing.csv"),
    ],
)
def test_bad_input_is_named(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code, _, err = said(capsys, PICTURE, *arguments)
    except SystemExit as ended:
        code, err = ended.code, capsys.readouterr().err
    assert code == 2 and says in err and not list(tmp_path.iterdir())


def test_a_picture_that_is_none(tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("text")
    code, _, err = said(capsys, str(tmp_path / "text.jpg"), "-o", str(tmp_path / "scene.ply"))
    assert code == 2 and "text.jpg: not a picture" in err and not (tmp_path / "scene.ply").exists()

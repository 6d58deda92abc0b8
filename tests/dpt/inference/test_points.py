"""Depth as points and as a mesh: `dpt.inference.points`, whose files are opened by libraries that did not write them."""

import io
import math

import numpy as np
import pytest

from dpt.inference.points import Intrinsics, as_distance, back_projected, faces, flying, normals, write_ply
from dpt.zoo import config_of


def plane(camera: Intrinsics, shape: tuple[int, int], normal: tuple[float, float, float], distance: float) -> np.ndarray:
    """The depth (H, W) of a plane, normal . X = -distance, by a ray through each pixel."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    rays = np.stack(((x - camera.cx) / camera.fx, (y - camera.cy) / camera.fy, np.ones(shape)), axis=-1)
    return -distance / (rays @ np.array(normal))


def test_a_plane_is_a_plane():
    """Blind spot: x for y; an axis that does not go through the middle; focal lengths that differ; normals away from the camera."""
    camera = Intrinsics(fx=80.0, fy=100.0, cx=20.0, cy=11.5)
    normal = np.array([0.2, -0.3, -0.9]) / np.linalg.norm([0.2, -0.3, -0.9])
    depth = plane(camera, (30, 50), tuple(normal), 3.0)
    points = back_projected(depth, camera)
    np.testing.assert_allclose(points @ normal, -3.0, rtol=1e-5)
    np.testing.assert_allclose(points[..., 2], depth, rtol=1e-6)
    np.testing.assert_allclose(normals(points), np.broadcast_to(normal, points.shape), atol=2e-3)
    np.testing.assert_allclose(normals(back_projected(np.ones((4, 5)), camera)), np.broadcast_to([0, 0, -1], (4, 5, 3)), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_one_row_has_no_normals(shape):
    """Blind spot: a division by a length of 0."""
    assert (normals(back_projected(np.ones(shape), Intrinsics.of_fov(shape))) == 0).all()


def test_the_field_of_view_is_across():
    """Blind spot: half of the angle; the height's; the middle between pixels."""
    camera = Intrinsics.of_fov((40, 100), 90)
    points = back_projected(np.ones((40, 100)), camera)
    assert camera.fx == camera.fy == pytest.approx(50)
    assert math.degrees(2 * math.atan(50 / camera.fx)) == pytest.approx(90)
    assert points[0, 0, 0] == -points[0, -1, 0] and points[0, 0, 1] == -points[-1, 0, 1]


def test_flying_pixels():
    """Blind spot: a slope that is taken for an edge, one side of an edge that is left, a border that wraps around; no distance at all."""
    depth = np.tile(np.linspace(1, 1.2, 10)[:, None], (1, 12))
    assert not flying(depth).any()
    depth[3:7, 4:9] = 0.5
    found = flying(depth)
    wanted = np.zeros((10, 12), bool)
    wanted[2:8, 3:10] = True
    wanted[4:6, 5:8] = False
    assert (found == wanted).all()
    assert not flying(depth, threshold=3.0).any() and flying(depth, threshold=0.001)[0].all()
    odd = np.ones((5, 5))
    odd[0, 0], odd[2, 2], odd[4, 4] = np.nan, 0, np.inf
    assert flying(odd).sum() == 3


def test_distance():
    """Blind spot: inverse depth taken for depth; metres that are scaled; a pixel behind infinity."""
    inverse, metric = config_of("dpt-large-midas").head, config_of("dpt-hybrid-nyu").head
    relative = config_of("depth-anything-3-mono-large").head
    depth = np.linspace(-5, 100, 300, dtype=np.float32).reshape(15, 20)
    assert np.array_equal(as_distance(depth + 6, metric), depth + 6)
    far = as_distance(depth, inverse)
    assert (far > 0).all() and (np.diff(far.ravel()) <= 0).all() and np.median(far) == pytest.approx(1) and far.max() < 60
    middle = depth.ravel()[100:200]
    np.testing.assert_allclose(far.ravel()[100:200] * middle, far.ravel()[100] * middle[0], rtol=1e-5)
    near = as_distance(depth, relative)
    assert (near > 0).all() and (np.diff(near.ravel()) > 0).all() and np.median(near) == pytest.approx(1)
    assert (as_distance(np.zeros((3, 3), np.float32), inverse) == 1).all() and (
        as_distance(np.ones((3, 3), np.float32), relative) == 1
    ).all()
    with pytest.raises(ValueError, match="a map of segmentation has no depth"):
        as_distance(depth, config_of("dpt-base-ade20k").head)


def test_ply_is_read_by_trimesh():
    """Blind spot: another order of bytes, of columns, of colours."""
    trimesh = pytest.importorskip("trimesh")
    generator = np.random.default_rng(0)
    points, colours = generator.standard_normal((70, 3)).astype(np.float32), generator.integers(0, 256, (70, 3), dtype=np.uint8)
    file = io.BytesIO()
    write_ply(file, points, colours)
    file.seek(0)
    read = trimesh.load(file, file_type="ply")
    assert np.array_equal(read.vertices, points.astype(float)) and np.array_equal(read.colors[:, :3], colours)


def test_faces():
    """Blind spot: indices of all pixels for those of the kept ones; a square with a hole in a corner; triangles seen from behind."""
    kept = np.ones((3, 4), bool)
    kept[0, 0] = False
    points = back_projected(np.ones((3, 4)), Intrinsics.of_fov((3, 4)))[kept]
    found = faces(kept)
    assert found.shape == (10, 3) and found.min() == 0 and found.max() == 10 and len(set(map(tuple, found))) == 10
    one, two, three = (points[found[:, corner], :2].astype(float) for corner in range(3))
    across, down = two - one, three - one
    area = (across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]) / 2
    assert (area < 0).all() and np.allclose(area, area[0])  # y points down: anticlockwise has a negative area
    assert faces(np.zeros((3, 4), bool)).shape == (0, 3) and faces(np.ones((1, 4), bool)).shape == (0, 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Intrinsics(0, 1, 0, 0), "fx=0: a focal length is finite and above 0"),
        (lambda: Intrinsics(1, math.inf, 0, 0), "fy=inf"),
        (lambda: Intrinsics(1, 1, math.nan, 0), "cx=nan: a place is finite"),
        (lambda: Intrinsics.of_fov((4, 4), 180), "a field of view of 180 degrees"),
        (lambda: flying(np.ones((2, 2)), 0), "threshold=0: it must be above 0"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("degrees", [0, 180])
def test_fields_of_view_at_the_bounds(degrees):
    with pytest.raises(ValueError, match=f"a field of view of {degrees} degrees: it must be above 0 and below 180"):
        Intrinsics.of_fov((4, 5), degrees)

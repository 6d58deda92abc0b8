"""Procedural scenes with exact depth and labels, rendered on the CPU by PyBullet's TinyRenderer.

The package's own small models are trained on these. A scene is a floor, perhaps walls, perhaps a sky, and objects from `pybullet_data`
(robots, toys, 1000 random objects) among tables, boxes, balls and cylinders, under a random camera and light. PyBullet draws shape, light
and shadow; the surface patterns are functions of the position on the object, evaluated here for each pixel: no texture files.

A scene depends on its seed alone. The seeds of the three splits are disjoint, and so are the random objects that each may show.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from ..classes.scenes import CLASSES, PALETTE
from ..system.disk import prepare, read_object, write_whole
from ..system.endings import end_with_clean_up, leaving_signals_to_us
from .surfaces import noise, random_colour, random_surface
from .world import (
    CLASS_OF,
    FAR,
    FLOOR,
    NEAR,
    SKY,
    TABLE,
    WALL,
    Camera,
    World,
    build_room,
    furnish,
    load_pybullet,
    place_camera,
    shared_client,
)

SEEDS_PER_SPLIT = 10_000_000
SPLITS = {"train": 0, "val": SEEDS_PER_SPLIT, "test": 2 * SEEDS_PER_SPLIT}  # first seed
RANDOM_OBJECTS = {"train": range(0, 900), "val": range(900, 950), "test": range(950, 1000)}

SKY_DEPTH = 65535  # in the depth files; what is nearer ends a millimetre before
_MAX_ATTEMPTS = 64


@dataclass(frozen=True)
class Scene:
    """One picture: `image` uint8 (H, W, 3), `depth` float32 (H, W) in metres along the optical axis, infinite for the sky, and `labels`
    uint8 (H, W), indices into `CLASSES`."""

    image: np.ndarray
    depth: np.ndarray
    labels: np.ndarray


def split_seeds(split: str, count: int) -> range:
    """The first `count` seeds of a split, "train", "val" or "test". No two splits share a seed."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    if not 0 <= count <= SEEDS_PER_SPLIT:
        raise ValueError(f"count {count}: must be 0 to {SEEDS_PER_SPLIT}, the seeds of a split")
    return range(SPLITS[split], SPLITS[split] + count)


def split_of(seed: int) -> str:
    """The split a seed belongs to."""
    if not 0 <= seed < len(SPLITS) * SEEDS_PER_SPLIT:
        raise ValueError(f"seed {seed}: must be 0 to {len(SPLITS) * SEEDS_PER_SPLIT - 1}")
    return list(SPLITS)[seed // SEEDS_PER_SPLIT]


def metric_depth(buffer: np.ndarray, near: float = NEAR, far: float = FAR) -> np.ndarray:
    """OpenGL depth buffer values in [0, 1] to metres along the optical axis, in float64."""
    return far * near / (far - (far - near) * np.asarray(buffer, np.float64))


def render(seed: int, size: int = 256) -> Scene:
    """The scene of a seed, `size` x `size` pixels. The same seed and size give the same bytes in any order and any process.

    Raises ImportError without PyBullet, ValueError for a seed outside the splits or a size below 16."""
    split = split_of(seed)
    _check_size(size)
    for attempt in range(_MAX_ATTEMPTS):
        scene = _draw(np.random.default_rng([seed, attempt]), RANDOM_OBJECTS[split], size)
        if _is_worth_keeping(scene):
            return replace(scene, labels=CLASS_OF[scene.labels])
    raise RuntimeError(f"seed {seed}: none of {_MAX_ATTEMPTS} attempts gave a scene worth keeping")


def moving(seed: int, frames: int, step: float, size: int = 256) -> Iterator[Scene]:
    """The scene of a seed, whatever it is worth, seen by a camera that goes sideways by `step` metres a frame and turns a little towards
    what it looked at; the light stays. Raises as `render`."""
    _check_size(size)
    rng = np.random.default_rng([seed, 0])
    world, camera = _furnished(rng, RANDOM_OBJECTS[split_of(seed)])
    state, right = rng.bit_generator.state, camera.rotation()[0]
    for number in range(frames):
        rng.bit_generator.state = state
        moved = right * step * number
        scene = _shoot(world, replace(camera, eye=camera.eye + moved, target=camera.target + moved / 2), size)
        yield replace(scene, labels=CLASS_OF[scene.labels])


def _check_size(size: int) -> None:
    if size < 16:
        raise ValueError(f"size {size}: must be at least 16 pixels")


def _is_worth_keeping(scene: Scene) -> bool:
    """Several kinds of things, enough of the picture on objects, none of them filling it, nothing right before the lens."""
    share = np.bincount(scene.labels.ravel(), minlength=len(CLASS_OF)) / scene.labels.size
    return bool(
        (share >= 0.01).sum() >= 4
        and share[TABLE:].sum() >= 0.12
        and share[TABLE:].max() <= 0.5
        and max(share[SKY], share[FLOOR], share[WALL]) <= 0.7
        and scene.depth.min() >= 0.3
    )


def _light(rng: np.random.Generator) -> dict[str, Any]:
    elevation, yaw = math.radians(rng.uniform(25.0, 80.0)), rng.uniform(0.0, 2.0 * math.pi)
    direction = [math.cos(yaw) * math.cos(elevation), math.sin(yaw) * math.cos(elevation), math.sin(elevation)]
    ambient = rng.uniform(0.35, 0.7)
    return {
        "lightDirection": direction,
        "lightColor": (1.0 - rng.uniform(0.0, 0.25, 3)).tolist(),
        "lightDistance": 8.0,
        "lightAmbientCoeff": ambient,
        "lightDiffuseCoeff": rng.uniform(0.7, 1.0) * (1.05 - ambient),
        "lightSpecularCoeff": rng.uniform(0.0, 0.2),
        "shadow": int(rng.random() < 0.75),
    }


def _sky(rng: np.random.Generator, rays: np.ndarray) -> np.ndarray:
    """A backdrop (H, W, 3) in [0, 1]: from the horizon's colour to the zenith's, with or without clouds."""
    direction = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    zenith, horizon = random_colour(rng), 1.0 - 0.6 * (1.0 - random_colour(rng))
    if rng.random() < 0.5:
        zenith, horizon = np.array([0.25, 0.5, 0.9]) * rng.uniform(0.5, 1.1), np.array([0.8, 0.87, 0.95]) * rng.uniform(0.7, 1.05)
    height = np.clip(direction[..., 2:] * rng.uniform(1.0, 4.0), 0.0, 1.0)
    sky: np.ndarray = horizon + (zenith - horizon) * height
    if rng.random() < 0.6:
        surface = random_surface(rng, (0.3, 1.5), upright=True)
        flat = direction.reshape(-1, 3) * [1.0, 1.0, 3.0] / surface.period
        cloud = np.clip(2.0 * noise(flat, np.zeros(len(flat)), surface) - 0.8, 0.0, 1.0).reshape(height.shape)
        sky = sky + (0.95 - sky) * cloud * rng.uniform(0.2, 0.9)
    return sky


def _footprint(points: np.ndarray) -> np.ndarray:
    """The width of a pixel on the surface (H, W), in metres: the nearer of its two neighbours, across and down, since one may be on
    another object."""
    steps = []
    for axis in (0, 1):
        step = np.linalg.norm(np.diff(points, axis=axis), axis=-1)
        before = np.concatenate([np.take(step, [0], axis=axis), step], axis=axis)
        after = np.concatenate([step, np.take(step, [-1], axis=axis)], axis=axis)
        steps.append(np.minimum(before, after))
    nearer: np.ndarray = np.maximum(*steps)
    return nearer


def _albedo(world: World, mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(H, W, 3) in [0, 1]: every body's surface at the points seen."""
    albedo, footprint = np.ones(points.shape), _footprint(points)
    for number, body in world.bodies.items():
        seen = mask == number
        if seen.any():
            local = (points[seen] - body.position) @ body.rotation
            albedo[seen] = body.surface.albedo(local, footprint[seen])
    return albedo


def _develop(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """What a camera adds: exposure, contrast, a colour cast, noise and now and then a soft focus. [0, 1] to uint8."""
    picture = np.clip(picture * rng.uniform(0.95, 1.4) * rng.uniform(0.93, 1.07, 3), 0.0, 1.0) ** rng.uniform(0.6, 1.1)
    grain = rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(0.0, 0.02)
    image = np.round(255.0 * np.clip(picture + grain, 0.0, 1.0)).astype(np.uint8)
    if rng.random() < 0.4:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))))
    return image


def _shoot(world: World, camera: Camera, size: int) -> Scene:
    bullet, _ = load_pybullet()
    rng = world.rng
    view, projection = camera.matrices(size)
    light = _light(rng)
    _, _, shading, buffer, mask = bullet.getCameraImage(
        size, size, view, projection, renderer=bullet.ER_TINY_RENDERER, physicsClientId=world.client, **light
    )
    mask = np.reshape(mask, (size, size))
    hit = mask >= 0
    depth = np.where(hit, metric_depth(np.reshape(buffer, (size, size))), 0.0)
    labels = np.full(max(world.bodies) + 2, SKY, np.uint8)  # the last entry serves mask -1, nothing hit
    for number, body in world.bodies.items():
        labels[number] = body.label
    rays = camera.rays(size)
    points = camera.eye + depth[..., None] * rays
    shaded = np.reshape(np.asarray(shading, np.uint8), (size, size, 4))[..., :3] / 255.0 * _albedo(world, mask, points)
    picture = np.where(hit[..., None], shaded, _sky(rng, rays))
    return Scene(_develop(rng, picture), np.where(hit, depth, np.inf).astype(np.float32), labels[mask])


def _draw(rng: np.random.Generator, random_objects: range, size: int) -> Scene:
    return _shoot(*_furnished(rng, random_objects), size)


def _furnished(rng: np.random.Generator, random_objects: range) -> tuple[World, Camera]:
    world = World(rng, shared_client.fresh(), random_objects)
    camera = place_camera(rng)
    furnish(world, camera)
    build_room(world, camera)
    return world, camera


def write_dataset(directory: str | Path, split: str, count: int, size: int = 256, workers: int = 1) -> None:
    """Render the first `count` scenes of a split into a folder that training reads.

    `images/NNNNNN.png` (RGB), `depth/NNNNNN.png` (16-bit, millimetres along the optical axis, `SKY_DEPTH` for the sky),
    `labels/NNNNNN.png` (8-bit indices into `CLASSES`) and `dataset.json`. Files appear whole or not at all and the image comes last,
    so a call after a kill, or with a larger `count`, renders what is missing.

    Raises ValueError if the folder holds a data set of another split, size or classes, or for a bad argument."""
    if workers < 1:
        raise ValueError(f"workers {workers}: must be at least 1")
    _check_size(size)
    seeds, root = split_seeds(split, count), Path(directory)
    load_pybullet()
    for folder in (root, *(root / name for name in ("images", "depth", "labels"))):
        prepare(folder)
    _write_description(root, split, count, size)
    tasks = [(root, number, seed, size) for number, seed in enumerate(seeds) if not _is_whole(root, number)]
    with tqdm(total=count, initial=count - len(tasks), desc=f"{split} scenes", unit="scene", smoothing=0.02) as progress:
        if workers == 1:
            for task in tasks:
                _write_scene(task)
                progress.update()
        else:
            with leaving_signals_to_us():
                pool = multiprocessing.get_context("spawn").Pool(workers, end_with_clean_up)
            with pool:
                for _ in pool.imap_unordered(_write_scene, tasks, chunksize=4):
                    progress.update()
                pool.close()
                pool.join()  # the end of `with` would terminate processes that are ending by themselves


def _paths(root: Path, number: int) -> tuple[Path, Path, Path]:
    """Labels, depth and image of a scene, in the order they are written."""
    return tuple(root / folder / f"{number:06d}.png" for folder in ("labels", "depth", "images"))  # type: ignore[return-value]


def _is_whole(root: Path, number: int) -> bool:
    return all(path.is_file() for path in _paths(root, number))


def _write_scene(task: tuple[Path, int, int, int]) -> None:
    root, number, seed, size = task
    scene = render(seed, size)
    millimetres = np.where(np.isinf(scene.depth), SKY_DEPTH, np.minimum(np.round(1000.0 * scene.depth), SKY_DEPTH - 1)).astype(np.uint16)
    for path, pixels in zip(_paths(root, number), (scene.labels, millimetres, scene.image), strict=True):
        write_whole(path, functools.partial(Image.fromarray(pixels).save, format="PNG", compress_level=1))


def _write_description(root: Path, split: str, count: int, size: int) -> None:
    path = root / "dataset.json"
    palette = [list(colour) for colour in PALETTE]  # as JSON gives it back
    fixed = {"classes": list(CLASSES), "palette": palette, "sky": SKY_DEPTH}
    fixed |= {"split": split, "size": size, "first_seed": SPLITS[split]}
    if os.path.lexists(path):
        found = read_object(path)
        for key, value in fixed.items():
            if found.get(key) != value:
                raise ValueError(f"{path}: {key} is {reprlib.repr(found.get(key))}, not {value!r}: choose another directory")
        if type(found.get("count")) is not int:
            raise ValueError(f"{path}: count is {reprlib.repr(found.get('count'))}: it is a number of scenes: choose another directory")
        count = max(count, found["count"])
    versions = {package: importlib.metadata.version(package) for package in ("pybullet", "numpy", "pillow")}
    text = json.dumps({**fixed, "count": count, "versions": versions}, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))

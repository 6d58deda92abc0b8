"""`dpt points`: a picture as coloured points or as a mesh. What it takes and writes is told by its help, in `arguments`."""

from __future__ import annotations

import argparse
import functools
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from ..inference.points import FOV, Intrinsics, as_distance, back_projected, faces, flying, normals, write_ply
from ..inference.prediction import Result
from ..system.disk import write_whole
from ..system.endings import CommandError, printable
from .single import depth_of

FOR_VIEWERS = np.array([1, -1, -1], np.float32)  # of a camera's axes glTF's: y up, z towards the viewer


def run(args: argparse.Namespace) -> int:
    """Run `dpt points`; returns the exit code. CommandError where nothing can be done."""
    write = _mesh if args.target.suffix.lower() == ".glb" else _points
    result, depth, head = depth_of(args, "points")
    depth, unit = as_distance(depth, head), "metres" if head.metric else "median distance 1"
    camera, told = _camera(args, result)
    grid, kept = back_projected(depth, camera), ~flying(depth, args.threshold)
    if not kept.any():
        raise CommandError(f"--threshold {args.threshold:g} leaves no point of {printable(args.picture)}")
    write_whole(args.target, functools.partial(write, grid, cast(np.ndarray, result.image), kept))
    if args.normals is not None:
        colours = ((normals(grid) + 1) * 127.5).round().astype(np.uint8)
        write_whole(args.normals, functools.partial(Image.fromarray(colours).save, format="PNG"))
    share = f"{kept.sum()} of {kept.size} pixels, where depth spans at most {args.threshold:g} of itself"
    print(f"{printable(args.target)}: {share}; {unit}; {told}")
    return 0


def _camera(args: argparse.Namespace, result: Result) -> tuple[Intrinsics, str]:
    """The camera, and where it is known from."""
    height, width = result.image.shape[:2]  # type: ignore[union-attr]
    if args.intrinsics is not None:
        return Intrinsics(*args.intrinsics), "the camera of --intrinsics"
    if args.fov is not None:
        return Intrinsics.of_fov((height, width), args.fov), f"{args.fov:g} degrees wide"
    if result.focal is not None:
        return Intrinsics.of_focal((height, width), result.focal), f"focal length {result.focal:.4g} pixels"
    return Intrinsics.of_fov((height, width)), f"{FOV:g} degrees wide, a guess: --fov or --intrinsics tell"


def _points(grid: np.ndarray, image: np.ndarray, kept: np.ndarray, file: BinaryIO) -> None:
    write_ply(file, grid[kept], image[kept])


def _mesh(grid: np.ndarray, image: np.ndarray, kept: np.ndarray, file: BinaryIO) -> None:
    try:
        import trimesh
    except ImportError as error:
        raise CommandError(f"a .glb needs trimesh: pip install '.[points]' ({error})") from error
    how: dict[str, Any] = {"vertices": grid[kept] * FOR_VIEWERS, "faces": faces(kept), "vertex_colors": image[kept], "process": False}
    content: Any = trimesh.Trimesh(**how).export(file_type="glb")
    file.write(content)

"""What `dpt predict` makes of clips: `python -m bench.clips` writes docs/video.json.

`flicker`: of rendered clips whose camera moves, how much what stands still changes from one frame to the next, and how far off the maps
are, both of the clip's maps over those of each frame alone. `memory`: of a process that predicts a clip of `FRAMES` frames, the resident
memory after every hundred, in units of that after the first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

import dpt
from dpt.commands import clips
from dpt.evaluation.alignment import align
from dpt.inference import video
from dpt.inference.steady import Steady
from dpt.scenes import rendering

from . import ROOT

RECORD = ROOT / "docs" / "video.json"
CLIPS = {0: 0.03, 1: 0.01, 2: 0.03}  # by the seed among the test scenes, metres that the camera goes a frame
FRAMES, SIDE, RENDERED, RENDERED_SIDE = 2000, (160, 120), 16, 160


def flicker(seed: int, step: float) -> dict[str, float]:
    """`change` and `error` of a rendered clip: the clip's maps over those of each frame alone."""
    scenes = list(rendering.moving(rendering.split_seeds("test", seed + 1)[seed], RENDERED, step, RENDERED_SIDE))
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    alone = [model.predict(scene.image).depth for scene in scenes]
    steady = Steady(model.config.head)
    found = [steady(depth, scene.image) for depth, scene in zip(alone, scenes, strict=True)]
    truth = [1 / scene.depth for scene in scenes]
    still = [np.abs(after - before) < 0.01 * np.ptp(truth[0]) for before, after in zip(truth, truth[1:], strict=False)]
    low, high = np.min(found), np.max(found)

    def change(maps: list[np.ndarray]) -> float:
        return float(np.mean([np.abs(b - a)[x].mean() for a, b, x in zip(maps, maps[1:], still, strict=False)]))

    def error(maps: list[np.ndarray]) -> float:
        tensors = [
            (torch.from_numpy(np.float64(depth)), torch.from_numpy(np.float64(true))) for depth, true in zip(maps, truth, strict=True)
        ]
        return float(np.mean([(align(depth, true) - true).abs().mean() for depth, true in tensors]))

    spread = [(depth - low) / (high - low) for depth in found], [(depth - depth.min()) / np.ptp(depth) for depth in alone]
    return {"change": change(spread[0]) / change(spread[1]), "error": error(found) / error(alone)}


def memory(folder: Path) -> list[float]:
    """Resident memory after every hundred frames of a clip, in units of the first."""
    import av

    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIDE, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 256, (SIDE[1] + 64, SIDE[0] + 64, 3), dtype=np.uint8)
        for number in range(FRAMES):
            left, top = number % 64, number // 2 % 64
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[top : top + SIDE[1], left : left + SIDE[0]]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    command = [sys.executable, "-m", "dpt", "predict", str(folder / "clip.mp4"), "-o", str(folder / "out"), "--model", "dpt-tiny-depth"]
    sizes: list[int] = []
    with subprocess.Popen([*command, "--frames", "npz"], stderr=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            parts = list(folder.glob(f"out/*/*.{video.PART}"))
            if len(parts) > len(sizes):
                sizes.append(watched.memory_info().rss)
            time.sleep(0.05)
    if process.returncode or len(sizes) < FRAMES // clips.PART - 1:
        raise RuntimeError(f"dpt predict ended with {process.returncode} after {len(sizes)} parts")
    return [size / sizes[0] for size in sizes]


def main() -> None:
    """Measure, and write the record."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = memory(Path(folder))
    flickers = {str(seed): flicker(seed, step) for seed, step in CLIPS.items()}
    record = {"flicker": flickers, "memory": {"frames": FRAMES, "of the first": sizes}}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(RECORD.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

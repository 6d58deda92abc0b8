"""What a training tells of itself: lines of JSON, TensorBoard, a curve, pictures of predictions, the run's circumstances."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import __version__
from ..config import HeadConfig
from ..data.targets import IGNORE
from ..inference.outputs import colored, tinted
from ..system.disk import open_regular, write_whole

PACKAGES = ("torch", "triton", "numpy", "pillow", "albumentations", "opencv-python-headless", "safetensors")
SHOWN = 4  # pictures of the validation set
UNITS = {  # of figures, by name: those of one unit share an axis of the curve
    "loss": "loss",
    "rate": "learning rate",
    "gradient": "gradient's norm",
    "pictures_per_second": "pictures a second",
    "memory": "GB",
    "rmse": "metres",
    "sqrel": "metres",
    "silog": "100 x ln",
    "rmselog": "ln",
    "log10": "log10",
    **dict.fromkeys(("mIoU", "mAcc", "aAcc", "bad1"), "percent"),
}
SHARE = "share"  # the unit of the others


class Log:
    """`log.jsonl` of a run, a JSON object a line: rows of training ("loss", "rate", ...) and of validation (its metrics), each with "step"
    and "seconds"; and the same in TensorBoard's files, where that is installed.

    Rows behind `step`, of a run that was killed later than its last checkpoint, are removed: they come again.
    """

    def __init__(self, directory: Path, step: int):
        self.path = directory / "log.jsonl"
        self.rows = [row for row in _rows(self.path) if row["step"] <= step]
        if self.path.exists():
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_whole(self.path, lambda file: file.write(text.encode()))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        except ImportError:
            self._board = None

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            part = "training" if "rate" in row else "validation"
            for name, value in row.items():
                if name not in ("step", "seconds"):
                    self._board.add_scalar(f"{part}/{name}", value, int(row["step"]))

    def picture(self, step: int, picture: np.ndarray) -> None:
        """uint8 (H, W, 3), to TensorBoard."""
        if self._board is not None:
            self._board.add_image("predictions", picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _rows(path: Path) -> list[dict[str, float]]:
    """The whole lines of a log; what was cut off by a kill is left out."""
    if not path.exists():
        return []
    with open_regular(path) as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def circumstances(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, commit and machine of a run. The commit is of the checkout that the package runs from, "+" behind it where that has
    changes; None where it is no checkout."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "dpt": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changes)


def in_words(row: dict[str, float]) -> str:
    """A row of training, for a terminal."""
    speed, memory = row["pictures_per_second"], row["memory"]
    return f"loss {row['loss']:.4f}, rate {row['rate']:.3g}, {speed:.3g} pictures/s, {memory:.3g} GB"


def peak_memory(device: torch.device) -> float:
    """GB: of a GPU what PyTorch had allocated at most, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e9 if sys.platform == "darwin" else size * 1024 / 1e9


def draw_curve(rows: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """The training's and the validation's figures over the steps, an axis a unit, as a picture."""
    from matplotlib.figure import Figure

    units: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds")):
        units.setdefault(UNITS.get(name, SHARE), []).append(name)
    if not units:
        return
    columns = min(len(units), 3)
    lines = -(-len(units) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(units) :]:
        axis.remove()
    for axis, (unit, names) in zip(axes, units.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=name)
        axis.set(xlabel="step", ylabel=unit)
        axis.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


def sheet(rows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], head: HeadConfig) -> np.ndarray:
    """Pictures uint8 (H, W, 3), the truth and what is predicted (H, W), beside each other, one below another: uint8 (H', W', 3)."""
    lines = []
    for image, truth, found in rows:
        if head.task == "segmentation":
            unlabelled = (truth == IGNORE)[..., None]
            shown = [np.where(unlabelled, image, np.asarray(tinted(image, np.where(truth == IGNORE, 0, truth), head)))]
            shown.append(np.asarray(tinted(image, found, head)))
        else:
            known = (truth > 0) & np.isfinite(truth)
            nearness = np.where(known, 1 / np.where(known, truth, 1), np.nan).astype(np.float32)
            shown = [colored(nearness if head.inverse else np.where(known, truth, np.nan).astype(np.float32), head.inverse)]
            shown.append(colored(found.astype(np.float32), head.inverse))
        lines.append(np.concatenate([image, *shown], axis=1))
    width = max(line.shape[1] for line in lines)
    canvas = [np.pad(line, ((0, 4), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return np.concatenate(canvas)


def save_sheet(path: Path, picture: np.ndarray) -> None:
    write_whole(path, lambda file: Image.fromarray(picture).save(file, format="png"))

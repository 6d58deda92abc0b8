"""The clips of `dpt predict`: a video's maps as a video, in parts, so that a run that was stopped goes on behind the last whole one."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..config import HeadConfig
from ..inference import drawing, video
from ..inference.images import ImageError
from ..inference.prediction import Beside, Result, predict_iter
from ..inference.steady import Steady
from ..model import DPT
from ..system.disk import prepare, write_whole
from ..system.endings import printable
from . import running
from .pipeline import Stopwatch

PART = 100  # frames
LOOKED_AT = 25  # frames, the first ones, that the range of colours and pixels is taken from
QUANTILES, WIDER = (0.01, 0.99), 0.1  # of them, and by how much of itself the range goes beyond on either side
STATE = "state.npz"


@dataclass
class State:
    """What a run that goes on needs to know of the frames that are done."""

    parts: int = 0
    frames: int = 0
    ends: tuple[float, float] | None = None
    held: tuple[np.ndarray, np.ndarray] | None = None

    def save(self, folder: Path, made_with: dict[str, Any]) -> None:
        mean, frame = self.held or (np.empty(0), np.empty(0))
        numbers: dict[str, Any] = {"parts": self.parts, "frames": self.frames, "ends": self.ends or ()}
        record = json.dumps(made_with, sort_keys=True)
        write_whole(folder / STATE, lambda file: np.savez(file, mean=mean, frame=frame, made_with=record, **numbers))

    @classmethod
    def of(cls, folder: Path, made_with: dict[str, Any]) -> State | None:
        """Of a run that was stopped; None where there is none, or it was of another clip, model or choice."""
        try:
            with np.load(folder / STATE, allow_pickle=False) as found:
                if str(found["made_with"]) != json.dumps(made_with, sort_keys=True):
                    return None
                ends = tuple(found["ends"].tolist())
                held = (found["mean"], found["frame"]) if found["mean"].size else None
                return cls(int(found["parts"]), int(found["frames"]), cast(Any, ends) or None, held)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
            return None


def is_clip(argument: str) -> bool:
    """Whether an argument of `dpt predict` names a video's file."""
    return Path(argument).suffix.lower() in video.SUFFIXES and Path(argument).is_file()


def obstacle(path: Path, stem: Path, made_with: dict[str, Any]) -> str | None:
    """None if the results may be written, "done" if they are there already, or else why they must not be written."""
    for suffix in (".mp4", ".mkv"):
        target = stem.with_name(stem.name + suffix)
        if not target.exists():
            continue
        try:
            record = json.loads(video.comment_of(target))
        except (ImageError, ValueError):
            return f"{target} was not made by dpt predict; --overwrite replaces it"
        if record == made_with:
            return "done"
        if record.get("source", [])[1:] != made_with["source"][1:]:
            return f"{target} was made from another clip, or another version of it; --overwrite replaces it"
    return None


def predict(
    model: DPT, path: Path, stem: Path, args: argparse.Namespace, made_with: dict[str, Any], tell: Callable[[str], None]
) -> tuple[Path, int, Stopwatch]:
    """Write the maps of a clip beside `stem`: the video, how many frames were predicted now, and the network's clock.

    `tell` hears of what is wrong with single frames, which have the map of the frame before. ImageError, OSError.
    """
    clip = video.Clip(path)
    target = stem.with_name(stem.name + video.suffix_of(clip))
    folder = stem.with_name(f".{stem.name}.parts")
    state = State.of(folder, made_with)
    if state is None:
        shutil.rmtree(folder, ignore_errors=True)
        state = State()
    prepare(folder)
    before, watch = state.frames, Stopwatch(next(model.parameters()).device)
    bar = tqdm(desc=printable(path.name), total=clip.count, initial=before, unit="frame", disable=None)
    maps = _Maps(model, clip, state, args, watch, tell)
    with bar, contextlib.closing(maps.frames()) as frames:
        ended = False
        while not ended:
            part = folder / f"{state.parts:06}.{video.PART}"
            taken = 0

            def chosen() -> Iterator[tuple[int, np.ndarray]]:
                nonlocal taken
                with _archive(folder / f"{state.parts:06}.npz", args.frames == "npz") as archive:
                    for number, pts, view, found in frames:
                        maps.keep(number, found, archive, stem)
                        taken += 1
                        bar.update()
                        yield pts, view
                        if taken == PART:
                            return

            write_whole(part, lambda file: video.write_part(file, chosen(), clip))  # noqa: B023
            ended = taken < PART
            if taken:
                state.parts, state.frames, state.ends, state.held = state.parts + 1, maps.done, maps.ends, maps.steady_held()
                state.save(folder, made_with)
    parts = [folder / f"{number:06}.{video.PART}" for number in range(state.parts)]
    if args.frames == "npz":
        archives = [part.with_suffix(".npz") for part in parts]
        write_whole(stem.with_name(stem.name + ".npz"), lambda file: _joined(file, archives))
    write_whole(target, lambda file: video.join(file, parts, clip, json.dumps(made_with, sort_keys=True)))
    shutil.rmtree(folder, ignore_errors=True)
    return target, state.frames - before, watch


class _Maps:
    """A clip's maps, from the frame on where a state has stopped."""

    def __init__(self, model: DPT, clip: video.Clip, state: State, args: argparse.Namespace, watch: Stopwatch, tell: Callable[[str], None]):
        self.model, self.clip, self.args, self.watch, self.tell = model, clip, args, watch, tell
        self.head: HeadConfig = model.config.head
        self.steady = Steady(self.head, state.held) if self.head.task == "depth" else None
        self.done, self.ends = state.frames, tuple(args.range) if args.range else state.ends
        self._pending: deque[tuple[video.Frame, np.ndarray]] = deque()

    def steady_held(self) -> tuple[np.ndarray, np.ndarray] | None:
        return self.steady.held if self.steady is not None else None

    def frames(self) -> Generator[tuple[int, int, np.ndarray, np.ndarray], None, None]:
        """Number, time, view and map of each frame; the range is settled when it is first needed."""
        if self.steady is None or self.ends is not None:
            for number, pts, image, found in self._found():
                yield number, pts, self._view(image, found), found
            return
        first, rest = [], self._found()
        for item in rest:
            first.append(item)
            if len(first) == LOOKED_AT:
                break
        if first:
            self.ends = range_of([found for *_, found in first])
        while first:
            number, pts, image, found = first.pop(0)
            yield number, pts, self._view(image, found), found
        for number, pts, image, found in rest:
            yield number, pts, self._view(image, found), found

    def _found(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Number, time, picture and map of each frame."""
        last: np.ndarray | None = None
        how: dict[str, Any] = {"batch_size": self.args.batch_size, "graph": self.args.graph}
        results = predict_iter(self.model, self._images(), Beside(clock=self.watch), **how, **running.choices(self.args))
        with contextlib.closing(results):
            for result in results:
                frame, image = self._pending.popleft()
                found = map_of(result, self.head)
                if found is None:
                    self.tell(f"frame {frame.number}, at {self._seconds(frame):.2f} s: {result.error}; it has the map of the one before")
                    found = last
                if found is None:
                    continue
                if self.steady is not None and found is not last:
                    found = self.steady(found, image)
                last = found
                yield frame.number, frame.pts, image, found

    def _seconds(self, frame: video.Frame) -> float:
        return float(frame.pts * self.clip.time_base)

    def _images(self) -> Iterator[np.ndarray]:
        last: np.ndarray | None = None
        skipped = self.done
        for frame in video.ahead(self.clip):
            image = frame.image if frame.image is not None else last
            last = image
            if frame.number < skipped:
                continue
            if frame.image is None:
                bridged = "it has the map of the one before" if image is not None else "it is left out"
                self.tell(f"frame {frame.number}, at {self._seconds(frame):.2f} s: {frame.error}; {bridged}")
            if image is not None:
                self._pending.append((frame, image))
                yield image

    def _view(self, image: np.ndarray, found: np.ndarray) -> np.ndarray:
        return view_of(image, found, self.head, self.ends, self.args.view)

    def keep(self, number: int, found: np.ndarray, archive: zipfile.ZipFile | None, stem: Path) -> None:
        """Count a frame as done, and keep its map where that was asked for."""
        self.done = number + 1
        if archive is not None:
            content = io.BytesIO()
            np.save(content, found)
            archive.writestr(f"{number:06}.npy", content.getvalue())
        elif self.args.frames == "png":
            values = torch.from_numpy(found)
            if self.head.task == "depth":
                values = drawing.depth_to_uint16(values, not self.head.metric, self.head.depth_scale, self.ends)
            folder = stem.with_name(f"{stem.name}_frames")
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / f"{number:06}.png", functools.partial(Image.fromarray(values.numpy()).save, format="PNG"), durable=False)


def map_of(result: Result, head: HeadConfig) -> np.ndarray | None:
    """The map of a head's task; None where there is an error."""
    return None if result.prediction is None else result.prediction.of(head.task)


def range_of(maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """The lowest and highest depth of the colours, by some of the pixels of maps (H, W)."""
    low, high = np.quantile(np.stack([found.ravel()[:: max(1, found.size // 4096)] for found in maps]), QUANTILES)
    room = WIDER * (high - low)
    return float(low - room), float(high + room)


def view_of(image: np.ndarray, found: np.ndarray, head: HeadConfig, ends: drawing.Ends, view: str) -> np.ndarray:
    """What is shown of a frame, uint8 (H, W, 3), and its map: "map", its colours, or "beside", the frame and those."""
    colours = drawing.DRAW["colours"][head.task](torch.from_numpy(found), torch.from_numpy(image), head, ends).numpy()
    return colours if view == "map" else np.concatenate((image, colours), axis=1)


@contextlib.contextmanager
def _archive(path: Path, wanted: bool) -> Iterator[zipfile.ZipFile | None]:
    if not wanted:
        yield None
        return
    with zipfile.ZipFile(path, "w") as archive:
        yield archive


def _joined(file: BinaryIO, archives: list[Path]) -> None:
    """The members of several archives in one, one at a time."""
    with zipfile.ZipFile(file, "w") as whole:
        for path in archives:
            with zipfile.ZipFile(path) as part:
                for name in part.namelist():
                    whole.writestr(name, part.read(name))

"""Clips in: a video's frames one after the other, upright, whatever became of some of them. By PyAV: pip install '.[video]'."""

from __future__ import annotations

import heapq
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..system.disk import open_regular
from .images import ImageError, reason

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".gif")


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: its `number` from 0, its time `pts` in the clip's `time_base`, and the picture, uint8 (H, W, 3); of a broken one none, and
    why."""

    number: int
    pts: int
    image: np.ndarray | None
    error: str | None = None


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImageError(f"a clip needs PyAV: pip install '.[video]' ({error})") from error
    return av


class Clip:
    """A video file. Frames are decoded as they are asked for: a clip of any length takes the memory of a few.

    Attributes:
        count: frames, where the file says so, else None. rate: frames a second, of the whole. time_base: seconds of a unit of `Frame.pts`.
        sound: whether it has any.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """ImageError: no video can be read there; it names the path. OSError."""
        self.path = Path(path)
        open_regular(path).close()  # a pipe would wait for its writer
        with self._opened() as container:
            stream = container.streams.video[0]
            self.count: int | None = stream.frames or None
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.time_base = Fraction(stream.time_base)
            self.sound = bool(container.streams.audio)

    def _opened(self) -> Any:
        av = _av()
        try:
            container = av.open(os.fspath(self.path))
        except av.error.FFmpegError as error:
            raise ImageError(f"{self.path}: not a video that can be read: {reason(error)}") from error
        if not container.streams.video:
            container.close()
            raise ImageError(f"{self.path}: has no pictures in it")
        return container

    def __iter__(self) -> Iterator[Frame]:
        """The frames in the order they are shown. One whose data give no picture has its place, its time and an error."""
        number, shown = 0, -math.inf
        waiting: list[int] = []  # times of packets whose frames have not come, a heap
        errors: dict[int, str] = {}
        with self._opened() as container:
            container.streams.video[0].thread_type = "SLICE"  # among frames an error would be told of another one
            for frame in itertools.chain(self._decoded(container, waiting, errors), [None]):
                while waiting and (frame is None or waiting[0] <= frame.pts):
                    pts = heapq.heappop(waiting)
                    if pts > shown and (frame is None or pts < frame.pts):  # decoders give frames as they are shown: it will not come
                        yield Frame(number, pts, None, errors.pop(pts, "its data give no picture"))
                        number, shown = number + 1, pts
                if frame is not None:
                    corrupt = "its data are damaged" if frame.is_corrupt else None
                    yield Frame(number, frame.pts, None if corrupt else _upright(frame), corrupt)
                    number, shown = number + 1, frame.pts

    def _decoded(self, container: Any, waiting: list[int], errors: dict[int, str]) -> Iterator[Any]:
        """Frames as they come; in `waiting` and `errors` the times of packets, and what is wrong with some of them."""
        broken, last = _av().error.FFmpegError, -1
        packets = container.demux(video=0)
        while True:
            try:
                packet = next(packets, None)
            except broken:  # of the file's form, such as a missing end: nothing can be found behind it
                return
            if packet is None:
                return
            pts = packet.dts if packet.pts is None else packet.pts
            if packet.size and pts is not None:
                heapq.heappush(waiting, pts)
            try:
                frames = packet.decode()
            except broken as error:
                if pts is not None:
                    errors[pts] = reason(error)
                continue
            for frame in frames:
                frame.pts = last + 1 if frame.pts is None else frame.pts
                last = frame.pts
                yield frame


def _upright(frame: Any) -> np.ndarray:
    """uint8 (H, W, 3), turned as the file says it is to be shown."""
    image: np.ndarray = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image

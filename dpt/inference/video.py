"""Clips in and out: a video's frames one after the other, upright, whatever became of some of them; and what was made of them as a video,
by parts, with the sound that it had. By PyAV: pip install '.[video]'."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..system.disk import open_regular
from .images import ImageError, reason

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".gif")
PART = "nut"  # the form of a part's file, which keeps times as they are
IN_MP4 = ("aac", "mp3", "ac3", "eac3", "alac", "flac", "opus")  # sound that an .mp4 may hold; with other sound the clip becomes an .mkv
AHEAD = 4  # frames that are decoded before they are asked for, or wait to be encoded
QUALITY = {"crf": "18", "preset": "veryfast", "bf": "0"}  # frames in the order they are shown, so that parts do not overlap


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: its `number` from 0, its time `pts` in the clip's `time_base`, and the picture, uint8 (H, W, 3); of a broken one none, and
    why."""

    number: int
    pts: int
    image: np.ndarray | None
    error: str | None = None


def pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImageError(f"a clip needs PyAV: pip install '.[video]' ({error})") from error
    return av


class Clip:
    """A video file. Frames are decoded as they are asked for: a clip of any length takes the memory of a few.

    Attributes:
        count: frames, where the file says so, else None. rate: frames a second, of the whole. time_base: seconds of a unit of `Frame.pts`.
        sound: the name of its codec, None without any.
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
            self.sound: str | None = container.streams.audio[0].codec_context.name if container.streams.audio else None

    def _opened(self) -> Any:
        av = pyav()
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
                    yield Frame(number, frame.pts, None if corrupt else upright(frame), corrupt)
                    number, shown = number + 1, frame.pts

    def _decoded(self, container: Any, waiting: list[int], errors: dict[int, str]) -> Iterator[Any]:
        """Frames as they come; in `waiting` and `errors` the times of packets, and what is wrong with some of them."""
        broken, last = pyav().error.FFmpegError, -1
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


def upright(frame: Any) -> np.ndarray:
    """uint8 (H, W, 3), turned as the file says it is to be shown."""
    image: np.ndarray = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def ahead(frames: Iterable[Frame]) -> Iterator[Frame]:
    """Frames, of which the next `AHEAD` are decoded by a thread meanwhile."""
    source, end = iter(frames), None
    with ThreadPoolExecutor(1) as thread:
        decoding = deque(thread.submit(next, source, end) for _ in range(AHEAD))
        while (frame := decoding.popleft().result()) is not None:
            decoding.append(thread.submit(next, source, end))
            yield frame


def write_part(file: BinaryIO, frames: Iterable[tuple[int, np.ndarray]], clip: Clip) -> int:
    """A part of a clip as H.264: frames, each (pts, uint8 (H, W, 3)), at their times; how many there were, of which it holds a few.

    An odd row or column is doubled, for H.264 has even sides.
    """
    count = 0
    with pyav().open(file, "w", format=PART) as container:
        stream = container.add_stream("libx264", rate=clip.rate, options=QUALITY)
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", clip.time_base

        def encode(pts: int, image: np.ndarray) -> None:
            rows, columns = (side % 2 for side in image.shape[:2])
            image = np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else image
            if not stream.codec_context.is_open:
                stream.height, stream.width = image.shape[:2]
            frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = pts, clip.time_base
            container.mux(stream.encode(frame))

        with ThreadPoolExecutor(1) as thread:  # it encodes while the next frames are made
            encoding: deque[Future[None]] = deque()
            for pts, image in frames:
                encoding.append(thread.submit(encode, pts, image))
                count += 1
                if len(encoding) > AHEAD:
                    encoding.popleft().result()
            for one in encoding:
                one.result()
        if count:
            container.mux(stream.encode())
    return count


def suffix_of(clip: Clip) -> str:
    """Of the file that a clip's maps become, by the sound that it has."""
    return ".mp4" if clip.sound is None or clip.sound in IN_MP4 else ".mkv"


def join(file: BinaryIO, parts: Sequence[Path], clip: Clip, comment: str = "") -> None:
    """Parts one behind the other, with the clip's sound as it is, as one file of the form `suffix_of` names."""
    av = pyav()
    form = {".mp4": "mp4", ".mkv": "matroska"}[suffix_of(clip)]
    with contextlib.ExitStack() as opened:
        container = opened.enter_context(av.open(file, "w", format=form))
        container.metadata["comment"] = comment
        sound = opened.enter_context(clip._opened()) if clip.sound else None
        video = heard = None
        packets: Iterator[Any] = iter(()) if sound is None else _sound(sound)
        waiting = None
        for part in parts:
            with av.open(os.fspath(part)) as source:
                if video is None:
                    video = container.add_stream_from_template(source.streams.video[0])
                    heard = None if sound is None else container.add_stream_from_template(sound.streams.audio[0])
                for packet in source.demux(video=0):
                    if packet.dts is None:
                        continue
                    now = packet.dts * packet.time_base
                    while heard is not None and (waiting := waiting or next(packets, None)) is not None:
                        if waiting.dts * waiting.time_base > now:
                            break
                        waiting.stream = heard
                        container.mux(waiting)
                        waiting = None
                    packet.stream = video
                    container.mux(packet)
        for packet in packets if waiting is None else itertools.chain([waiting], packets):
            packet.stream = heard
            container.mux(packet)


def _sound(container: Any) -> Iterator[Any]:
    """The packets of a clip's sound, as long as they can be found."""
    try:
        yield from (packet for packet in container.demux(audio=0) if packet.dts is not None)
    except pyav().error.FFmpegError:
        return


def comment_of(path: Path) -> str:
    """What `join` was given for a file; empty where there is none. ImageError for what is no clip."""
    with Clip(path)._opened() as container:
        found = {key.lower(): value for key, value in container.metadata.items()}
        return str(found.get("comment", ""))

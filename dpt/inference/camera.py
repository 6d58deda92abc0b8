"""A camera's newest picture. By PyAV: pip install '.[video]'."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from .images import ImageError, reason
from .video import pyav, upright

DEVICES = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}:none")}  # by platform FFmpeg's input and a camera's name


class Camera:
    """A camera, opened; iterating gives its newest picture each time, uint8 (H, W, 3), and leaves out what came while nobody asked.

    ImageError: none of that number can be opened, no PyAV, or a system on which cameras have no numbers; later, if it breaks off.
    """

    def __init__(self, number: int):
        if sys.platform not in DEVICES:
            raise ImageError(f"--camera {number}: cameras are read on {' and '.join(sorted(DEVICES))}, not on {sys.platform}")
        form, name = DEVICES[sys.platform]
        self.name = name.format(number)
        self._open(self.name, form)

    def _open(self, name: str, form: str) -> None:
        av = pyav()
        try:
            self._container = av.open(name, format=form)
        except (av.error.FFmpegError, ValueError) as error:
            raise ImageError(f"{name}: no camera that can be read: {reason(error)}") from error
        self._news = threading.Condition()
        self._newest: Any = None
        self._error: Exception | None = None
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            for frame in self._container.decode(video=0):
                with self._news:
                    if self._closed:
                        return
                    self._newest = frame
                    self._news.notify()
            error = ImageError(f"{self.name}: the camera gives no more pictures")
        except pyav().error.FFmpegError as found:
            error = ImageError(f"{self.name}: the camera broke off: {reason(found)}")
        with self._news:
            self._error = error
            self._news.notify()

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._newest is not None or self._error is not None)
                frame, self._newest = self._newest, None
            if frame is None:
                raise self._error or ImageError(self.name)
            yield upright(frame)

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._news:
            self._closed = True
        self._reader.join(timeout=5)
        self._container.close()

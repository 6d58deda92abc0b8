"""`dpt predict --camera`: a camera's maps in a window, as they come."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch

from ..inference.camera import Camera
from ..inference.prediction import predict_iter
from ..inference.steady import Steady
from ..model import DPT
from ..system.endings import CommandError, printable
from ..zoo import config_of
from . import running
from .arguments import CARRIED
from .clips import map_of, range_of, view_of

FOLLOWED = 0.1  # of how far the range of a new map is from that of the colours, these go with it


class Shown(Protocol):
    """Where pictures are shown; `open` until it is closed there."""

    open: bool

    def show(self, image: np.ndarray, title: str) -> None: ...


class Window:
    """A window of Tk's, which Escape, q or its own button closes. CommandError where there is none to be had."""

    def __init__(self) -> None:
        try:
            import tkinter

            from PIL import ImageTk
        except ImportError as error:
            raise CommandError(f"--camera needs a window of Tk's, which this Python has not: {error}") from error
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise CommandError(f"--camera needs a window: {error}") from error
        self._photo = ImageTk.PhotoImage
        self._label: Any = tkinter.Label(self._root)
        self._label.pack()
        self.open = True
        self._root.protocol("WM_DELETE_WINDOW", self.close)
        for key in ("<Escape>", "q"):
            self._root.bind(key, lambda event: self.close())

    def close(self) -> None:
        """Nothing is shown any more."""
        if self.open:
            self.open = False
            self._root.destroy()

    def show(self, image: np.ndarray, title: str) -> None:
        """A picture, uint8 (H, W, 3), in place of the last one."""
        from PIL import Image

        self._label.image = self._photo(Image.fromarray(image))  # kept there, for Tk does not
        self._label.configure(image=self._label.image)
        self._root.title(title)
        self._root.update()


def run(args: argparse.Namespace) -> int:
    """Show a camera's maps until the window is closed; returns the exit code. CommandError where nothing can be shown."""
    if args.model is not None and len(args.model) > 1:
        raise CommandError(f"--camera shows one model, not {' and '.join(args.model)}")
    name = args.model[0] if args.model else None if args.weights else CARRIED[0]
    caution = None if name is None else running.scenes_only([config_of(name)])
    window = Window()
    try:
        with Camera(args.camera) as camera:
            model = running.model_of(args, name, running.device_of(args.device), getattr(torch, args.dtype))
            print(f"{printable(model.config.name)} on {camera.name}{'; ' + caution if caution else ''}; Escape or q ends it")
            show(model, camera, window, args)
    finally:
        window.close()
    return 0


def show(model: DPT, pictures: Iterable[np.ndarray], window: Shown, args: argparse.Namespace) -> None:
    """Pictures with their maps, one after the other, until the window is closed; CommandError for one that cannot be predicted."""
    head = model.config.head
    steady = Steady(head) if head.task == "depth" else None
    ends = args.range
    for image in pictures:
        start = time.perf_counter()
        (result,) = predict_iter(model, [image], graph=args.graph, **running.choices(args))
        found = map_of(result, head)
        if found is None:
            raise CommandError(str(result.error)) from result.error
        if steady is not None:
            found = steady(found, image)
            if args.range is None:
                low, high = range_of([found])
                ends = (low, high) if ends is None else (ends[0] + FOLLOWED * (low - ends[0]), ends[1] + FOLLOWED * (high - ends[1]))
        window.show(view_of(image, found, head, ends, args.view), f"dpt: {1 / (time.perf_counter() - start):.1f} a second")
        if not window.open:
            return

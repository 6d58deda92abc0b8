"""What waits at a server is predicted together: one thread, which takes pictures from a queue.

A picture waits with others of its model and focal length. The thread takes the oldest and all that may go with it, and `predict_iter`
batches them by their size in the network, reading ahead; what comes meanwhile joins, until another model's picture has waited for long
enough. Batches that are not full are filled up, so that what one gets has the same bits whoever else was there.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from ..inference.prediction import Beside, Result, predict_iter
from ..inference.reading import LOOK_AHEAD
from ..inference.windows import Network


class Upload(io.BytesIO):
    """The content of a file that was sent, with the name that messages call it by. Nothing is ever opened by that name."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


@dataclass(frozen=True, eq=False)
class _Waiting:
    key: tuple[str, float | None]  # model, focal length
    content: bytes
    name: str
    answer: Future[Result] = field(default_factory=Future)

    def upload(self) -> Upload:
        return Upload(self.content, self.name)


class _Runs(AbstractContextManager[None]):
    """Counts the runs of the network: the clock of `Beside`, of one thread."""

    count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        pass


class Closed(RuntimeError):
    """The server ends: nothing is predicted any more."""


class Batcher:
    """Predicts pictures in a thread of its own.

    Args:
        models: by name, what predicts.
        batch_size, max_pixels: as `predict_iter` takes them.

    Attributes:
        pictures: how many went through a network.
        runs: how often a network ran: `pictures` over `runs` is how many were batched, in the mean.
        dropped: how many were given up, while they waited, by who had sent them.
    """

    def __init__(self, models: Mapping[str, Network], *, batch_size: int, max_pixels: int):
        self._models, self._how = models, {"batch_size": batch_size, "max_pixels": max_pixels}
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._clock, self._closed = _Runs(), False
        self.pictures = self.dropped = 0
        self._thread = threading.Thread(target=self._work, name="dpt-predict", daemon=True)
        self._thread.start()

    @property
    def runs(self) -> int:
        return self._clock.count

    @property
    def waiting(self) -> int:
        """How many pictures nobody has begun with."""
        return len(self._waiting)

    def submit(self, model: str, content: bytes, name: str, focal: float | None = None) -> Future[Result]:
        """A picture's `Result`, of which `error` says why there is no prediction; cancelled while it waits, it costs nothing.

        Raises:
            KeyError: no such model. Closed: the server ends; in the future too.
        """
        if model not in self._models:
            raise KeyError(model)
        one = _Waiting((model, focal), content, name)
        with self._changed:
            if self._closed:
                raise Closed("the server is ending")
            self._waiting.append(one)
            self._changed.notify()
        return one.answer

    def close(self) -> None:
        """Give up what waits, and wait for what is in work."""
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, deque()
            self._changed.notify()
        for one in left:
            if one.answer.set_running_or_notify_cancel():
                one.answer.set_exception(Closed("the server is ending"))
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                key = self._waiting[0].key
            self._turn(key)

    def _turn(self, key: tuple[str, float | None]) -> None:
        """Predict what waits with a key, as long as there is such, or for a window's length where others wait too."""
        taken: deque[_Waiting] = deque()
        again: list[_Waiting] = []

        def uploads() -> Iterator[Upload]:
            for number in itertools.count():
                one = self._next(key, number < LOOK_AHEAD * self._how["batch_size"])
                if one is None:
                    return
                taken.append(one)
                yield one.upload()

        try:
            for result in self._predicted(key, uploads()):
                one = taken.popleft()
                if isinstance(result.error, MemoryError):  # of one, perhaps, with whom others shared a batch
                    again.append(one)
                else:
                    self._settle(one, result)
        except Exception:  # whoever it was of will get it below, and nobody else
            again += taken
        for one in again:
            self._alone(one)

    def _next(self, key: tuple[str, float | None], before_others: bool) -> _Waiting | None:
        with self._changed:
            for one in list(self._waiting):
                if one.answer.cancelled():
                    self._waiting.remove(one)
                    self.dropped += 1
                elif one.key == key:
                    self._waiting.remove(one)
                    if one.answer.set_running_or_notify_cancel():
                        return one
                    self.dropped += 1
                elif not before_others:
                    return None
        return None

    def _alone(self, one: _Waiting) -> None:
        """In a batch that holds nobody else; where there is no memory for that, in one of 1."""
        try:
            for batch_size in dict.fromkeys((self._how["batch_size"], 1)):
                (result,) = self._predicted(one.key, iter([one.upload()]), batch_size=batch_size)
                if not isinstance(result.error, MemoryError):
                    break
        except Exception as error:
            one.answer.set_exception(error)
            return
        self._settle(one, result)

    def _predicted(self, key: tuple[str, float | None], uploads: Iterator[Upload], **changes: Any) -> Iterator[Result]:
        name, focal = key
        return predict_iter(self._models[name], uploads, Beside(clock=self._clock), focal=focal, **{**self._how, **changes})

    def _settle(self, one: _Waiting, result: Result) -> None:
        self.pictures += result.prediction is not None
        one.answer.set_result(result)

"""Items read ahead in threads, and batched by what they can share a batch with: the order of results is theirs all the same."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

READERS = 4  # threads, at most, that read ahead
LOOK_AHEAD = 4  # batches from which the next one is made: two orientations of pictures, or four sizes, then fill theirs
Item = TypeVar("Item")
Read = TypeVar("Read")


@dataclass(eq=False)
class Place(Generic[Read]):
    """An item's place in the order: what it was read as, and with what it can share a batch; in the end, its result."""

    reading: Future[tuple[Read, Hashable]] | None
    taken: bool = False
    result: Read | None = None

    def finish(self, result: Read) -> None:
        """Let go of what was read for what was made of it."""
        self.result, self.reading, self.taken = result, None, True


class Window(Generic[Item, Read]):
    """The items from the first whose result was not handed out yet: `LOOK_AHEAD` batches of them at most, whatever they are by now.

    Args:
        read: makes of an item what it is read as, and what it can share a batch by; by None it can with none, and is its own result. It is
            called in threads.
        batch_size: items of a batch, at most.
    """

    def __init__(self, items: Iterable[Item], read: Callable[[Item], tuple[Read, Hashable]], batch_size: int):
        self._items, self._read, self._batch_size = iter(items), read, batch_size
        self._places: deque[Place[Read]] = deque()
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(min(READERS, torch.get_num_threads()), thread_name_prefix="dpt-load")

    def next_batch(self) -> list[tuple[Place[Read], Read]] | None:
        """The first place that is in no batch yet, and of those that may share one with it the next, as far as the window goes; none where
        results have to be handed out first, and None where all are. It waits for what has to be read for that. RuntimeError in a process
        that was forked meanwhile."""
        if os.getpid() != self._process:
            raise RuntimeError("these predictions were begun before this process was forked, without the threads that read: begin anew")
        missing = LOOK_AHEAD * self._batch_size - len(self._places)
        self._places += [Place(self._pool.submit(self._read, item)) for item in itertools.islice(self._items, missing)]
        if not self._places:
            return None
        batch: list[tuple[Place[Read], Read]] = []
        shared: Hashable = None
        for place in self._places:
            if place.taken or place.reading is None:
                continue
            read, key = place.reading.result()
            if key is None:
                place.finish(read)
            elif not batch or key == shared:
                shared, place.taken = key, True
                batch.append((place, read))
                if len(batch) == self._batch_size:
                    break
        return batch

    def finished(self) -> Iterator[Read]:
        """The results that are next in the order and there."""
        while self._places and (result := self._places[0].result) is not None:
            self._places.popleft()
            yield result
            del result  # held by whoever took it alone

    def close(self) -> None:
        """What is being read is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

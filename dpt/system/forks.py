"""What a process that was forked from this one can go on with: locks, and PyTorch's threads.

A fork copies the memory and, of the threads, only the one that forks. Where there is no fork, nothing is done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def in_forked(action: Callable[[], None]) -> Callable[[], None]:
    """Have each process that is forked from this one from now on do something first; a decorator."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=action)
    return action


def held_over_forks(lock: threading.Lock) -> threading.Lock:
    """A lock that this process forks with in its own hand: what it guards is whole in the copy, where nobody else would ever let go of it.

    A fork waits for it: nobody may ask for one while holding it.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock

"""Which of the processes of one run this one is, as torchrun tells each by its environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Place:
    """This process among those of a run: `rank` of `world`, and `local` of those on this machine; alone it is 0 of 1."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Of items that each process has in the same order those that are this one's: every `world`th."""
        return items[self.rank :: self.world]


def place() -> Place:
    """ValueError where the environment has RANK, WORLD_SIZE or LOCAL_RANK that make no place."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Place()
    words = {name: os.environ.get(name, "0" if name == "LOCAL_RANK" else "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    said = ", ".join(f"{name}={word!r}" for name, word in words.items())
    if not all(word.isdecimal() for word in words.values()):
        raise ValueError(f"{said}: they must be whole numbers, as torchrun sets them")
    rank, world, local = map(int, words.values())
    if not rank < world:
        raise ValueError(f"{said}: a rank is from 0 to one less than WORLD_SIZE")
    return Place(rank, world, local)

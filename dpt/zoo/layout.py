"""What a family's files call their tensors: a table of keys in terms of ours.

A table row is (our key, their key). `{n}` is a block, `{i}` a level from 0 (shallow) to 3, `{j}` = 3 - i, `{k}` = i + 1, and `{p}`
the rest of the key. A row whose second part is a tuple joins tensors along their first dimension.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


class CheckpointError(ValueError):
    """A file that is no checkpoint of the model it was loaded into; the message says which keys or why."""


@dataclass(frozen=True)
class Layout:
    """How one family of files names its tensors.

    `marker` is a key only this layout has. `unused` are patterns of keys that the network never reads. `norm_eps`, where the
    family's own code runs another LayerNorm epsilon than the named model. `final_norm`: what it means that a file holds the encoder's norm.
    """

    name: str
    marker: str
    rows: tuple[tuple[str, str | tuple[str, ...]], ...]
    unused: tuple[str, ...] = ()
    norm_eps: float | None = None
    final_norm: str = "every"

    def source(self, key: str) -> tuple[str, ...]:
        """Their key(s) for one of ours."""
        for ours, theirs in self.rows:
            match = _pattern(ours).fullmatch(key)
            if match:
                names = match.groupdict()
                if "i" in names:
                    names |= {"j": str(3 - int(names["i"])), "k": str(int(names["i"]) + 1)}
                return tuple(their.format(**names) for their in ((theirs,) if isinstance(theirs, str) else theirs))
        raise CheckpointError(f"the layout {self.name} has no {key}: its models have no such part")

    def find(self, key: str, state: Mapping[str, Value]) -> Value | None:
        """The state's (first) tensor for one of our keys; None if it or the layout has none."""
        try:
            return state.get(self.source(key)[0])
        except CheckpointError:
            return None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression of one of our keys in a table."""
    escaped = re.escape(template)
    for name, what in (("n", r"\d+"), ("i", r"\d"), ("p", r"[\w.]+")):
        escaped = escaped.replace(rf"\{{{name}\}}", f"(?P<{name}>{what})")
    return re.compile(escaped)


def residual_units(theirs: str, conv: str, norm: str) -> tuple[tuple[str, str], ...]:
    """The rows of both residual units; in the templates `#` is the unit and `@` the convolution within it."""
    return tuple(
        (f"fusion.blocks.{{i}}.unit{unit}.{ours}{index}.{{p}}", theirs.replace("#", str(unit)) + their.replace("@", str(index)) + ".{p}")
        for unit in (1, 2)
        for index in (1, 2)
        for ours, their in (("conv", conv), ("norm", norm))
    )

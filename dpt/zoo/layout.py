"""What a family's files call their tensors: a table of keys in terms of ours.

A table row is (our key, their key). `{n}` is a block, `{i}` a level from 0 (shallow) to 3, `{j}` = 3 - i, `{k}` = i + 1, and `{p}`
the rest of the key. A row whose second part is a tuple joins tensors along their first dimension; None in it stands for zeros, as many as
the first of them holds: a bias that their code has not. An empty tuple says that they have no such tensor, whatever later rows say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import DPTConfig

if TYPE_CHECKING:
    from .stated import Document

Value = TypeVar("Value")
Row = tuple[str, str | tuple[str | None, ...]]


class CheckpointError(ValueError):
    """A file that is no checkpoint of the model it was loaded into; the message says which keys or why."""


@dataclass(frozen=True)
class Stated:
    """How a family's config.json and preprocessor_config.json, those of transformers as a rule, state a model.

    `read(model, processor, name)`: the configuration they state; without a processor's file, the model's own size and the class's defaults.
    `write(config)`: what both files hold to state that, the inverse; CheckpointError names the field that transformers cannot follow. None
    where a converted file goes without them. `kind`: what transformers calls such models, by `model_type`; empty of what is not its own.
    """

    read: Callable[[Document, Document | None, str], DPTConfig]
    write: Callable[[DPTConfig], tuple[dict[str, Any], dict[str, Any]]] | None = None
    kind: str = ""


@dataclass(frozen=True)
class Layout:
    """How one family of files names its tensors.

    `format`: what `dpt convert --to` calls it. `markers`: keys that all files of this layout have, and of no other have all. `unused`:
    patterns of keys that the network never reads. `filled`: keys that its own code wants beside what the network reads, with their shapes,
    "D" being the encoder's width, "8D" eight times that and "F" the decoder's features, and what they are filled with. `differs`: what
    the family's own code computes otherwise than the named model, fields by section. `masked`: what follows the name of a tensor in that
    of its mask, by which it is multiplied where the file has one. `final_norm`: what it means that a file holds the encoder's norm.
    `stated`: of layouts with a config.json. `prefix`: before all keys in its files; reading takes it off, as it does of wrappers.
    `wrapper`: under which torch.load finds the tensors.
    """

    name: str
    format: str
    markers: tuple[str, ...]
    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    filled: tuple[tuple[str, tuple[int | str, ...], float | tuple[float, ...]], ...] = ()
    differs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    masked: str | None = None
    final_norm: str = "every"
    stated: Stated | None = None
    prefix: str = ""
    wrapper: str = ""

    def is_of(self, state: Iterable[str]) -> bool:
        """Whether a state's keys are this layout's."""
        return set(self.markers) <= set(state)

    def source(self, key: str) -> tuple[str | None, ...]:
        """Their key(s) for one of ours."""
        for ours, theirs in self.rows:
            match = _pattern(ours).fullmatch(key)
            if match:
                names = match.groupdict()
                if "i" in names:
                    names |= {"j": str(3 - int(names["i"])), "k": str(int(names["i"]) + 1)}
                parts = (theirs,) if isinstance(theirs, str) else theirs
                if not parts:
                    break
                return tuple(None if part is None else part.format(**names) for part in parts)
        raise CheckpointError(f"the layout {self.name} has no {key}: its models have no such part")

    def find(self, key: str, state: Mapping[str, Value]) -> Value | None:
        """The state's (first) tensor for one of our keys; None if it or the layout has none."""
        try:
            return state.get(self.source(key)[0] or "")
        except CheckpointError:
            return None

    def as_run(self, config: DPTConfig) -> DPTConfig:
        """The configuration with what this layout's own code computes otherwise."""
        for section, changes in self.differs.items():
            config = config.with_(section, **changes)
        return config


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression of one of our keys in a table."""
    escaped = re.escape(template)
    for name, what in (("n", r"\d+"), ("i", r"\d"), ("p", r"[\w.]+")):
        escaped = escaped.replace(rf"\{{{name}\}}", f"(?P<{name}>{what})")
    return re.compile(escaped)

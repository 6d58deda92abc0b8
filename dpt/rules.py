"""Dataclasses whose fields are held to rules as they are made, so that a wrong value is an error at once and names its rule."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Rule:
    """What a field must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(words: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(f"a number {words}", lambda value: type(value) in (int, float) and math.isfinite(value) and holds(value))


def one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: type(value) is str and value in names)


def or_none(rule: Rule) -> Rule:
    return Rule(f"{rule.words}, or None", lambda value: value is None or rule.holds(value))


def instance_of(kind: type) -> Rule:
    return Rule(f"a {kind.__name__}", lambda value: isinstance(value, kind))


def tuple_of(rule: Rule, low: int, high: int | None = None) -> Rule:
    high = low if high is None else high
    count = f"{low}" if low == high else f"{low} to {high}"
    return Rule(
        f"a tuple of {count}, each {rule.words}",
        lambda value: type(value) is tuple and low <= len(value) <= high and all(map(rule.holds, value)),
    )


TRUTH = Rule("True or False", lambda value: type(value) is bool)
NAME = Rule("a name without slashes", lambda value: type(value) is str and value != "" and not set(value) & set("/\\\0"))
TEXT = Rule("text", lambda value: type(value) is str)
POSITIVE = number("above 0", lambda value: value > 0)
FINITE = number("", lambda value: True)


class Checked:
    """A dataclass whose fields are held to `RULES` as it is made, and then, together, to `_conflicts`.

    ValueError names the field, its value and the rule.
    """

    RULES: ClassVar[Mapping[str, Rule]]

    def __post_init__(self) -> None:
        for name, rule in self.RULES.items():
            value = getattr(self, name)
            if not rule.holds(value):
                raise ValueError(f"{type(self).__name__}.{name}={reprlib.repr(value)}: it must be {rule.words}")
        for wrong, message in self._conflicts():
            if wrong:
                raise ValueError(f"{type(self).__name__}.{message}")

    def _conflicts(self) -> Iterable[tuple[bool, str]]:
        """Whether fields that are right by themselves contradict each other, and what to say then."""
        return ()


def nearest(name: str, known: Iterable[str]) -> str:
    """Which known name a mistyped one may mean, to stand behind it; empty where none is near."""
    known = list(known)
    longer = [one for one in known if name.strip("-") and one.startswith(name)]  # before what is short and much the same
    close = difflib.get_close_matches(name, longer or known, n=1, cutoff=0.0 if longer else 0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""

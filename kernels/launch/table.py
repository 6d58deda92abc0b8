"""The configuration table.

It is one JSON file a device family in ``configs/``. It holds, for every kernel, a list of entries that is read from the top;
the first whose conditions hold is used, and the last one has no conditions:

    {"attention_forward": [{"when": {"D_max": 64, "dtype": "bfloat16"}, "config": {"BLOCK_M": 128, ...}, "provenance": "..."}, ...]}

A condition is ``"X": value`` (equal), ``"X_min"`` or ``"X_max"`` (inclusive) on a keyword that the launcher passes to :func:`config`,
or ``"dtype"``. There is no run-time autotuner: it breaks graph capture, races between threads and costs minutes on first use.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from . import recording
from .families import TABLES

CONFIGS = Path(__file__).parents[1] / "configs"


@functools.cache
def load_table(family: str) -> Mapping[str, list[dict[str, Any]]]:
    """The configuration table of ``family``: kernel name -> entries, read once a process."""
    return json.loads((CONFIGS / f"{TABLES[family]}.json").read_text())


def _holds(condition: str, value: Any, shape: Mapping[str, Any]) -> bool:
    name, _, bound = condition.rpartition("_")
    if bound not in ("min", "max"):
        name, bound = condition, "equal"
    if name not in shape:
        raise ValueError(f"the table has a condition on {name!r}; the launcher gives {', '.join(sorted(shape))}")
    if bound == "equal":
        return shape[name] == value
    return shape[name] >= value if bound == "min" else shape[name] <= value


def select(entries: Sequence[Mapping[str, Any]], shape: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first entry all of whose conditions hold for ``shape``, or None."""
    return next((entry for entry in entries if all(_holds(c, v, shape) for c, v in entry["when"].items())), None)


@functools.lru_cache(maxsize=4096)
def _entry(kernel_name: str, family: str, dtype: torch.dtype, shape: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    table = load_table(family)
    if kernel_name not in table:
        raise ValueError(f"no configuration of kernel {kernel_name!r} in configs/{TABLES[family]}.json")
    entry = select(table[kernel_name], {"dtype": str(dtype).removeprefix("torch."), **dict(shape)})
    if entry is None:
        raise ValueError(
            f"configs/{TABLES[family]}.json has no entry of {kernel_name!r} for {dict(shape)}, {dtype}: the last needs no conditions"
        )
    return entry


forgetting: list[Callable[[], None]] = []  # what else rests on choices, and forgets it


def forget_choices() -> None:
    """Choose again: a table that was read has been changed, or the driver."""
    _entry.cache_clear()
    for forget in forgetting:
        forget()


def forget_tables() -> None:
    """Read the tables again: a file has been changed."""
    load_table.cache_clear()
    forget_choices()


_overrides: ContextVar[Mapping[str, Mapping[str, Any]]] = ContextVar("dpt_kernels_config_overrides", default=MappingProxyType({}))


@contextlib.contextmanager
def using(kernel_name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Launch ``kernel_name`` with ``config`` instead of the table's: for the tuning command and the tests. Nested, both hold."""
    token = _overrides.set({**_overrides.get(), kernel_name: config})
    try:
        yield
    finally:
        _overrides.reset(token)


def overridden() -> bool:
    """Whether a configuration of the table is replaced at present, by :func:`using`."""
    return bool(_overrides.get())


def config(kernel_name: str, family: str, dtype: torch.dtype, **shape: Any) -> dict[str, Any]:
    """The launch configuration of ``kernel_name``: block sizes, ``num_warps``, ``num_stages``, ``descriptor``, ...

    ``shape`` are the keywords that the table's conditions may name, e.g. ``D=64, N=1025``. ValueError if nothing matches.
    """
    override = _overrides.get().get(kernel_name)
    if override is not None:
        return dict(override)
    entry = _entry(kernel_name, family, dtype, tuple(sorted(shape.items())))
    recorder = recording.in_force()
    if recorder is not None:
        recorder.used.append((kernel_name, json.dumps(entry["when"])))
    return dict(entry["config"])

"""channel_scale: what is compiled and tuned of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ... import launch
from ...channel_scale import _scale, channel_scale_ref
from ..workload import Inputs, Workload, combinations

SHOWS = {"tensor_cores": False, "async_copies": False}


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every dtype."""
    for dtype in launch.DTYPES:
        x = torch.empty(577, 768, dtype=dtype, device="meta")
        yield from launch.record(family, f"C=768 {dtype}", _scale, x, x[0], **SHOWS)


def _arguments(inputs: Inputs, rows: int, columns: int) -> dict[str, Any]:
    return {"x": inputs.normal(rows, columns), "gamma": inputs.normal(columns)}


def tuning_space() -> Iterator[Workload]:
    """The tokens of sixteen pictures."""
    yield Workload(
        "channel scale", _scale, _arguments, channel_scale_ref,
        {"channel_scale": combinations([{}], BLOCK_M=(4, 16), BLOCK_C=(64, 128), num_warps=(4, 8), num_stages=(1,))},
        sizes={"rows": 16400, "columns": 768}, small={"rows": 5, "columns": 7}, shows=SHOWS,
    )  # fmt: skip

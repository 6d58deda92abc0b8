"""Which way a convolution is computed on this machine: the first entry of its table whose conditions hold.

The tables, beside this file, are of the machine's vector instructions, in the form of ``launch.table``; what was measured to make them is
in ``measured/``, by ``python -m dpt.kernels.tools.measure_cpu``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..launch.table import select

MEASURED = {"AVX512": "avx512", "AVX2": "avx2"}  # by PyTorch's name of what it uses
OTHERWISE = "AVX2"  # whose entries are taken for a machine that was not measured, such as an Arm


def capability() -> str:
    """PyTorch's name of the vector instructions that it uses here."""
    return torch.backends.cpu.get_cpu_capability()


def _file(name: str) -> Path:
    return Path(__file__).with_name(f"{MEASURED[name]}.json")


def measured_file(name: str) -> Path:
    """What was measured with these vector instructions; in a checkout alone."""
    return Path(__file__).parent / "measured" / _file(name).name


@functools.cache
def _entries(name: str) -> Sequence[Mapping[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(_file(name).read_text())
    return found["conv3x3"]


@functools.lru_cache(maxsize=1024)
def algorithm(channels: int, outputs: int, pixels: int, name: str) -> str:
    """ "winograd" or "direct", for a 3x3 convolution of so many pixels in all with the vector instructions of this name."""
    entry = select(_entries(name if name in MEASURED else OTHERWISE), {"C": channels, "O": outputs, "pixels": pixels})
    if entry is None:
        raise ValueError(f"no entry of {_file(name).name} holds for {channels} to {outputs} channels of {pixels} pixels")
    found: str = entry["config"]["algorithm"]
    return found


def winograd(batch: int, channels: int, height: int, width: int, outputs: int) -> bool:
    """Whether the table has Winograd's algorithm for a map and a weight of these sizes."""
    return algorithm(channels, outputs, batch * height * width, capability()) == "winograd"


def told() -> str:
    """What a report says of it."""
    here = capability()
    of = f"for {here}" if here in MEASURED else f"for {OTHERWISE}, since {here} was not"
    return f"float32 convolutions by Winograd where that was measured to be faster, {of}"

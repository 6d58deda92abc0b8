"""What the time model is asked about: models, sizes and batches, each as the launches of one forward and PyTorch's own calls between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dpt.kernels import launch
from dpt.kernels.tools import library
from dpt.kernels.tools.time_model import Library
from dpt.zoo import CONFIGS

from ..harness.hollow import Hollow
from .launches import Run, model_of

# The models that the table has, their pictures' sides, and their batches.
TABLE = {
    "dpt-base-ade20k": (512, (1, 16)),
    "dpt-large-midas": (384, (1, 16)),
    "depth-anything-v2-small": (518, (1,)),
    "depth-anything-v2-base": (518, (1,)),
    "depth-anything-v2-large": (518, (1,)),
}


class OnGpu(Hollow):
    """Convolutions give their maps in the format that they have on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return library.as_cudnn(func._schema.name.removeprefix("aten::"), args, result)


def side_of(model: str) -> int:
    """The pictures' side that a model is predicted at: the table's, or the shorter of its own input."""
    if model not in CONFIGS:
        raise ValueError(f"model {model!r}: must be one of {', '.join(CONFIGS)}")
    return TABLE[model][0] if model in TABLE else min(CONFIGS[model].input.size)


def works(model: str, batch: int, dtype: torch.dtype, family: str) -> Iterator[launch.CompileCase | Library]:
    """The launches of a forward of square pictures, and PyTorch's calls."""
    side = side_of(model)
    hollow = model_of(CONFIGS[model], Run(dtype))
    calls: list[Library] = []

    def forward() -> None:
        def computed(name: str, arguments: tuple[Any, ...], result: Any) -> None:
            calls.extend(library.calls_of(name, arguments, result))

        x = torch.empty((batch, 3, side, side), dtype=dtype, memory_format=torch.channels_last)
        with launch.stand_ins(), OnGpu(computed=computed), torch.no_grad():
            hollow(x)

    yield from launch.record(family, f"{model} {side}x{side} batch {batch}", forward)
    yield from calls

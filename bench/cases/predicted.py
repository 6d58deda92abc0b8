"""What the time model is asked about: models, sizes and batches, each the launches of a forward and PyTorch's own calls between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dpt.kernels import launch
from dpt.kernels.layernorm_linear import layernorm_linear
from dpt.kernels.tools import library
from dpt.kernels.tools.cards import CARDS
from dpt.kernels.tools.time_model import Library
from dpt.zoo import CONFIGS

from ..harness.hollow import Hollow
from ..harness.records import first_runs, read_all
from .launches import Run, model_of

# The models that the table has: their pictures' sides, and their batches.
MODELS = {
    "dpt-base-ade20k": (512, (1, 16)),
    "dpt-large-midas": (384, (1, 16)),
    "depth-anything-v2-small": (518, (1,)),
    "depth-anything-v2-base": (518, (1,)),
    "depth-anything-v2-large": (518, (1,)),
}
ROWS, WIDTH, HIDDEN = 16 * 1025, 768, 3072  # of the encoder's product that is predicted by itself: ViT-B, 16 pictures of 512x512
CONTENDER = "fast, CUDA graph"  # what the predictions are of, among the benchmarks' contenders


class OnGpu(Hollow):
    """Convolutions give their maps in the format that they have on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return library.as_cudnn(func._schema.name.removeprefix("aten::"), args, result)


def side_of(model: str) -> int:
    """The pictures' side that a model is predicted at: the table's, or the shorter of its own input."""
    if model not in CONFIGS:
        raise ValueError(f"model {model!r}: must be one of {', '.join(CONFIGS)}")
    return MODELS[model][0] if model in MODELS else min(CONFIGS[model].input.size)


def name_of(model: str, batch: int, dtype: torch.dtype | str) -> str:
    """As the benchmarks name it."""
    side = side_of(model)
    return f"{model} {side}x{side}, batch {batch}, {str(dtype).removeprefix('torch.')}"


def works(model: str, batch: int, dtype: torch.dtype, family: str) -> Iterator[launch.CompileCase | Library]:
    """The launches of a forward of square pictures, and PyTorch's calls."""
    side = side_of(model)
    x = torch.empty((batch, 3, side, side), dtype=dtype, memory_format=torch.channels_last)
    return _works(family, model_of(CONFIGS[model], Run(dtype)), x)


def _works(family: str, function: Callable[..., Any], *arguments: Any) -> Iterator[launch.CompileCase | Library]:
    calls: list[Library] = []

    def computed(name: str, given: tuple[Any, ...], result: Any) -> None:
        calls.extend(library.calls_of(name, given, result))

    def run() -> None:
        with launch.stand_ins(), OnGpu(computed=computed), torch.no_grad():
            function(*arguments)

    yield from launch.record(family, "predicted", run)
    yield from calls


def forwards(dtype: torch.dtype, family: str) -> Iterator[tuple[str, Iterator[launch.CompileCase | Library]]]:
    """The table's, with their names."""
    for model, (_, batches) in MODELS.items():
        for batch in batches:
            yield name_of(model, batch, dtype), works(model, batch, dtype, family)
    x, norm, weight, bias = (torch.empty(shape, dtype=dtype) for shape in ((ROWS, WIDTH), WIDTH, (HIDDEN, WIDTH), HIDDEN))
    name = f"LayerNorm, linear and GELU of {ROWS} rows, {WIDTH} to {HIDDEN}, {str(dtype).removeprefix('torch.')}"
    yield name, _works(family, layernorm_linear, x, norm, norm, weight, bias, 1e-6, "gelu")


def measured(family: str) -> dict[str, float]:
    """Milliseconds of the forwards that the model's card of a family has run, as the benchmarks have recorded them."""
    card = CARDS[family].name.split()[0]
    runs = [record for record in first_runs(read_all()).values() if record.what == "models" and card in record.device["name"]]
    names = {name_of(model, batch, torch.bfloat16) for model, (_, batches) in MODELS.items() for batch in batches}
    rows = [row for record in runs for row in record.rows if row.contender == CONTENDER and row.case in names]
    return {row.case: row.p50_ms for row in rows if row.p50_ms is not None}

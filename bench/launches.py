"""Every launch that the named models make: cases for the gate on compiled code, `python -m dpt.kernels.compiled --cases bench.launches`.

A model runs hollow (`hollow.py`) while its launches are recorded: forward in every dtype, training with batch norms in either form, and
under autocast. What differs between pictures is in the sizes below; that these are enough is tested with other sizes (`tests/host`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import dpt
from dpt.config import CONFIGS, DPTConfig
from dpt.kernels import compiled, launch
from dpt.kernels.workload import float32_products

from .hollow import Hollow

BLOCKS = 4  # of an encoder: each is like the next
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Run:
    """One way to run a model. ``backward``: with a training step's gradients; ``statistics``: and the batch's statistics in its norms.
    ``autocast``: the dtype of autocast, the parameters being float32. ``precision``: of float32 products."""

    dtype: torch.dtype = torch.float32
    backward: bool = False
    statistics: bool = False
    autocast: torch.dtype | None = None
    precision: str = "ieee"

    def __str__(self) -> str:
        dtype = "tf32" if self.precision == "tf32" else _name(self.dtype)
        dtype = f"autocast {_name(self.autocast)}" if self.autocast else dtype
        return f"{'training' if self.backward else 'inference'}{' batch statistics' if self.statistics else ''} {dtype}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _runs() -> Iterator[Run]:
    for backward, statistics in ((False, False), (True, False), (True, True)):
        for precision in ("ieee", "tf32"):
            yield Run(backward=backward, statistics=statistics, precision=precision)
        for half in HALVES:
            yield Run(half, backward, statistics)
            yield Run(backward=backward, statistics=statistics, autocast=half)


RUNS = tuple(_runs())


def shortened(config: DPTConfig) -> DPTConfig:
    """The model with an encoder of few blocks: what it launches is the same, a block being like the next."""
    hooks = tuple(range(BLOCKS))[len(config.encoder.stem_hooks) :]
    return config.with_("encoder", depth=BLOCKS, hooks=hooks)


@functools.cache
def model_of(config: DPTConfig, dtype: torch.dtype) -> torch.nn.Module:
    """The fast model, of parameters that hold no numbers."""
    with torch.device("meta"):
        model = dpt.build(config, fast=True, dtype=dtype)
    return model.to_empty(device="cpu")


def run(config: DPTConfig, how: Run, size: tuple[int, int], batch: int) -> None:
    """Run the model as :func:`dpt.predict` or a training step does: with its labels, or its gradients."""
    model = model_of(config, how.dtype).train(how.statistics)
    segments = config.head.task == "segmentation"
    autocast = torch.autocast("cpu", dtype=how.autocast) if how.autocast else contextlib.nullcontext()
    with Hollow(), float32_products(how.precision), torch.set_grad_enabled(how.backward):
        x = torch.empty(batch, 3, *size, dtype=how.dtype).to(memory_format=torch.channels_last)
        with autocast:
            outputs = model.forward_auxiliary(x) if how.backward and config.head.auxiliary else (model(x),)
        if how.backward:
            torch.autograd.backward([output.float().sum() for output in outputs])
        elif segments:
            picture = (size[0] + 37, size[1] + 51)
            averaged = outputs[0][0].float().contiguous()  # over scales or windows
            for logits, probability in itertools.product((outputs[0][0], averaged), (False, True)):
                model.head.labels(logits, picture, config.input, probability)


def sizes(config: DPTConfig) -> list[tuple[int, int]]:
    """Inputs that stand for all: square, and one whose tokens' last block of 64 is more than a class token."""
    patch = config.encoder.patch_size
    side = max(config.input.multiple, min(config.input.size) // patch * patch)
    return [(side, side), (side, side + patch * (3 if side % 64 else 6))]


@functools.cache
def _shows(family: str) -> dict[tuple[Any, ...], tuple[bool | str, bool]]:
    """What each kernel has to show, by what decides it: as the op modules' own cases have it."""
    found: dict[tuple[Any, ...], tuple[bool | str, bool]] = {}
    for module in compiled.op_modules().values():
        for case in module.compile_cases(family):
            cores, copies = found.get(_kind(case), (False, False))
            found[_kind(case)] = (cores or case.tensor_cores, copies or case.async_copies)
    return found


def _kind(case: launch.CompileCase) -> tuple[Any, ...]:
    tensors = [getattr(arg, "base", arg) for arg in case.args]
    dtype = next(tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor))
    half = dtype in HALVES
    return case.function, "half" if half else _name(dtype), case.kwargs.get("PRECISION")


def recorded(family: str, config: DPTConfig, runs: Iterable[Run] = RUNS) -> Iterator[launch.CompileCase]:
    """The launches of one model."""
    for how in runs:
        for batch in (2,) if how.backward else (1, 16):
            for size in sizes(config):
                name = f"{config.name} {how} B={batch} {size[0]}x{size[1]}"
                yield from launch.record(family, name, run, config, how, size, batch)


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """The launches of all named models."""
    for config in CONFIGS.values():
        for case in launch.distinct(recorded(family, shortened(config))):
            cores, copies = _shows(family).get(_kind(case), (False, False))
            yield replace(case, tensor_cores=cores, async_copies=copies)

"""Every launch that the named models make: cases for the gate on compiled code, `make compiled-code`.

A model runs hollow (`hollow.py`), forward in every dtype, in training with batch norms in either form, and under autocast; what it calls of
the ops is kept, each different call once, and called again for each GPU family while the launches are recorded. What differs between
pictures is in the inputs below; that these are enough is tested with others (`tests/host`).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

import dpt
import dpt.fast.modules  # noqa: F401 - registers the ops, also where the calls come from a file
from dpt.config import DPTConfig
from dpt.inference.prediction import decided_labels
from dpt.kernels import launch
from dpt.kernels.tools import spaces
from dpt.kernels.tools.parity import float32_products
from dpt.zoo import CONFIGS

from ..harness.hollow import Form, Hollow
from ..harness.shrunk import shortened

HALVES = (torch.bfloat16, torch.float16)
CALLS_VARIABLE = "DPT_NAMED_CALLS"  # of the environment
ALIGNMENT = 16  # bytes; what Triton asks of an address


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


@dataclass(frozen=True)
class Memory:
    """A tensor that was an argument: all of it but its numbers. ``beyond``: elements from an address that ``ALIGNMENT`` divides."""

    form: Form
    beyond: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Memory:
        return cls(Form.of(tensor), tensor.data_ptr() % ALIGNMENT // tensor.element_size())

    def tensor(self) -> torch.Tensor:
        """One like it, whose memory nobody has touched."""
        shape, stride = self.form.shape, self.form.stride
        size = 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
        return torch.empty(self.beyond + size, dtype=self.form.dtype).as_strided(shape, stride, self.beyond)


@dataclass(frozen=True)
class Call:
    """A call of an op, "dpt::attention", where float32 products are of ``precision``."""

    op: str
    arguments: tuple[Any, ...]
    precision: str

    @classmethod
    def of(cls, op: str, arguments: tuple[Any, ...]) -> Call:
        """A call that is being made."""
        kept = tuple(Memory.of(value) if isinstance(value, torch.Tensor) else value for value in arguments)
        return cls(op, kept, torch.backends.cuda.matmul.fp32_precision)

    def again(self) -> None:
        """Make it; where launches are recorded, or a driver launches nothing."""
        arguments = [value.tensor() if isinstance(value, Memory) else value for value in self.arguments]
        with launch.stand_ins(), Hollow(), torch.no_grad(), float32_products(self.precision):
            launch.implementation(self.op)(*arguments)


@functools.lru_cache(maxsize=2)
def _empty_model(config: DPTConfig, dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("meta"):
        model = dpt.build(config, fast=True, dtype=dtype)
    return model.to_empty(device="cpu")


def model_of(config: DPTConfig, how: Run) -> torch.nn.Module:
    """The fast model, of parameters that hold no numbers. Not to be called in a hollow mode: initialisation looks at its values."""
    return _empty_model(config, how.dtype).train(how.statistics)


def run(model: torch.nn.Module, how: Run, size: tuple[int, int], batch: int) -> None:
    """Run a model as predicting or a training step does: with its labels, or its gradients."""
    config = model.config
    autocast = torch.autocast("cpu", dtype=how.autocast) if how.autocast else contextlib.nullcontext()
    with float32_products(how.precision), torch.set_grad_enabled(how.backward):
        x = torch.empty(batch, 3, *size, dtype=how.dtype).to(memory_format=torch.channels_last)
        with autocast:
            prompt = (torch.empty(batch, 192, 256),) if config.decoder.prompt else ()
            found = model.forward_auxiliary(x) if how.backward and config.head.auxiliary else model(x, *prompt)
        if how.backward:
            torch.autograd.backward([output.float().sum() for output in pytree.tree_leaves(found)])
            return
        for task, maps in (found if isinstance(found, dict) else {config.head.task: found}).items():
            if task == "segmentation":
                picture = (size[0] + 37, size[1] + 51)
                averaged = maps[0].float().contiguous()  # over scales or windows
                head = model.head if task == config.head.task else model.further[task].head
                for logits, probability in itertools.product((maps[0], averaged), (False, True)):
                    decided_labels(head, logits, picture, config.input, probability)


def inputs(config: DPTConfig, batches: tuple[int, ...]) -> list[tuple[int, tuple[int, int]]]:
    """(batch, size) that stand for all: a square; one whose tokens' last block of 64 is more than a class token; few and odd patches, of
    which the halved maps are not half as large; and as few as there can be, with the narrow last block of an attention that is short of
    queries and the smallest maps of every convolution. Of an encoder that takes one size, that."""
    if config.encoder.fixed_size:
        return [(batch, config.encoder.fixed_size) for batch in batches]
    patch = config.encoder.patch_size
    side = max(config.input.multiple, min(config.input.size) // patch * patch)
    square, wide = (side, side), (side, side + patch * (3 if side % 64 else 6))
    few, fewest = (5 * patch, 7 * patch), (2 * patch, 3 * patch)
    return [*itertools.product(batches, (square, wide)), (batches[0], few), (batches[0], fewest)]


def calls(config: DPTConfig, runs: Iterable[Run], on: Iterable[tuple[int, tuple[int, int]]]) -> dict[Call, str]:
    """The different calls that a model makes on inputs of (batch, size), each with the first run that made it."""
    found: dict[Call, str] = {}
    for how, (batch, size) in itertools.product(runs, on):
        model = model_of(config, how)

        def called(name: str, arguments: tuple[Any, ...], how: Run = how, where: str = f"B={batch} {size[0]}x{size[1]}") -> None:
            found.setdefault(Call.of(name, arguments), f"{config.name} {how} {where}")

        with launch.stand_ins(), Hollow(called, launches=False):
            run(model, how, size, batch)
    return found


# Fields that decide nothing about launches: numbers that they are given, and what PyTorch computes, before, between and behind them.
NO_LAUNCH = {
    "encoder": (
        *("norm_eps", "final_norm_eps", "pos_grid", "pos_mode", "pos_offset", "pos_by_count", "pos_antialias", "rope_theta"),
        *("stem_eps_on", "stem_depths"),
    ),
    "decoder": ("dead_unit",),
    "head": (
        *("classes", "palette", "max_depth", "inverse", "dropout", "offset", "reciprocal", "bounds", "depth_scale", "relative", "focal"),
        *("bin_range", "bin_spacing", "bin_floor", "bin_centres", "temperature"),
    ),
    "input": ("mean", "std", "rule", "pad", "mode", "antialias", "grey_levels", "align_corners", "border", "flip"),
}
LABELS = ("output_mode", "output_align_corners")  # of the input's fields, those that decide how labels are


def launching(configs: Iterable[DPTConfig]) -> list[DPTConfig]:
    """The models of which no earlier one launches the same: most of a family differ in weights and preparation alone."""
    found: dict[str, DPTConfig] = {}
    for config in configs:
        sections = {name: asdict(getattr(shortened(config), name)) for name in NO_LAUNCH}
        for name, fields in NO_LAUNCH.items():
            for field in fields:
                del sections[name][field]
        if config.head.task != "segmentation":
            for field in LABELS:
                del sections["input"][field]
        found.setdefault(json.dumps([sections, len(config.head.classes)], sort_keys=True), config)
    return list(found.values())


@functools.cache
def named_calls() -> dict[Call, str]:
    """Those of all named models, which take minutes: processes that want them at once share them in the file that ``CALLS_VARIABLE`` names,
    which must not be there before."""
    if CALLS_VARIABLE not in os.environ:
        return _named_calls()
    with open(os.environ[CALLS_VARIABLE], "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if kept := file.read():
            return pickle.loads(kept)
        found = _named_calls()
        file.write(pickle.dumps(found))
        return found


def _named_calls() -> dict[Call, str]:
    found: dict[Call, str] = {}
    for config in launching(CONFIGS.values()):
        for backward, batches in ((False, (1, 16)), (True, (2,))):
            runs = [how for how in RUNS if how.backward == backward]
            made = calls(shortened(config), runs, inputs(config, batches))
            found = {**made, **found}
    return found


@functools.cache
def _shows(family: str) -> dict[tuple[Any, ...], tuple[bool | str, bool]]:
    """What each kernel has to show, by what decides it: as the ops' own cases have it."""
    found: dict[tuple[Any, ...], tuple[bool | str, bool]] = {}
    for op in spaces.ops():
        for case in spaces.space(op).compile_cases(family):
            cores, copies = found.get(_kind(case), (False, False))
            found[_kind(case)] = (cores or case.tensor_cores, copies or case.async_copies)
    return found


def _kind(case: launch.CompileCase) -> tuple[Any, ...]:
    arguments = (getattr(part, "base", part) for part in pytree.tree_leaves(case.args))
    dtype = next(part.dtype for part in arguments if isinstance(part, torch.Tensor))
    return case.function, "half" if dtype in HALVES else _name(dtype), case.kwargs.get("PRECISION")


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """The launches of all named models."""
    cases = (case for call, name in named_calls().items() for case in launch.record(family, name, call.again))
    for case in launch.distinct(cases):
        cores, copies = _shows(family).get(_kind(case), (False, False))
        yield replace(case, tensor_cores=cores, async_copies=copies)

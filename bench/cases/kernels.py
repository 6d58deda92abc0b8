"""The ops one by one, at the shapes the models use, against what PyTorch can do on the same tensors; an op a file in ops/.

FLOPs are those of the plain algorithm, counted on its graph; bytes are what has to move at least: inputs and outputs once, and in a
backward pass the inputs again, the cotangent and the gradients. An op that saves work beyond fusing can therefore be below the floor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dpt.kernels import launch
from dpt.kernels.tools import parity

from ..harness import measure, records
from ..harness.runner import Case, Context, Prepared, Unavailable
from . import models
from .ops import Op, ops

CALLS_IN_A_GRAPH = 10
FORWARD, BOTH = "forward", "forward+backward"
CHANNELS_LAST = "eager, channels_last"
NOT_COMPILED_HERE = "on a CPU there are no kernels to compare: compiled PyTorch is measured on whole models only"


@dataclass
class OpenedOp:
    """One op at one shape, with sets of tensors that are rotated. Maps are channels-last for the contenders that say so, and for ours."""

    op: Op
    shape: Any
    direction: str
    dtype: torch.dtype
    context: Context
    replays: int = 0
    unit: str = "calls"
    per_run: float = 1.0
    flops: int | None = field(init=False, default=None)
    bytes: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.context.toy:
            self.shape = self.op.toy
        self.arguments = self.op.arguments(self.shape)
        generator = torch.Generator().manual_seed(1)
        device = self.context.device
        self.sets = [[a.make(generator, device, self.dtype) for a in self.arguments] for _ in range(models.INPUTS)]
        self.rms = self.direction == BOTH
        self.flops, self.bytes = count(self.op, self.shape, self.direction, self.dtype)
        self.cotangents: dict[torch.dtype, Tensor] = {}

    def _leaves(self, tensors: Sequence[Tensor], channels_last: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The tensors to be handed to a contender, which need gradients if it is to give them."""
        found = []
        for argument, tensor in zip(self.arguments, tensors, strict=True):
            layout = torch.channels_last if argument.map and channels_last else torch.preserve_format
            tensor = tensor.detach().to(dtype or self.dtype, memory_format=layout)
            found.append(tensor.requires_grad_(argument.gradient and self.direction == BOTH))
        return found

    def _both_passes(self, function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        """[output], or [output, gradients]."""
        if self.direction == FORWARD:
            with torch.no_grad():
                return [function(self.shape, *leaves)]
        out = function(self.shape, *leaves)
        if out.dtype not in self.cotangents:
            generator = torch.Generator().manual_seed(2)
            self.cotangents[out.dtype] = torch.randn(out.shape, generator=generator).to(out)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, self.cotangents[out.dtype])]

    def once(self, function: Callable[..., Tensor]) -> None:
        """Call a contender's function on the first set of tensors: what it raises tells whether it can run."""
        self._both_passes(function, self._leaves(self.sets[0], False))

    def _judged(self, results: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        if self.op.judged is None:
            return results
        inputs = self._leaves(self.sets[0], False, dtype or parity.exact_dtype(self.dtype))
        return [self.op.judged(self.shape, results[0], *inputs)]

    def exact(self) -> list[Tensor]:
        wide = parity.exact_dtype(self.dtype)
        with measure.full_precision():
            return self._judged(self._both_passes(self.op.plain, self._leaves(self.sets[0], False, wide)))

    def other_plain(self) -> list[Tensor] | None:
        """Of maps, in channels-last memory."""
        if not self.op.has_maps:
            return None
        return self._judged(self._both_passes(self.op.plain, self._leaves(self.sets[0], True)))

    def prepare(self, contender: str) -> Prepared:
        function, channels_last, note = self._contender(contender)
        sets = [self._leaves(tensors, channels_last) for tensors in self.sets]
        if self.replays:
            run = self._captured(function, sets)
        else:

            def run(index: int) -> list[Tensor]:
                return self._both_passes(function, sets[index % len(sets)])

        compiled = contender == "torch.compile"
        held = sum(tensor.nbytes for tensor in sets[0])
        return Prepared(
            run,
            outputs=lambda: self._judged(run(0)),
            recorded=lambda: self._both_passes(function, sets[0]),
            held=lambda: held,
            warm_up=int(compiled),
            note=note,
        )

    def _contender(self, name: str) -> tuple[Callable[..., Tensor], bool, str]:
        """Its function, whether its maps are channels-last, and what to say of it."""
        if name == "eager" or name == CHANNELS_LAST:
            return self.op.plain, name == CHANNELS_LAST, ""
        if name == records.FUSED:
            runs = launch.runs_kernels(self.sets[0][0], self.op.module)
            return self.op.call, True, "" if runs else f"{records.ALGEBRA}, no kernel on this device"
        if name == "torch.compile":
            return self._compiled()
        return self.op.peers[name](self), False, ""

    def _compiled(self) -> tuple[Callable[..., Tensor], bool, str]:
        if self.context.toy:
            return torch.compile(self.op.plain, backend="eager", dynamic=False), True, "traced only"
        if self.context.device.type == "cpu":
            raise Unavailable(NOT_COMPILED_HERE)
        # Graphs are captured here, for all contenders alike.
        return torch.compile(self.op.plain, mode="max-autotune-no-cudagraphs", dynamic=False), True, "max-autotune"

    def _captured(self, function: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]]) -> measure.Run:
        """Several calls in one CUDA graph, over the sets of inputs in turn; what it returns is of the first set, which comes last."""
        if self.context.device.type != "cuda":
            raise Unavailable(models.NO_GRAPHS)
        models.on_side_stream(lambda: [self._both_passes(function, tensors) for tensors in sets], self.context.device)
        graph, made = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for call in reversed(range(self.replays)):
                made[:] = self._both_passes(function, sets[call % len(sets)])

        def run(index: int) -> list[Tensor]:
            graph.replay()
            return made

        return run


@functools.cache
def count(op: Op, shape: Any, direction: str, dtype: torch.dtype) -> tuple[int, int]:
    """FLOPs of the plain algorithm and the bytes that have to move, counted on the meta device."""
    arguments = op.arguments(shape)
    leaves = [torch.empty(a.shape, dtype=dtype, device="meta", requires_grad=a.gradient and direction == BOTH) for a in arguments]
    with FlopCounterMode(display=False) as counter:
        out = op.plain(shape, *leaves)
        if direction == BOTH:
            out.backward(torch.empty_like(out))
    inputs = sum(leaf.nbytes for leaf in leaves)
    moved = inputs + out.nbytes
    if direction == BOTH:
        moved += inputs + out.nbytes + sum(leaf.nbytes for leaf in leaves if leaf.requires_grad)
    return counter.get_total_flops(), moved


def contenders(op: Op) -> tuple[str, ...]:
    """In order of importance; the first is the baseline."""
    return ("eager", records.FUSED, *((CHANNELS_LAST,) if op.has_maps else ()), *op.peers, "torch.compile")


def cases(device_type: str, dtypes: Iterable[torch.dtype], importance: float) -> Iterator[Case]:
    """Every op, shape, direction and dtype; on a GPU each timed by events and by graph replay."""
    for op in ops():
        for place, shape in enumerate(op.shapes):
            for direction in (FORWARD, BOTH) if op.backward else (FORWARD,):
                for dtype in dtypes:
                    for replays in (0, CALLS_IN_A_GRAPH) if device_type == "cuda" else (0,):
                        yield _case(op, shape, direction, dtype, replays, importance + place)


def _case(op: Op, shape: Any, direction: str, dtype: torch.dtype, replays: int, importance: float) -> Case:
    how = ", graph replay" if replays else ""
    return Case(
        suite="kernels",
        name=f"{op.name} {direction}, {shape}, {str(dtype).removeprefix('torch.')}{how}",
        dtype=dtype,
        shape=op.arguments(shape)[0].shape,
        contenders=contenders(op),
        open=lambda context: OpenedOp(op, shape, direction, dtype, context, replays),
        importance=importance + (0.5 if direction == BOTH else 0.0),
        estimate=lambda: count(op, shape, direction, dtype)[0],
        replays=replays,
        key=f"{op.name} {direction} {dtype} {replays}",
        facts={"op": op.module, "direction": direction},
    )

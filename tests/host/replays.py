"""Whether a plan launches what its op launches: the calls of Triton's launcher of both, argument for argument, on the stub."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from bench.cases.ops import Op, ops
from bench.harness.stub import Seen, Watch
from dpt.kernels import launch
from dpt.kernels.launch.written import ALLOCATES


class Allocations(TorchDispatchMode):
    """Tells the watch of memory that is allocated without a plan."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dpt":
            with self:
                return launch.implementation(func._schema.name)(*args, **kwargs or {})
        result = func(*args, **kwargs or {})
        if func.overloadpacket in ALLOCATES:
            self.watch.note(None, result)
        return result


def tensors_of(op: Op, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [(argument, argument.make(generator, torch.device("cpu"), dtype)) for argument in op.arguments(op.toy)]
    return [tensor.to(memory_format=torch.channels_last) if argument.map else tensor for argument, tensor in made]


def differences(seen: Seen) -> Iterator[str]:
    """Ops and dtypes whose plan launches otherwise than the op, for tensors that it was not made of, on another stream."""
    for op, dtype in itertools.product(ops(), launch.DTYPES):
        if "statistics" in op.name:  # of training
            continue
        with Watch(seen) as watch, torch.no_grad():
            for seed in range(3):
                tensors, driver.active.stream = tensors_of(op, seed, dtype), seed
                with launch.without_plans(), Allocations(watch):
                    wanted = watch.of(lambda: op.call(op.toy, *tensors), tensors)  # noqa: B023
                found = watch.of(lambda: op.call(op.toy, *tensors), tensors)  # noqa: B023
                if seed and (not wanted or found != wanted):
                    yield f"{op.name} {dtype}: {found} instead of {wanted}"

"""Whether a plan launches what its op launches: the calls of Triton's launcher of both, argument for argument, on the stub."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from bench.cases.ops import Op, ops
from dpt.kernels import launch
from dpt.kernels.launch.written import ALLOCATES


EMPTY = torch.empty_strided


class Watch:
    """What the present driver's launcher is told from its making on, addresses as places: in an argument, or in memory of so many bytes."""

    def __init__(self) -> None:
        utils = driver.active.utils
        self.launch, self.encode, self.empty = utils.launch, utils.fill_tma_descriptor_tiled, EMPTY
        self.maps: dict[int, tuple[Any, Any]] = {}  # by identity, which they keep
        self.calls: list[tuple[Any, ...]] = []
        self.memory: list[tuple[Any, int, int]] = []  # (name, address, bytes)
        utils.launch, utils.fill_tma_descriptor_tiled, torch.empty_strided = self._launched, self._encoded, self._allocated

    def _encoded(self, *args: Any) -> Any:
        made = self.encode(*args)
        self.maps[id(made)] = made, args
        return made

    def _allocated(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = self.empty(*args, **kwargs)
        self.note(None, tensor)
        return tensor

    def note(self, name: Any, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.memory.insert(0, (name, storage.data_ptr(), storage.nbytes()))

    def _place(self, address: int) -> tuple[Any, ...]:
        for name, begin, size in self.memory:
            if begin <= address < begin + max(size, 1):
                return name, size, address - begin
        return ("PyTorch's",) if address else ("none",)

    def _told(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._place(value.data_ptr())
        if id(value) in self.maps:
            address, *rest = self.maps[id(value)][1]
            return self._place(address), *map(repr, rest)
        return self._place(value) if isinstance(value, int) and value > 1 << 32 else repr(value)

    def _launched(self, *args: Any) -> Any:
        *grid, stream, function, cooperative, dependent, packed, _, _, _, _, _, _, signature, given = args
        self.calls.append((*grid, stream, function, cooperative, dependent, packed, bytes(signature), *map(self._told, pytree.tree_leaves(list(given)))))
        return self.launch(*args)

    def of(self, call: Callable[[], Any], tensors: list[torch.Tensor]) -> list[tuple[Any, ...]]:
        """What is launched by a call that is given these tensors."""
        self.calls, self.memory = [], []
        for place, tensor in enumerate(tensors):
            self.note(place, tensor)
        call()
        return self.calls


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


def differences(watch: Watch) -> Iterator[str]:
    """Ops and dtypes whose plan launches otherwise than the op; what was launched once is compared again for other tensors."""
    for op, dtype in itertools.product(ops(), launch.DTYPES):
        if "statistics" in op.name:  # of training
            continue
        for seed in range(3):
            tensors = tensors_of(op, seed, dtype)
            with torch.no_grad(), launch.without_plans(), Allocations(watch):
                wanted = watch.of(lambda: op.call(op.toy, *tensors), tensors)  # noqa: B023
            with torch.no_grad():
                found = watch.of(lambda: op.call(op.toy, *tensors), tensors)  # noqa: B023
            if not wanted:
                yield f"{op.name} {dtype}: nothing was launched"
            if seed and found != wanted:
                yield f"{op.name} {dtype}: {found} instead of {wanted}"

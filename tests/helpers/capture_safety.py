"""What a CUDA graph cannot record, refused without a GPU: modes in which a forward raises at it.

`CaptureSafe` is for models on the meta device, which stands for a GPU: memory of the host shows as another device's. `HollowCaptureSafe`
computes nothing on a CPU, and so runs the launchers of `dpt.kernels` too, whose launches are recorded.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness.hollow import Hollow

# Operators that PyTorch's own tags do not tell, and why they cannot be recorded.
REFUSED = {
    "item": "the host waits for a number",
    "_local_scalar_dense": "the host waits for a number",
    "is_nonzero": "the host waits for a number",
    "equal": "the host waits for a number",
    "allclose": "the host waits for a number",
    "lift_fresh": "numbers of the host are copied to the device",
    "_pin_memory": "memory of the host beyond the graph's",
    "pin_memory": "memory of the host beyond the graph's",
    "record_stream": "memory whose reuse is asked of events",
}
WAITS = ("cuda.synchronize", "accelerator.synchronize", "cuda.Stream.synchronize", "cuda.Event.synchronize", "cuda.Event.query")


class Unsafe(AssertionError):
    """What cannot be recorded."""


def refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `Unsafe` if a CUDA graph cannot hold a call of an operator."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if name in REFUSED:
        raise Unsafe(f"{name}: {REFUSED[name]}")
    if name.startswith(("index", "_index")) and "Tensor" in str(func._schema):  # tagged for the sake of masks
        if any(index.dtype in (torch.bool, torch.uint8) for index in tensors[1:] if "put" not in name or index is not tensors[-1]):
            raise Unsafe(f"{name}: the shape depends on the numbers of a mask")
    elif torch.Tag.dynamic_output_shape in func.tags:
        raise Unsafe(f"{name}: the shape depends on numbers")
    if torch.Tag.data_dependent_output in func.tags:
        raise Unsafe(f"{name}: the host waits for a number")
    if kwargs.get("pin_memory"):
        raise Unsafe(f"{name}: memory of the host beyond the graph's")
    devices = {tensor.device for tensor in tensors if tensor.dim()}  # a number of the host is an argument of the launch
    asked = kwargs.get("device")
    if asked is not None and tensors:
        devices.add(torch.device(asked))
    if len(devices) > 1:
        raise Unsafe(f"{name}: from one device to another, {' and '.join(sorted(map(str, devices)))}")


class CaptureSafe(TorchDispatchMode):
    """Raises `Unsafe`. Keeps, weakly, the memory that was made."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.made = torch.device(device), []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        refuse(func, args, kwargs or {})
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in (leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)):
            if tensor.device != self.device and tensor.dim():
                raise Unsafe(f"{func._schema.name}: makes memory on {tensor.device}")
            if tensor.untyped_storage()._cdata not in given:
                self.made.append((func._schema.name, StorageWeakRef(tensor.untyped_storage())))
        return found

    def kept(self) -> list[str]:
        """The operators whose results still live."""
        if any(not reference.expired() for _, reference in self.made):
            gc.collect()  # what only a cycle holds is not kept; a collection takes longer than a small model's forward
        return [name for name, reference in self.made if not reference.expired()]


class HollowCaptureSafe(Hollow):
    """`Hollow` that raises `Unsafe`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        refuse(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """PyTorch's ways to wait for a device raise `Unsafe`."""
    with contextlib.ExitStack() as stack:
        for name in WAITS:
            stack.enter_context(mock.patch(f"torch.{name}", mock.Mock(side_effect=Unsafe(f"torch.{name}: the host waits"))))
        yield

"""PyTorch's own calls between our launches, as the time model takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .time_model import Library

# What a product's factors are among the arguments.
GEMMS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "linear": (0, 1)}
NOTHING = ("empty", "new_empty", "resize_", "set_", "_unsafe_view", "_reshape_alias", "lift_fresh")  # what computes nothing


def calls_of(name: str, arguments: tuple[Any, ...], result: Any) -> Iterator[Library]:
    """A call of aten's ``name``; nothing, where it computes nothing."""
    tensors = [value for value in pytree.tree_leaves(arguments) if isinstance(value, torch.Tensor)]
    out = next((value for value in pytree.tree_leaves(result) if isinstance(value, torch.Tensor)), None)
    if out is None or out.numel() == 0:
        return
    moved = sum(value.nbytes for value in [*tensors, *([] if name.endswith("_") else [out])])
    label = f"aten {name} {'x'.join(map(str, out.shape))}"
    if name in GEMMS:
        depth = arguments[GEMMS[name][0]].shape[-1]
        yield Library(label, "gemm", moved, 2 * out.numel() * depth, out.shape[-1], depth)
    elif name == "convolution":
        weight = arguments[1]
        depth = math.prod(weight.shape[1:])
        yield Library(label, "convolution", moved, 2 * out.numel() * depth, weight.shape[0], depth)
    else:
        yield Library(label, "other", moved)


def as_cudnn(name: str, arguments: tuple[Any, ...], result: Any) -> Any:
    """A convolution's result as a GPU gives it, where no GPU is: channels-last if its input or weight is."""
    if name != "convolution" or result.is_contiguous(memory_format=torch.channels_last):
        return result
    if not any(each.is_contiguous(memory_format=torch.channels_last) for each in arguments[:2]):
        return result
    return torch.empty(result.shape, dtype=result.dtype, device=result.device, memory_format=torch.channels_last)


class Recorded(TorchDispatchMode):
    """In this mode the calls that compute are kept in ``calls``; for tensors on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Library] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(NOTHING):
            self.calls += calls_of(name, args, result)
        return as_cudnn(name, args, result)

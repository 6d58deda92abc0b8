"""PyTorch's own arithmetic as calls that compute nothing: what is left of a forward pass on a CPU is the host's work.

On a GPU such a call queues a kernel. Here it calls a function of Python that gives memory of the right form: about 5 microseconds, which
stand for what nobody has measured on a GPU's host yet.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

CALLED: Counter[str] = Counter()  # since it was cleared


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any, padding: Any, *rest: Any) -> torch.Tensor:
    sides = [(x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    return torch.empty((x.shape[0], weight.shape[0], *sides), dtype=x.dtype, memory_format=torch.channels_last)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty((x.shape[0], weight.shape[1]), dtype=x.dtype)


def _joined(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    sides = list(tensors[0].shape)
    sides[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(sides, dtype=tensors[0].dtype)


# Of aten, by name: those of a fast model in inference. What is not here computes.
SILENT: dict[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "linear": _linear,
    "addmm": lambda bias, x, weight, *, beta=1, alpha=1: _product(x, weight),
    "addmm.out": lambda bias, x, weight, *, beta=1, alpha=1, out: out,
    "mm": _product,
    "mm.out": lambda x, weight, *, out: out,
    "cat": _joined,
    "copy_": lambda target, source, non_blocking=False: target,
    "add.Tensor": lambda a, b, *, alpha=1: torch.empty_like(a),
    "equal": lambda a, b: True,
}


def silence() -> torch.library.Library:
    """Put them in force on CPU tensors, in the whole process, until it ends or the library that is returned is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was an implementation
        for name, stand_in in SILENT.items():
            library.impl(name, _counted(name, stand_in), "CPU")
    return library


def _counted(name: str, stand_in: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLED[name] += 1
        return stand_in(*args, **kwargs)

    return call

"""The launch itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from . import plans, recording
from .written import run


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """``kernel[grid](*args, **kwargs)`` on the device of the first tensor among ``args``; every launch of every op goes through here.

    ``kwargs``: constexprs, ``num_warps``, ``num_stages``. An empty grid launches nothing.
    """
    recorder = recording.in_force()
    if recorder is not None:
        given = tuple(recording.stand_in(arg) for arg in args)
        recorder.launches.append((kernel, grid, recording.bytes_of(args), given, kwargs))
        return
    if 0 in grid:
        return
    with _device_of(args):
        plans.launched(kernel, grid, args, kwargs, run(kernel, grid, *args, **kwargs))


def _device_of(args: Iterable[Any]) -> contextlib.AbstractContextManager:
    for arg in args:
        tensor = arg.base if isinstance(arg, TensorDescriptor) else arg
        if isinstance(tensor, torch.Tensor):
            return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    return contextlib.nullcontext()

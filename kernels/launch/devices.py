"""Which tensors run kernels, and the family of the device that a launch is meant for."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
import triton

from . import recording
from .families import MULTIPROCESSORS, TABLES, family_of_capability

# Triton decides when a kernel is decorated whether it is interpreted, so this is fixed from the import on.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# The family whose table and code path CPU tensors take in the interpreter.
INTERPRETED_FAMILY_VARIABLE = "DPT_KERNELS_FAMILY"


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether there are kernels for the device of ``tensor``.

    True for tensors on an NVIDIA GPU of compute capability 8.0 or newer, for CPU tensors in Triton's interpreter, and for all while
    tensors stand in for a GPU's (:func:`stand_ins`).
    """
    if _standing_in:
        return True
    if tensor.is_cuda:
        return torch.version.hip is None and torch.cuda.get_device_properties(tensor.device).major >= 8
    return tensor.device.type == "cpu" and INTERPRETED


def may_have_kernels(tensor: torch.Tensor) -> bool:
    """:func:`has_kernels` without a look at the GPU: False where it is False for sure."""
    return tensor.is_cuda or _standing_in or INTERPRETED


_standing_in = False


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Take CPU tensors for a GPU's, in the whole process: where nothing is launched, or by a driver that only looks at the launch."""
    global _standing_in
    before, _standing_in = _standing_in, True
    try:
        yield
    finally:
        _standing_in = before


_only: frozenset[str] | None = None


def runs_kernels(tensor: torch.Tensor, op: str) -> bool:
    """Whether ``op``, a module of this folder, runs its kernels on ``tensor``, rather than the same algebra in PyTorch."""
    return has_kernels(tensor) and (_only is None or op in _only)


def restriction() -> frozenset[str] | None:
    """The ops that :func:`only` has left to the kernels; None for all."""
    return _only


@contextlib.contextmanager
def only(*ops: str) -> Iterator[None]:
    """Leave all ops but these to PyTorch, in the whole process: to measure what each of them gains."""
    global _only
    before, _only = _only, frozenset(ops)
    try:
        yield
    finally:
        _only = before


def named_family() -> str | None:
    """In the interpreter, the family that the environment names."""
    return os.environ.get(INTERPRETED_FAMILY_VARIABLE) if INTERPRETED else None


@functools.cache
def _family_of_gpu(index: int) -> str:
    return family_of_capability(torch.cuda.get_device_capability(index))


def device_family(device: torch.device) -> str:
    """The family of the device that a launch is meant for.

    While launches are recorded, the family they are recorded for. In the interpreter (CPU tensors) the one named by the environment
    variable ``DPT_KERNELS_FAMILY``, or sm_80: the path without descriptors.
    """
    recorder = recording.in_force()
    if recorder is not None:
        return recorder.family
    if device.type == "cuda":
        return _family_of_gpu(torch.cuda.current_device() if device.index is None else device.index)
    family = os.environ.get(INTERPRETED_FAMILY_VARIABLE, "sm_80")
    if family not in TABLES:
        raise ValueError(f"{INTERPRETED_FAMILY_VARIABLE}={family}: must be one of {', '.join(TABLES)}")
    return family


@functools.cache
def _multiprocessors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many the device has that a launch is meant for; where it is not there, the card's that stands for its family."""
    if recording.in_force() is None and device.type == "cuda":
        return _multiprocessors_of_gpu(torch.cuda.current_device() if device.index is None else device.index)
    return MULTIPROCESSORS[device_family(device)]

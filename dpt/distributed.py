"""What the processes of one run do together: a group of them under torchrun, a device each, and values that all of them get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from .system.processes import Place, place

Value = TypeVar("Value")

WAIT = timedelta(hours=2)  # for the slowest process, which may be reading or writing for all the others


def device_of_process(device: torch.device, own: Place) -> torch.device:
    """The device that a process takes where several were started: of a kind with numbers, and none given, that of its local rank."""
    if own.world == 1 or device.type == "cpu" or device.index is not None:
        return device
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if own.local >= count:
        raise ValueError(f"LOCAL_RANK={own.local}: this machine has {count} devices of {device.type}; start at most as many processes")
    return torch.device(device.type, own.local)


@contextmanager
def joined(device: torch.device) -> Iterator[Place]:
    """This process's place, in a group with the others if there are any: gloo's for what lies in memory, NCCL's beside it for CUDA."""
    own = place()
    if own.world == 1 or distributed.is_initialized():
        yield own
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        yield own
    finally:
        distributed.destroy_process_group()


def gathered(value: Value) -> list[Value]:
    """What each process gives, any object that can be pickled, in the order of their ranks; alone, a list of one."""
    if not distributed.is_available() or not distributed.is_initialized():
        return [value]
    found: list[Value] = [value] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found

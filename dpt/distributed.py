"""What the processes of one run do together: a group of them under torchrun, a device each, and values that all of them get."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .system.processes import Place, place

Value = TypeVar("Value")

WAIT = timedelta(hours=2)  # for the slowest process, which may be reading or writing for all the others
ENDED = "another process of this run has ended"


def device_of_process(device: torch.device, own: Place) -> torch.device:
    """The device that a process takes where several were started: of a kind with numbers, and none given, that of its local rank."""
    if own.world == 1 or device.type == "cpu" or device.index is not None:
        return device
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if own.local >= count:
        raise ValueError(f"LOCAL_RANK={own.local}: this machine has {count} devices of {device.type}; start at most as many processes")
    return torch.device(device.type, own.local)


@contextmanager
def joined(device: torch.device, wait: timedelta = WAIT) -> Iterator[Place]:
    """This process's place, in a group with the others if there are any: gloo's for what lies in memory, NCCL's beside it for CUDA.

    `wait`: for so long the processes wait for each other at most, each time.
    """
    own = place()
    if own.world == 1 or distributed.is_initialized():
        yield own
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(rendezvous("env://", timeout=wait))
    # torchrun --max-restarts keeps the store, with the addresses of the processes that died: each attempt has keys of its own.
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    try:
        yield own
    finally:
        distributed.destroy_process_group()


def gathered(value: Value) -> list[Value]:
    """What each process gives, any object that can be pickled, in the order of their ranks; alone, a list of one.

    ConnectionError where another process has ended.
    """
    if not _several():
        return [value]
    found: list[Value] = [value] * distributed.get_world_size()
    with _others():
        distributed.all_gather_object(found, value)
    return found


def of_first(make: Callable[[], Value]) -> Value:
    """In all processes what `make` gives in the first, which alone calls it: any object that can be pickled. Errors as `gathered`."""
    if not _several():
        return make()
    told = [make() if distributed.get_rank() == 0 else None]
    with _others():
        distributed.broadcast_object_list(told, src=0)
    return cast(Value, told[0])


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's own, whatever it was waiting for
        raise ConnectionError(ENDED) from error

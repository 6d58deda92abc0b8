"""Tensors to a device and back without the host waiting: through page-locked memory, which a GPU reads and writes while the host goes on.

Page-locked blocks are PyTorch's to keep and to give out again; it gives none out before the copies are done that it is part of. On other
devices, and on a CPU, this is `.to` and `.cpu`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

STAGED = {"cuda"}  # types of devices that copy while the host goes on
Key = TypeVar("Key")


def is_staged(device: torch.device | str) -> bool:
    """Whether work is queued on a device, and copied to and from it, while the host goes on."""
    return torch.device(device).type in STAGED


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device."""
    if not is_staged(device):
        return tensor.to(device)
    return _page_locked(tensor.shape, tensor.dtype).copy_(tensor).to(device, non_blocking=True)


def _page_locked(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


@functools.lru_cache(maxsize=64)
def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers as a tensor, made once a device: a copy from the host each time would wait for all that the device has to do.

    It may be used on every stream, for the one copy is waited for, and in training, though it may be made in inference mode.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).to(device)


class Fetched(Generic[Key]):
    """Tensors of one device on their way to the host, under one key each: in one copy, which nobody waits for but `arrays`."""

    def __init__(self, tensors: Mapping[Key, Tensor]):
        self._event: torch.cuda.Event | None = None
        if not tensors or not is_staged(device := next(iter(tensors.values())).device):
            self._tensors = dict(tensors)
            return
        ordered = sorted(tensors, key=lambda key: -tensors[key].element_size())  # each then begins at a multiple of its elements' size
        self._forms = {key: (tuple(tensors[key].shape), tensors[key].dtype) for key in ordered}
        packed = torch.cat([tensors[key].contiguous().view(-1).view(torch.uint8) for key in ordered])
        self._host = _page_locked(packed.shape, torch.uint8).copy_(packed, non_blocking=True)
        self._event = torch.cuda.Event(blocking=True)  # whoever waits leaves the processor to those who decode
        self._event.record(torch.cuda.current_stream(device))

    def arrays(self) -> dict[Key, np.ndarray]:
        """Them all, as soon as they are there, in memory of their own: none keeps the others', or page-locked memory, from others."""
        if self._event is None:
            return {key: tensor.cpu().numpy() for key, tensor in self._tensors.items()}
        self._event.synchronize()
        found, start = {}, 0
        for key, (shape, dtype) in self._forms.items():
            size = dtype.itemsize * int(np.prod(shape))
            found[key] = self._host[start : start + size].view(dtype).view(shape).clone().numpy()
            start += size
        return found

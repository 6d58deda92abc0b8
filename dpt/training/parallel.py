"""A training step as a module, on one process or shared by several: DistributedDataParallel, or FSDP2's sharded parameters.

What is written to a file is whole whatever the way: `whole` puts shards together, `fitted` takes them out again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..model import DPT

Loss = Callable[[Tensor, Tensor], Tensor]


class Step(nn.Module):
    """Pictures and targets to their loss by a model, so that what shares the work out sees one call of one module."""

    def __init__(self, model: DPT, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.loss(images, targets)


class Shared:
    """A `Step` and how its gradients come together over the processes of the group, if there are several."""

    def __init__(self, step: Step, kind: str, device: torch.device):
        self.module: nn.Module = step
        self.sharded = False
        if not distributed.is_initialized():
            return
        if kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in step.model.blocks():  # most of the parameters
                fully_shard(block)
            self.module, self.sharded = cast(nn.Module, fully_shard(step)), True
        else:
            # A 1x1 convolution's strides in channels-last order can be told in two ways, which is all that differs.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            ids = [device] if device.type == "cuda" else None
            self.module = DistributedDataParallel(step, device_ids=ids, gradient_as_bucket_view=True)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        return cast(Tensor, self.module(images, targets))

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a part of a step: gradients are exchanged with the last alone."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
            return
        if self.sharded:
            cast(Any, self.module).set_requires_gradient_sync(last)
        yield


def with_synchronised_norms(model: DPT, device: torch.device) -> DPT:
    """Batch norms with the statistics of all processes, where PyTorch has that: on a GPU, and with several processes."""
    if device.type != "cuda" or not distributed.is_initialized():
        return model
    return cast(DPT, nn.SyncBatchNorm.convert_sync_batchnorm(model))


def whole(value: Any) -> Any:
    """Tensors in nested dictionaries and lists, shards put together; all processes must ask, and all get it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    return [whole(part) for part in value] if isinstance(value, list) else value


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as a shard like another, where that is one."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def norm_of(value: Tensor) -> float:
    """A gradient's norm as a number; of shards that of all."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def mean_over_processes(value: float) -> float:
    """The mean of what each process gives."""
    if not distributed.is_initialized():
        return value
    found = torch.tensor([value], dtype=torch.float64)
    distributed.all_reduce(found)
    return found.item() / distributed.get_world_size()

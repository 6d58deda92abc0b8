"""The forward of a training step with its shapes and dtypes and without its numbers: what depends on what, before anything is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .dpt import DPTNetwork


class TrainingForward(nn.Module):
    """What a training step asks of a model: a list of its outputs, the auxiliary head's behind the head's where it has one."""

    def __init__(self, model: DPTNetwork):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> list[Tensor]:
        found = self.model.forward_auxiliary(x) if self.model.config.head.auxiliary else self.model(x, prompt)
        return pytree.tree_leaves(found)


def without_numbers(model: DPTNetwork, made: Callable[[Tensor], Tensor]) -> DPTNetwork:
    """A copy whose parameters and buffers are what `made` gives for each: none of the model's memory is copied. Norms that processes share
    are common ones in it, for alone, or on a CPU, they do not run in training."""
    copies: dict[int, object] = {id(buffer): made(buffer) for buffer in model.buffers()}
    copies |= {id(parameter): nn.Parameter(made(parameter), parameter.requires_grad) for parameter in model.parameters()}
    copied = copy.deepcopy(model, copies)
    norms: list[Any] = [module for module in copied.modules() if type(module) is nn.SyncBatchNorm]
    for norm in norms:
        norm.__class__ = nn.BatchNorm2d
    return copied


def hollow_forward(model: DPTNetwork, batch: int, size: tuple[int, int]) -> tuple[dict[str, nn.Parameter], list[Tensor]]:
    """The parameters by name, and the outputs for `batch` pictures of `size` (height, width), of a model like this one, on fake tensors.

    These are a CPU's: PyTorch without CUDA indexes no others. Parameters want a gradient as the model's do. The model, in whatever mode it
    is and wherever, stays as it is, and so do the random numbers.
    """
    with FakeTensorMode(), torch.enable_grad(), torch.device("cpu"):
        fake = without_numbers(model, lambda value: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype))
        x = torch.empty(batch, 3, *size, dtype=next(model.parameters()).dtype).to(memory_format=torch.channels_last)
        prompt = torch.empty(batch, 192, 256) if model.config.decoder.prompt else None
        return dict(fake.named_parameters()), TrainingForward(fake)(x, prompt)


def unreached(model: DPTNetwork) -> list[str]:
    """Names of the parameters that want a gradient and get none in a training step, for no output depends on them; in their order.

    Units that never run, norms behind the last hooked block, what only decides (a router, a sky): no optimiser moves them, and
    DistributedDataParallel raises where they want a gradient.
    """
    encoder = model.config.encoder
    parameters, outputs = hollow_forward(model, 2, encoder.fixed_size or (4 * encoder.patch_size,) * 2)
    reached = _leaves([output.grad_fn for output in outputs if output.grad_fn is not None])
    return [name for name, value in parameters.items() if value.requires_grad and id(value) not in reached]


def _leaves(nodes: list[Any]) -> set[int]:
    """The ids of the tensors where a graph ends."""
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):  # where a gradient is kept
            found.add(id(node.variable))
        before = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= before
        nodes += before
    return found


def freeze_unreached(model: DPTNetwork) -> list[str]:
    """Let `unreached` parameters want no gradient, in place, and return their names. They stay in the state dict as they are."""
    names = unreached(model)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names

"""When an op may go its own way on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = (Tensor, torch.nn.Parameter)


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether all are on the CPU, in float32, and nobody wants more than the result: no gradient, trace, mode, autocast or compiler, which
    would see other ops than those it knows."""
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].device.type != "cpu" or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return False
    gradients = torch.is_grad_enabled()
    for tensor in given:
        of_here = type(tensor) in KINDS and tensor.device.type == "cpu" and tensor.dtype == torch.float32
        if not of_here or (gradients and tensor.requires_grad):
            return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() or torch._C._functorch.peek_interpreter_stack())

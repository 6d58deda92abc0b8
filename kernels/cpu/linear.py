"""A linear layer where there are no kernels. On a CPU the bias is added after the product, which is faster than PyTorch's way, a product
that is added to a map of biases; what follows goes on in the same memory, which is used again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import memory
from .plain import are_plain

LINE = 16  # numbers of a line of the cache


def activated(pre: Tensor, activation: str | None) -> Tensor:
    """An activation in plain PyTorch: "gelu", "gelu_tanh", "swiglu" (of two halves of the last dimension) or None."""
    if activation == "swiglu":
        gate, value = pre.chunk(2, dim=-1)
        return F.silu(gate) * value
    return pre if activation is None else F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    apart: bool = False,
) -> Tensor:
    """activation(x W^T + b), or residual + scale * (x W^T + b): (..., O).

    ``apart``: the result's rows may lie further apart in memory: by an odd number of lines of the cache, so that what reads it down a
    column finds it in all of the cache's sets, and not in a few.
    """
    if not are_plain(x, weight, bias, scale, residual) or x.numel() == 0:
        y = activated(F.linear(x, weight, bias), activation)
        y = y if scale is None else y * scale
        return y if residual is None else residual + y
    rows = x.reshape(-1, x.shape[-1])
    columns = weight.shape[0]
    between = LINE if apart and columns % (2 * LINE) == 0 else 0
    y = memory.empty((rows.shape[0], columns + between), x)[:, :columns]
    torch.mm(rows, weight.t(), out=y)
    if bias is not None:
        y.add_(bias)
    y = y.unflatten(0, x.shape[:-1]) if x.ndim != 2 else y
    if activation == "swiglu":
        gate, value = y.chunk(2, dim=-1)
        return F.silu(gate, inplace=True).mul_(value)
    if activation is not None:
        torch.ops.aten.gelu_(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual is None:
        return y if scale is None else y.mul_(scale)
    return y.add_(residual) if scale is None else torch.addcmul(residual, y, scale, out=y)

"""A linear layer, and so a 1x1 convolution, as the library's product, with its parameters taken as they are.

    y = x W^T + b        x (..., C), W (O, C) -> (..., O)

The library computes it (cuBLAS, on a GPU with the bias in its epilogue), here as an op: under autocast it converts the parameters inside,
and what it saves for the backward is x and the parameter, not a copy of the parameter in autocast's dtype. FLOPs: 2 * rows * C * O.

Padded, the result is the first O of a multiple of 16 columns (``maps``): the product takes the first rows of W and b twice, a copy of a few
numbers, and what they give is in nobody's view.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import launch
from .maps import padded_channels


def _apart(weight: torch.Tensor, padded: bool) -> int:
    return padded_channels(weight.shape[0]) if padded else weight.shape[0]


def _taken(parameter: torch.Tensor, like: torch.Tensor, rows: int) -> torch.Tensor:
    """A parameter in the product's dtype, and its first rows once more until there are so many."""
    parameter, missing = parameter.to(like.dtype), rows - parameter.shape[0]
    return torch.cat([parameter, parameter[:missing]]) if missing else parameter


@torch.library.custom_op("dpt::pointwise", mutates_args=())
def _op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padded: bool) -> torch.Tensor:
    rows = _apart(weight, padded)
    return F.linear(x, _taken(weight, x, rows), None if bias is None else _taken(bias, x, rows))[..., : weight.shape[0]]


@_op.register_fake
def _(x, weight, bias, padded):
    return x.new_empty((*x.shape[:-1], _apart(weight, padded)))[..., : weight.shape[0]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    rows = grad.reshape(-1, weight.shape[0])  # of padded memory: a view
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (rows @ weight.to(x.dtype)).view(x.shape)
    if ctx.needs_input_grad[1]:
        grad_weight = rows.T @ x.reshape(-1, x.shape[-1])
    if bias is not None and ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0, dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, None


_op.register_autograd(_differentiate, setup_context=_save)


@launch.planned
def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, padded: bool = False) -> torch.Tensor:
    """x W^T + b: (..., O), in x's dtype; ``padded`` with rows a multiple of 16 numbers apart, if O is 16 or more. Differentiable.

    x: (..., C), under autocast in autocast's dtype; weight: (O, C) and bias: (O,) or None, in x's dtype, or under autocast in any.
    Raises TypeError for a dtype, ValueError for a shape or device, naming it and the rule.
    """
    if not launch.has_kernels(x):
        return F.linear(x, weight, bias)
    (x,) = launch.autocast(x)
    launch.check_operand("weight", weight, (*weight.shape[:1], x.shape[-1]), x, weight=True)
    if bias is not None:
        launch.check_operand("bias", bias, weight.shape[:1], x, weight=True)
    return _op(x, weight, bias, padded)

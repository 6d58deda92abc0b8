"""Each channel times a factor of its own: LayerScale by itself.

    y[m, c] = x[m, c] * gamma[c]

x and y (..., C), gamma (C,). M*C FLOPs for M rows; 2*M*C elements moved. The gradient of x is the same launch on the output's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch


def channel_scale_ref(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """:func:`channel_scale` in plain PyTorch."""
    return x * gamma


@triton.jit(do_not_specialize=["rows"])
def channel_scale_kernel(
    x,  # (rows, columns)
    gamma,  # (columns,)
    out,  # (rows, columns)
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    factors = tl.load(gamma + column, mask=column < columns, other=0.0).to(tl.float32)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) * factors[None, :]
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


def _scale(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    columns = x.shape[-1]
    flat = x.reshape(-1, columns).contiguous()
    out = torch.empty_like(flat)
    config = launch.config("channel_scale", launch.device_family(x.device), x.dtype, rows=len(flat), columns=columns)
    grid = (triton.cdiv(len(flat), config["BLOCK_M"]), triton.cdiv(columns, config["BLOCK_C"]))
    launch.launch(channel_scale_kernel, grid, flat, gamma.contiguous(), out, len(flat), columns, **config)
    return out.reshape(x.shape)


@torch.library.custom_op("dpt::channel_scale", mutates_args=())
def _channel_scale(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    return _scale(x, gamma)


@_channel_scale.register_fake
def _(x, gamma):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, gamma = ctx.saved_tensors
    rows = (grad.float() * x.float()).reshape(-1, len(gamma))
    return _channel_scale(grad, gamma), rows.sum(0).to(gamma.dtype)


_channel_scale.register_autograd(_differentiate, setup_context=_save)


def channel_scale(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """``x`` (..., C) times ``gamma`` (C,), in x's dtype; float32, float16 or bfloat16. TypeError or ValueError for others."""
    launch.check_input("x", x)
    launch.check_operand("gamma", gamma, x.shape[-1:], x, vector=True)
    return _channel_scale(x, gamma) if launch.runs_kernels(x, "channel_scale") else channel_scale_ref(x, gamma)

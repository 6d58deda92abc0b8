"""Every op by itself on a picture of so many patches, as a function of dtype and size: what an op compiles for other sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dpt.kernels.argmax_upsample import upsample_argmax
from dpt.kernels.attention import attention, attention_qkv
from dpt.kernels.conv_norm_relu import conv_norm_relu
from dpt.kernels.depth_head import depth_head
from dpt.kernels.layernorm_mlp import layernorm_linear, layernorm_mlp, linear_residual
from dpt.kernels.reassemble import readout_project, transposed_conv
from dpt.kernels.residual_conv import residual_conv_unit
from dpt.kernels.upsample import upsample_bilinear

D, C = 64, 48  # channels of tokens and of maps


def _numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).requires_grad_()


def _map(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last).requires_grad_()


def _tokens(dtype: torch.dtype, high: int, wide: int, width: int = D) -> torch.Tensor:
    return _numbers(dtype, 1, 1 + high * wide, width)


def _norm(dtype: torch.dtype) -> tuple:
    return tuple(_numbers(dtype, C) for _ in range(2)) + tuple(torch.empty(C) for _ in range(2)) + (1e-5,)


def _attention(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    """With a bias and a rotation, q, k and v apart."""
    tokens = 1 + high * wide
    apart = (_numbers(dtype, 1, 2, tokens, D // 2).transpose(1, 2) for _ in range(3))
    return attention_qkv(*apart, bias=_numbers(dtype, 2, tokens, tokens), rotation=torch.empty(2, tokens, D // 4))


def _linear(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    vectors = _numbers(dtype, D), _numbers(dtype, D)
    return layernorm_linear(_tokens(dtype, high, wide), *vectors, _numbers(dtype, 3 * D, D), _numbers(dtype, 3 * D), 1e-6)


def _rotated(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    vectors, rotation = (_numbers(dtype, D), _numbers(dtype, D)), torch.empty(2, 1 + high * wide, D // 2)
    return layernorm_linear(_tokens(dtype, high, wide), *vectors, _numbers(dtype, 3 * D, D), None, 1e-6, rotation=rotation)


def _residual(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    x, scale = _tokens(dtype, high, wide), _numbers(dtype, D)
    return linear_residual(x, _numbers(dtype, D, D), _numbers(dtype, D), _tokens(dtype, high, wide), scale)


def _mlp(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    first, second = (_numbers(dtype, 4 * D, D), _numbers(dtype, 4 * D)), (_numbers(dtype, D, 4 * D), _numbers(dtype, D))
    return layernorm_mlp(_tokens(dtype, high, wide), _numbers(dtype, D), _numbers(dtype, D), *first, *second, 1e-6)


def _unit(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    weights, add = (_map(dtype, C, C, 3, 3) for _ in range(2)), _map(dtype, 1, C, high, wide)
    first, second = weights
    x = _map(dtype, 1, C, 2 * high, 2 * wide)
    return residual_conv_unit(x, first, None, second, None, norm1=_norm(dtype), norm2=_norm(dtype), add=add)


def _conv(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    return conv_norm_relu(_map(dtype, 1, C, 2 * high + 1, wide), _map(dtype, C, C, 3, 3), norm=_norm(dtype))


def _depth(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    parameters = _map(dtype, 32, C, 3, 3), _numbers(dtype, 32), _map(dtype, 1, 32, 1, 1), _numbers(dtype, 1)
    return depth_head(_map(dtype, 1, C, high, wide), *parameters, (2 * high, 2 * wide + 1))


def _labels(dtype: torch.dtype, high: int, wide: int) -> torch.Tensor:
    return upsample_argmax(_map(dtype, 1, 150, high, wide), (16 * high + 5, 16 * wide + 3), False)


CALLS: dict[str, Callable[[torch.dtype, int, int], torch.Tensor]] = {
    "attention": lambda dtype, high, wide: attention(_tokens(dtype, high, wide, 3 * D), 2),
    "attention_qkv": _attention,
    "layernorm_linear": _linear,
    "layernorm_linear, rotated": _rotated,
    "linear_residual": _residual,
    "layernorm_mlp": _mlp,
    "residual_conv_unit": _unit,
    "conv_norm_relu": _conv,
    "upsample_bilinear": lambda dtype, high, wide: upsample_bilinear(_map(dtype, 1, C, high, wide), (2 * high, 3 * wide + 1), True),
    "upsample_argmax": _labels,
    "depth_head": _depth,
    "readout_project": lambda dtype, high, wide: readout_project(_tokens(dtype, high, wide), _numbers(dtype, D, 2 * D), _numbers(dtype, D)),
    "transposed_conv": lambda dtype, high, wide: transposed_conv(_map(dtype, 1, C, high, wide), _numbers(dtype, C, C, 4, 4)),
}

"""What encoders, decoder and heads share: activations by name, layers in float32, and shapes compared without settling them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def statically_equal(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether shapes are equal as far as it is known without settling what a graph that is being traced leaves open."""
    if not torch.compiler.is_compiling():
        return one == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def single(x: Tensor) -> Tensor:
    """In float32, or as it is if it is more exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _quick_gelu(x: Tensor) -> Tensor:
    wide = single(x)
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def is_half(dtype: torch.dtype) -> bool:
    """Whether it is a dtype of floats that `single` makes another of."""
    return torch.promote_types(dtype, torch.float32) != dtype


def in_single(x: Tensor, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias for a layer's product: with parameters in half precision all in float32, else as they are, and autocast's."""
    weight, bias = layer.weight, layer.bias
    if not is_half(weight.dtype):
        return x, weight, bias
    return single(x), single(weight), None if bias is None else single(bias)


class LastConv2d(nn.Conv2d):
    """A head's last convolution: `in_single`, and what it gives is float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        return single(self._conv_forward(*in_single(x, self)))


class LastLinear(nn.Linear):
    """As `LastConv2d`, of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return single(F.linear(*in_single(x, self)))


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": _quick_gelu,
}

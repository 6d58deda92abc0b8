"""What encoders, decoder and heads share: activations by name, and shapes compared without settling them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def statically_equal(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether shapes are equal as far as it is known without settling what a graph that is being traced leaves open."""
    if not torch.compiler.is_compiling():
        return one == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def single(x: Tensor) -> Tensor:
    """In float32, or as it is if it is more exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

"""Random calls of the encoder's linear ops, for their tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from both_passes import assert_op_parity

from dpt.kernels.layernorm_linear import layernorm_linear, layernorm_linear_ref
from dpt.kernels.layernorm_mlp import layernorm_mlp, layernorm_mlp_ref
from dpt.kernels.linear_residual import linear_residual, linear_residual_ref

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """A call of an op: it and its reference as functions of ``inputs`` alone, which are called ``names``."""

    function: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    names: tuple[str, ...]
    inputs: list[torch.Tensor | None]

    def __getitem__(self, name: str) -> torch.Tensor | None:
        return self.inputs[self.names.index(name)]

    def replaced(self, **tensors: torch.Tensor | None) -> Case:
        """The same call with other inputs."""
        return Case(self.function, self.reference, self.names, [tensors.get(n, t) for n, t in zip(self.names, self.inputs, strict=True)])

    def assert_parity(self, **options: Any) -> None:
        """Output and the gradient of every input, by the rule; with the options of `assert_op_parity`."""
        assert_op_parity(self.function, self.reference, self.inputs, self.names, **options)


def _without_eps(function: Callable[..., torch.Tensor], eps: float, *last: Any) -> Callable[..., torch.Tensor]:
    """layernorm_linear of tensors only."""
    return lambda *tensors: function(*tensors, eps, *last)


def _mlp_without_eps(function: Callable[..., torch.Tensor], eps: float, activation: str) -> Callable[..., torch.Tensor]:
    """layernorm_mlp of tensors only."""
    return lambda *tensors: function(*tensors[:-1], eps, tensors[-1], activation)


def turning(tokens: int, dim: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines (2, tokens, dim / 2) of random angles."""
    angles = torch.rand(tokens, dim // 2, device=device) * 6.3
    return torch.stack((angles.cos(), angles.sin()))


class _Random:
    """Random operands. Vectors come in the dtype ``vectors``, everything else in ``dtype``."""

    def __init__(self, dtype: torch.dtype, device: torch.device, vectors: torch.dtype | None):
        self.dtype, self.vectors, self.device = dtype, vectors or dtype, device

    def rows(self, *shape: int, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, device=self.device) + mean).to(self.dtype)

    def weight(self, columns: int, depth: int) -> torch.Tensor:
        return (torch.randn(columns, depth, device=self.device) / depth**0.5).to(self.dtype)

    def vector(self, size: int, wanted: bool = True, mean: float = 0.0) -> torch.Tensor | None:
        return (torch.randn(size, device=self.device) * 0.5 + mean).to(self.vectors) if wanted else None


def layernorm_linear_case(
    leading: Sequence[int],
    depth: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool = True,
    activation: str | None = None,
    vectors: torch.dtype | None = None,
    mean: float = 0.0,
    eps: float = EPS,
    head: int = 0,
) -> Case:
    """x (*leading, depth) with ``mean`` and a standard deviation of 1, weight (columns, depth), of "swiglu" (2 * columns, depth); with
    ``head`` queries, keys and values of so many channels a head, turned."""
    random = _Random(dtype, device, vectors)
    norm = [random.vector(depth, mean=1.0), random.vector(depth)]
    features = 2 * columns if activation == "swiglu" else columns
    inputs = [random.rows(*leading, depth, mean=mean), *norm, random.weight(features, depth), random.vector(features, bias)]
    rotation = turning(leading[1], head, device) if head else None
    functions = (_without_eps(f, eps, activation, rotation) for f in (layernorm_linear, layernorm_linear_ref))
    return Case(*functions, ("x", "norm_weight", "norm_bias", "weight", "bias"), inputs)


def linear_residual_case(
    leading: Sequence[int],
    depth: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool = True,
    scale: bool = True,
    vectors: torch.dtype | None = None,
) -> Case:
    """x (*leading, depth), weight (columns, depth), residual (*leading, columns)."""
    random = _Random(dtype, device, vectors)
    linear = [random.rows(*leading, depth), random.weight(columns, depth), random.vector(columns, bias)]
    inputs = [*linear, random.rows(*leading, columns), random.vector(columns, scale)]
    return Case(linear_residual, linear_residual_ref, ("x", "weight", "bias", "residual", "layer_scale"), inputs)


def layernorm_mlp_case(
    leading: Sequence[int],
    depth: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool = True,
    scale: bool = True,
    vectors: torch.dtype | None = None,
    mean: float = 0.0,
    eps: float = EPS,
    activation: str = "gelu",
) -> Case:
    """x (*leading, depth), the hidden layer of ``columns``."""
    random = _Random(dtype, device, vectors)
    norm = [random.vector(depth, mean=1.0), random.vector(depth)]
    features = 2 * columns if activation == "swiglu" else columns
    first = [random.weight(features, depth), random.vector(features, bias)]
    second = [random.weight(depth, columns), random.vector(depth, bias)]
    inputs = [random.rows(*leading, depth, mean=mean), *norm, *first, *second, random.vector(depth, scale)]
    functions = (_mlp_without_eps(f, eps, activation) for f in (layernorm_mlp, layernorm_mlp_ref))
    return Case(*functions, ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "layer_scale"), inputs)


# What every linear op must do alike is tested on these.
CASES: dict[str, Callable[..., Case]] = {
    "layernorm_linear": functools.partial(layernorm_linear_case, activation="gelu"),
    "linear_residual": linear_residual_case,
    "layernorm_mlp": layernorm_mlp_case,
    "layernorm_mlp swiglu": functools.partial(layernorm_mlp_case, activation="swiglu"),
}

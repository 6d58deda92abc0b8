"""batch_norm, with the statistics of the batch: what is compiled and tuned of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ... import launch
from ...parts.batch_norm import BatchNorm, batch_moments, batch_norm_backward
from ..workload import BACKWARD, Inputs, Workload, combinations

ELEMENTWISE = {"tensor_cores": False, "async_copies": False}


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Both passes of the gradient, with and without a ReLU, in every dtype; and the joining of the tiles."""
    for channels in (64, 256):
        partials = torch.empty(1024, 3, channels, device="meta")
        yield from launch.record(family, f"C={channels}", batch_moments, partials, **ELEMENTWISE)
        for dtype in launch.DTYPES:
            arguments = _gradient_arguments(Inputs("meta", dtype), 2, channels, 64)
            for relu in (False, True):
                variant = f"C={channels} {str(dtype).removeprefix('torch.')}{' relu' * relu}"
                yield from launch.record(family, variant, batch_norm_backward, **{**arguments, "relu": relu}, **ELEMENTWISE)


def _gradient_arguments(inputs: Inputs, batch: int, channels: int, side: int) -> dict[str, Any]:
    x = inputs.map(batch, channels, side, side)
    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    weight, bias = (inputs.normal(channels, dtype=torch.float32) for _ in range(2))
    return {"grad": inputs.map(batch, channels, side, side), "x": x, "norm": BatchNorm(weight, bias, mean, variance, 1e-5), "relu": True}


def _gradient_ref(grad: torch.Tensor, x: torch.Tensor, norm: BatchNorm, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, norm.bias, norm.weight)]
    y = F.batch_norm(leaves[0], None, None, leaves[2], leaves[1], training=True, eps=norm.eps)
    grad_x, *of_norm = torch.autograd.grad(F.relu(y) if relu else y, leaves, grad)
    return grad_x, torch.stack(of_norm)


def _moments_arguments(inputs: Inputs, channels: int, tiles: int) -> dict[str, Any]:
    counts = torch.randint(1, 128, (tiles, 1), device=inputs.device).expand(tiles, channels)
    means, squares = inputs.normal(2, tiles, channels)
    return {"partials": torch.stack((counts, means, counts * squares.square()), 1)}


def _moments_ref(partials: torch.Tensor) -> torch.Tensor:
    counts, means, squares = partials.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return torch.stack((mean, (squares + counts * (means - mean).square()).sum(0) / count))


def tuning_space() -> Iterator[Workload]:
    """The gradient at the sizes of a decoder's units and of its head, and the joining of as many tiles as these have."""
    tiles = combinations([{}], BLOCK_M=(32, 64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(1,))
    for side in (64, 256):
        yield Workload(
            "batch norm's gradient", batch_norm_backward, _gradient_arguments, _gradient_ref,
            {"batch_norm_sums": tiles, "batch_norm_gradient": tiles},
            sizes={"batch": 2, "channels": 256, "side": side}, small={"batch": 2, "channels": 20, "side": 7},
            stage=BACKWARD, shows=ELEMENTWISE,
        )  # fmt: skip
    for count in (64, 1024):
        yield Workload(
            "batch statistics", batch_moments, _moments_arguments, _moments_ref,
            {"batch_moments": combinations([{}], BLOCK_M=(32, 64, 128, 256), BLOCK_N=(8, 16, 32), num_warps=(4, 8), num_stages=(1,))},
            sizes={"channels": 256, "tiles": count}, small={"channels": 20, "tiles": 70}, dtype=torch.float32,
            stage=BACKWARD, shows=ELEMENTWISE,
        )  # fmt: skip

"""depth_head: what is compiled and tuned of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ... import launch
from ...depth_head import _backward, _depth_head_kernel, _launch, depth_head_ref
from ..variants import compiled_variants
from ..workload import BACKWARD, Inputs, Workload, by_autograd, combinations, tiles

# (kind of product, C, F, activation, passes) that are compiled. Left out, for CI's time: C = 64, more turns of the loop of 128; F = 16,
# half of each tile of 32; and the other products of dtype, pass and activation, which is a line at the end of a row.
COMPILED = (
    ("bfloat16", 128, 32, "relu", ("forward",)),
    ("bfloat16", 128, 32, "sigmoid", ("gradient",)),
    ("bfloat16", 32, 32, "sigmoid", ("forward",)),
    ("bfloat16", 32, 32, "relu", ("gradient",)),
    ("float16", 128, 32, "sigmoid", ("gradient",)),
    ("float32", 128, 32, "sigmoid", ("forward", "gradient")),
    ("tf32", 128, 32, "sigmoid", ("forward", "gradient")),
    ("tf32", 24, 32, "relu", ("gradient",)),
)


# Of the backend "cudnn", which no table has yet: to be measured, and the two passes that are compiled all the same.
CUDNN = combinations([{"backend": "cudnn"}], BLOCK_H=(1, 4), BLOCK_W=(32, 64), num_warps=(4,), num_stages=(1,))
COMPILED_CUDNN = (("bfloat16", 128, 32, "relu", ("forward",)), ("float32", 128, 32, "sigmoid", ("gradient",)))


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every shipped configuration, forward and backward, for the widths of the smallest Depth Anything model's head and of DPT-Large's."""
    yield from launch.distinct(_cases(family, COMPILED))
    with launch.using("depth_head", CUDNN[-1]), launch.using("depth_head_backward", CUDNN[-1]):
        others = list(_cases(family, COMPILED_CUDNN, "cudnn "))
    yield from others


def _cases(family: str, compiled: Sequence[tuple[Any, ...]], backend: str = "") -> Iterator[launch.CompileCase]:
    kinds = {name: (dtype, precision, shows) for dtype, precision, name, shows in compiled_variants()}
    for kind, channels, hidden, activation, passes in compiled:
        dtype, precision, shows = kinds[kind]
        x = torch.empty(1, channels, 32, 32, dtype=dtype, device="meta", memory_format=torch.channels_last)
        shapes = ((hidden, channels, 3, 3), (hidden,), (1, hidden, 1, 1), (1,))
        parameters = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        grads = {"forward": None, "gradient": torch.empty(1, 64, 64, dtype=dtype, device="meta")}
        for name in passes:
            variant = f"{backend}{name} C={channels} F={hidden} {activation} {kind}"
            arguments = (x, *parameters, (64, 64), activation, 1.0, grads[name], precision)
            for case in launch.record(family, variant, _launch, *arguments):
                product = case.function is _depth_head_kernel
                yield replace(
                    case,
                    tensor_cores=product and shows["tensor_cores"] and "HMMA",
                    async_copies=product and dtype != torch.float32,
                )


def _tuned_arguments(inputs: Inputs, batch: int, channels: int, side: int, size: int, hidden: int = 32) -> dict[str, Any]:
    """Hidden channels are far above 0 or far below: near it, what a product of few digits loses decides a ReLU, and gradients jump."""
    parameters = {
        "w1": inputs.map(hidden, channels, 3, 3, std=(9 * channels) ** -0.5),
        "b1": 6 * inputs.normal(hidden).sign(),
        "w2": inputs.normal(1, hidden, 1, 1, std=hidden**-0.5),
        "b2": inputs.normal(1),
    }
    return {"x": inputs.map(batch, channels, side, side), **parameters, "activation": "sigmoid", "max_depth": 20.0}


def _forward_arguments(inputs: Inputs, size: int, **sizes: int) -> dict[str, Any]:
    return {**_tuned_arguments(inputs, size=size, **sizes), "size": (size, size), "grad": None, "precision": inputs.precision}


def _backward_arguments(inputs: Inputs, batch: int, size: int, **sizes: int) -> dict[str, Any]:
    """Under a last ReLU that is far above 0: by a sigmoid's slope, an error that all pixels share would decide that of every sum."""
    arguments = _tuned_arguments(inputs, batch=batch, size=size, **sizes)
    arguments |= {"b2": arguments["b2"] + 20, "activation": "relu", "max_depth": 1.0}
    return {**arguments, "grad": inputs.normal(batch, size, size)}


def _forward_ref(x, w1, b1, w2, b2, size, activation, max_depth, grad, precision) -> torch.Tensor:
    return depth_head_ref(x, w1, b1, w2, b2, size, activation, max_depth)


def _backward_ref(grad, x, w1, b1, w2, b2, activation, max_depth) -> list[torch.Tensor]:
    """Without the gradient of b2: of a single number PyTorch's own error, to which a kernel's is compared, is chance."""
    head = functools.partial(depth_head_ref, size=grad.shape[1:], activation=activation, max_depth=max_depth)
    return by_autograd(lambda x, w1, b1, w2: head(x, w1, b1, w2, b2), [x, w1, b1, w2], grad)


def _candidates(narrow: bool, exact: bool) -> list[dict[str, int]]:
    """``exact``: float32 without tensor cores holds whole operands in registers."""
    blocks = tiles("BLOCK_W SOURCE_W num_warps", (32, 16, 4), (32, 16, 8), (64, 32, 4), (64, 32, 8), (128, 64, 8))
    strips = {"backend": ("triton",), "BLOCK_H": (8, 16, 32)}
    if exact:
        return CUDNN + combinations(blocks[:2], **strips, BLOCK_C=(16, 32), num_stages=(1, 2))
    found = combinations(blocks[:2], **strips, BLOCK_C=(16,) if narrow else (32,), num_stages=(3,))
    return CUDNN + found + combinations(blocks[2:], **strips, BLOCK_C=(16, 32) if narrow else (32, 64), num_stages=(3,))


def tuning_space() -> Iterator[Workload]:
    """The heads of DPT-Large at 384 pixels and of the Depth Anything models at 518; and their gradients, in training."""
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
        exact = dtype == torch.float32 and precision == "ieee"
        options = {"small": {"batch": 1, "channels": 8, "side": 5, "size": 9}, "dtype": dtype, "precision": precision}
        options["simple"] = ("_resize_weights_kernel", "_upsample_backward_kernel", "_depth_head_epilogue")
        options["shows"] = {"tensor_cores": not exact and "HMMA", "async_copies": dtype != torch.float32}
        shapes = ((128, 192, 384), (64, 296, 518), (32, 296, 518))
        for channels, side, size in shapes if dtype == torch.bfloat16 else shapes[:1] if exact else shapes[::2]:
            candidates = _candidates(channels <= 32, dtype == torch.float32)
            sizes = {"channels": channels, "side": side, "size": size}
            yield Workload(
                "depth head", _launch, _forward_arguments, _forward_ref, {"depth_head": candidates},
                sizes={"batch": 1, **sizes}, turn=4, **options,
            )  # fmt: skip
            yield Workload(
                "depth head gradients", _backward, _backward_arguments, _backward_ref, {"depth_head_backward": candidates},
                sizes={"batch": 2, **sizes}, stage=BACKWARD, **options,
            )  # fmt: skip

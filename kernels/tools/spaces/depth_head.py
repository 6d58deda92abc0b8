"""depth_head: what is compiled and tuned of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ... import launch
from ...depth_head import _backward, _launch, depth_head_ref
from ..workload import BACKWARD, Inputs, Workload, by_autograd, combinations, tiles

# (dtype, F, activation, passes) that are compiled; C is the library's alone. Left out, for CI's time: the other products of dtype, pass and
# activation, which is a line at the end of a row.
COMPILED = (
    (torch.bfloat16, 32, "relu", ("forward", "gradient")),
    (torch.bfloat16, 16, "sigmoid", ("forward",)),
    (torch.float16, 32, "sigmoid", ("gradient",)),
    (torch.float32, 32, "sigmoid", ("forward", "gradient")),
)
CHANNELS = 128  # of the compile cases


# Of the backend "cudnn", which no table has yet: to be measured, and the two passes that are compiled all the same.
CUDNN = combinations([{"backend": "cudnn"}], BLOCK_H=(1, 4), BLOCK_W=(32, 64), num_warps=(4,), num_stages=(1,))
COMPILED_CUDNN = ((torch.bfloat16, 32, "relu", ("forward",)), (torch.float32, 32, "sigmoid", ("gradient",)))


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every shipped configuration, forward and backward."""
    yield from launch.distinct(_cases(family, COMPILED))
    with launch.using("depth_head", CUDNN[-1]), launch.using("depth_head_backward", CUDNN[-1]):
        others = list(_cases(family, COMPILED_CUDNN, "cudnn "))
    yield from others


def _cases(family: str, compiled: Sequence[tuple[Any, ...]], backend: str = "") -> Iterator[launch.CompileCase]:
    for dtype, hidden, activation, passes in compiled:
        x = torch.empty(1, CHANNELS, 32, 32, dtype=dtype, device="meta", memory_format=torch.channels_last)
        shapes = ((hidden, CHANNELS, 3, 3), (hidden,), (1, hidden, 1, 1), (1,))
        parameters = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        grads = {"forward": None, "gradient": torch.empty(1, 64, 64, dtype=dtype, device="meta")}
        for name in passes:
            variant = f"{backend}{name} F={hidden} {activation} {str(dtype).removeprefix('torch.')}"
            arguments = (x, *parameters, (64, 64), activation, 1.0, grads[name])
            yield from launch.record(family, variant, _launch, *arguments, tensor_cores=False, async_copies=False)


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
    return {**_tuned_arguments(inputs, size=size, **sizes), "size": (size, size), "grad": None}


def _backward_arguments(inputs: Inputs, batch: int, size: int, **sizes: int) -> dict[str, Any]:
    """Under a last ReLU that is far above 0: by a sigmoid's slope, an error that all pixels share would decide that of every sum."""
    arguments = _tuned_arguments(inputs, batch=batch, size=size, **sizes)
    arguments |= {"b2": arguments["b2"] + 20, "activation": "relu", "max_depth": 1.0}
    return {**arguments, "grad": inputs.normal(batch, size, size)}


def _forward_ref(x, w1, b1, w2, b2, size, activation, max_depth, grad) -> torch.Tensor:
    return depth_head_ref(x, w1, b1, w2, b2, size, activation, max_depth)


def _backward_ref(grad, x, w1, b1, w2, b2, activation, max_depth) -> list[torch.Tensor]:
    """Without the gradient of b2: of a single number PyTorch's own error, to which a kernel's is compared, is chance."""
    head = functools.partial(depth_head_ref, size=grad.shape[1:], activation=activation, max_depth=max_depth)
    return by_autograd(lambda x, w1, b1, w2: head(x, w1, b1, w2, b2), [x, w1, b1, w2], grad)


TRITON = combinations(
    tiles("BLOCK_W num_warps", (16, 2), (32, 2), (32, 4), (64, 4), (64, 8)), backend=("triton",), BLOCK_H=(8, 16, 32), num_stages=(1,)
)


def tuning_space() -> Iterator[Workload]:
    """The heads of DPT-Large at 384 pixels and of the Depth Anything models at 518; and their gradients, in training."""
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
        exact = dtype == torch.float32 and precision == "ieee"
        options = {"small": {"batch": 1, "channels": 8, "side": 5, "size": 9}, "dtype": dtype, "precision": precision}
        options["shows"] = {"tensor_cores": False, "async_copies": False}
        shapes = ((128, 192, 384), (64, 296, 518), (32, 296, 518))
        for channels, side, size in shapes if dtype == torch.bfloat16 else shapes[:1] if exact else shapes[::2]:
            sizes = {"channels": channels, "side": side, "size": size}
            yield Workload(
                "depth head", _launch, _forward_arguments, _forward_ref, {"depth_head": CUDNN + TRITON},
                sizes={"batch": 1, **sizes}, turn=4, **options,
            )  # fmt: skip
            yield Workload(
                "depth head gradients", _backward, _backward_arguments, _backward_ref, {"depth_head_backward": CUDNN + TRITON},
                sizes={"batch": 2, **sizes}, stage=BACKWARD, **options,
            )  # fmt: skip

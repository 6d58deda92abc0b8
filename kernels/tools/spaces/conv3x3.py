"""conv3x3: what is compiled and tuned of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ... import launch
from ...parts.batch_norm import BatchNorm
from ...parts.conv3x3 import _operands, _with_cudnn, conv3x3, conv3x3_epilogue, conv3x3_kernel, convolved, normalised
from ..variants import simple
from ..workload import FORWARD, RARE, Inputs, Workload, combinations, tiles

# (C, side of the map, dtype, precision) that stand for what the table distinguishes; C=20 is beyond TMA's alignment.
COMPILED_SHAPES = (
    *((channels, 64, torch.bfloat16, "ieee") for channels in (20, 32, 48, 64, 96, 256)),
    (96, 160, torch.bfloat16, "ieee"),
    *((256, side, torch.bfloat16, "ieee") for side in (16, 32, 96, 256)),
    (256, 64, torch.float16, "ieee"),
    *((channels, 64, torch.float32, "tf32") for channels in (32, 256)),
    (256, 16, torch.float32, "tf32"),
    (256, 64, torch.float32, "ieee"),
)


def _unit_arguments(
    channels: int, side: int, dtype: torch.dtype, device: torch.device | str, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(x, weight, the other arguments of each kind of launch that a residual convolution unit makes), random."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    x, add = random(batch, channels, side, side), random(batch, channels, side // 2, side // 2)
    weight = random(channels, channels, 3, 3) / (9 * channels) ** 0.5
    bias, variance = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5
    after = {"bias": bias, "norm": BatchNorm(variance, bias, bias, variance, 1e-5)}
    first = {**after, "relu_input": True, "relu_output": True}
    return x, weight, {"first": first, "second": {**after, "skip": x, "add": add}, "gradient": {"mask": x, "skip": x, "gradient": True}}


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every configuration of the table with the heaviest epilogues of a unit's two convolutions, and a gradient's for the widest."""
    for channels, side, dtype, precision in COMPILED_SHAPES:
        x, weight, launches = _unit_arguments(channels, side, dtype, "meta")
        exact = dtype == torch.float32 and precision == "ieee"  # left to cuDNN: the kernel recorded is the epilogue
        checks = {"precision": precision, "tensor_cores": not exact, "async_copies": not exact}
        for name, arguments in launches.items():
            if name != "gradient" or channels == 256:
                variant = f"{name} C={channels} {side}x{side} {str(dtype).removeprefix('torch.')} {precision}"
                cases = launch.record(family, variant, conv3x3, x, weight, **arguments, **checks)
                yield from simple(cases, conv3x3_epilogue)  # behind cuDNN's convolution
        if channels in (64, 256):
            yield from _with_batch_statistics(family, x, weight, launches, **checks)


def _with_batch_statistics(
    family: str, x: torch.Tensor, weight: torch.Tensor, launches: dict[str, Any], **checks: Any
) -> Iterator[launch.CompileCase]:
    """The first convolution whose epilogue gives statistics too, without what follows it; and the norm that is applied afterwards."""
    variant = f"C={x.shape[1]} {x.shape[2]}x{x.shape[3]} {str(x.dtype).removeprefix('torch.')} {checks['precision']}"
    bias = launches["first"]["bias"]
    for case in launch.record(family, f"statistics {variant}", convolved, x, weight, bias, relu_input=True, **checks):
        if case.function is conv3x3_kernel:
            yield case
    norm, add = launches["second"]["norm"], launches["second"]["add"]
    for name, arguments in {"normalised": {"relu": True}, "normalised, added": {"skip": x, "add": add}}.items():
        yield from launch.record(family, f"{name} {variant}", normalised, x, norm, **arguments, tensor_cores=False, async_copies=False)


def _tuned_arguments(inputs: Inputs, batch: int, channels: int, side: int) -> dict[str, Any]:
    """A unit's second convolution: the heaviest epilogue."""
    x, weight, launches = _unit_arguments(channels, side, inputs.dtype, inputs.device, batch)
    return {"x": x, "weight": weight, **launches["second"], "precision": inputs.precision}


def _epilogue_arguments(inputs: Inputs, channels: int, **sizes: int) -> dict[str, Any]:
    """The same behind a convolution of few channels, so that the epilogue is most of what is timed."""
    arguments = _tuned_arguments(inputs, channels=channels, **sizes)
    x, add = arguments["x"], arguments["add"]
    epilogue, sides = _operands(tuple(x.shape[2:]), arguments["bias"], arguments["norm"], None, arguments["skip"], add)
    narrow, weight = inputs.map(x.shape[0], 8, *x.shape[2:]), inputs.map(channels, 8, 3, 3, std=72**-0.5)
    return {"x": narrow, "weight": weight, "epilogue": epilogue, "sides": sides, "relu_output": False}


def _tuned_ref(x, weight, bias, norm, skip, add, **_) -> torch.Tensor:
    y = F.batch_norm(F.conv2d(x, weight, bias, padding=1), norm.mean, norm.variance, norm.weight, norm.bias, eps=norm.eps)
    return y + skip + F.interpolate(add, size=x.shape[2:], mode="bilinear", align_corners=True)


def _epilogue_ref(x, weight, epilogue, sides, relu_output) -> torch.Tensor:
    bias, norm, _, skip, _, resized = epilogue
    return _tuned_ref(x, weight, bias, BatchNorm(*norm), skip, resized)


def _candidates(kind: str, channels: int, side: int) -> list[dict[str, Any]]:
    """PyTorch's convolution; tiles read by pointers; and by descriptors, where 64 pixels, or as many channels, are a warpgroup's rows."""
    by_pointers, by_descriptors = ({"backend": ("triton",), "descriptor": (descriptor,)} for descriptor in (False, True))
    names = "BLOCK_N EPILOGUE_PARTS num_warps"
    if kind == "float32":
        exact = tiles("BLOCK_M " + names, (32, 32, 1, 4), (64, 32, 1, 8), (64, 64, 2, 8))
        return [{"backend": "cudnn"}, *combinations(exact, **by_pointers, BLOCK_K=(16,), num_stages=(2,))]
    blocks = tiles(
        "BLOCK_H BLOCK_W " + names,
        (8, 8, 16, 1, 4), (8, 8, 32, 1, 4), (8, 8, 64, 2, 4), (8, 16, 64, 2, 4), (8, 16, 64, 2, 8), (16, 16, 64, 2, 8), (8, 8, 128, 4, 4),
        (8, 8, 128, 4, 8), (8, 16, 128, 4, 8), (8, 16, 128, 8, 8), (16, 16, 128, 4, 8), (8, 8, 256, 8, 8), (8, 16, 256, 8, 8),
    )  # fmt: skip
    narrow, wide, most, stages = (16, 64, 128, (4, 6)) if side <= 32 else (64, 256 if side > 64 else 128, 256, (3, 4))
    wide = wide if channels > 64 else 64
    blocks = [b for b in blocks if b["BLOCK_H"] * b["BLOCK_W"] <= most and narrow <= b["BLOCK_N"] <= wide]
    turned = [b for b in blocks if 64 <= b["BLOCK_N"] <= 128 and (b["BLOCK_H"], b["BLOCK_W"]) == (8, 16)]
    rows = tiles("BLOCK_M " + names, (64, 64, 2, 4), (128, 64, 2, 4), (128, 128, 4, 8))
    if channels <= 32:
        rows = tiles("BLOCK_M " + names, (64, 32, 1, 4), (128, 32, 1, 4), (256, 32, 1, 8))
    k = (64,) if kind == "half" and channels >= 64 else (32,)
    return [
        {"backend": "cudnn"},
        *combinations(blocks, **by_descriptors, PIXELS_FIRST=(True,), BLOCK_K=k, num_stages=stages),
        *combinations(turned, **by_descriptors, PIXELS_FIRST=(False,), BLOCK_K=k, num_stages=stages[:1]),
        *combinations(rows, **by_pointers, BLOCK_K=sorted({32, *k}), num_stages=(3, 4)),
    ]


# (kind of product, batch, channels, side): fusion levels and heads of the 256-channel models at 384 and 512 pixels and of the Depth
# Anything models at 518 (32 channels leave the smallest one's head), one picture and many; then channels beyond TMA's alignment.
TUNED_SHAPES = (
    *(("half", 1, 256, side) for side in (16, 32, 64, 74, 96, 128, 256)),
    *(("half", 1, 128, side) for side in (148, 296)),
    ("half", 16, 256, 128),
    *(("half", 1, 64, side) for side in (74, 148)),
    ("half", 1, 32, 296),
    ("half", 1, 20, 96),
    *(("tf32", 1, 256, side) for side in (32, 128)),
    ("tf32", 1, 32, 296),
    ("float32", 1, 256, 64),
)
# A map of so few pixels is one wave of large tiles, or two: an entry of its own is proposed.
FEW_PIXELS = 32768


def tuning_space() -> Iterator[Workload]:
    """A unit's second convolution in every shape above, and the epilogue that follows PyTorch's convolution."""
    small = {"batch": 2, "channels": 24, "side": 7}
    for kind, batch, channels, side in TUNED_SHAPES:
        half, exact = kind == "half", kind == "float32"
        few = half and channels > 64 and batch * side * side <= FEW_PIXELS
        yield Workload(
            "conv3x3", conv3x3, _tuned_arguments, _tuned_ref, {"conv3x3": _candidates(kind, channels, side)},
            sizes={"batch": batch, "channels": channels, "side": side}, small=small if channels > 20 else {**small, "channels": 20},
            dtype=torch.bfloat16 if half else torch.float32, precision="tf32" if kind == "tf32" else "ieee",
            narrow={"pixels_max": FEW_PIXELS} if few else {}, stage=RARE if channels == 20 else FORWARD, turn=0,
            shows={"tensor_cores": not exact, "async_copies": not exact}, simple=("conv3x3_epilogue",),
        )  # fmt: skip
    for side in (32, 128):
        yield Workload(
            "convolution's epilogue", _with_cudnn, _epilogue_arguments, _epilogue_ref,
            {"conv3x3_epilogue": combinations([{}], BLOCK_M=(32, 64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(1,))},
            sizes={"batch": 1, "channels": 256, "side": side}, small=small, turn=9, simple=("conv3x3_epilogue",),
        )  # fmt: skip

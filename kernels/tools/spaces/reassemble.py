"""reassemble: what is compiled and tuned of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ... import launch
from ...reassemble import _readout, _readout_epilogue, _transposed_conv, readout_project_ref, transposed_conv_ref
from ..variants import compiled_variants, simple
from ..workload import BACKWARD, Inputs, Workload, by_autograd, combinations, tiles

# What is compiled: the readout's passes at 768 features, by kind of product; and (kind, C, s) of transposed convolutions. Left out, for
# CI's time: ViT-S and -L, whose features are as aligned and only change how often a loop turns; the same for the convolutions' widths, of
# which 48 leaves part of a block; float16's plain passes, bfloat16's code with another MMA; and the GELU by tanh, which the MLP's have.
COMPILED_READOUTS = {"bfloat16": (False, True), "float16": (True,), "float32": (False, True), "tf32": (False, True)}
COMPILED_CONVS = (("bfloat16", 48, 4), ("bfloat16", 96, 2), ("bfloat16", 256, 4), ("float16", 96, 4), ("float32", 48, 4), ("tf32", 256, 4))


# Of the backends that no table has yet: to be measured, and what is compiled all the same. ("cudnn" ends in conv3x3's epilogue.)
CUBLAS = combinations([{"backend": "cublas"}], BLOCK_M=(16, 32), BLOCK_N=(64, 128), num_warps=(4,), num_stages=(1,))
CUDNN = [{"backend": "cudnn"}]
COMPILED_CUBLAS = {"bfloat16": (False, True), "float32": (True,)}


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every shipped configuration: the readout of ViT-B forward and backward, and the transposed convolutions of the neck."""
    yield from launch.distinct((*_readout_cases(family, COMPILED_READOUTS), *_conv_cases(family)))
    with launch.using("readout_project", CUBLAS[-1]), launch.using("readout_project_backward", CUBLAS[-1]):
        others = list(_readout_cases(family, COMPILED_CUBLAS, "cublas "))
    yield from others


def _kinds() -> dict[str, tuple[torch.dtype, str, dict[str, Any]]]:
    return {name: (dtype, precision, shows) for dtype, precision, name, shows in compiled_variants()}


def _readout_cases(family: str, compiled: Mapping[str, Sequence[bool]], backend: str = "") -> Iterator[launch.CompileCase]:
    for kind, passes in compiled.items():
        dtype, precision, shows = _kinds()[kind]
        tokens, grad, weight, bias = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 577, 768), (2, 576, 768), (768, 2 * 768), (768,))
        )
        for backward in passes:
            variant = f"{backend}readout D=768{' backward' if backward else ''} {kind}"
            arguments = (tokens, weight, bias, precision, "gelu", grad if backward else None)
            yield from simple(launch.record(family, variant, _readout, *arguments, **shows), _readout_epilogue)


def _conv_cases(family: str) -> Iterator[launch.CompileCase]:
    for kind, channels, stride in COMPILED_CONVS:
        dtype, precision, shows = _kinds()[kind]
        x = torch.empty(2, channels, 24, 24, dtype=dtype, device="meta", memory_format=torch.channels_last)
        weight, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((channels, channels, stride, stride), (channels,)))
        variant = f"transposed convolution C={channels} s={stride} {kind}"
        yield from launch.record(family, variant, _transposed_conv, x, weight, bias, precision, **shows)


def _readout_arguments(inputs: Inputs, batch: int, tokens: int, features: int) -> dict[str, Any]:
    weight, bias = inputs.normal(features, 2 * features, std=(2 * features) ** -0.5), inputs.normal(features)
    options = {"precision": inputs.precision, "activation": "gelu"}
    return {"tokens": inputs.normal(batch, tokens, features), "weight": weight, "bias": bias, **options}


def _readout_gradient_arguments(inputs: Inputs, batch: int, tokens: int, features: int) -> dict[str, Any]:
    return {**_readout_arguments(inputs, batch, tokens, features), "grad": inputs.normal(batch, tokens - 1, features)}


def _transposed_conv_arguments(inputs: Inputs, batch: int, channels: int, side: int, stride: int) -> dict[str, Any]:
    weight, bias = inputs.normal(channels, channels, stride, stride, std=channels**-0.5), inputs.normal(channels)
    return {"x": inputs.map(batch, channels, side, side), "weight": weight, "bias": bias, "precision": inputs.precision}


def _readout_ref(tokens, weight, bias, precision, activation, grad=None) -> torch.Tensor:
    if grad is None:
        return readout_project_ref(tokens, weight, bias, activation)
    patches, features = tokens[:, 1:], tokens.shape[-1]
    pre = F.linear(patches, weight[:, :features], bias) + F.linear(tokens[:, :1], weight[:, features:])
    return F.pad(by_autograd(F.gelu, [pre], grad)[0], (0, 0, 1, 0))


def _transposed_conv_workload_ref(x, weight, bias, precision) -> torch.Tensor:
    return transposed_conv_ref(x, weight, bias)


def _candidates(exact: bool, tf32: bool) -> list[dict[str, int]]:
    if exact:
        blocks = tiles("BLOCK_M BLOCK_N num_warps", (32, 32, 4), (32, 32, 8), (64, 32, 4), (64, 32, 8), (64, 64, 8))
        return combinations(blocks, backend=("triton",), BLOCK_K=(16, 32), num_stages=(2,))
    names = "BLOCK_M BLOCK_N num_warps"
    blocks = tiles(names, (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))
    return combinations(blocks, backend=("triton",), BLOCK_K=(32,) if tf32 else (32, 64), num_stages=(3, 4))


def tuning_space() -> Iterator[Workload]:
    """The readouts and the transposed convolutions of DPT-Base at 512 pixels and DPT-Large at 384, batch 1, and of one with batch 16; and
    the narrowest, of the smallest Depth Anything model."""
    for dtype, precision, _, kinds in compiled_variants():
        if dtype == torch.float16:
            continue
        exact = dtype == torch.float32 and precision == "ieee"
        options = {"dtype": dtype, "precision": precision, "shows": kinds, "simple": ("_readout_epilogue", "conv3x3_epilogue")}
        candidates, small = _candidates(exact, precision == "tf32"), {"batch": 2, "tokens": 6, "features": 24}
        base = {"batch": 1, "tokens": 1025, "features": 768}
        for sizes in (base, {"batch": 1, "tokens": 577, "features": 1024}, {**base, "batch": 16})[: 3 if dtype == torch.bfloat16 else 1]:
            yield Workload(
                "readout", _readout, _readout_arguments, _readout_ref, {"readout_project": CUBLAS + candidates},
                sizes=sizes, small=small, turn=7, **options,
            )  # fmt: skip
        yield Workload(
            "readout gradient", _readout, _readout_gradient_arguments, _readout_ref, {"readout_project_backward": CUBLAS + candidates},
            sizes={**base, "batch": 2}, small=small, stage=BACKWARD, **options,
        )  # fmt: skip
        shapes = ((1, 96, 32, 4), (1, 192, 32, 2), (1, 256, 24, 4), (16, 96, 32, 4), (1, 48, 37, 4))
        for batch, channels, side, stride in shapes[: 5 if dtype == torch.bfloat16 else 1]:
            yield Workload(
                "transposed convolution", _transposed_conv, _transposed_conv_arguments, _transposed_conv_workload_ref,
                {"transposed_conv": CUDNN + candidates}, sizes={"batch": batch, "channels": channels, "side": side, "stride": stride},
                small={"batch": 2, "channels": 24, "side": 3}, turn=8, **options,
            )  # fmt: skip

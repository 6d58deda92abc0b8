"""layernorm_linear: what is compiled and tuned of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ... import launch
from ...layernorm_linear import layernorm_linear_ref, normalised_linear
from ...parts.layernorm import LayerNorm, Statistics, layer_norm, layernorm_backward, layernorm_kernel
from ...parts.products import linear_epilogue
from ...parts.rotation import rotate_kernel
from .. import variants
from ..workload import BACKWARD, Inputs, Workload, by_autograd, combinations
from .attention import rotation_of

COMPILED = (  # see variants.COMPILED_ROWS: ViT-B, -S, rows that no 16-byte copy fits, and the widest, ViT-7B
    ("bfloat16", 768, 2304, ("none", "gelu", "gelu saved", "gelu_tanh saved", "swiglu", "swiglu saved", "rotated", "norm gradient")),
    ("float16", 384, 1536, ("gelu saved", "rotated", "norm gradient")),
    ("float32", 384, 1536, ("none", "gelu saved", "swiglu saved", "rotated", "norm gradient")),
    ("tf32", 384, 1536, ("none", "gelu saved", "swiglu saved")),
    ("bfloat16", 50, 150, ("gelu saved", "norm gradient")),
    ("bfloat16", 50, 384, ("rotated",)),
    ("float32", 50, 150, ("gelu saved",)),
    ("float32", 4096, 12288, ("none", "norm gradient")),
)
COMPILED_CUBLAS = (("bfloat16", 768, 2304, ("gelu saved", "swiglu saved")),)
EPS = 1e-6
HEAD = 64  # columns of each, where queries and keys are turned


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every launch of both passes, and what follows cuBLAS's product."""
    with launch.using("layernorm_linear", variants.CUBLAS[-1]):
        others = list(_cases(family, COMPILED_CUBLAS, "cublas "))
    yield from launch.distinct((*_cases(family, COMPILED), *others))


def _cases(family: str, compiled: variants.Compiled, backend: str = "") -> Iterator[launch.CompileCase]:
    for name, where, precision, shows, (x, weight, grad) in variants.compiled_operands(compiled):
        norm, statistics = LayerNorm(x[0], x[0]), Statistics(*torch.empty((2, x.shape[0]), dtype=torch.float32, device="meta"))
        if name == "norm gradient":
            arguments = (x, x, statistics, norm, x, True, True, True)
            yield from launch.record(family, where, layernorm_backward, *arguments, tensor_cores=False, async_copies=False)
        else:
            rotation = torch.empty(2, x.shape[0], HEAD // 2, device="meta") if name == "rotated" else None
            activation = "none" if name == "rotated" else name.removesuffix(" saved")
            arguments = (x, norm, EPS, weight, grad[0], activation, precision, name.endswith("saved"), rotation)
            cases = launch.record(family, backend + where, normalised_linear, *arguments, **shows)
            yield from variants.simple(cases, layernorm_kernel, rotate_kernel, linear_epilogue)


def _linear_arguments(inputs: Inputs, rows: int, depth: int, columns: int, activation: str, tokens: int = 0) -> dict[str, Any]:
    """Turned if a picture has so many ``tokens``."""
    return {
        "x": inputs.normal(rows, depth),
        "norm": LayerNorm(inputs.normal(depth), inputs.normal(depth)),
        "eps": EPS,
        "weight": inputs.normal(columns, depth, std=depth**-0.5),
        "bias": inputs.normal(columns),
        "activation": activation,
        "precision": inputs.precision,
        "save": False,
        "rotation": rotation_of(tokens, HEAD, inputs.device) if tokens else None,
    }


def _linear_ref(x, norm, eps, weight, bias, activation, rotation, **_) -> torch.Tensor:
    if rotation is not None:
        return layernorm_linear_ref(x.view(-1, rotation.shape[1], x.shape[1]), *norm, weight, bias, eps, rotation=rotation).flatten(0, 1)
    return layernorm_linear_ref(x, *norm, weight, bias, eps, None if activation == "none" else activation)


def _statistics(x: torch.Tensor) -> Statistics:
    wide = x if x.dtype == torch.float64 else x.float()
    return Statistics(wide.mean(1), torch.rsqrt(wide.var(1, correction=0) + EPS))


def _norm_arguments(inputs: Inputs, rows: int, depth: int) -> dict[str, Any]:
    norm = LayerNorm(inputs.normal(depth), inputs.normal(depth))
    return {"x": inputs.normal(rows, depth), "norm": norm, "eps": EPS, "save": True}


def _norm_ref(x, norm, eps, save) -> tuple[torch.Tensor, ...]:
    return F.layer_norm(x, x.shape[1:], *norm, eps), *_statistics(x)


def _norm_gradient_arguments(inputs: Inputs, rows: int, depth: int) -> dict[str, Any]:
    grad, x, skip = (inputs.normal(rows, depth) for _ in range(3))
    norm, needs = LayerNorm(inputs.normal(depth), inputs.normal(depth)), ("needs_input", "needs_norm", "needs_again")
    return {"grad": grad, "x": x, "statistics": _statistics(x), "norm": norm, "skip": skip, **dict.fromkeys(needs, True)}


def _norm_gradient_ref(grad, x, norm, skip, **_) -> tuple[torch.Tensor, ...]:
    function = functools.partial(F.layer_norm, normalized_shape=x.shape[1:], eps=EPS)
    x_grad, *sums = by_autograd(lambda x, weight, bias: function(x, weight=weight, bias=bias), [x, *norm], grad)
    return x_grad + skip, torch.stack(sums), function(x, weight=norm.weight, bias=norm.bias)


def tuning_space() -> Iterator[Workload]:
    """qkv and fc1 of ViT-B at 512 pixels, -L at 384 and -S at 518, and w12 of -g, one picture and many; in float32 the widest, -7B, at 768;
    and LayerNorm alone, both passes."""
    small = {"rows": 19, "depth": 24, "columns": 48}
    for kind, options in variants.tuned_variants():
        half = kind == "bfloat16"
        shapes = ((1025, 768, 2304, "none"), (577, 1024, 4096, "gelu"), (1370, 384, 1152, "none"), (1370, 1536, 8192, "swiglu"))
        shapes += ((16400, 768, 2304, "none"), (9232, 1024, 4096, "gelu"))
        widest = ((2309, 4096, 12288, "none"),) if kind == "float32" else ()
        for shape in shapes if half else shapes[:1] + widest:
            few = {"rows_max": variants.FEW_ROWS} if half and shape[0] <= variants.FEW_ROWS else {}
            yield Workload(
                "layernorm linear", normalised_linear, _linear_arguments, _linear_ref,
                {"layernorm_linear": variants.linear_candidates(kind)},
                sizes=dict(zip(("rows", "depth", "columns", "activation"), shape, strict=True)), small=small, turn=1,
                simple=("layernorm_kernel", "linear_epilogue"), **{**options, "narrow": options["narrow"] | few},
            )  # fmt: skip
    for rows in (1029, 16464):
        yield Workload(
            "layernorm linear, rotated", normalised_linear, _linear_arguments, _linear_ref,
            {"layernorm_linear": variants.rotating(variants.linear_candidates("bfloat16"), HEAD)},
            sizes={"rows": rows, "depth": 768, "columns": 2304, "activation": "none", "tokens": 1029},
            small={"rows": 38, "depth": 24, "columns": 384, "tokens": 19}, narrow={"head": HEAD}, turn=1,
            simple=("layernorm_kernel", "rotate_kernel"), dtype=torch.bfloat16, shows={"tensor_cores": True},
        )  # fmt: skip
    alone = {"small": {"rows": 19, "depth": 24}, "shows": {"tensor_cores": False, "async_copies": False}}
    for rows, depth in ((1025, 768), (2740, 384), (16400, 768), (9232, 1024), (2309, 4096)):
        yield Workload(
            "layernorm", layer_norm, _norm_arguments, _norm_ref,
            {"layernorm": combinations([{}], BLOCK_M=(1, 2, 4), num_warps=(1, 2, 4, 8), num_stages=(1,))},
            sizes={"rows": rows, "depth": depth}, turn=3, **alone,
        )  # fmt: skip
    for rows, depth in ((2740, 384), (2050, 768), (1154, 1024), (2050, 1536)):
        yield Workload(
            "layernorm's gradients", layernorm_backward, _norm_gradient_arguments, _norm_gradient_ref,
            {"layernorm_backward": combinations([{}], BLOCK_M=(1, 2, 4, 8), STEPS=(1, 2, 4, 8), num_warps=(4, 8), num_stages=(1,))},
            sizes={"rows": rows, "depth": depth}, stage=BACKWARD, **alone,
        )  # fmt: skip

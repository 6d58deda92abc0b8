"""layernorm_linear: what is compiled and tuned of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ... import launch
from ...layernorm_linear import _layernorm_backward, layernorm_linear_ref
from ...parts import products
from ...parts.norms import LayerNorm, Statistics
from .. import variants
from ..workload import BACKWARD, Inputs, Workload, by_autograd, combinations

COMPILED = (  # see variants.COMPILED_ROWS: ViT-B, -S, rows that no 16-byte copy fits, and the widest, ViT-7B
    ("bfloat16", 768, 2304, ("none", "gelu", "gelu saved", "weight gradient", "norm gradient")),
    ("float16", 384, 1536, ("gelu saved", "weight gradient", "norm gradient")),
    ("float32", 384, 1536, ("none", "gelu saved", "weight gradient", "norm gradient")),
    ("tf32", 384, 1536, ("none", "gelu saved", "weight gradient")),
    ("bfloat16", 50, 150, ("gelu saved", "weight gradient", "norm gradient")),
    ("float32", 50, 150, ("gelu saved",)),
    ("float32", 4096, 12288, ("none",)),
)


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every launch of both passes."""
    yield from launch.distinct(_cases(family))


def _cases(family: str) -> Iterator[launch.CompileCase]:
    for name, where, precision, shows, (x, weight, grad) in variants.compiled_operands(COMPILED):
        norm, statistics = LayerNorm(x[0], x[0]), Statistics(*torch.empty((2, x.shape[0]), dtype=torch.float32, device="meta"))
        if name == "weight gradient":
            options = {"prologue": "layernorm", "norm": norm, "statistics": statistics}
            yield from launch.record(family, where, products.weight_gradient, grad, x, precision, **options, **shows)
        elif name == "norm gradient":
            arguments = (x, x, statistics, norm.weight, x, True, True)
            yield from launch.record(family, where, _layernorm_backward, *arguments, tensor_cores=False, async_copies=False)
        else:
            options = {"epilogue": name.removesuffix(" saved"), "save_pre": name.endswith("saved")}
            arguments = ("layernorm_linear", x, weight, precision)
            options |= {"bias": grad[0], "norm": norm, "eps": 1e-6}
            yield from launch.record(family, where, products.linear, *arguments, **options, **shows)


EPS = 1e-6


def _linear_arguments(inputs: Inputs, rows: int, depth: int, columns: int, gelu: bool) -> dict[str, Any]:
    return {
        "name": "layernorm_linear",
        "x": inputs.normal(rows, depth),
        "weight": inputs.normal(columns, depth, std=depth**-0.5),
        "precision": inputs.precision,
        "epilogue": "gelu" if gelu else "none",
        "bias": inputs.normal(columns),
        "norm": LayerNorm(inputs.normal(depth), inputs.normal(depth)),
        "eps": EPS,
    }


def _linear_ref(x, weight, bias, norm, eps, epilogue, **_) -> torch.Tensor:
    return layernorm_linear_ref(x, *norm, weight, bias, eps, "gelu" if epilogue == "gelu" else None)


def _statistics(x: torch.Tensor) -> Statistics:
    x = x.float()
    return Statistics(x.mean(1), torch.rsqrt(x.var(1, correction=0) + EPS))


def _weight_gradient_arguments(inputs: Inputs, rows: int, depth: int, columns: int) -> dict[str, Any]:
    x, norm = inputs.normal(rows, depth), LayerNorm(inputs.normal(depth), inputs.normal(depth))
    prologue = {"prologue": "layernorm", "norm": norm, "statistics": _statistics(x)}
    return {"grad": inputs.normal(rows, columns), "x": x, "precision": inputs.precision, **prologue}


def _weight_gradient_ref(grad, x, norm, **_) -> list[torch.Tensor]:
    weight = x.new_zeros(grad.shape[1], x.shape[1])
    return by_autograd(lambda weight: layernorm_linear_ref(x, *norm, weight, None, EPS), [weight], grad)


def _norm_gradient_arguments(inputs: Inputs, rows: int, depth: int) -> dict[str, Any]:
    grad, x, skip = (inputs.normal(rows, depth) for _ in range(3))
    needs = {"needs_input": True, "needs_norm": True}
    return {"grad": grad, "x": x, "statistics": _statistics(x), "norm_weight": inputs.normal(depth), "skip": skip, **needs}


def _norm_gradient_ref(grad, x, norm_weight, skip, **_) -> tuple[torch.Tensor, torch.Tensor]:
    norm = functools.partial(F.layer_norm, normalized_shape=x.shape[1:], eps=EPS)
    inputs = [x, norm_weight, torch.zeros_like(norm_weight)]
    x_grad, *sums = by_autograd(lambda x, weight, bias: norm(x, weight=weight, bias=bias), inputs, grad)
    return x_grad + skip, torch.stack(sums)


def tuning_space() -> Iterator[Workload]:
    """qkv and fc1 of ViT-B at 512 pixels, -L at 384 and -S at 518, one picture and many; in float32 the widest, -7B, at 768; and the
    gradients of training with two."""
    small = {"rows": 19, "depth": 24, "columns": 40}
    for kind, options in variants.tuned_variants():
        candidates = {"layernorm_linear": variants.linear_candidates(kind, prologue=True)}
        half = kind == "bfloat16"
        shapes = ((1025, 768, 2304, False), (577, 1024, 4096, True), (1370, 384, 1152, False))
        shapes += ((16400, 768, 2304, False), (9232, 1024, 4096, True))
        widest = ((2309, 4096, 12288, False),) if kind == "float32" else ()
        for shape in shapes if half else shapes[:1] + widest:
            few = {"rows_max": variants.FEW_ROWS} if half and shape[0] <= variants.FEW_ROWS else {}
            yield Workload(
                "layernorm linear", products.linear, _linear_arguments, _linear_ref, candidates,
                sizes=dict(zip(("rows", "depth", "columns", "gelu"), shape, strict=True)), small=small, turn=1,
                **{**options, "narrow": options["narrow"] | few},
            )  # fmt: skip
        yield Workload(
            "layernorm linear's weight gradient", products.weight_gradient, _weight_gradient_arguments, _weight_gradient_ref,
            {"weight_gradient": variants.weight_gradient_candidates(kind)},
            sizes={"rows": 2050, "depth": 768, "columns": 3072}, small=small, stage=BACKWARD, **options,
        )  # fmt: skip
    for rows, depth in ((2740, 384), (2050, 768), (1154, 1024)):
        yield Workload(
            "layernorm's gradients", _layernorm_backward, _norm_gradient_arguments, _norm_gradient_ref,
            {"layernorm_backward": combinations([{}], BLOCK_M=(1, 2, 4, 8), STEPS=(1, 2, 4, 8), num_warps=(4, 8), num_stages=(1,))},
            sizes={"rows": rows, "depth": depth}, small={"rows": 19, "depth": 24}, stage=BACKWARD,
            shows={"tensor_cores": False, "async_copies": False},
        )  # fmt: skip

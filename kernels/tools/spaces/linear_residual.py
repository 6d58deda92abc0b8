"""linear_residual: what is compiled and tuned of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ... import launch
from ...cpu.linear import activated
from ...linear_residual import linear_residual_ref
from ...parts import products
from .. import variants
from ..workload import BACKWARD, Inputs, Workload, by_autograd

COMPILED = (  # see variants.COMPILED_ROWS: the projection of ViT-B and fc2 of ViT-S, and rows that no 16-byte copy fits
    ("bfloat16", 768, 768, ("residual", "scaled", "weight gradient")),
    ("float16", 1536, 384, ("scaled", "weight gradient")),
    ("float32", 1536, 384, ("residual", "scaled", "weight gradient")),
    ("tf32", 1536, 384, ("scaled", "weight gradient")),
    ("bfloat16", 50, 50, ("scaled", "weight gradient")),
    ("float32", 50, 50, ("scaled", "weight gradient")),
)
COMPILED_CUBLAS = (("bfloat16", 768, 768, ("scaled",)),)


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every launch of both passes, and what follows cuBLAS's product."""
    with launch.using("linear_residual", variants.CUBLAS[-1]):
        others = list(_cases(family, COMPILED_CUBLAS, "cublas "))
    yield from launch.distinct((*_cases(family, COMPILED), *others))


def _cases(family: str, compiled: variants.Compiled, backend: str = "") -> Iterator[launch.CompileCase]:
    for name, where, precision, shows, (x, weight, grad) in variants.compiled_operands(compiled):
        if name == "weight gradient":
            options = {"scale": grad[0], "weight": weight}
            yield from launch.record(family, where, products.weight_gradient, grad, x, precision, **options, **shows)
        else:
            options = {"epilogue": "residual", "bias": grad[0], "scale": grad[0] if name == "scaled" else None, "extra": grad}
            arguments = ("linear_residual", x, weight, precision)
            cases = launch.record(family, backend + where, products.linear, *arguments, **options, **shows)
            yield from variants.simple(cases, products.linear_epilogue)


def _linear_arguments(inputs: Inputs, rows: int, depth: int, columns: int) -> dict[str, Any]:
    return {
        "name": "linear_residual",
        "x": inputs.normal(rows, depth),
        "weight": inputs.normal(columns, depth, std=depth**-0.5),
        "precision": inputs.precision,
        "epilogue": "residual",
        "bias": inputs.normal(columns),
        "scale": inputs.normal(columns),
        "extra": inputs.normal(rows, columns),
    }


def _linear_ref(x, weight, bias, scale, extra, **_) -> torch.Tensor:
    return linear_residual_ref(x, weight, bias, extra, scale)


def scaled_weight_gradient_arguments(inputs: Inputs, rows: int, depth: int, columns: int, activation: str) -> dict[str, Any]:
    """Keywords of ``products.weight_gradient`` for a layer with LayerScale."""
    x = inputs.normal(rows, 2 * depth if activation == "swiglu" else depth)
    grad, scale = inputs.normal(rows, columns), inputs.normal(columns)
    weight = inputs.normal(columns, depth, std=depth**-0.5)
    return {"grad": grad, "x": x, "precision": inputs.precision, "activation": activation, "scale": scale, "weight": weight}


def scaled_weight_gradient_ref(grad, x, precision, activation, scale, weight) -> list[torch.Tensor]:
    """The gradients of weight and scale, by autograd."""
    x, none = x if activation == "none" else activated(x, activation), torch.zeros_like(grad)
    return by_autograd(lambda weight, scale: linear_residual_ref(x, weight, None, none, scale), [weight, scale], grad)


def tuning_space() -> Iterator[Workload]:
    """The projection and fc2 of ViT-B at 512 pixels, -L at 384 and -S at 518, one picture and many; and a gradient of training with two."""
    small = {"rows": 19, "depth": 24, "columns": 40}
    for kind, options in variants.tuned_variants():
        candidates = {"linear_residual": variants.linear_candidates(kind)}
        half = kind == "bfloat16"
        shapes = ((1025, 768, 768), (577, 4096, 1024), (1370, 1536, 384), (16400, 768, 768), (9232, 4096, 1024))
        for shape in shapes if half else shapes[:1]:
            few = {"rows_max": variants.FEW_ROWS} if half and shape[0] <= variants.FEW_ROWS else {}
            yield Workload(
                "linear residual", products.linear, _linear_arguments, _linear_ref, candidates,
                sizes=dict(zip(("rows", "depth", "columns"), shape, strict=True)), small=small, turn=2,
                simple=("linear_epilogue",), **{**options, "narrow": options["narrow"] | few},
            )  # fmt: skip
        yield Workload(
            "linear residual's weight gradient", products.weight_gradient, scaled_weight_gradient_arguments, scaled_weight_gradient_ref,
            {"weight_gradient": variants.weight_gradient_candidates(kind)},
            sizes={"rows": 2050, "depth": 768, "columns": 768, "activation": "none"}, small=small, stage=BACKWARD, **options,
        )  # fmt: skip

"""layernorm_mlp: what is compiled and tuned of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ... import launch
from ...cpu.linear import activated
from ...parts import products
from .. import variants
from ..workload import BACKWARD, Inputs, Workload, by_autograd
from .linear_residual import scaled_weight_gradient_arguments, scaled_weight_gradient_ref

PASSES = ("pre gradient", "weight gradient", "scaled weight gradient")  # those of an activation, after whose name
COMPILED = (  # see variants.COMPILED_ROWS: fc2, (N, K), of ViT-B and -S, and rows that no 16-byte copy fits
    ("bfloat16", 3072, 768, tuple(f"{activation} {name}" for activation in products.ACTIVATIONS for name in PASSES)),
    ("float16", 1536, 384, ("gelu pre gradient", "gelu scaled weight gradient", "swiglu scaled weight gradient")),
    ("float32", 1536, 384, ("gelu pre gradient", "gelu scaled weight gradient", "swiglu pre gradient", "swiglu scaled weight gradient")),
    ("tf32", 1536, 384, ("gelu pre gradient", "gelu scaled weight gradient", "swiglu pre gradient", "swiglu scaled weight gradient")),
    ("bfloat16", 150, 50, ("gelu pre gradient", "gelu scaled weight gradient")),
)
COMPILED_CUBLAS = (("bfloat16", 3072, 768, ("gelu pre gradient", "swiglu pre gradient")),)


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """The launches that the two ops it is made of do not have, and what follows cuBLAS's product."""
    with launch.using("activation_input_gradient", variants.CUBLAS[-1]):
        others = list(_cases(family, COMPILED_CUBLAS, "cublas "))
    yield from launch.distinct((*_cases(family, COMPILED), *others))


def _cases(family: str, compiled: variants.Compiled, backend: str = "") -> Iterator[launch.CompileCase]:
    for what, where, precision, shows, (hidden, w2, grad) in variants.compiled_operands(compiled):
        activation, name = what.split(maxsplit=1)
        pre = hidden.new_empty(len(hidden), 2 * hidden.shape[1]) if activation == "swiglu" else hidden
        if name == "pre gradient":
            options = {"epilogue": "gradient", "activation": activation, "extra": pre}
            arguments = ("activation_input_gradient", grad, w2, precision)
            cases = launch.record(family, backend + where, products.linear, *arguments, **options, **shows)
            yield from variants.simple(cases, products.linear_epilogue)
        else:
            scaled = {"scale": grad[0], "weight": w2} if name.startswith("scaled") else {}
            arguments = (grad, pre, precision)
            yield from launch.record(family, where, products.weight_gradient, *arguments, activation=activation, **scaled, **shows)


def _activation_gradient_arguments(inputs: Inputs, rows: int, depth: int, hidden: int, activation: str) -> dict[str, Any]:
    return {
        "name": "activation_input_gradient",
        "x": inputs.normal(rows, depth),
        "weight": inputs.normal(depth, hidden, std=hidden**-0.5),
        "precision": inputs.precision,
        "epilogue": "gradient",
        "activation": activation,
        "extra": inputs.normal(rows, 2 * hidden if activation == "swiglu" else hidden),
    }


def _activation_gradient_ref(x, weight, extra, activation, **_) -> list[torch.Tensor]:
    return by_autograd(lambda pre: F.linear(activated(pre, activation), weight), [extra], x)


def tuning_space() -> Iterator[Workload]:
    """What training adds to the two ops' own launches: ViT-B with two pictures of 512 pixels, ViT-L with eight of 384."""
    small = {"rows": 19, "depth": 24, "hidden": 40}
    for kind, options in variants.tuned_variants():
        shapes = ((2050, 768, 3072, "gelu"), (4616, 1024, 4096, "gelu"), (2740, 1536, 4096, "swiglu"), (1025, 768, 3072, "gelu"))
        for shape in shapes if kind == "bfloat16" else shapes[:1]:
            few = {"rows_max": variants.FEW_ROWS} if kind == "bfloat16" and shape[0] <= variants.FEW_ROWS else {}
            yield Workload(
                "activation's input gradient", products.linear, _activation_gradient_arguments, _activation_gradient_ref,
                {"activation_input_gradient": variants.linear_candidates(kind)},
                sizes=dict(zip(("rows", "depth", "hidden", "activation"), shape, strict=True)), small=small, stage=BACKWARD,
                simple=("linear_epilogue",), **{**options, "narrow": options["narrow"] | few},
            )  # fmt: skip
        for activation in ("gelu", "swiglu"):
            yield Workload(
                "weight gradient behind an activation", products.weight_gradient, scaled_weight_gradient_arguments,
                scaled_weight_gradient_ref, {"weight_gradient": variants.weight_gradient_candidates(kind)},
                sizes={"rows": 2050, "depth": 3072, "columns": 768, "activation": activation},
                small={"rows": 19, "depth": 24, "columns": 40}, stage=BACKWARD, **options,
            )  # fmt: skip

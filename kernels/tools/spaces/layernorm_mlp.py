"""layernorm_mlp: what is compiled and tuned of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ... import launch
from ...parts import products
from .. import variants
from ..workload import BACKWARD, Inputs, Workload, by_autograd
from .linear_residual import scaled_weight_gradient_arguments, scaled_weight_gradient_ref

COMPILED = (  # see variants.COMPILED_ROWS: fc2, (N, K), of ViT-B and -S, and rows that no 16-byte copy fits
    ("bfloat16", 3072, 768, ("pre gradient", "weight gradient", "scaled weight gradient")),
    ("float16", 1536, 384, ("pre gradient", "scaled weight gradient")),
    ("float32", 1536, 384, ("pre gradient", "scaled weight gradient")),
    ("tf32", 1536, 384, ("pre gradient", "scaled weight gradient")),
    ("bfloat16", 150, 50, ("pre gradient", "scaled weight gradient")),
)


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """The launches that the two ops it is made of do not have."""
    yield from launch.distinct(_cases(family))


def _cases(family: str) -> Iterator[launch.CompileCase]:
    for name, where, precision, shows, (pre, w2, grad) in variants.compiled_operands(COMPILED):
        if name == "pre gradient":
            arguments = ("gelu_input_gradient", grad, w2, precision)
            yield from launch.record(family, where, products.linear, *arguments, epilogue="gelu_gradient", extra=pre, **shows)
        else:
            options = {"prologue": "gelu", "scale": grad[0], "weight": w2} if name.startswith("scaled") else {"prologue": "gelu"}
            yield from launch.record(family, where, products.weight_gradient, grad, pre, precision, **options, **shows)


def _gelu_gradient_arguments(inputs: Inputs, rows: int, depth: int, hidden: int) -> dict[str, Any]:
    return {
        "name": "gelu_input_gradient",
        "x": inputs.normal(rows, depth),
        "weight": inputs.normal(depth, hidden, std=hidden**-0.5),
        "precision": inputs.precision,
        "epilogue": "gelu_gradient",
        "extra": inputs.normal(rows, hidden),
    }


def _gelu_gradient_ref(x, weight, extra, **_) -> list[torch.Tensor]:
    return by_autograd(lambda pre: F.linear(F.gelu(pre), weight), [extra], x)


def tuning_space() -> Iterator[Workload]:
    """What training adds to the two ops' own launches: ViT-B with two pictures of 512 pixels, ViT-L with eight of 384."""
    for kind, options in variants.tuned_variants():
        for rows, depth, hidden in ((2050, 768, 3072), (4616, 1024, 4096))[: 2 if kind == "bfloat16" else 1]:
            yield Workload(
                "GELU's input gradient", products.linear, _gelu_gradient_arguments, _gelu_gradient_ref,
                {"gelu_input_gradient": variants.linear_candidates(kind, prologue=False)},
                sizes={"rows": rows, "depth": depth, "hidden": hidden}, small={"rows": 19, "depth": 24, "hidden": 40},
                stage=BACKWARD, **options,
            )  # fmt: skip
        yield Workload(
            "weight gradient behind GELU", products.weight_gradient, scaled_weight_gradient_arguments, scaled_weight_gradient_ref,
            {"weight_gradient": variants.weight_gradient_candidates(kind)},
            sizes={"rows": 2050, "depth": 3072, "columns": 768, "prologue": "gelu"}, small={"rows": 19, "depth": 24, "columns": 40},
            stage=BACKWARD, **options,
        )  # fmt: skip

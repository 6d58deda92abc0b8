"""argmax_upsample: what is compiled and tuned of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ... import launch
from ...argmax_upsample import _forward, upsample_argmax_ref
from ...parts.maps import channels_last, padded
from ..workload import FORWARD, RARE, Inputs, Workload, combinations

# (dtype, K, memory, align_corners, whether the probability is asked for) that are compiled: 300 classes have labels of int16. Left
# out, for CI's time: the other products of these. A dtype is a conversion at the loads, coordinates are integers before the loop over the
# classes, and the probability only adds to what is there without it.
COMPILED = (
    (torch.bfloat16, 150, "padded", False, False),
    (torch.bfloat16, 150, "padded", True, True),
    (torch.bfloat16, 150, "channels_last", True, False),
    (torch.bfloat16, 150, "contiguous", True, False),
    (torch.bfloat16, 150, "contiguous", False, True),
    (torch.bfloat16, 12, "channels_last", False, True),
    (torch.float16, 300, "padded", False, True),
    (torch.float32, 150, "padded", False, True),
    (torch.float32, 150, "channels_last", False, True),
    (torch.float32, 150, "contiguous", False, True),
)


def compile_cases(family: str) -> Iterable[launch.CompileCase]:
    """Every shipped configuration: all orders in memory, both rules of coordinates, with and without the probability."""
    for dtype, classes, memory, align_corners, probability in COMPILED:
        logits = _logits(torch.empty(2, classes, 16, 24, dtype=dtype, device="meta"), memory)
        name = str(dtype).removeprefix("torch.")
        variant = f"K={classes} align_corners={align_corners}{' probability' if probability else ''} {memory} {name}"
        arguments = (logits, 64, 96, align_corners, probability)
        yield from launch.record(family, variant, _forward, *arguments, tensor_cores=False, async_copies=False)


def _logits(x: torch.Tensor, memory: str) -> torch.Tensor:
    """A contiguous map in the named order: as it is, channels-last, or channels-last and padded."""
    return {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last, "padded": padded}[memory](x)


def _tuned_arguments(inputs: Inputs, batch: int, classes: int, side: int, memory: str) -> dict[str, Any]:
    """Logits that are multiples of 1/16, for a resize by two: all that follows is exact in float32, and so the labels are."""
    logits = inputs.normal(batch, classes, side, side)
    logits = _logits((logits.float() * 16).round().div(16).to(logits.dtype), memory)
    return {"logits": logits, "height": 2 * side, "width": 2 * side, "align_corners": False, "probability": False}


def _labels_ref(logits: torch.Tensor, height: int, width: int, align_corners: bool, probability: bool) -> torch.Tensor:
    return upsample_argmax_ref(logits, (height, width), align_corners)


def _candidates(block_k: Sequence[int]) -> list[dict[str, int]]:
    """1 to 8 elements a thread: 16 spill."""
    found = combinations([{}], BLOCK_P=(16, 32, 64, 128, 256, 512), BLOCK_K=block_k, num_warps=(4, 8), num_stages=(1,))
    return [c for c in found if 1 <= c["BLOCK_P"] * c["BLOCK_K"] // (32 * c["num_warps"]) <= (8 if c["BLOCK_K"] > 4 else 4)]


def tuning_space() -> Iterator[Workload]:
    """ADE20K's 150 classes at 512 pixels, as a model's head gives them and side by side, and the few classes of a small model."""
    for batch, classes, side, memory, block_k in (
        (1, 150, 256, "padded", (16, 32, 64)),
        (16, 150, 256, "padded", (16, 32, 64)),
        (1, 9, 96, "channels_last", (16, 32, 64)),
        (1, 150, 256, "contiguous", (1, 2, 4)),
    ):
        yield Workload(
            "argmax", _forward, _tuned_arguments, _labels_ref, {"upsample_argmax": _candidates(block_k)},
            sizes={"batch": batch, "classes": classes, "side": side, "memory": memory},
            small={"batch": 1, "classes": min(classes, 20), "side": 5},
            stage=RARE if memory == "contiguous" else FORWARD, turn=5,
            shows={"tensor_cores": False, "async_copies": False},
        )  # fmt: skip

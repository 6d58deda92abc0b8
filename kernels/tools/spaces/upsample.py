"""upsample: what is compiled and tuned of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ... import launch
from ...parts.maps import padded
from ...upsample import _forward, upsample_backward, upsample_bilinear_ref
from ..workload import BACKWARD, FORWARD, RARE, Inputs, Workload, by_autograd, combinations

# (dtype, C, align_corners, passes) that are compiled. Left out, for CI's time: the other products of these. Either width is one block of
# the table, coordinates are integers that no dtype enters, and a dtype is a conversion at the loads and the store; nine taps are the
# depth head's, which aligns corners and has few channels. The 150 channels are a multiple of 16 apart, as a model's logits are.
COMPILED = (
    (torch.bfloat16, 256, True, ("forward", "gradient")),
    (torch.bfloat16, 256, False, ("forward", "gradient")),
    (torch.bfloat16, 150, False, ("forward", "gradient")),
    (torch.bfloat16, 32, True, ("forward", "gradient", "nine taps")),
    (torch.float16, 256, True, ("forward",)),
    (torch.float16, 32, True, ("nine taps",)),
    (torch.float32, 256, False, ("forward", "gradient")),
    (torch.float32, 32, True, ("nine taps",)),
)


def compile_cases(family: str) -> Iterable[launch.CompileCase]:
    """Every shipped configuration, forward and backward, at the sizes of a fusion level and of the head's nine taps."""
    for dtype, channels, align_corners, passes in COMPILED:
        x = padded(torch.empty(2, channels, 24, 32, dtype=dtype, device="meta"))
        launchers = {
            "forward": (_forward, 48, 64, align_corners),
            "gradient": (upsample_backward, (12, 16), align_corners),
            "nine taps": (upsample_backward, (12, 16), align_corners, 3),
        }
        for name in passes:
            launcher, *arguments = launchers[name]
            variant = f"{name} C={channels} align_corners={align_corners} {str(dtype).removeprefix('torch.')}"
            yield from launch.record(family, variant, launcher, x, *arguments, tensor_cores=False, async_copies=False)


def _resize_arguments(inputs: Inputs, batch: int, channels: int, side: int, size: int) -> dict[str, Any]:
    return {"x": padded(inputs.normal(batch, channels, side, side)), "height": size, "width": size, "align_corners": True}


def _gradient_arguments(inputs: Inputs, batch: int, channels: int, side: int, size: int, taps: int) -> dict[str, Any]:
    return {"grad": padded(inputs.normal(batch, channels, size, size)), "source_size": (side, side), "align_corners": True, "taps": taps}


def _forward_ref(x: torch.Tensor, height: int, width: int, align_corners: bool) -> torch.Tensor:
    return upsample_bilinear_ref(x, (height, width), align_corners)


def _upsample_backward_ref(grad: torch.Tensor, source_size: tuple[int, int], align_corners: bool, taps: int) -> torch.Tensor:
    """:func:`upsample_backward` by autograd: each tap is resized by itself, and sees the gradient moved by its place in the window."""
    (batch, channels, height, width), reach = grad.shape, taps // 2
    padded = F.pad(grad, (reach,) * 4)
    parts = []
    for dy, dx in itertools.product(range(taps), repeat=2):
        moved = padded[:, :, 2 * reach - dy :][:, :, :height, 2 * reach - dx :][..., :width]
        source = grad.new_zeros((batch, channels, *source_size))
        parts += by_autograd(functools.partial(upsample_bilinear_ref, size=(height, width), align_corners=align_corners), [source], moved)
    return torch.cat(parts, dim=1)


# 4 to 32 elements a thread.
CANDIDATES = [
    candidate
    for candidate in combinations([{}], BLOCK_P=(16, 32, 64, 128, 256), BLOCK_C=(32, 64, 128, 256), num_warps=(4, 8), num_stages=(1,))
    if 4 <= candidate["BLOCK_P"] * candidate["BLOCK_C"] // (32 * candidate["num_warps"]) <= 32
]
NARROW = [candidate for candidate in CANDIDATES if candidate["BLOCK_C"] == 32]
WIDE = [candidate for candidate in CANDIDATES if candidate["BLOCK_C"] > 32]


def tuning_space() -> Iterator[Workload]:
    """The last level of the neck at 512 and 518 pixels, batch 1 and 16; logits; few channels; and what training adds: the gradients."""
    shows = {"tensor_cores": False, "async_copies": False}
    blocks = {256: WIDE, 128: WIDE, 150: CANDIDATES, 32: NARROW}
    small = {"batch": 1, "channels": 5, "side": 3, "size": 5}
    for batch, channels, side, size in (
        (1, 256, 128, 256),
        (16, 256, 128, 256),
        (1, 128, 148, 296),
        (1, 150, 256, 512),
        (16, 150, 256, 512),
        (1, 32, 96, 192),
    ):
        yield Workload(
            "upsample", _forward, _resize_arguments, _forward_ref, {"upsample_bilinear": blocks[channels]},
            sizes={"batch": batch, "channels": channels, "side": side, "size": size},
            small=small, stage=RARE if channels == 32 else FORWARD, turn=6, shows=shows,
        )  # fmt: skip
    for channels, taps in ((256, 1), (150, 1), (32, 3)):
        yield Workload(
            "upsample gradient", upsample_backward, _gradient_arguments, _upsample_backward_ref,
            {"upsample_bilinear_backward": blocks[channels]},
            sizes={"batch": 2, "channels": channels, "side": 128, "size": 256, "taps": taps},
            small=small, stage=BACKWARD, shows=shows,
        )  # fmt: skip

"""attention: what is compiled and tuned of it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from ... import launch
from ...attention import LOG2_E, _backward, _forward, attention_ref
from ..workload import BACKWARD, FORWARD, RARE, Inputs, Workload, by_autograd, combinations, tiles

FEW_PICTURES = 2  # up to so many, large blocks of queries leave multiprocessors without work: the tuning proposes an entry of its own

# What stands for the shapes that the models use, and for every entry of the tables: both tails, of 1025 = 16*64+1 and of 1370 = 21*64+26,
# a padded head dimension, the widest. Tokens enter the code by nothing but the tail. Left out: float16 at the other shapes (the code of
# bfloat16, with another MMA) and the small tail of float32 (the wide one has more registers).
COMPILED_SHAPES = (
    (64, 1025, launch.DTYPES[2:]),
    (64, 1370, (torch.float32, torch.bfloat16)),
    (80, 1025, launch.DTYPES[2:]),
    (128, 1370, (torch.float32, torch.float16)),
)


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every kernel of both passes: the shapes above, float32 exact and with tf32, and a tensor at an odd address, which TMA cannot read."""
    yield from launch.distinct(_cases(family))


def _cases(family: str) -> Iterator[launch.CompileCase]:
    for dim, tokens, dtypes in COMPILED_SHAPES:
        for dtype in dtypes:
            qkv = _meta_qkv(dim, tokens, dtype)
            name = f"D={dim} N={tokens} {str(dtype).removeprefix('torch.')}"
            yield from launch.record(family, name, _both_passes, qkv, "ieee", tensor_cores=dtype != torch.float32)
            many = _meta_qkv(dim, tokens, dtype, batch=FEW_PICTURES + 1)  # another case only where the table has another entry
            yield from launch.record(family, name + " many", _both_passes, many, "ieee", tensor_cores=dtype != torch.float32)
            if dtype == torch.float32:
                yield from launch.record(family, name + " tf32", _both_passes, qkv, "tf32")
    odd = _meta_qkv(64, 1370, torch.bfloat16, offset=1)
    yield from launch.record(family, "D=64 N=1370 bfloat16 odd address", _both_passes, odd, "ieee", async_copies=False)


def _meta_qkv(dim: int, tokens: int, dtype: torch.dtype, offset: int = 0, batch: int = 2, heads: int = 4) -> torch.Tensor:
    shape = (batch, tokens, 3 * heads * dim)
    return torch.empty(math.prod(shape) + offset, dtype=dtype, device="meta")[offset:].view(shape)


def _both_passes(qkv: torch.Tensor, precision: str, num_heads: int = 4) -> None:
    out, lse = _forward(qkv, num_heads, 0.125, precision)
    _backward(out, qkv, out, lse, num_heads, 0.125, precision)


def _forward_arguments(inputs: Inputs, batch: int, heads: int, tokens: int, dim: int) -> dict[str, Any]:
    qkv = inputs.normal(batch, tokens, 3 * heads * dim)
    return {"qkv": qkv, "num_heads": heads, "scale": dim**-0.5, "precision": inputs.precision}


def _backward_arguments(inputs: Inputs, **sizes: int) -> dict[str, Any]:
    arguments = _forward_arguments(inputs, **sizes)
    out, lse = _forward_ref(**arguments)
    return {"dout": torch.randn_like(out), "out": out, "lse": lse, **arguments}


def _forward_ref(qkv, num_heads, scale, precision) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)[:2]
    scores = (q * scale) @ k.transpose(-1, -2)
    lse = torch.logsumexp(scores if scores.dtype == torch.float64 else scores.float(), -1) * LOG2_E
    return attention_ref(qkv, num_heads, scale), lse


def _backward_ref(qkv, dout, num_heads, scale, **_) -> list[torch.Tensor]:
    return by_autograd(functools.partial(attention_ref, num_heads=num_heads, scale=scale), [qkv], dout)


def _candidates(kind: str, dim: int) -> dict[str, list[dict[str, Any]]]:
    """Of each kernel, by the ``kind`` of product. On sm_90 other numbers of warps make ptxas serialise the forward's MMAs, and larger
    blocks make dkv spill; float32 without tensor cores spills in all but small ones."""
    names = "BLOCK_M BLOCK_N num_warps"
    if kind == "ieee":
        blocks = tiles(names, (16, 16, 4), (16, 32, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 16, 8), (64, 32, 8))
        few = combinations(blocks, num_stages=(2,), descriptor=(False, True))
        return {"attention_forward": few, "attention_backward_dq": few, "attention_backward_dkv": few}
    if kind == "tf32":
        blocks = tiles(names, (32, 32, 4), (64, 32, 4), (64, 32, 8), (32, 64, 8), (64, 64, 8), (128, 32, 8), (128, 64, 8))
        few = combinations(blocks, num_stages=(2, 3), descriptor=(True,))
        return {"attention_forward": few, "attention_backward_dq": few, "attention_backward_dkv": few}
    forward = tiles(names, (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8))
    dq = tiles(names, (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8), (64, 128, 8), (128, 128, 8))
    dkv = tiles(names, (32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8))
    pointers = combinations([forward[1], forward[4]], num_stages=(3,), descriptor=(False,)) if dim <= 64 else []
    return {
        "attention_forward": combinations(forward, num_stages=(2, 3, 4), descriptor=(True,)) + pointers,
        "attention_backward_dq": combinations(dq, num_stages=(2, 3), descriptor=(True, False)),
        "attention_backward_dkv": combinations(dkv, num_stages=(2, 3), descriptor=(True, False)),
    }


def tuning_space() -> Iterator[Workload]:
    """ViT-B at 512 pixels, -L at 384 and -S at 518, one picture and many; training with two; and heads that no model of the table has."""
    for kind, dtype, dim in itertools.product(("half", "tf32", "ieee"), (torch.bfloat16, torch.float32), (64, 128)):
        if (kind == "half") == (dtype == torch.float32):
            continue
        candidates = _candidates(kind, dim)
        forward, backward = {"attention_forward": candidates.pop("attention_forward")}, candidates
        options = {"dtype": dtype, "precision": "tf32" if kind == "tf32" else "ieee", "shows": {"tensor_cores": kind != "ieee"}}
        options["small"] = {"batch": 1, "heads": 2, "tokens": 37}
        usual = kind == "half" and dim == 64
        shapes = ((1, 12, 1025), (1, 16, 577), (1, 6, 1370), (16, 12, 1025), (4, 16, 1370))
        for batch, heads, tokens in shapes if usual else ((1, 12, 1025),):
            narrow = {"B_max": FEW_PICTURES} if usual and batch <= FEW_PICTURES else {}
            yield Workload(
                "attention", _forward, _forward_arguments, _forward_ref, forward,
                sizes={"batch": batch, "heads": heads, "tokens": tokens, "dim": dim},
                stage=FORWARD if dim == 64 else RARE, turn=3, narrow=narrow, **options,
            )  # fmt: skip
        for heads, tokens in ((12, 1025), (16, 577))[: 2 if usual else 1]:
            yield Workload(
                "attention gradient", _backward, _backward_arguments, _backward_ref, backward,
                sizes={"batch": 2, "heads": heads, "tokens": tokens, "dim": dim}, stage=BACKWARD if dim == 64 else RARE, **options,
            )  # fmt: skip

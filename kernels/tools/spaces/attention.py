"""attention: what is compiled and tuned of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ... import launch
from ...attention import LOG2_E, _aligned_like, _backward, _forward, attention_qkv_ref
from ...parts.rotation import rotate, rotated_ref
from ..workload import BACKWARD, FORWARD, RARE, Inputs, Workload, by_autograd, combinations, tiles

# What stands for the shapes that the models use, and for every entry of the tables: both tails, of 1025 = 16*64+1 and of 1370 = 21*64+26,
# padded head dimensions, the widest. Tokens enter the code by nothing but the tail. Left out: float16 at the other shapes (the code of
# bfloat16, with another MMA) and the small tail of float32 (the wide one has more registers). Three tensors are the code of a packed one.
COMPILED_SHAPES = (
    (64, 1025, launch.DTYPES[1:]),
    (64, 1370, (torch.float32, torch.bfloat16)),
    (72, 1025, launch.DTYPES[2:]),
    (80, 1025, launch.DTYPES[2:]),
    (128, 1370, (torch.float32, torch.float16)),
)
COMPILED_BIASES = ((64, 1025, launch.DTYPES[2:]), (64, 1370, (torch.float32, torch.bfloat16)), (128, 1370, (torch.float32, torch.float16)))
COMPILED_COUNTS = ((1, 8), (3, 8))  # (B, H): another case only where the table has another entry


def compile_cases(family: str) -> Iterator[launch.CompileCase]:
    """Every kernel of both passes: the shapes above, with and without a bias, float32 exact and with tf32."""
    yield from launch.distinct(_cases(family))


def _cases(family: str) -> Iterator[launch.CompileCase]:
    for what, shapes in (("", COMPILED_SHAPES), (" bias", COMPILED_BIASES)):
        for (dim, tokens, dtypes), (batch, heads) in itertools.product(shapes, COMPILED_COUNTS):
            for dtype in dtypes:
                q = torch.empty(batch, tokens, 3, heads, dim, dtype=dtype, device="meta")
                bias = _bias(Inputs("meta", dtype), heads, tokens) if what else None
                name = f"D={dim} N={tokens}{what} {str(dtype).removeprefix('torch.')}"
                several = "" if (batch, heads) == COMPILED_COUNTS[0] else f" {batch}x{heads}"
                shows = {"tensor_cores": dtype != torch.float32}
                yield from launch.record(family, name + several, _both_passes, q, bias, "ieee", **shows)
                if dtype == torch.float32:
                    yield from launch.record(family, f"{name} tf32{several}", _both_passes, q, bias, "tf32")
    for dim, dtype in ((64, torch.float32), (64, torch.bfloat16), (72, torch.float16)):
        q, k = torch.empty(1, 1029, 3, 12, dim, dtype=dtype, device="meta").unbind(2)[:2]
        table, name = torch.empty(2, 1029, dim // 2, device="meta"), f"D={dim} {str(dtype).removeprefix('torch.')}"
        for inverse in (False, True):
            yield from launch.record(
                family, name + " back" * inverse, rotate, q, k, q, k, table, inverse, tensor_cores=False, async_copies=False
            )


def _bias(inputs: Inputs, heads: int, tokens: int) -> torch.Tensor:
    """With rows that begin at multiples of 8 numbers, as BEiT's have."""
    bias = inputs.normal(heads, tokens, tokens)
    aligned = _aligned_like(bias)
    return aligned if bias.is_meta else aligned.copy_(bias)


def _both_passes(q: torch.Tensor, bias: torch.Tensor | None, precision: str) -> None:
    out, lse = _forward(q, None, None, 0.125, precision, bias)
    _backward(out, q, None, None, out, lse, 0.125, precision, bias, None, bias is not None)


def _forward_arguments(inputs: Inputs, batch: int, heads: int, tokens: int, dim: int, biased: bool) -> dict[str, Any]:
    q = inputs.normal(batch, tokens, 3, heads, dim)
    bias = _bias(inputs, heads, tokens) if biased else None
    return {"q": q, "k": None, "v": None, "scale": dim**-0.5, "precision": inputs.precision, "bias": bias}


def _backward_arguments(inputs: Inputs, **sizes: Any) -> dict[str, Any]:
    arguments = _forward_arguments(inputs, **sizes)
    out, lse = _forward_ref(**arguments)
    return {"dout": torch.randn_like(out), "out": out, "lse": lse, **arguments, "of_bias": arguments["bias"] is not None}


def _forward_ref(q, k, v, scale, precision, bias) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = q.unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q * scale, k) + (0 if bias is None else bias)
    lse = torch.logsumexp(scores if scores.dtype == torch.float64 else scores.float(), -1) * LOG2_E.value
    return attention_qkv_ref(q, k, v, scale, bias).contiguous(), lse


def _backward_ref(q, dout, scale, bias, **_) -> list[torch.Tensor]:
    def attend(q: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
        return attention_qkv_ref(*q.unbind(2), scale, *added)

    return by_autograd(attend, [q] if bias is None else [q, bias], dout)


def _bias_terms(dout, out, q, bias, **_) -> dict[int, float]:
    """The bias's gradient is weights * (dweights - delta): counted from the largest delta, which the rounding of ``out`` is part of."""
    return {} if bias is None else {1: (dout.double() * out.double()).unflatten(-1, (q.shape[3], -1)).sum(-1).abs().max().item()}


def _rotate_arguments(inputs: Inputs, batch: int, heads: int, tokens: int, dim: int) -> dict[str, Any]:
    return {"q": inputs.normal(batch, tokens, 3, heads, dim)}


def rotation_of(tokens: int, dim: int, device: torch.device) -> torch.Tensor:
    """A rotation of heads of ``dim`` channels, (2, tokens, dim / 2)."""
    angles = torch.arange(tokens * dim // 2, device=device).view(tokens, -1) % 63 / 10.0
    return torch.stack((angles.cos(), angles.sin()))


def _rotated(q: torch.Tensor) -> torch.Tensor:
    turned = q.new_empty((2, *q[:, :, 0].shape))
    rotate(*q.unbind(2)[:2], *turned, rotation_of(q.shape[1], q.shape[-1], q.device))
    return turned


def _rotated_ref(q: torch.Tensor) -> torch.Tensor:
    return torch.stack([rotated_ref(x, rotation_of(q.shape[1], q.shape[-1], q.device)) for x in q.unbind(2)[:2]])


def _candidates(kind: str, dim: int) -> dict[str, list[dict[str, Any]]]:
    """Of each kernel, by the ``kind`` of product. On sm_90 other numbers of warps make ptxas serialise the forward's MMAs, and larger
    blocks make dkv spill; float32 without tensor cores spills in all but small ones."""
    names = "BLOCK_M BLOCK_N num_warps"

    def all_of(forward: list[dict[str, Any]], *of_backward: list[dict[str, Any]], pipelined=(False,)) -> dict[str, list[dict[str, Any]]]:
        passes = zip(("dq", "dkv", "dbias"), of_backward, strict=True)
        return {
            "attention_forward": combinations(forward, PIPELINED=pipelined),
            **{f"attention_backward_{name}": found for name, found in passes},
        }

    if kind == "ieee":
        blocks = tiles(names, (16, 16, 4), (16, 32, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 16, 8), (64, 32, 8))
        few = combinations(blocks, num_stages=(2,), descriptor=(False, True))
        return all_of(few, few, few, few)
    if kind == "tf32":
        blocks = tiles(names, (32, 32, 4), (64, 32, 4), (64, 32, 8), (32, 64, 8), (64, 64, 8), (128, 32, 8), (128, 64, 8))
        few = combinations(blocks, num_stages=(2, 3), descriptor=(True,))
        return all_of(few, few, few, few)
    forward = tiles(names, (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8))
    dq = tiles(names, (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8), (64, 128, 8), (128, 128, 8))
    dkv = tiles(names, (32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8))
    dbias = tiles(names, (32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8))
    pointers = combinations([forward[1], forward[4]], num_stages=(3,), descriptor=(False,)) if dim <= 64 else []
    return all_of(
        combinations(forward, num_stages=(2, 3, 4), descriptor=(True,)) + pointers,
        *(combinations(found, num_stages=(2, 3), descriptor=(True, False)) for found in (dq, dkv, dbias)),
        pipelined=(False, True),
    )


def tuning_space() -> Iterator[Workload]:
    """ViT-B at 512 pixels, -L at 384 and -S at 518, one picture and many; the SO400m; BEiT-L; training with two; heads that few have."""
    for kind, dtype, dim, biased in itertools.product(
        ("half", "tf32", "ieee"), (torch.bfloat16, torch.float32), (64, 72, 128), (False, True)
    ):
        if (kind == "half") == (dtype == torch.float32) or dim == 72 and (kind != "half" or biased):
            continue
        candidates = _candidates(kind, dim)
        forward, backward = {"attention_forward": candidates.pop("attention_forward")}, candidates
        if not biased:
            del backward["attention_backward_dbias"]
        options = {"dtype": dtype, "precision": "tf32" if kind == "tf32" else "ieee", "shows": {"tensor_cores": kind != "ieee"}}
        options["small"] = {"batch": 1, "heads": 2, "tokens": 37}
        usual, what = kind == "half" and dim == 64, "attention with a bias" if biased else "attention"
        shapes = ((1, 16, 577), (1, 16, 1025), (16, 16, 577)) if biased else SHAPES
        for batch, heads, tokens in shapes if usual else ((1, 12, 1025),):
            yield Workload(
                what, _forward, _forward_arguments, _forward_ref, forward,
                sizes={"batch": batch, "heads": heads, "tokens": tokens, "dim": dim, "biased": biased},
                stage=FORWARD if dim <= 72 else RARE, turn=3, **options,
            )  # fmt: skip
        for heads, tokens in ((12, 1025), (16, 577))[: 2 if usual else 1]:
            yield Workload(
                f"{what}: gradient", _backward, _backward_arguments, _backward_ref, backward,
                sizes={"batch": 2, "heads": heads, "tokens": tokens, "dim": dim, "biased": biased},
                stage=BACKWARD if dim <= 72 else RARE, terms=_bias_terms, **options,
            )  # fmt: skip
    for dtype, batch in itertools.product((torch.bfloat16, torch.float32), (1, 16)):
        yield Workload(
            "rotation", _rotated, _rotate_arguments, _rotated_ref,
            {"rotate": combinations(tiles("ROWS num_warps", (4, 4), (8, 4), (16, 4), (32, 4), (32, 8)), num_stages=(1,))},
            sizes={"batch": batch, "heads": 12, "tokens": 1029, "dim": 64}, small={"batch": 1, "heads": 2, "tokens": 19}, dtype=dtype,
            shows={"tensor_cores": False, "async_copies": False},
        )  # fmt: skip


SHAPES = ((1, 6, 1370), (1, 12, 1025), (1, 16, 577), (1, 16, 1370), (16, 12, 1025), (4, 16, 1370))  # (B, H, N)

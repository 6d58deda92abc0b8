"""What the spaces of several ops share: the kinds of product, and of the linear layers' launches the operands and the candidates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import launch
from .workload import combinations, tiles


def compiled_variants() -> Iterator[tuple[torch.dtype, str, str, dict[str, bool]]]:
    """For the compile cases: (dtype, precision, their name, whether tensor cores must show) of every way to launch."""
    for dtype in launch.DTYPES:
        yield dtype, "ieee", str(dtype).removeprefix("torch."), {"tensor_cores": dtype != torch.float32}
    yield torch.float32, "tf32", "tf32", {"tensor_cores": True}


def simple(cases: Iterable[launch.CompileCase], *functions: Any) -> Iterator[launch.CompileCase]:
    """The cases; of those functions, which multiply no matrices, no tensor cores and no asynchronous copies have to show."""
    for case in cases:
        yield replace(case, tensor_cores=False, async_copies=False) if case.function in functions else case


# Which of all shapes, dtypes and epilogues the encoder's linear ops compile, and what they leave out, for CI's time. Depths and widths
# enter the code only by whether 16 divides them: one aligned shape a dtype, and one that no 16-byte copy fits, stand for all. Rows do not
# enter it. bfloat16 has every epilogue and prologue; float16, the same code with another MMA, and float32 have what takes the most
# registers: the pre-activation saved, LayerScale. Vectors have x's dtype and a bias is there: float32 vectors and none are wider loads and
# fewer.
Compiled = Sequence[tuple[str, int, int, Sequence[str]]]
COMPILED_ROWS = (577, 9 * 1025)  # the second, many pictures', is a case of its own only where the table has another entry for it


def compiled_operands(
    compiled: Compiled,
) -> Iterator[tuple[str, str, str, dict[str, Any], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Of (kind of product, K, N, launches), for each launch and number of rows: (launch, case's name, precision, what must show,
    (x (rows, K), weight (N, K), grad (rows, N)))."""
    kinds = {name: (dtype, precision, shows) for dtype, precision, name, shows in compiled_variants()}
    for kind, depth, columns, launches in compiled:
        dtype, precision, shows = kinds[kind]
        for rows, name in itertools.product(COMPILED_ROWS, launches):
            operands = tuple(torch.empty(s, dtype=dtype, device="meta") for s in ((rows, depth), (columns, depth), (rows, columns)))
            where = f"{name} {kind} M={rows} K={depth} N={columns}"
            yield name, where, precision, {**shows, "async_copies": depth % 8 == 0}, operands


# Up to so many rows (one picture's tokens) large tiles leave multiprocessors without work: entries of their own are proposed.
FEW_ROWS = 2048


def tuned_variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """For the workloads: (kind of product, their options) of every way to launch that has code of its own; tf32 gets its own entries."""
    for dtype, precision, kind, shows in compiled_variants():
        if dtype != torch.float16:
            narrow = {"precision": precision} if precision == "tf32" else {}
            yield kind, {"dtype": dtype, "precision": precision, "shows": shows, "narrow": narrow}


# The product by cuBLAS, and what follows it in one launch.
CUBLAS = combinations([{"backend": "cublas"}], BLOCK_M=(16, 32), BLOCK_N=(64, 128), num_warps=(4,), num_stages=(1,))


def linear_candidates(kind: str) -> list[dict[str, Any]]:
    """Of :func:`linear`, by ``kind`` of product."""
    names = "BLOCK_M BLOCK_N BLOCK_K num_warps PARTS"
    if kind == "float32":
        blocks = tiles(names, (32, 32, 32, 4, 2), (32, 64, 32, 4, 2), (64, 32, 32, 4, 2))
        blocks += tiles(names, (64, 64, 16, 8, 2), (64, 64, 32, 4, 2), (64, 64, 32, 8, 2))
        stages, loads = (2,), (True, False)
    elif kind == "tf32":
        blocks = tiles(names, (64, 64, 32, 4, 2), (64, 128, 32, 4, 2), (128, 64, 32, 4, 2), (128, 128, 32, 8, 2))
        stages, loads = (2, 3, 4), (True,)
    else:
        blocks = tiles(names, (64, 64, 64, 4, 2), (64, 128, 64, 4, 2), (128, 64, 64, 4, 2), (128, 128, 64, 4, 2), (128, 128, 64, 8, 2))
        blocks += tiles(
            names, (128, 256, 64, 8, 4), (128, 256, 64, 8, 8), (256, 128, 64, 8, 2), (256, 128, 64, 8, 4), (128, 128, 128, 8, 2)
        )
        stages, loads = (3, 4), (True,)
    own = combinations([{"backend": "triton", "GROUP": 8, **block} for block in blocks], num_stages=stages, descriptor=loads)
    own += [{**c, "persistent": True} for c in own if c["BLOCK_M"] == 256]  # a program fills a multiprocessor
    if kind == "bfloat16":
        own += [{**c, "GROUP": 1} for c in own[8:12]] + [{**c, "descriptor": False} for c in own[::8]]
    return own + CUBLAS


def rotating(candidates: Sequence[dict[str, Any]], head: int) -> list[dict[str, Any]]:
    """The candidates where heads of so many columns are turned: in the epilogue of ours, by a launch of its own behind cuBLAS's."""
    inside = [{**c, "PARTS": c["BLOCK_N"] // head, "rotate": True} for c in candidates if c["backend"] == "triton"]
    return [c for i, c in enumerate(inside) if c not in inside[:i]] + [c for c in candidates if c["backend"] == "cublas"]


def weight_gradient_candidates(kind: str) -> list[dict[str, Any]]:
    """Of :func:`weight_gradient`, by ``kind`` of product."""
    names = "BLOCK_N BLOCK_K num_warps"
    if kind == "float32":
        blocks = tiles(names, (32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8))
        return combinations(blocks, BLOCK_M=(16, 32), IN_REGISTERS=(False,), num_stages=(2,), descriptor=(True,))
    if kind == "tf32":
        blocks = tiles(names, (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8))
        return combinations(blocks, BLOCK_M=(32,), IN_REGISTERS=(False, True), num_stages=(2, 3), descriptor=(True,))
    blocks = tiles(names, (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8))
    found = combinations(blocks, BLOCK_M=(64,), IN_REGISTERS=(True, False), num_stages=(3, 4), descriptor=(True,))
    return found + combinations([blocks[0], blocks[2]], BLOCK_M=(128,), IN_REGISTERS=(True, False), num_stages=(2, 3), descriptor=(True,))

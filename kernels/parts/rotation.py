"""Rotary position embedding: pairs of a head's channels, d and d + D/2, turned by angles of their token.

    y[d] = x[d] * cos[d] - x[d + D/2] * sin[d]        y[d + D/2] = x[d + D/2] * cos[d] + x[d] * sin[d]

In a launch of its own 4*B*N*H*D elements are moved, for queries and keys. Behind their projection's product, in its epilogue
(``products``), only the table is: that is taken where it compiles leaner.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import launch
from .attention import _first


def rotated_ref(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x (B, N, H, D) turned by the angles whose cosine and sine are ``rotation`` (2, N, D/2), computed in the wider of both dtypes."""
    cosine, sine = rotation.to(torch.promote_types(rotation.dtype, x.dtype))[:, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def packed_rotated_ref(qkv: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """The queries and keys of qkv (B, N, 3*H*D) turned by ``rotation`` (2, N, D/2)."""
    q, k, v = qkv.unflatten(2, (3, -1, 2 * rotation.shape[2])).unbind(2)
    return torch.stack((rotated_ref(q, rotation), rotated_ref(k, rotation), v), dim=2).flatten(2)


def check_rotation(rotation: torch.Tensor | None, tokens: int, size: int | None, x: torch.Tensor) -> None:
    """TypeError or ValueError unless it can turn heads of ``size`` channels (None: of any) of so many tokens, on x's device; or is None."""
    if rotation is None:
        return
    if not isinstance(rotation, torch.Tensor):
        raise TypeError(f"rotation is a {type(rotation).__name__}: it must be a tensor")
    if rotation.dtype != torch.float32:
        raise TypeError(f"rotation is {rotation.dtype}: it must be float32")
    pairs = "D/2" if size is None else size // 2
    if rotation.ndim != 3 or rotation.shape[:2] != (2, tokens) or not rotation.shape[2] or size not in (None, 2 * rotation.shape[2]):
        raise ValueError(f"rotation has shape {tuple(rotation.shape)}: it must be (2, {tokens}, {pairs}), cosine and sine by token")
    if rotation.device != x.device:
        raise ValueError(f"rotation is on {rotation.device} and the input on {x.device}: they must be on one device")
    if rotation.requires_grad:
        raise ValueError("rotation requires a gradient, and has none")


@triton.jit
def _turn(of_x, of_y, table_ptr, b, start, N, H, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, INVERSE: tl.constexpr):
    """Rows start... of all heads of x, turned, into y, which may be x."""
    HALF: tl.constexpr = D // 2
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_HALF)
    inside = (rows < N)[:, None] & (columns < HALF)[None, :]
    table = table_ptr + tl.cast(rows, tl.int64)[:, None] * HALF + columns[None, :]
    cosine = tl.load(table, mask=inside, other=1.0)
    sine = tl.load(table + tl.cast(N, tl.int64) * HALF, mask=inside, other=0.0)
    if INVERSE:
        sine = -sine
    offsets = tl.cast(tl.arange(0, ROWS), tl.int64)[:, None]
    for head in range(0, H):
        x = _first(of_x, b, head, start) + offsets * of_x[2] + columns[None, :]
        y = _first(of_y, b, head, start) + offsets * of_y[2] + columns[None, :]
        first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(y, (first * cosine - second * sine).to(of_y[0].dtype.element_ty), mask=inside)
        tl.store(y + HALF, (second * cosine + first * sine).to(of_y[0].dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "H"])
def rotate_kernel(
    of_q,  # the pointer to (B, N, H, D), rows at multiples of UNIT, with the strides of B, N and H
    of_k,
    of_turned_q,
    of_turned_k,
    table_ptr,  # (2, N, D/2) float32: cosine and sine
    N,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One program: ROWS queries or keys, of all heads, turned."""
    blocks = tl.cdiv(N, ROWS)
    b = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * ROWS
    if tl.program_id(1) == 0:
        _turn(of_q, of_turned_q, table_ptr, b, start, N, H, D, ROWS, BLOCK_HALF, INVERSE)
    else:
        _turn(of_k, of_turned_k, table_ptr, b, start, N, H, D, ROWS, BLOCK_HALF, INVERSE)


def rotate(
    q: torch.Tensor, k: torch.Tensor, turned_q: torch.Tensor, turned_k: torch.Tensor, rotation: torch.Tensor, inverse: bool = False
) -> None:
    """One launch: write q and k (B, N, H, D) turned, or turned back; the same tensors may be read and written."""
    batch, tokens, heads, size = q.shape
    config = launch.config("rotate", launch.device_family(q.device), q.dtype, D=size, N=tokens, B=batch, H=heads)
    grid = (triton.cdiv(tokens, config["ROWS"]) * batch, 2)
    tensors = ((x, *x.stride()[:3]) for x in (q, k, turned_q, turned_k))
    constants = {"D": size, "BLOCK_HALF": triton.next_power_of_2(size // 2), "INVERSE": inverse, **config}
    launch.launch(rotate_kernel, grid, *tensors, rotation.contiguous(), tokens, heads, **constants)

"""Tiles of matrices and pieces of vectors, between memory and registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """A (ROWS, COLUMNS) tile of a contiguous (rows, columns) matrix; zeros beyond its edges."""
    if DESCRIPTOR:
        return source.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        offsets = i.to(tl.int64)[:, None] * columns + j[None, :]
        return tl.load(source + offsets, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def store_tile(target, tile, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """The counterpart of :func:`load_tile`; nothing is written beyond the edges."""
    if DESCRIPTOR:
        target.store([row, column], tile.to(target.dtype))
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        offsets = i.to(tl.int64)[:, None] * columns + j[None, :]
        tl.store(target + offsets, tile.to(target.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def load_vector(source, start, length, BLOCK: tl.constexpr):
    """BLOCK elements as float32; zeros beyond the end."""
    i = start + tl.arange(0, BLOCK)
    return tl.load(source + i, mask=i < length, other=0.0).to(tl.float32)

"""Tiles of matrices and pieces of vectors, between memory and registers.

A matrix is contiguous, (rows, columns); or it is one of the two halves of (rows, 2, columns), ``HALF``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _offsets(i, j, columns, HALF: tl.constexpr):
    if HALF is None:
        return i.to(tl.int64)[:, None] * columns + j[None, :]
    else:
        return i.to(tl.int64)[:, None] * (2 * columns) + (HALF * columns + j)[None, :]


@triton.jit
def load_tile(
    source, row, column, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr, HALF: tl.constexpr = None,
):  # fmt: skip
    """A (ROWS, COLUMNS) tile; zeros beyond the matrix's edges."""
    if DESCRIPTOR:
        if HALF is None:
            return source.load([row, column])
        else:
            return source.load([row, HALF, column]).reshape(ROWS, COLUMNS)
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        return tl.load(source + _offsets(i, j, columns, HALF), mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def store_tile(
    target, tile, row, column, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr, HALF: tl.constexpr = None,
):  # fmt: skip
    """The counterpart of :func:`load_tile`; nothing is written beyond the edges."""
    if DESCRIPTOR:
        if HALF is None:
            target.store([row, column], tile.to(target.dtype))
        else:
            target.store([row, HALF, column], tile.to(target.dtype).reshape(ROWS, 1, COLUMNS))
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        mask = (i < rows)[:, None] & (j < columns)[None, :]
        tl.store(target + _offsets(i, j, columns, HALF), tile.to(target.dtype.element_ty), mask=mask)


@triton.jit
def load_pair(source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """The same (ROWS, COLUMNS) tile of both matrices of (2, rows, columns), one below the other: (2 * ROWS, COLUMNS)."""
    if DESCRIPTOR:
        return source.load([0, row, column]).reshape(2 * ROWS, COLUMNS)
    else:
        i = row + tl.arange(0, 2 * ROWS) % ROWS
        j = column + tl.arange(0, COLUMNS)
        offsets = (tl.arange(0, 2 * ROWS) // ROWS * rows + i).to(tl.int64)[:, None] * columns + j[None, :]
        return tl.load(source + offsets, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def load_vector(source, start, length, BLOCK: tl.constexpr):
    """BLOCK elements as float32; zeros beyond the end."""
    i = start + tl.arange(0, BLOCK)
    return tl.load(source + i, mask=i < length, other=0.0).to(tl.float32)

"""A 3x3 convolution on a CPU by Winograd's minimal filtering, F(4x4, 3x3), as products of matrices (Lavin, Gray 2015, arXiv 1509.09308).

    each tile of 4x4 pixels of the result, of the 6x6 pixels d that it sees:    A^T ((G w G^T) . (B^T d B)) A

36 products a tile and pair of channels where the convolution has 144. Between the transforms stands a product of (tiles, C) by (C, O) for
each of the 36 places; the transforms are linear, and so products as well, of rows and then of columns, or of both at once by a Kronecker
product: all of it is the library's, at its full rate. A strip of tiles at a time goes through buffers that stay in the cache; nothing as
large as a map is written but the result. Maps are channels-last, of any batch. What stands around a convolution happens where a strip is
copied anyhow: a ReLU in front of it or behind it, a map that is added to it, a 1x1 convolution, whose input then is never written.

FLOPs for each pixel of the result: 4.5 C O for the products, and 45 C + 72 O for the transforms; the convolution has 18 C O.

Rounding depends on where the polynomials are evaluated. Of 0, infinity and four points out of thirty, fifteen sizes from 1/4 to 4 with
either sign, those below amplify least what the products round: on noise, with and without a mean, 0.69 of what 0, 1, -1, 1/2, -2 and
infinity do, and less than NNPACK, whose tiles are 6x6 (tests/dpt/fast/test_on_a_cpu.py has the bounds).
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from . import memory

TILE, SEEN = 4, 6
TILES, NUMBERS = 128, 1 << 15  # of a strip, about: enough rows for the products' full rate, of a place's numbers what the cache holds
POINTS = tuple(map(Fraction, ("0", "5/8", "-5/8", "3/2", "-3/2")))  # and infinity

Matrix = list[list[Fraction]]


def _from_roots(roots: list[Fraction]) -> list[Fraction]:
    """The coefficients, constant first, of the polynomial of degree len(POINTS) or less that has these roots and leads with 1."""
    found = [Fraction(1)]
    for root in roots:
        found = [above - root * here for above, here in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found + [Fraction(0)] * (SEEN - len(found))


def transforms() -> tuple[Matrix, Matrix, Matrix]:
    """(A^T, G, B^T) of Toom and Cook: a row of G and of B^T for each point; exact."""
    at, g, bt = [], [], []
    for power in range(TILE):
        at.append([point**power for point in POINTS] + [Fraction(power == TILE - 1)])
    for point in POINTS:
        others = [other for other in POINTS if other != point]
        apart = Fraction(1)
        for other in others:
            apart *= point - other
        g.append([point**power / apart for power in range(3)])
        bt.append(_from_roots(others))
    return at, [*g, [Fraction(0), Fraction(0), Fraction(1)]], [*bt, _from_roots(list(POINTS))]


AT, G, BT = (
    torch.tensor([[float(entry) for entry in row] for row in matrix], dtype=torch.float64, device="cpu") for matrix in transforms()
)
INPUT, WEIGHT, OUTPUT = BT.float(), torch.kron(G, G).float(), torch.kron(AT, AT).float()  # (6, 6), (36, 9), (16, 36)
WITH_BIAS = torch.cat((OUTPUT, OUTPUT.new_ones(TILE * TILE, 1)), 1)  # (16, 37): behind the places the bias, 1 for each pixel


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    relu_input: bool = False,
    relu: bool = False,
    skip: Tensor | None = None,
    then: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """scale * conv3x3(x) + bias with padding 1, (B, O, H, W), channels-last.

    Args:
        x: (B, C, H, W) float32 on a CPU, channels-last; weight: (O, C, 3, 3); bias, scale: (O,) or None. Nothing wants a gradient.
        relu_input: convolve relu(x).
        relu: the result's ReLU, or
        skip: (B, O, H, W), channels-last, to add to the result.
        then: weight (K, O, 1, 1) and bias (K,) or None of a 1x1 convolution of the result: (B, K, H, W).
    """
    batch, channels, height, width = x.shape
    outputs = weight.shape[0]
    down, across = -(-height // TILE), -(-width // TILE)
    tiles = max(TILES, NUMBERS // max(channels, outputs))
    rows = min(down, max(1, tiles // across))  # of tiles, in a strip
    rows = -(-down // -(-down // rows))  # as equal as may be
    pictures = min(batch, max(1, tiles // (down * across))) if rows == down else 1
    moved = _transformed(weight, scale)
    source, last = x.permute(0, 2, 3, 1), outputs if then is None else then[0].shape[0]
    found = memory.empty((batch, height, width, last), x)
    buffers = _Buffers(x, pictures, rows, across, outputs)
    for first_picture in range(0, batch, pictures):
        some = slice(first_picture, min(batch, first_picture + pictures))
        for first in range(0, down, rows):
            strip = buffers.of(some.stop - some.start, min(rows, down - first))
            strip.read(source[some], first * TILE, relu_input)
            torch.bmm(strip.moved.flatten(1, 3), moved, out=strip.products[:-1].flatten(1, 3))
            if bias is None:
                torch.mm(OUTPUT, strip.products[:-1].flatten(1), out=strip.pixels.flatten(1))
            else:
                strip.products[-1] = bias
                torch.mm(WITH_BIAS, strip.products.flatten(1), out=strip.pixels.flatten(1))
            here = slice(first * TILE, min(height, (first + rows) * TILE))
            added = None if skip is None else skip.permute(0, 2, 3, 1)[some, here]
            strip.write(found[some, here], relu, added, then)
    return found.permute(0, 3, 1, 2)


def _transformed(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weight's transform, (36, C, O): made at each call, for kept it would be four times as large as the weight."""
    outputs, channels = weight.shape[:2]
    ordered = memory.empty((3, 3, channels, outputs), weight)
    if scale is None:
        ordered.copy_(weight.permute(2, 3, 1, 0))
    else:
        torch.mul(weight.permute(2, 3, 1, 0), scale, out=ordered)
    moved = memory.empty((SEEN * SEEN, channels, outputs), weight)
    torch.mm(WEIGHT, ordered.view(9, -1), out=moved.view(SEEN * SEEN, -1))
    return moved


class _Strip:
    """Some rows of tiles of some pictures, on their way: each tensor is a part of a buffer, and dense."""

    def __init__(self, padded: Tensor, lines: Tensor, buffers: list[Tensor], pictures: int, rows: int, across: int):
        self.padded = padded[:pictures, : rows * TILE + 2]
        channels, outputs = buffers[0].shape[-1], buffers[2].shape[-1]
        tiles = (pictures, rows, across)
        places = (SEEN * SEEN, SEEN * SEEN, SEEN * SEEN + 1, TILE * TILE)
        widths = (channels, channels, outputs, outputs)
        parts = [
            buffer.flatten()[: count * pictures * rows * across * width].view(count, *tiles, width)
            for buffer, count, width in zip(buffers, places, widths, strict=True)
        ]
        self.seen, self.moved, self.products, self.pixels = parts
        line = padded.stride(1)
        self.windows = [part.as_strided((rows, SEEN, line), (TILE * line, line, 1), part.storage_offset()) for part in self.padded]
        self.lines = lines.flatten()[: pictures * rows * SEEN * line].view(pictures, rows, SEEN, line)
        strides = (line, channels, rows * SEEN * line, SEEN * line, TILE * channels, 1)
        self.seen_lines = self.lines.as_strided((SEEN, SEEN, *tiles, channels), strides, self.lines.storage_offset())

    def read(self, source: Tensor, first: int, relu: bool) -> None:
        """The rows of pixels (B, H, W, C) from the one above ``first`` on, then the windows of the tiles."""
        height, width = source.shape[1:3]
        start, stop = max(0, first - 1), min(height, first + self.padded.shape[1] - 1)
        above = start - (first - 1)
        rows = self.padded[:, above : above + stop - start, 1 : width + 1]
        if relu:
            torch.clamp_min(source[:, start:stop], 0, out=rows)
        else:
            rows.copy_(source[:, start:stop])
        self.padded[:, :above].zero_()
        self.padded[:, above + stop - start :].zero_()
        for windows, lines in zip(self.windows, self.lines, strict=True):
            torch.bmm(INPUT.expand(windows.shape[0], SEEN, SEEN), windows, out=lines)
        seen = self.seen.view(SEEN, SEEN, -1)
        seen.view(self.seen_lines.shape).copy_(self.seen_lines)
        torch.bmm(INPUT.expand(SEEN, SEEN, SEEN), seen, out=self.moved.view(SEEN, SEEN, -1))

    def write(self, target: Tensor, relu: bool, skip: Tensor | None, then: tuple[Tensor, Tensor | None] | None) -> None:
        """The tiles' pixels to ``target`` (B, rows, W, O)."""
        _, pictures, rows, across, outputs = self.pixels.shape
        pixels = self.pixels.view(TILE, TILE, pictures, rows, across, outputs).permute(2, 3, 0, 4, 1, 5)
        tiled = (pictures, rows, TILE, across, TILE, outputs)
        whole = then is None and target.shape[1:3] == (rows * TILE, across * TILE)
        lines = target.view(tiled) if whole else self.products.flatten()[: pixels.numel()].view(tiled)
        if skip is not None and whole:
            torch.add(pixels, skip.view(tiled), out=lines)
        elif relu:
            torch.clamp_min(pixels, 0, out=lines)
        else:
            lines.copy_(pixels)
        if whole:
            return
        lines = lines.view(pictures, rows * TILE, across * TILE, outputs)[:, : target.shape[1], : target.shape[2]]
        if then is not None:
            target.copy_(F.linear(lines, then[0].flatten(1), then[1]))
        elif skip is not None:
            torch.add(lines, skip, out=target)
        else:
            target.copy_(lines)


class _Buffers:
    """The memory of strips, made once for a convolution."""

    def __init__(self, x: Tensor, pictures: int, rows: int, across: int, outputs: int):
        channels = x.shape[1]
        tiles = (pictures, rows, across)
        self.padded = memory.empty((pictures, rows * TILE + 2, across * TILE + 2, channels), x).zero_()
        shapes = [(SEEN * SEEN, *tiles, channels)] * 2 + [(SEEN * SEEN + 1, *tiles, outputs), (TILE * TILE, *tiles, outputs)]
        self.lines = memory.empty((pictures, rows, SEEN, (across * TILE + 2) * channels), x)
        self.buffers = [memory.empty(shape, x) for shape in shapes]
        self.strips: dict[tuple[int, int], _Strip] = {}
        self.across = across

    def of(self, pictures: int, rows: int) -> _Strip:
        key = pictures, rows
        if key not in self.strips:
            self.strips[key] = _Strip(self.padded, self.lines, self.buffers, pictures, rows, self.across)
        return self.strips[key]

"""BEiT as MiDaS 3.1 runs it: a Vision Transformer that knows places by a bias of the attention, a table of its own in each block.

Source: https://github.com/isl-org/MiDaS, midas/backbones/beit.py (Bao et al. 2022, arXiv 2106.08254; Birkl et al. 2023, 2307.14460).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import EncoderConfig
from ..functional import single
from .kept import KeptBySize
from .residual import run
from .vit import STEMS, Attention, Block, grid_of, sdpa

FROM_CLASS, TO_CLASS, ITSELF = range(3)  # the last rows of a table: of the class token and patches, and of it and itself
CLASS_ROWS = 3


class RelativePosition(nn.Module):
    """What attention adds between two tokens, by how many patches lie between them down and across, for each head.

    The table has a row for each such pair of a grid of `config.pos_grid`, and three for the class token. For another grid its maps are
    resized. What is kept has as many numbers as all the block's attention weights of a picture: for one size only.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.sides = tuple(2 * side - 1 for side in config.pos_grid)  # the numbers of distances, down and across
        self.table = nn.Parameter(torch.zeros(self.sides[0] * self.sides[1] + CLASS_ROWS, config.num_heads))
        self.kept = KeptBySize(most=1)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.zeros_(self.table)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Rows and columns of patches -> the bias (1, H, 1 + h*w, 1 + h*w), query by key, not to be written to."""
        if torch.compiler.is_compiling():
            return self._bias(grid)
        return self.kept.get(grid, self.table, lambda: self._bias(grid))

    def _bias(self, grid: tuple[int, int]) -> Tensor:
        height, width = 2 * grid[0] - 1, 2 * grid[1] - 1
        maps = single(self.table[:-CLASS_ROWS].T.unflatten(1, self.sides)[None])  # (1, H, rows, columns)
        maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)[0].to(self.table.dtype)
        table = torch.cat((self.table[-CLASS_ROWS:].T, maps.flatten(1)), dim=1)  # (H, 3 + height * width)
        y, x = (torch.arange(side, device=table.device) for side in grid)
        y, x = y[:, None].expand(grid).flatten(), x.expand(grid).flatten()  # of each patch
        apart = (y[:, None] - y + grid[0] - 1) * width + (x[:, None] - x + grid[1] - 1)  # (h*w, h*w), query by key
        # Each row of the bias begins at a multiple of 8 numbers: else attention on CUDA copies it into such memory every time. A compiler,
        # which lays memory out by itself, would settle the number of tokens by it.
        tokens = 1 + grid[0] * grid[1]
        spare = 0 if torch.compiler.is_compiling() else -tokens % 8
        index = F.pad(F.pad(CLASS_ROWS + apart, (1, 0), value=TO_CLASS), (0, spare, 1, 0), value=FROM_CLASS)
        index[0, 0].fill_(ITSELF)  # set by index, the number would be copied from the host's memory, which a CUDA graph cannot hold
        return table[:, index][None, ..., :tokens]


class BEiTAttention(Attention):
    """Multi-head self-attention over (B, N, D) with a bias by relative position. BEiT's keys have no bias: in ours it is zero."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.position = RelativePosition(config)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        qkv = self.qkv(x)
        return self.proj(sdpa(qkv, self.num_heads, self.position(grid).to(qkv.dtype)))


class BEiTBlock(Block):
    """`Block` whose attention is told the rows and columns of patches."""

    ATTENTION = BEiTAttention

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        x = self.added(x, self.ls1(self.attn(self.norm1(x), grid)))
        return self.added(x, self.ls2(self.mlp(self.norm2(x))))


class BEiT(nn.Module):
    """Picture (B, 3, H, W) -> the tokens (B, 1 + h*w, D) after each of the hooked blocks, cls token first; none is normed."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.patch_embed = STEMS["patch"](config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.blocks = nn.ModuleList(BEiTBlock(config) for _ in range(config.depth))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.cls_token, std=0.02, generator=generator)

    def grid(self, x: Tensor) -> tuple[int, int]:
        return grid_of(x, self.config.patch_size)

    def forward(self, x: Tensor) -> list[Tensor]:
        grid = self.grid(x)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, h*w, D)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        hooked = []
        for index, block in enumerate(self.blocks):
            x = run(block, x, grid)
            if index in self.config.hooks:
                hooked.append(x)
        return hooked

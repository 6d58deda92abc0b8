"""The encoder of MiDaS 3.1's Swin models: a Swin Transformer V2, whose four stages give a map each (Liu et al. 2022, arXiv 2111.09883).

Its parts go by timm's names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import EncoderConfig
from .kept import KeptBySize
from .residual import ResidualBlock, run
from .vit import MLP

HIDDEN = 512  # channels of the MLP that makes the position bias
FARTHEST = 8.0  # what distances of a window's side are scaled to, before their logarithm
MOST_BIAS = 16.0
MOST_SCALE = 100.0  # of the cosines
NORM_EPS = 1e-5  # of the norms between stages, whatever the blocks' is


class PositionBias(nn.Module):
    """The bias of a head's scores by how far apart two patches of a window are, from an MLP of the distances' logarithms.

    The MLP's output for each distance is kept while no gradient is wanted; spread over the pairs it would be as large as the scores.

    Args:
        window: side in patches.
        pretrained: side of the windows that the MLP has learnt; 0 is `window`.
    """

    def __init__(self, num_heads: int, window: int, pretrained: int):
        super().__init__()
        self.window, self.reach = window, (pretrained or window) - 1
        self.mlp = nn.Sequential(nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_heads, bias=False))
        self.tables = KeptBySize(most=1)

    def _made(self) -> Tensor:
        weight = self.get_parameter("mlp.0.weight")
        apart = torch.arange(1 - self.window, self.window, device=weight.device, dtype=torch.float32) * (FARTHEST / self.reach)
        apart = apart.sign() * torch.log2(apart.abs() + 1) / math.log2(FARTHEST)
        pairs = torch.stack(torch.meshgrid(apart, apart, indexing="ij"), dim=-1)  # (2w - 1, 2w - 1, 2)
        bias: Tensor = MOST_BIAS * self.mlp(pairs.to(weight.dtype)).sigmoid()
        return bias.flatten(0, 1).T.contiguous()

    def table(self) -> Tensor:
        """(heads, (2w - 1)^2): of each distance down and across, from -(w - 1) to w - 1."""
        if torch.compiler.is_compiling():
            return self._made()
        return self.tables.get((), tuple(self.mlp.parameters()), self._made)

    def forward(self) -> Tensor:
        """(heads, N, N), of N = w * w patches."""
        table, side = self.table(), 2 * self.window - 1
        place = torch.arange(self.window, device=table.device)
        number = (place[:, None] * side + place).flatten()  # of a patch in a picture of that side: differences are distances
        distance = number[:, None] - number + (self.window - 1) * (side + 1)
        return table[:, distance]


class WindowAttention(nn.Module):
    """Self-attention within windows (B, W, N, D), by the cosine of queries and keys times a learned scale, and `PositionBias`."""

    def __init__(self, dim: int, num_heads: int, window: int, pretrained: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.position = PositionBias(num_heads, window, pretrained)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.constant_(self.logit_scale, math.log(10))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (W, N, N) is added to the scores."""
        batch, windows, count, dim = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)  # each (B, W, H, N, D / H)
        scale = self.logit_scale.clamp(max=math.log(MOST_SCALE)).exp()
        q, k, bias = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), self.position()
        if mask is None:
            first = 0  # the windows are as so many pictures
        else:
            first, bias = 1, (mask[:, None] + bias).flatten(0, 1)  # they are as so many heads, each with a bias of its own
        q, k, v = (part.flatten(first, first + 1) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None], scale=1.0)
        mixed = mixed.reshape(batch, windows, self.num_heads, count, -1).transpose(2, 3)
        return self.proj(mixed.reshape(batch, windows, count, dim))


class SwinBlock(ResidualBlock):
    """Post-norm transformer block on maps (B, h, w, D): x + norm1(attn(x)), then x + norm2(mlp(x)).

    Args:
        side: h and w.
        shifted: windows begin half a window down and to the right, and those cut by the map's edge go on at the other one, masked.
    """

    def __init__(self, config: EncoderConfig, stage: int, side: int, shifted: bool):
        super().__init__()
        dim = config.embed_dim << stage
        self.side, self.window, self.mask_value = side, min(config.window, side), config.window_mask
        self.shift = config.window // 2 if shifted and side > config.window else 0
        self.attn = WindowAttention(dim, config.stage_heads[stage], self.window, config.pretrained_windows[stage])
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim), config.activation)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)

    def windows(self, x: Tensor) -> Tensor:
        """A map (B, h, w, C) -> (B, W, N, C)."""
        x = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of `windows`."""
        count = self.side // self.window
        x = x.unflatten(2, (self.window, self.window)).unflatten(1, (count, count)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def mask(self, x: Tensor) -> Tensor:
        """(W, N, N): zero between patches that are neighbours in the unshifted map, else `mask_value`."""
        place = torch.arange(self.side, device=x.device)
        part = (place >= self.side - self.window).long() + (place >= self.side - self.shift)
        region = self.windows((3 * part[:, None] + part)[None, ..., None])[0, ..., 0]  # (W, N)
        return self.mask_value * (region[:, None] != region[:, :, None]).to(x.dtype)

    def attended(self, x: Tensor) -> Tensor:
        if not self.shift:
            return self.joined(self.attn(self.windows(x)))
        x = x.roll((-self.shift, -self.shift), (1, 2))
        return self.joined(self.attn(self.windows(x), self.mask(x))).roll((self.shift, self.shift), (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.added(x, self.norm1(self.attended(x)))
        return self.added(x, self.norm2(self.mlp(x)))


class PatchMerging(nn.Module):
    """Each two by two patches become one, of twice the channels: (B, h, w, D) -> (B, h/2, w/2, 2 D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h/2, 2, w/2, 2, D)
        return self.norm(self.reduction(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))  # down first, then across


class Stage(nn.Module):
    """Blocks on one grid, every second of them shifted, and the merging to the next one's, which the last stage has not."""

    def __init__(self, config: EncoderConfig, stage: int):
        super().__init__()
        side = config.pos_grid[0] >> stage
        self.blocks = nn.ModuleList(SwinBlock(config, stage, side, index % 2 == 1) for index in range(config.stage_depths[stage]))
        self.downsample = PatchMerging(config.embed_dim << stage) if stage < 3 else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map (B, h, w, D) -> the map behind the blocks, and the one that the next stage begins with."""
        for block in self.blocks:
            x = run(block, x)
        return x, self.downsample(x)


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> normalised embedded patches (B, h, w, D)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, stride=config.patch_size)
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class SwinV2(nn.Module):
    """Picture (B, 3, H, W) -> the maps behind the four stages: (B, D, H/4, W/4), (B, 2 D, H/8, W/8), ... with patches of 4.

    H and W are those of `config.fixed_size` alone: windows, and the masks of those that are shifted, are made for one grid.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(4))

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches; ValueError for a picture of another size."""
        patch, (rows, columns) = self.config.patch_size, self.config.pos_grid
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"input of shape {tuple(x.shape)}: it must be (batch, 3, height, width)")
        height, width = x.shape[2:]
        if (height, width) != (patch * rows, patch * columns):
            size = f"{patch * rows}x{patch * columns}"
            raise ValueError(f"input of {height}x{width} (height x width): it must be {size}, the one size that the windows are made for")
        return rows, columns

    def forward(self, x: Tensor) -> list[Tensor]:
        self.grid(x)
        x, maps = self.patch_embed(x), []
        for stage in self.stages:
            behind, x = stage(x)
            maps.append(behind.permute(0, 3, 1, 2))
        return maps

"""The encoder: a Vision Transformer whose tokens are read after four of its blocks (Ranftl et al. 2021, section 3.1)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EncoderConfig


def sdpa(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention by PyTorch: packed qkv (B, N, 3*H*D) -> (B, N, H*D)."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def xformers_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention by xformers: packed qkv (B, N, 3*H*D) -> (B, N, H*D)."""
    from xformers.ops import memory_efficient_attention

    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).unbind(2)  # each (B, N, H, D)
    return memory_efficient_attention(q, k, v).reshape(batch, tokens, width // 3)


ATTENTION = {"sdpa": sdpa, "xformers": xformers_attention}


def check_attention(name: str) -> None:
    """Raise unless `name` is an attention that can run here: ValueError for the name, ImportError for the package."""
    if name not in ATTENTION:
        raise ValueError(f"attention={name!r}: it must be one of {', '.join(ATTENTION)}")
    if name == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            raise ImportError('attention="xformers" needs the package xformers: pip install xformers') from error


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.kind = config.attention
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(ATTENTION[self.kind](self.qkv(x), self.num_heads))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor a channel (DINOv2)."""

    def __init__(self, dim: int, initial: float = 1.0):
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim))
        self.ls2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ConvolutionalStem(nn.Sequential):
    """Patches of 16 by four strided 3x3 convolutions, from which small data sets learn sooner than from one of 16x16."""

    def __init__(self, dim: int, patch: int):
        if patch != 16:
            raise ValueError(f'stem="convolutions" halves four times, for patches of 16, not {patch}')
        widths = (3, dim // 8, dim // 4, dim // 2, dim)
        layers: list[nn.Module] = []
        for channels, width in itertools.pairwise(widths):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(dim, dim, 1))

    def maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the maps after each of the four: (B, D/8, H/2, W/2), (B, D/4, H/4, W/4), ..."""
        found = []
        for first in range(0, len(self) - 1, 3):
            x = self[first + 2](self[first + 1](self[first](x)))
            found.append(x)
        return found


STEMS = {"patch": lambda dim, patch: nn.Conv2d(3, dim, patch, stride=patch), "convolutions": ConvolutionalStem}


class Encoder(nn.Module):
    """Picture (B, 3, H, W) -> the tokens (B, 1 + h*w, D) after each of the hooked blocks, cls token first.

    With `stem_hooks` the maps of the stem come before them, so that there are four in all.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        check_attention(config.attention)
        dim, patch, (rows, columns) = config.embed_dim, config.patch_size, config.pos_grid
        self.config = config
        self.patch_embed = STEMS[config.stem](dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.final_norm:
            self.norm = nn.LayerNorm(dim, eps=config.norm_eps)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of a picture (B, 3, H, W); ValueError if it is not whole patches."""
        patch = self.config.patch_size
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"input of shape {tuple(x.shape)}: it must be (batch, 3, height, width)")
        height, width = x.shape[2:]
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(
                f"input of {height}x{width} (height x width): both must be multiples of the patch size {patch}, at least one patch"
            )
        return height // patch, width // patch

    def position(self, grid: tuple[int, int]) -> Tensor:
        """The positional embedding for a grid of patches, (1, 1 + h*w, D)."""
        config = self.config
        rows, columns = config.pos_grid
        same_count = config.pos_by_count and grid[0] * grid[1] == rows * columns
        if grid == (rows, columns) or same_count:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).float()  # (1, D, rows, columns)
        if config.pos_offset:
            factor = tuple((n + config.pos_offset) / stored for n, stored in zip(grid, (rows, columns), strict=True))
            patches = F.interpolate(patches, scale_factor=factor, mode=config.pos_mode, align_corners=False)
        else:
            patches = F.interpolate(patches, size=grid, mode=config.pos_mode, align_corners=False)
        return torch.cat((cls, patches.flatten(2).transpose(1, 2).to(cls.dtype)), dim=1)

    def embed(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Picture (B, 3, H, W) -> the embedded patches (B, D, h, w), and the hooked maps of the stem."""
        if not self.config.stem_hooks:
            return self.patch_embed(x), []
        maps = self.patch_embed.maps(x)
        return self.patch_embed[-1](maps[-1]), [maps[index] for index in self.config.stem_hooks]

    def forward(self, x: Tensor) -> list[Tensor]:
        position = self.position(self.grid(x))
        x, hooked = self.embed(x)
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + position
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.config.hooks:
                hooked.append(self.norm(x) if self.config.final_norm else x)
        return hooked

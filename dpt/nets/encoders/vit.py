"""The encoder: a Vision Transformer whose tokens are read after four of its blocks (Ranftl et al. 2021, section 3.1)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import EncoderConfig
from ..functional import ACTIVATION, statically_equal
from .kept import KeptBySize
from .residual import ResidualBlock, run
from .resnetv2 import ResNetV2
from .rotary import rotated


def sdpa(qkv: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention by PyTorch: packed qkv (B, N, 3*H*D) -> (B, N, H*D); `bias` (1, H, N, N), query by key, is added before the softmax."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(batch, tokens, width // 3)


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
    """Multi-head self-attention over (B, N, D); queries and keys turned by `rotation` (2, N, D/H/2) where there is one."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.kind = config.attention
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x)
        if rotation is not None:
            qkv = rotated(qkv, self.num_heads, rotation)
        return self.proj(ATTENTION[self.kind](qkv, self.num_heads))


class MLP(nn.Module):
    """Linear, activation (exact GELU where nothing else is said), linear."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ACTIVATION[self.activation](self.fc1(x)))


class SwiGLU(nn.Module):
    """Linear to two halves, the SiLU of the first times the second, linear (Shazeer 2020; DINOv2's g).

    `hidden` is that of an MLP of the same ratio: two thirds of it are taken, rounded up to a multiple of eight.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        hidden = (2 * hidden // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor a channel (DINOv2)."""

    def __init__(self, dim: int, initial: float = 1.0):
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(ResidualBlock):
    """Pre-norm transformer block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    ATTENTION: type[Attention] = Attention

    def __init__(self, config: EncoderConfig):
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = self.ATTENTION(config)
        self.ls1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        hidden = int(config.mlp_ratio * dim)
        self.mlp = SwiGLU(dim, hidden) if config.mlp == "swiglu" else MLP(dim, hidden, config.activation)
        self.ls2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        x = self.added(x, self.ls1(self.attn(self.norm1(x), rotation)))
        return self.added(x, self.ls2(self.mlp(self.norm2(x))))


class ConvolutionalStem(nn.Sequential):
    """Patches of 16 by four strided 3x3 convolutions, from which small data sets learn sooner than from one of 16x16."""

    def __init__(self, config: EncoderConfig):
        layers: list[nn.Module] = []
        for channels, width in itertools.pairwise((3, *config.stem_widths)):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(config.embed_dim, config.embed_dim, 1))

    def maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the maps after each of the four: (B, D/8, H/2, W/2), (B, D/4, H/4, W/4), ..."""
        found = []
        for first in range(0, len(self) - 1, 3):
            x = self[first + 2](self[first + 1](self[first](x)))
            found.append(x)
        return found

    def embed(self, x: Tensor) -> Tensor:
        """The last map (B, D, h, w) -> the embedded patches (B, D, h, w)."""
        return self[-1](x)


STEMS: dict[str, Callable[[EncoderConfig], nn.Module]] = {
    "patch": lambda config: nn.Conv2d(3, config.embed_dim, config.patch_size, stride=config.patch_size),
    "convolutions": ConvolutionalStem,
    "resnetv2": ResNetV2,
}


def grid_of(x: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture (B, 3, H, W); ValueError if it is not whole patches."""
    if x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"input of shape {tuple(x.shape)}: it must be (batch, 3, height, width)")
    height, width = x.shape[2:]
    if height < patch or width < patch or height % patch or width % patch:
        raise ValueError(
            f"input of {height}x{width} (height x width): both must be multiples of the patch size {patch}, at least one patch"
        )
    return height // patch, width // patch


class HookedTransformer(nn.Module):
    """What Vision Transformers share: patches, class token, registers, and blocks after four of which the tokens are read."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        check_attention(config.attention)
        dim = config.embed_dim
        self.config = config
        self.patch_embed = STEMS[config.stem](config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.registers:
            self.registers = nn.Parameter(torch.zeros(1, config.registers, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.normed = {"none": (), "every": config.hooks, "last": (config.depth - 1,)}[config.final_norm]  # blocks whose hooked tokens are
        if self.normed:
            self.norm = nn.LayerNorm(dim, eps=config.norm_eps if config.final_norm_eps is None else config.final_norm_eps)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """ViT's initialisation of what is not in a layer: class token, registers, positional embedding."""
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02, generator=generator)

    def grid(self, x: Tensor) -> tuple[int, int]:
        return grid_of(x, self.config.patch_size)

    def with_registers(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + h*w, D) with the registers behind the class token."""
        if not self.config.registers:
            return x
        return torch.cat((x[:, :1], self.registers.expand(x.shape[0], -1, -1), x[:, 1:]), dim=1)

    def hooked(self, x: Tensor, rotation: Tensor | None = None) -> list[Tensor]:
        """Tokens (B, 1 + registers + h*w, D) -> those (B, 1 + h*w, D) after each of the hooked blocks, normed where they are."""
        found, count = [], self.config.registers
        for index, block in enumerate(self.blocks):
            x = run(block, x, rotation)
            if index in self.config.hooks:
                tokens = torch.cat((x[:, :1], x[:, 1 + count :]), dim=1) if count else x
                found.append(self.norm(tokens) if index in self.normed else tokens)
        return found


class ViT(HookedTransformer):
    """Picture (B, 3, H, W) -> the tokens (B, 1 + h*w, D) after each of the hooked blocks, cls token first; registers are left out.

    With `stem_hooks` the maps of the stem come before them, so that there are four in all.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        rows, columns = config.pos_grid
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.embed_dim))
        self.positions = KeptBySize()

    def position(self, grid: tuple[int, int]) -> Tensor:
        """The positional embedding for a grid of patches, (1, 1 + h*w, D): as it is stored, or resized.

        A resized one is kept while no gradient is wanted, and is not to be written to.
        """
        if torch.compiler.is_compiling():
            return self._traced_position(grid)
        rows, columns = self.config.pos_grid
        if grid == (rows, columns) or self.config.pos_by_count and grid[0] * grid[1] == rows * columns:
            return self.pos_embed
        return self.positions.get(grid, self.pos_embed, lambda: self._resized(grid))

    def _resized(self, grid: tuple[int, int]) -> Tensor:
        config = self.config
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.unflatten(1, config.pos_grid).permute(0, 3, 1, 2).float()  # (1, D, rows, columns)
        if config.pos_offset:
            # `interpolate` by a factor of (n + offset) / stored, for which it would need the sides of a graph as numbers
            y, x = (
                2 * (torch.arange(n, device=cls.device) + 0.5) / (torch.full((), n, device=cls.device) + config.pos_offset) - 1
                for n in grid
            )
            places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]  # (1, h, w, 2), from -1 to 1
            patches = F.grid_sample(patches, places, config.pos_mode, padding_mode="border", align_corners=False)
        else:
            patches = F.interpolate(patches, size=grid, mode=config.pos_mode, align_corners=False, antialias=config.pos_antialias)
        return torch.cat((cls, patches.flatten(2).transpose(1, 2).to(cls.dtype)), dim=1)

    def _traced_position(self, grid: tuple[int, int]) -> Tensor:
        """`position` for a graph whose sides are open: the choice is part of it, where in `position` it would settle the sides.

        Resized to its own size an embedding stays as it is, bit for bit, so that nothing is left to choose, unless it is resized by a
        factor with an offset, or by the number of patches.
        """
        (height, width), (rows, columns) = grid, self.config.pos_grid
        if statically_equal((height, width), (rows, columns)):
            return self.pos_embed
        resized = self._resized(grid)
        if not self.config.pos_offset and not self.config.pos_by_count:
            return resized
        h, w = (torch.full((), side, device=resized.device) for side in (height, width))
        stored = h * w == rows * columns if self.config.pos_by_count else (h == rows) & (w == columns)
        index = torch.arange(1 + height * width, device=resized.device).clamp(max=rows * columns)
        return torch.where(stored, self.pos_embed[:, index], resized)

    def embed(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Picture (B, 3, H, W) -> the embedded patches (B, D, h, w), and the hooked maps of the stem."""
        if not self.config.stem_hooks:
            return self.patch_embed(x), []
        stem: Any = self.patch_embed  # one of those that have maps
        maps = stem.maps(x)
        return stem.embed(maps[-1]), [maps[index] for index in self.config.stem_hooks]

    def forward(self, x: Tensor) -> list[Tensor]:
        position = self.position(self.grid(x))
        x, maps = self.embed(x)
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + position
        return [*maps, *self.hooked(self.with_registers(x))]

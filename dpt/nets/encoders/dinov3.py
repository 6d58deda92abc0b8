"""DINOv3's encoder (Siméoni et al. 2025, arXiv 2508.10104): a Vision Transformer that learns no positions, but rotates queries and keys by
where their patches are.

Source: https://github.com/facebookresearch/dinov3. Its training scales the places of the patches at random; here they are as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import EncoderConfig
from .kept import KeptBySize
from .rotary import rotation
from .vit import HookedTransformer


class DINOv3(HookedTransformer):
    """Picture (B, 3, H, W) -> the tokens (B, 1 + h*w, D) after each of the hooked blocks, cls token first; registers are left out."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.rotations = KeptBySize()

    def rotation(self, grid: tuple[int, int]) -> Tensor:
        """`rotation` of this encoder's tokens, float32 (2, 1 + registers + h*w, D/2); kept, and not to be written to."""
        config, token = self.config, self.cls_token

        def make() -> Tensor:
            return rotation(grid, config.embed_dim // config.num_heads, config.rope_theta, token.device, 1 + config.registers)

        return make() if torch.compiler.is_compiling() else self.rotations.get(grid, token, make)  # of the token its device alone counts

    def forward(self, x: Tensor) -> list[Tensor]:
        table = self.rotation(self.grid(x))
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, h*w, D)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.hooked(self.with_registers(x), table)

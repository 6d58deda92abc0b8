"""Rotary position embedding in two dimensions (Su et al. 2021, arXiv 2104.09864; DINOv3's form of it): queries and keys turned by angles
that grow with the place of their patch, so that their products depend on how far patches are apart.

Source: https://github.com/facebookresearch/dinov3, layers/rope_position_encoding.py and layers/attention.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation(grid: tuple[int, int], size: int, theta: float, device: torch.device) -> Tensor:
    """Cosine and sine of the angles of each patch, float32 (2, h*w, size), for heads of `size` channels.

    The places run from -1 to 1 over the picture, whatever its sides. A quarter of the channels turns with the row, a quarter with the
    column, at frequencies that fall from 1 towards 1 / theta; the second half of the channels are the partners of the first.
    """
    y, x = (2 * (torch.arange(n, device=device) + 0.5) / torch.full((), n, device=device) - 1 for n in grid)
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (h*w, 2)
    frequencies = theta ** -torch.arange(0, 1, 4 / size, device=device)
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1).tile(2)  # (h*w, size)
    return torch.stack((angles.cos(), angles.sin()))


def rotated(qkv: Tensor, num_heads: int, table: Tensor) -> Tensor:
    """Packed qkv (B, N, 3*H*D) with the queries and keys of its last h*w tokens, the patches, turned by `rotation`'s table (2, h*w, D).

    Class token and registers, which come first, are nowhere and stay as they are. Computed in the table's dtype, float32.
    """
    batch, tokens, width = qkv.shape
    before = tokens - table.shape[1]
    parts = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))
    qk = parts[:, before:, :2]  # (B, h*w, 2, H, D)
    cosine, sine = table[:, :, None, None]
    first, second = qk.chunk(2, dim=-1)
    turned = (qk * cosine + torch.cat((-second, first), dim=-1) * sine).to(qkv.dtype)
    patches = torch.cat((turned, parts[:, before:, 2:]), dim=2)
    return torch.cat((parts[:, :before], patches), dim=1).view(batch, tokens, width)

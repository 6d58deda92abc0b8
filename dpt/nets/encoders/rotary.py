"""Rotary position embedding in two dimensions (Su et al. 2021, arXiv 2104.09864; DINOv3's form of it): queries and keys turned by angles
that grow with the place of their patch, so that their products depend on how far patches are apart.

Source: https://github.com/facebookresearch/dinov3, layers/rope_position_encoding.py and layers/attention.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation(grid: tuple[int, int], size: int, theta: float, device: torch.device, before: int) -> Tensor:
    """Cosine and sine of the angles of each token, float32 (2, before + h*w, size / 2), for heads of `size` channels.

    The `before` tokens that come first, class token and registers, are nowhere, and their angles 0. The places of the patches run from -1
    to 1 over the picture, whatever its sides. Half of the pairs of channels turn with the row, half with the column, at frequencies that
    fall from 1 towards 1 / theta.
    """
    y, x = (2 * (torch.arange(n, device=device) + 0.5) / torch.full((), n, device=device) - 1 for n in grid)
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)  # (h*w, 2)
    frequencies = theta ** -torch.arange(0, 1, 4 / size, device=device)
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1)  # (h*w, size / 2)
    angles = torch.cat((angles.new_zeros(before, angles.shape[1]), angles))
    return torch.stack((angles.cos(), angles.sin()))


def rotated(qkv: Tensor, num_heads: int, table: Tensor) -> Tensor:
    """Packed qkv (B, N, 3*H*D) with its queries and keys turned by `rotation`'s table (2, N, D/2), channel d with d + D/2.

    Computed in the table's dtype, float32.
    """
    qk, v = qkv.unflatten(2, (3, num_heads, -1)).split((2, 1), dim=2)  # (B, N, 2, H, D) and (B, N, 1, H, D)
    cosine, sine = table[:, :, None, None]
    first, second = qk.chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return torch.cat((turned.to(qkv.dtype), v), dim=2).flatten(2)

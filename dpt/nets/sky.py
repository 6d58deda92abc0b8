"""The sky of Depth Anything 3: a second branch of the depth head finds it, and it is put as far as the rest of the picture goes.

Source: https://github.com/ByteDance-Seed/Depth-Anything-3, model/dpt.py and model/da3.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import LastConv2d

SKY = 0.3  # of the branch's output: what is below is not sky
PERCENT = 99  # of the depths that are not sky lie below the sky's
FEWEST = 10  # pixels: the depth stays as it is where no more are sky, or no more are not


class SkyBranch(nn.Module):
    """The depth head's resized map (B, C, H, W) -> how much each pixel is sky (B, H, W), from 0: conv3x3, ReLU, 1x1, ReLU."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv2 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv3 = LastConv2d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(F.relu(self.conv2(x)))).squeeze(1)


def with_far_sky(depth: Tensor, sky: Tensor) -> Tensor:
    """Depth (B, H, W) that is in the sky the 99th percentile of its picture's other pixels.

    Upstream takes the percentile of all pictures of a call together, and beyond 100 000 pixels of a random sample. Here each picture has
    its own, of all its pixels: a picture's depth depends neither on chance nor on its neighbours. Interpolated as `torch.quantile` does,
    which takes no mask.
    """
    is_sky = ~(sky < SKY)
    other = (~is_sky).flatten(1).sum(1, keepdim=True)  # (B, 1) pixels, the first in order of depth once the sky is behind them
    ordered = depth.masked_fill(is_sky, torch.inf).flatten(1).sort(1).values
    hundredths = PERCENT * (other - 1).clamp(min=0)  # whole numbers: in float32 a place among many pixels would be rounded
    lower = hundredths // 100
    below, above = ordered.gather(1, lower), ordered.gather(1, torch.minimum(lower + 1, (other - 1).clamp(min=0)))
    far = torch.lerp(below, above, (hundredths % 100).to(depth.dtype) / 100)
    enough = (other > FEWEST) & (depth[0].numel() - other > FEWEST)
    return torch.where(is_sky & enough[..., None], far[..., None], depth)

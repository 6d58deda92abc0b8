"""The prompt of Prompt Depth Anything: a sensor's depth of few pixels, which each level of the decoder sees, and which sets the scale.

Source: https://github.com/DepthAnything/PromptDA, promptda/promptda.py and promptda/model/blocks.py (Lin et al. 2024, arXiv 2412.14015)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalised(prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Metres (B, h, w) -> the same from 0, a picture's nearest, to 1, its farthest; the nearest; how far they are apart; (B, 1, 1) each.

    A prompt of one distance is 0 everywhere, where the published code divides by zero.
    """
    near, far = prompt.amin(dim=(1, 2), keepdim=True), prompt.amax(dim=(1, 2), keepdim=True)
    apart = far - near
    return (prompt - near) / torch.where(apart > 0, apart, torch.ones_like(apart)), near, apart


class PromptBranch(nn.Module):
    """A prompt in 0..1 (B, h, w) -> what is added to a level's map (B, F, H, W): resized, then three 3x3 convolutions, ReLUs between."""

    def __init__(self, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.conv3 = nn.Conv2d(features, features, 3, padding=1)

    def resized(self, prompt: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, 1, H, W), in the dtype of the parameters."""
        prompt = F.interpolate(prompt[:, None], size=size, mode="bilinear", align_corners=False)
        return prompt.to(self.conv1.weight.dtype)

    def forward(self, prompt: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.relu(self.conv1(self.resized(prompt, size)))
        return self.conv3(F.relu(self.conv2(x)))

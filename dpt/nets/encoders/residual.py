"""How blocks of all encoders train: residual branches that are dropped by chance, and activations that are computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ResidualBlock(nn.Module):
    """A block whose branches are added to what goes in. It trains as two plain attributes say, which copies and pickles keep.

    `drop_path`: the probability that a sample's branch is left out, in training mode alone (stochastic depth; Huang et al. 2016, arXiv
    1603.09382), timm's, scaled. `checkpointing`: as `run` says.
    """

    drop_path: float = 0.0
    checkpointing: bool = False

    @property
    def drops(self) -> bool:
        """Whether branches are now dropped."""
        return self.training and self.drop_path > 0

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """x (B, ...) + branch, of the same shape; where branches are dropped each sample's is left out or divided by its probability to
        stay, so that its mean is what it is in evaluation. In x's dtype then, and computed in float32 at least."""
        if not self.drops:
            return x + branch
        keep = 1 - self.drop_path
        dtype = torch.promote_types(x.dtype, torch.float32)  # in bfloat16 1 / 0.9 is off by 0.2 %, in every sample alike
        factor = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=dtype).bernoulli_(keep).div_(keep)
        return (x + branch * factor).to(x.dtype)


def run(block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    """block(x, *rest). With `block.checkpointing`, in training mode and where a gradient is wanted, what happens inside is not kept for the
    backward but computed again there, from the same random numbers (activation checkpointing; Chen et al. 2016, arXiv 1604.06174)."""
    if getattr(block, "checkpointing", False) and block.training and torch.is_grad_enabled():
        found: Tensor = checkpoint(block, x, *rest, use_reentrant=False)
        return found
    given: Tensor = block(x, *rest)
    return given

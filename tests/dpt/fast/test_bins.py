"""The fused forms of DINOv3's blocks and of heads with bins."""

import copy

import pytest
import torch
from small import wide

import dpt


@pytest.mark.parametrize("name", ["chmv2", "dinov3-7b-depth"])
@pytest.mark.parametrize("size", [(64, 96), (48, 80), (16, 16)])
def test_the_same_algebra_on_a_cpu(name, size):
    """Blind spot: queries and keys that are not rotated, or registers that are; bins of the first channel alone; a norm of tokens left
    out."""
    plain = wide(name)
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        ours, theirs = quick(x), plain(x)
    assert theirs.std() > 0.01 * theirs.mean() and (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    assert {row.kind for row in dpt.fast_report(quick)} >= {"FastBlock", "FastDepthHead"}


def test_gradients_are_the_plain_ones():
    """Blind spot: a gradient that stops at the rotation, or at the bins."""
    plain = wide("chmv2")
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(1, 3, 48, 64)
    for model in (plain, quick):
        model(x).sum().backward()
    for (name, ours), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-3 * theirs.grad.abs().max() + 1e-6, name

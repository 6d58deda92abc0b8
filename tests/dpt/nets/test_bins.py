"""Depth as the mean of bins, against transformers' classes of the same."""

from types import SimpleNamespace

import pytest
import torch

from dpt.config import HeadConfig
from dpt.nets.bins import depth_of_bins


def head(**fields) -> HeadConfig:
    return HeadConfig(task="depth", inverse=False, **fields)


def logits(bins: int) -> torch.Tensor:
    """With pixels that no bin wins, whose mean is of the floor alone."""
    x = torch.randn(2, bins, 5, 7, generator=torch.Generator().manual_seed(0))
    x[0, :, 1] = -x[0, :, 1].abs()
    x[1, :, :, 2] *= 1e3
    return x


@pytest.mark.parametrize(("near", "far", "bins"), [(0.001, 96.0, 256), (0.5, 20.0, 16)])
def test_chmv2(near, far, bins):
    """Blind spot: bins between other depths than its class has, which divides the farthest by 8 and multiplies the mean again."""
    modeling = pytest.importorskip("transformers.models.chmv2.modeling_chmv2")
    fields = {"min_depth": near, "max_depth": far, "bins_strategy": "chmv2_mixlog", "norm_strategy": "chmv2_mixlog"}
    theirs = modeling.CHMv2FeaturesToDepth(SimpleNamespace(**fields))
    ours = head(bins=bins, bin_range=(8 * near, far), bin_spacing="mixed_log", bin_floor=1e-8)
    x = logits(bins)
    torch.testing.assert_close(depth_of_bins(x, ours), theirs(x)[:, 0], rtol=2e-6, atol=0)


@pytest.mark.parametrize(("near", "far", "bins"), [(0.001, 100.0, 256), (0.5, 20.0, 16)])
def test_dinov3(near, far, bins):
    """Blind spot: the floor of one family in another, the last bin left out. Against the same class, whose linear ones are DINOv3's."""
    modeling = pytest.importorskip("transformers.models.chmv2.modeling_chmv2")
    fields = {"min_depth": near, "max_depth": far, "bins_strategy": "linear", "norm_strategy": "linear"}
    theirs = modeling.CHMv2FeaturesToDepth(SimpleNamespace(**fields))
    x = logits(bins)
    torch.testing.assert_close(depth_of_bins(x, head(bins=bins, bin_range=(near, far))), theirs(x)[:, 0], rtol=2e-6, atol=0)


def test_tipsv2():
    """Blind spot: a floor that is the nearest depth, and not 0.1."""
    modeling = pytest.importorskip("transformers.models.tipsv2_dpt.modeling_tipsv2_dpt")
    theirs = modeling.Tipsv2DptFeaturesToDepth(SimpleNamespace(min_depth=0.001, max_depth=10.0, num_depth_bins=256))
    x = logits(256)
    torch.testing.assert_close(depth_of_bins(x, head(bins=256, bin_floor=0.001)), theirs(x), rtol=2e-6, atol=0)


def test_half_precision_keeps_the_floor():
    """Blind spot: a floor of 1e-8, which is 0 in half precision: 0 / 0 where no bin wins."""
    config = head(bins=8, bin_range=(1.0, 9.0), bin_floor=1e-8)
    depth = depth_of_bins(-torch.ones(1, 8, 2, 2).half(), config)
    torch.testing.assert_close(depth, torch.full((1, 2, 2), 5.0))


def test_autocast_leaves_the_mean_in_float32():
    """Blind spot: a product that autocast takes in half precision, of weights that are float32."""
    config, x = head(bins=256, bin_range=(0.008, 96.0), bin_spacing="mixed_log", bin_floor=1e-8), logits(256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = depth_of_bins(x, config)
    assert torch.equal(found, depth_of_bins(x, config)) and found.dtype == torch.float32
    assert depth_of_bins(x.double(), config).dtype == torch.float64

"""The fused form of a model of three tasks, and what of it stays PyTorch's."""

import copy

import numpy as np
import pytest
import torch
from small import small, wide

import dpt
from dpt.fast import modules
from dpt.zoo import CONFIGS


@pytest.mark.parametrize("name", ["tipsv2-base", "tipsv2-giant"])
@pytest.mark.parametrize("size", [(56, 84), (42, 70), (14, 14)])
def test_the_same_algebra_on_a_cpu(name, size):
    """Blind spot: a tanh's GELU taken for the exact one; a ReLU before normals; a task whose modules stay plain."""
    plain = wide(name)
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.rand(2, 3, *size)
    with torch.inference_mode():
        ours, theirs = quick(x), plain(x)
    assert list(ours) == ["depth", "segmentation", "normals"]
    for task, expected in theirs.items():
        assert (ours[task] - expected).abs().max() <= 2e-5 * expected.abs().max()
    rows = {row.name: row for row in dpt.fast_report(quick)}
    assert all(row.fused for row in rows.values())
    for task in ("", "further.normals.", "further.segmentation."):
        assert rows[f"{task}head"].kind == "FastLinearHead" and rows[f"{task}fusion"].kind == "FastFusion"
        assert rows[f"{task}reassemble.1"].how == rows[f"{task}fusion"].how  # nothing of it is said to be PyTorch's


def test_predictions_are_the_plain_ones():
    """Blind spot: labels of a head that is not the model's first."""
    picture = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    plain = wide("tipsv2-base")
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    ours, theirs = (model.predict(picture, probability=True) for model in (quick, plain))
    assert (ours.labels == theirs.labels).mean() > 0.999 and np.abs(ours.probability - theirs.probability).max() < 1e-3
    assert np.abs(ours.depth - theirs.depth).max() < 1e-3 and np.abs(ours.normals - theirs.normals).max() < 1e-3


def test_heads_of_72_channels_are_fused_and_of_36_stay_plain():
    """Blind spot: an error from inside the attention kernel at the first picture of a model whose heads it does not take."""
    full = CONFIGS["tipsv2-so400m"].encoder
    assert full.embed_dim // full.num_heads == 72
    quick = dpt.accelerate(small("tipsv2-base", embed_dim=144), strict=True)
    assert quick.encoder.blocks[0].attn.num_heads == 2 and type(quick.encoder.blocks[0]) is modules.FastBlock
    model = small("tipsv2-base", embed_dim=72)
    with pytest.raises(ValueError, match=r"encoder\.blocks\.0 cannot run fused: heads of 36 channels: the attention kernel takes"):
        dpt.accelerate(copy.deepcopy(model), strict=True)
    quick = dpt.accelerate(model)
    assert type(model.encoder.blocks[0]) is not modules.FastBlock
    assert {row.name for row in dpt.fast_report(quick) if not row.fused} == {f"encoder.blocks.{index}" for index in range(4)}

"""What of every named model runs fused, by the report, without its weights."""

import pytest
import torch

import dpt
from dpt.model import DPT
from dpt.nets.encoders.residual import ResidualBlock
from dpt.nets.encoders.swinv2 import SwinBlock
from dpt.zoo import CONFIGS


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_no_encoder_block_is_plain_but_swins(name):
    """Blind spot: a model whose blocks refuse without anybody asking; an attention that is PyTorch's in a block that counts as fused."""
    with torch.device("meta"):
        model = dpt.accelerate(DPT(CONFIGS[name]).eval())
    blocks = {name for name, module in model.named_modules() if isinstance(module, ResidualBlock)}
    rows = [row for row in dpt.fast_report(model) if row.name in blocks]
    assert len(rows) == len(blocks) > 0
    for row in rows:
        assert row.fused or isinstance(model.get_submodule(row.name), SwinBlock), f"{row.name}: {row.how}"
        assert not row.fused or row.how.startswith("the same algebra"), f"{row.name}: {row.how}"

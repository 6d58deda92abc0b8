"""dpt.kernels.channel_scale against PyTorch, by the rule of parity.py."""

import pytest
import torch
from both_passes import assert_op_parity

from dpt.kernels.channel_scale import channel_scale, channel_scale_ref


@pytest.mark.parametrize("shape", [(1, 1), (33, 48), (2, 5, 130)], ids=str)
def test_parity(shape, dtype, device):
    """Blind spot: partial blocks of rows and of channels, in both passes."""
    x, gamma = torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device).to(dtype)
    assert_op_parity(channel_scale, channel_scale_ref, [x, gamma], ["x", "gamma"])

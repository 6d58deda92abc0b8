"""Batch norms that several processes share, in fast modules: exchanged before they become fast, or after."""

import copy

import pytest
import torch
from small import wide
from torch import nn

import dpt
from dpt.model import DPT

# Of mmsegmentation's decoder, of isl-org's with an auxiliary head, and with a norm of the tokens.
NAMES = ("dpt-base-ade20k", "dpt-large-ade20k", "dinov3-7b-depth")


def converted(model: DPT) -> DPT:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


ORDERS = {
    "converted, then fast": lambda model: dpt.accelerate(converted(model), strict=True),
    "fast, then converted": lambda model: converted(dpt.accelerate(model, strict=True)),
}


def gradients(model: DPT, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_as_batch_norms_do(name, order, training):
    """Blind spot: a norm of another class that the fused forward passes over, in evaluation, or in training, where it takes the batch's
    statistics; running statistics that stand still."""
    plain = wide(name).train(training)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fast, shared = dpt.accelerate(copy.deepcopy(plain), strict=True), ORDERS[order](copy.deepcopy(plain))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in shared.modules())
    x = torch.randn(2, 3, *(side * plain.config.encoder.patch_size for side in (3, 4)))
    wanted, found = gradients(fast, x), gradients(shared, x)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], gradient) for key, gradient in wanted.items())
    assert all(torch.equal(value, shared.state_dict()[key]) for key, value in fast.state_dict().items())
    rows = {row.name: row for row in dpt.fast_report(shared)}
    assert all(row.fused for row in rows.values())
    assert any("the batch's statistics" in row.how for row in rows.values()) == (training and name != "dinov3-7b-depth")


@pytest.mark.parametrize("where", ["fusion.blocks.0.unit1.norm2", "head.norm"])
def test_another_norm_since_it_became_fast(where):
    """Blind spot: a group norm in a batch norm's place, which the fused forward would read as none, or as a batch norm."""
    model = dpt.accelerate(wide("dpt-base-ade20k"), strict=True)
    model.set_submodule(where, nn.GroupNorm(4, 16))
    with pytest.raises(TypeError, match="a GroupNorm in place of a batch norm: the kernels know BatchNorm2d and SyncBatchNorm"):
        model(torch.randn(1, 3, 32, 32))
    assert "GroupNorm" in str(dpt.fast_report(model))

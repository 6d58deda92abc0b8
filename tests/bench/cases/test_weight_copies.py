"""How often a forward of the fast model copies a weight, counted without a GPU: the launchers run and launch nothing."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import dpt
from bench.harness.hollow import Hollow
from bench.harness.shrunk import shortened
from dpt.fast import acceleration
from dpt.kernels import launch
from dpt.model import DPT
from dpt.zoo import CONFIGS

COPIES = ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::to", "aten::contiguous", "aten::reshape", "aten::flatten")


class Copies(Hollow):
    """Counts the ops that read a parameter's memory and make as many numbers as it has, by the parameter's name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters() if name.endswith("weight")}
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        source = args[-1] if func._schema.name == "aten::copy_" else args[0] if args else None
        if func._schema.name in COPIES:
            name = self.names.get(source.untyped_storage()._cdata)
            if name and result.untyped_storage()._cdata != source.untyped_storage()._cdata:
                self.found[name] += 1
        return result


def copies(model: nn.Module, monkeypatch) -> Counter:
    monkeypatch.setattr(launch, "launch", lambda *args, **kwargs: None)
    monkeypatch.setenv("DPT_KERNELS_FAMILY", "sm_90")
    monkeypatch.setattr(launch, "device_family", lambda device: "sm_90")
    patch = model.config.encoder.patch_size
    x = torch.empty(1, 3, 4 * patch, 6 * patch, dtype=torch.bfloat16)
    with launch.stand_ins(), torch.inference_mode(), Copies(model) as counted:
        model(x)
    return counted.found


@pytest.mark.parametrize(("name", "before"), [("dpt-tiny-depth", 16), ("dpt-large-midas", 18), ("dpt-base-ade20k", 17)])
def test_no_weight_is_copied(name, before, monkeypatch):
    """Blind spot: a weight in another order than the kernels read, which is copied at every call. `before`: with weights as they were."""
    model = DPT(shortened(CONFIGS[name])).to(torch.bfloat16).eval()
    with monkeypatch.context() as as_it_was:
        as_it_was.setattr(acceleration, "_lay_out", lambda model: None)
        unordered = dpt.accelerate(copy.deepcopy(model), strict=True)
    assert sum(copies(unordered, monkeypatch).values()) == before
    assert copies(dpt.accelerate(model, strict=True), monkeypatch) == {}

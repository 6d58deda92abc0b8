"""transformers' models with what other libraries put into them, before `dpt.accelerate` or after: PEFT, torchao, accelerate."""

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from theirs import CASES, same
from torch import nn

import dpt
from dpt.fast import acceleration
from dpt.fast.transformers import encoder

NAME = "depth-anything"
FIRST = "backbone.encoder.layer.0."


def lora(model: nn.Module) -> None:
    """On the queries and values of the first two layers, trained away from nothing."""
    chosen = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "init_lora_weights": False}
    torch.manual_seed(3)
    peft.inject_adapter_in_model(peft.LoraConfig(**chosen), model)


def int8(model: nn.Module) -> None:
    """Where torchao is installed, which no extra of ours does: each import of transformers would import it."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "layer.1." in name)


def offloaded(model: nn.Module) -> None:
    accelerate.cpu_offload(model, torch.device("cpu"))


def dispatched(model: nn.Module) -> None:
    """As `device_map` does over several devices: inputs are moved, weights stay."""
    accelerate.dispatch_model(model, {"backbone": "cpu", "neck": "cpu", "head": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("change", "fused_layers"), [(lora, 2), (int8, 3), (offloaded, 0), (dispatched, 4)])
def test_what_others_put_in_is_obeyed(change, fused_layers, before, monkeypatch):
    """Blind spot: an adapter that adds nothing, a quantised weight read as what it is not, weights that are elsewhere; and layers that are
    computed as upstream's for a hook that only moves what comes in."""
    quick, untouched = (CASES[NAME].model() for _ in range(2))
    inputs = CASES[NAME].inputs()
    change(untouched)
    for step in (change, dpt.accelerate) if before else (dpt.accelerate, change):
        step(quick)
    layers, block = [], encoder._block
    monkeypatch.setattr(encoder, "_block", lambda *args: layers.append(args) or block(*args))
    with torch.inference_mode():
        same(quick(**inputs), untouched(**inputs))
    assert len(layers) == fused_layers
    rows = {row.name: row.fused for row in dpt.fast_report(quick)}
    assert sum(fused for name, fused in rows.items() if ".encoder.layer." in name) == fused_layers
    if change is dispatched:
        assert sum(rows.values()) == CASES[NAME].fused


@pytest.mark.parametrize("before", [True, False])
def test_what_device_map_put_in_is_taken_off(before):
    """Blind spot: accelerate's own forward, which still calls the fast one when the class is upstream's again, or the other way round."""
    quick, untouched = (CASES[NAME].model() for _ in range(2))
    inputs = CASES[NAME].inputs()
    for step in (dispatched, dpt.accelerate) if before else (dpt.accelerate, dispatched):
        step(quick)
    with torch.inference_mode():
        acceleration.decelerate(quick)
        same(quick(**inputs), untouched(**inputs))
        moved = [module for module in quick.modules() if "_old_forward" in vars(module)]
        assert len(moved) > 100 and all(module._old_forward.__func__ is type(module).forward for module in moved)
        assert not any(row.fused for row in dpt.fast_report(quick))
        dpt.accelerate(quick)
        remove_hook_from_submodules(quick)
        same(quick(**inputs), untouched(**inputs))
    assert sum(row.fused for row in dpt.fast_report(quick)) == CASES[NAME].fused
    assert all(vars(module)["forward"].__func__ is type(module).forward for module in moved)  # which accelerate leaves


def test_lora_learns():
    """Blind spot: gradients that do not arrive at an adapter, or at the layers before it."""
    found = []
    for accelerated in (True, False):
        model = CASES[NAME].model()
        lora(model)
        (dpt.accelerate(model) if accelerated else model).train()
        model(**CASES[NAME].inputs()).predicted_depth.square().mean().backward()
        found.append({key: parameter.grad for key, parameter in model.named_parameters() if "lora_" in key})
    ours, theirs = found
    assert len(theirs) == 8
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))

"""That a CUDA graph can hold the forward of every model: nothing in it waits for the device, is launched by numbers, or makes memory that
the graph does not own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from capture_safety import CaptureSafe, HollowCaptureSafe, Unsafe, without_waiting
from small import config as small_config
from torch import Tensor, nn

import dpt
from bench.cases.launches import launching
from dpt.fast.acceleration import as_on_a_gpu
from dpt.kernels import launch
from dpt.model import DPT
from dpt.zoo import CONFIGS

NAMES = [config.name for config in launching(CONFIGS.values())]  # one of those that launch the same


def model_of(name: str, fast: bool, dtype: torch.dtype) -> DPT:
    """A small one on the meta device, its heads wide enough for the kernels."""
    wide = {} if CONFIGS[name].encoder.stage_depths else {"embed_dim": 64, "num_heads": 2}
    with torch.device("meta"):
        model = DPT(small_config(name, **wide)).eval()
    model.cast(dtype)
    return dpt.accelerate(model) if fast else model


def inputs_of(model: DPT, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Two pictures that are not of the stored grid's size, and the prompts of models that take such."""
    encoder = model.config.encoder
    size = encoder.fixed_size or (3 * encoder.patch_size, 5 * encoder.patch_size)
    prompt = [torch.empty(2, 24, 32, device=device)] if model.config.decoder.prompt else []
    return [torch.empty(2, 3, *size, device=device, dtype=dtype), *prompt]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_forward_can_be_recorded(name, fast, monkeypatch):
    """Blind spot: a number that the host asks for, a tensor that is copied to the device at each forward, a mask that selects, a cache
    whose memory would be the graph's."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # which the meta device has not, and cannot be asked
    dtype = torch.bfloat16 if fast else torch.float32
    model = model_of(name, fast, dtype)
    inputs = inputs_of(model, "meta", dtype)
    with torch.no_grad(), without_waiting(), as_on_a_gpu(), CaptureSafe() as mode:
        model(*inputs)
    assert len(mode.made) > 50 and not mode.kept()


@pytest.mark.parametrize("name", NAMES)
def test_its_launchers_can_be_recorded(name):
    """Blind spot: what a launcher does beside its launch, and numbers of the host that PyTorch does not copy to the meta device."""
    model = model_of(name, False, torch.bfloat16).to_empty(device="cpu")
    inputs = inputs_of(model, "cpu", torch.bfloat16)
    with torch.no_grad(), without_waiting(), as_on_a_gpu(), HollowCaptureSafe():
        model(*inputs)
        dpt.accelerate(model)
        for family in ("sm_80", "sm_90", "sm_100"):
            assert len(launch.record(family, name, model, *inputs)) > 5


REFUSED = {
    "a number": lambda x: x.sum().item(),
    "a float": lambda x: float(x[0, 0]),
    "a condition": lambda x: x if x.sum() > 0 else -x,
    "a list": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "to the host": lambda x: x.cpu(),
    "to the host, by name": lambda x: x.to("cpu"),
    "from the host": lambda x: torch.ones(4).to(x.device),
    "copied from the host": lambda x: x.copy_(torch.ones(4, 4)),
    "a number set by index": lambda x: x[0].__setitem__(0, 2.0),
    "a list's numbers": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
    "new numbers": lambda x: x + x.new_tensor([1.0, 2.0, 3.0, 4.0]),
    "an array's numbers": lambda x: x + torch.as_tensor(np.ones(4, np.float32), device=x.device),
    "made on the host": lambda x: torch.arange(4),
    "picked by a list": lambda x: x[[0, 2]],
    "picked by a mask": lambda x: x[x > 0],
    "set by a mask": lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.flatten().long().bincount(),
    "repeated": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long, device=x.device), dim=0),
    "pinned": lambda x: torch.empty(4, pin_memory=True, device="cpu"),
    "waiting for CUDA": lambda x: torch.cuda.synchronize(),
    "waiting for any": lambda x: torch.accelerator.synchronize(),
}
ACCEPTED = {
    "numbers of the program": lambda x: torch.where(x > 0, x, 2.0) * 3 + 1,
    "made there": lambda x: x + torch.arange(4, device=x.device) + torch.full((), 3, device=x.device) + torch.zeros_like(x),
    "picked by places": lambda x: x[torch.arange(2, device=x.device)] + x[:2, None].squeeze(1),
    "set by places": lambda x: x.clone().index_put_((torch.arange(4, device=x.device),), x),
    "filled by a mask": lambda x: x.masked_fill(x > 0, 0.0).sort(1).values.gather(1, x.argmax(1, keepdim=True)),
    "another dtype": lambda x: x.to(torch.bfloat16).contiguous(),
}


def unsafe(what: Callable[[Tensor], object], mode: Callable[[], AbstractContextManager], device: str) -> bool:
    """Whether a mode refuses it; the meta device itself has no numbers for the host."""
    try:
        with torch.no_grad(), without_waiting(), mode():
            what(torch.empty(4, 4, device=device))
    except Unsafe:
        return True
    return False


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_recorded_is_seen(what):
    """Blind spot: modes that see nothing, with which every model passes. Each model runs in both."""
    assert unsafe(REFUSED[what], CaptureSafe, "meta") or unsafe(REFUSED[what], HollowCaptureSafe, "cpu")


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_can_be_recorded_passes(what):
    """Blind spot: modes that refuse what they should not, for which models would be written round them."""
    assert not unsafe(ACCEPTED[what], CaptureSafe, "meta") and not unsafe(ACCEPTED[what], HollowCaptureSafe, "cpu")


def test_what_a_cache_keeps_is_seen():
    """Blind spot: a tensor of the graph's pool that a module holds on to, and that the next replay overwrites."""

    class Keeps(nn.Module):
        def forward(self, x):
            self.table = x + 1
            return self.table * 2

    model = Keeps()
    with torch.no_grad(), CaptureSafe() as mode:
        model(torch.empty(4, 4, device="meta"))
    assert mode.kept() == ["aten::add"]

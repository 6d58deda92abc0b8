"""To a device and back. Blind spots: page-locked memory, events and a GPU: here a CPU, or tensors without memory, take their way."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small import config as small_config
from staged import stage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpt
from dpt.inference import drawing, resizing, taps, transfer
from dpt.inference import prediction as predicting
from dpt.inference.prediction import Beside, Result
from dpt.zoo import CONFIGS


def test_all_in_one_copy(monkeypatch):
    """Blind spot: a tensor that begins within another's elements, lies otherwise in memory, or is empty; results that keep the memory that
    all came in; a wait before anyone asks."""
    told = stage(monkeypatch)
    locked: list[torch.Tensor] = []

    def page_locked(shape, dtype):
        locked.append(torch.empty(shape, dtype=dtype))
        return locked[-1]

    monkeypatch.setattr(transfer, "_page_locked", page_locked)
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "floats": torch.arange(12, dtype=torch.float32).view(3, 4),
        "none": torch.empty(0, 3, dtype=torch.uint8),
        "turned": torch.arange(6, dtype=torch.float32).view(2, 3).T,
        "short": torch.tensor([[-5, 300, 9]], dtype=torch.int16),
        "large": torch.tensor([65535, 0, 1]).to(torch.uint16),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    fetched = transfer.Fetched(tensors)
    assert told == ["recorded 0"] and len(locked) == 1
    arrays = fetched.arrays()
    assert told == ["recorded 0", "waited 0"]
    for key, tensor in tensors.items():
        assert arrays[key].dtype == tensor.numpy().dtype and arrays[key].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(arrays[key], tensor.numpy())
    assert not any(np.shares_memory(array, locked[0].numpy()) for array in arrays.values())
    assert transfer.Fetched({}).arrays() == {}


def test_a_cpu_copies_nothing():
    """Blind spot: a copy of each map, where it is the host's already."""
    tensor = torch.rand(3)
    assert transfer.to_device(tensor, "cpu") is tensor and not transfer.is_staged("mps") and transfer.is_staged("cuda:1")
    assert np.shares_memory(transfer.Fetched({0: tensor}).arrays()[0], tensor.numpy())


def test_constants_serve_training_too():
    """Blind spot: a tensor of inference mode kept for all: what is trained with it raises."""
    transfer.constant.cache_clear()
    taps.interpolated.cache_clear()
    with torch.inference_mode():
        kept = [transfer.constant((1.0, 2.0), torch.device("cpu")), *taps.interpolated(5, 2, "bilinear")]
    assert not any(tensor.is_inference() for tensor in kept)
    assert transfer.constant((1.0, 2.0), torch.device("cpu")) is kept[0] and taps.interpolated(5, 2, "bilinear")[1] is kept[2]


class Crossings(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a value that is asked for, or a copy that is not both non-blocking and of page-locked
    memory. Keeps the others' shapes and dtypes, to the device and back. The device is PyTorch's "meta", which has no memory."""

    def __init__(self, locked: list[torch.Tensor]):
        super().__init__()
        self.locked, self.up, self.back = locked, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"), name
        comes_back = name == "aten::copy_" and args[1].is_meta and not args[0].is_meta
        result = args[0] if comes_back else function(*args, **kwargs)
        if name in ("aten::to", "aten::_to_copy", "aten::copy_"):
            source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], result)
            if source.is_meta != target.is_meta:
                host = target if source.is_meta else source
                assert any(host is one for one in self.locked) and (kwargs.get("non_blocking") or True in args[2:]), name
                (self.up if target.is_meta else self.back).append((tuple(source.shape), source.dtype))
        else:
            whole = [tensor for tensor in tree_leaves((args, kwargs, result)) if isinstance(tensor, torch.Tensor) and tensor.dim()]
            assert len({tensor.device for tensor in whole}) <= 1, name
        return result


def refuse_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's numbers made a tensor on the device: a copy that is waited for, of which "meta" makes none, and so nothing is seen."""

    def refused(make):
        def checked(*args, **kwargs):
            made = make(*args, **kwargs)
            assert not made.is_meta, "a tensor on the device, of Python's numbers"
            return made

        return checked

    for owner, name in ((torch.Tensor, "new_tensor"), (torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy")):
        monkeypatch.setattr(owner, name, refused(getattr(owner, name)))


TASKS = {
    "dpt-large-midas": {},
    "dpt-base-ade20k": {"probability": True},
    "tipsv2-base": {"flip": True},
    "depth-anything-3-metric-large": {"focal": 500.0},
    "dpt-hybrid-nyu": {"tta": True},
    "prompt-depth-anything-small": {"prompt": np.ones((9, 12), np.float32)},
    "depth-anything-v2-small": {"slide": True, "flip": True},
}


def _config(name: str):
    config = small_config(name)
    return config.with_("input", size=(56, 56) if config.encoder.patch_size == 14 else (64, 64))


@pytest.mark.parametrize("name", TASKS)
def test_nothing_waits_between_a_picture_and_its_map(monkeypatch, name):
    """Blind spot: a number asked of the device, constants or taps made on it from Python's lists, a map that comes back on its own. The
    device takes part in no arithmetic."""
    told, locked = stage(monkeypatch, "meta"), []

    def page_locked(shape, dtype):
        locked.append(torch.empty(shape, dtype=dtype))
        return locked[-1]

    monkeypatch.setattr(transfer, "_page_locked", page_locked)
    config, rng = _config(name), np.random.default_rng(0)
    constants: dict = {}

    def constant(values, device, dtype=torch.float32):  # as if made for a picture before
        key = (values, device, dtype)
        return constants.setdefault(key, torch.empty(torch.tensor(values).shape, dtype=dtype, device=device))

    for module in (resizing, drawing):
        monkeypatch.setattr(module, "constant", constant)
    options = predicting.Options.of(config, **TASKS[name])
    loaded = [Result(None, rng.integers(0, 256, (70, 90, 3), dtype=np.uint8), focal=500.0) for _ in range(2)]
    loaded = [dataclasses.replace(result, prompt=options.prompts[0] if options.prompts else None) for result in loaded]
    for function in (taps.interpolated, taps.area):
        monkeypatch.setattr(taps, function.__name__, function.__wrapped__)
    with torch.device("meta"):
        model = dpt.build(config).eval()
    refuse_lists(monkeypatch)
    with torch.inference_mode(), Crossings(locked) as crossings:
        found = predicting._found(model, loaded, 4, options, Beside(drawn=True))
        transfer.Fetched(found)
    assert told == ["recorded 0"] and len(crossings.back) == 1
    drawn = {"depth": 3, "segmentation": 2, "normals": 2}
    maps = 2 * (sum(drawn[head.task] for head in config.heads) + (options.probability is True))
    assert len(found) == maps + 1  # whether they are finite
    pixels = [shape for shape, dtype in crossings.up if dtype == torch.uint8]
    assert pixels == [result.image.shape for result in loaded]  # each once, whatever its scales


@pytest.mark.parametrize("mode", ["area_cubic", "area", "bilinear", "bicubic"])
def test_resizing_waits_for_nothing(monkeypatch, mode):
    """Blind spot: a way of resizing that no model above takes."""
    stage(monkeypatch, "meta")
    locked: list[torch.Tensor] = []
    monkeypatch.setattr(transfer, "_page_locked", lambda shape, dtype: locked.append(torch.empty(shape, dtype=dtype)) or locked[-1])
    for function in (taps.interpolated, taps.area):
        monkeypatch.setattr(taps, function.__name__, function.__wrapped__)
    refuse_lists(monkeypatch)
    x = torch.empty(1, 3, 40, 60, device="meta")
    with Crossings(locked) as crossings:
        for size in ((20, 30), (20, 15), (17, 40), (80, 90), (40, 60)):
            config = dataclasses.replace(CONFIGS["dpt-large-midas"].input, mode=mode)
            assert resizing.resized(x, size, config).shape == (1, 3, *size)
    assert crossings.up and not crossings.back


def test_staged_results_are_the_same(monkeypatch):
    """Blind spot: maps under another picture's or task's name; pictures that are drawn on the device with other bytes than the writers'."""
    model = dpt.build(_config("tipsv2-base")).eval()
    sources = [np.random.default_rng(seed).integers(0, 256, (50 + 7 * seed, 70, 3), dtype=np.uint8) for seed in range(5)]
    wanted = list(predicting.predict_iter(model, sources, Beside(drawn=True), batch_size=2))
    stage(monkeypatch)
    found = list(predicting.predict_iter(model, sources, Beside(drawn=True), batch_size=2))
    for one, other in zip(found, wanted, strict=True):
        assert not other.drawn and set(one.drawn) == {"depth", "segmentation", "normals"}
        for head, field in zip(model.config.heads, ("depth", "labels", "normals"), strict=True):
            mine, theirs = getattr(one.prediction, field), getattr(other.prediction, field)
            np.testing.assert_array_equal(mine, theirs)
            drawn = drawing.drawn(torch.from_numpy(theirs), torch.from_numpy(other.image), head)
            assert drawn.keys() == one.drawn[head.task].keys()
            for what, tensor in drawn.items():
                np.testing.assert_array_equal(one.drawn[head.task][what], tensor.numpy())

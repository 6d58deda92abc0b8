"""Reading files that others wrote: every container, wrapper and prefix, and what stands beside the tensors."""

import argparse
import collections
import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from containers import WRITERS, equal, path_for, save_legacy, save_protocol, save_zip
from safetensors.torch import save_file
from small import config, small, upstream

import dpt
from dpt.checkpoints import CheckpointError
from dpt.checkpoints.pickles import unpickle
from dpt.checkpoints.stored import Stored
from dpt.classes import palette
from dpt.zoo import carried, isl

CONFIG = config("dpt-large-midas")


@pytest.fixture(scope="module")
def model():
    return small("dpt-large-midas")


@pytest.fixture(scope="module")
def state(model):
    return upstream(model, isl.LAYOUT)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model.", "model.model."])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("layout", [isl.LAYOUT, carried.LAYOUT], ids=lambda layout: layout.name)
def test_prefixes(tmp_path, model, writer, layout, prefix):
    """Blind spot: what DistributedDataParallel, torch.compile and Lightning put before names, in one container or layout only."""
    path = path_for(tmp_path, writer)
    WRITERS[writer]({prefix + key: value for key, value in upstream(model, layout).items()}, path)
    assert equal(dpt.load(path, CONFIG), model)


@pytest.mark.parametrize("writer", WRITERS)
def test_two_keys_that_become_one(tmp_path, state, writer):
    """Blind spot: one of two tensors dropped, whichever came first."""
    key = "scratch.layer1_rn.weight"
    WRITERS[writer]({**state, "module." + key: torch.zeros(1)}, path_for(tmp_path, writer))
    names = rf"({key} and module\.{key}|module\.{key} and {key}) are both {key}"
    with pytest.raises(CheckpointError, match=names):
        dpt.load(path_for(tmp_path, writer), CONFIG)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"ema": state},
        lambda state: {"ema": {"state_dict": state}, "model": None},
        lambda state: {"model": {"model_state_dict": {"module." + key: value for key, value in state.items()}}},
        lambda state: {"model": state, "ema": {"decay": 0.99}, "best": torch.tensor(0.5)},
        lambda state: collections.OrderedDict(state),
        lambda state: collections.defaultdict(dict, {"state_dict": collections.OrderedDict(state)}),
    ],
)
@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_wrappers(tmp_path, model, state, save, wrap):
    """Blind spot: a wrapper that one training code uses and another not."""
    save(wrap(state), tmp_path / "file.pth")
    assert equal(dpt.load(tmp_path / "file.pth", CONFIG), model)


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda state: {"model": state, "ema": state}, "'model' and 'ema'"),
        (lambda state: {"state_dict": {"model_state_dict": state}, "model": state}, "'state_dict' and 'model'"),
        (lambda state: {"model": {"ema": state, "state_dict": state}}, "'state_dict' and 'ema'"),
    ],
)
def test_two_wrappers_that_could_be_meant(tmp_path, state, wrap, names):
    """Blind spot: the averaged weights or the last ones, by the order of a table."""
    torch.save(wrap(state), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"file.pth: holds {names}, each of them a state dict"):
        dpt.load(tmp_path / "file.pth", CONFIG)


class Hub:
    """Stands for mmengine's message hub: pickled by the name of a class that the reader cannot import."""

    def __init__(self):
        self.history = collections.OrderedDict(loss=np.arange(3.0), scalars=[np.float64(1.5), np.int64(2)])
        self.itself = self


Hub.__module__, Hub.__qualname__ = "mmengine_that_is_not_installed", "MessageHub"


@pytest.fixture
def extras(model):
    """What training code leaves beside the weights."""
    parameters = [parameter.detach().clone().requires_grad_() for parameter in list(model.parameters())[:3]]
    optimiser = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimiser.step()
    return {
        "message_hub": Hub(),
        "args": argparse.Namespace(lr=1e-3, path=Path("data"), sizes={1, 2}, frozen=frozenset([3])),
        "best": np.float32(0.5),
        "random": [np.random.RandomState(0).get_state(), random.Random(0).getstate(), torch.get_rng_state()],
        "optimizer": optimiser.state_dict(),
        "objects": [object(), complex(1, 2), range(3), bytearray(b"x"), 1 << 200, torch.float16, torch.device("cpu"), {(1, 2): 3}],
        "sparse": torch.eye(3).to_sparse(),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", range(1, 6))  # torch.save with protocol 0 writes storages as text that torch.load cannot read either
def test_files_that_hold_more_than_tensors(tmp_path, model, state, extras, zipped, protocol, monkeypatch):
    """Blind spot: a protocol's opcodes; a class that only reads where it is installed."""
    import sys
    import types

    module = types.ModuleType(Hub.__module__)
    module.MessageHub = Hub
    monkeypatch.setitem(sys.modules, Hub.__module__, module)
    save_protocol(protocol, zipped)({**extras, "state_dict": state}, tmp_path / "iter.pth")
    monkeypatch.delitem(sys.modules, Hub.__module__)
    assert equal(dpt.load(tmp_path / "iter.pth", CONFIG), model)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back(protocol):
    """Blind spot: a protocol's own way to write a value; values that stand twice or hold themselves."""
    one = [1, -1, 255, 1 << 15, -(1 << 40), 1 << 300, 1.5, "text", "\u00e9\n", True, False, None, (), (1,), (1, 2), (1, 2, 3, 4), [], {}]
    values = {"one": one, "again": one, 3: {"x": (one, one)}, "bytes": [b"x", b"x" * 300][: 2 * (protocol > 2)], "long": "x" * 300}
    values["long list"] = list(range(2000))
    assert unpickle(io.BytesIO(pickle.dumps(values, protocol)), lambda identity: None) == values
    one.append(one)
    made = unpickle(io.BytesIO(pickle.dumps(one, protocol)), lambda identity: None)
    assert made[-1] is made


def test_only_the_state_dict_is_read(tmp_path, state, monkeypatch):
    """Blind spot: an optimiser's state, twice the size of the model, fetched and thrown away."""
    read = []
    original = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self: read.append(self) or original(self))
    torch.save({"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1 << 20)}}}}, tmp_path / "file.pth")
    dpt.load(tmp_path / "file.pth", CONFIG)
    assert len(read) == len(state)


def test_views_and_parameters(tmp_path, model, state):
    """Blind spot: tensors that share a storage, transposed or channels-last ones, parameters, and tensors with attributes."""
    key, other, third = "scratch.layer1_rn.weight", "scratch.layer2_rn.weight", "scratch.output_conv.0.weight"
    changed = dict(state)
    both = torch.cat([torch.ones(5), state[key].flatten(), state[other].flatten()])
    changed[key] = both[5 : 5 + state[key].numel()].view(state[key].shape)
    changed[other] = both[5 + state[key].numel() :].view(state[other].shape)
    changed[third] = torch.nn.Parameter(state[third].to(memory_format=torch.channels_last))
    name = "pretrained.model.blocks.0.mlp.fc1.weight"
    changed[name] = state[name].t().contiguous().t()
    bias = "pretrained.model.blocks.0.mlp.fc1.bias"
    changed[bias] = torch.nn.Parameter(state[bias].clone())
    changed[bias].tag = "set by a training code"
    for save in (save_zip, save_legacy):
        save(changed, tmp_path / "file.pth")
        loaded = dpt.load(tmp_path / "file.pth", CONFIG)
        assert equal(loaded, model)
        for value in loaded.state_dict().values():
            assert value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_what_is_loaded_is_whole(tmp_path, model, state):
    """Blind spot: parameters that do not train, are left without values, or change with the file."""
    save_file(state, tmp_path / "file.safetensors")
    loaded = dpt.load(tmp_path / "file.safetensors", CONFIG)
    (tmp_path / "file.safetensors").write_bytes(b"overwritten in place")
    assert equal(loaded, model)
    assert all(type(p) is torch.nn.Parameter and p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers())) and not loaded.training
    loaded(torch.randn(1, 3, 32, 32)).sum().backward()
    assert loaded.encoder.pos_embed.grad is not None


@pytest.mark.parametrize("make", [lambda path: dpt.load(path, CONFIG), lambda path: dpt.build(CONFIG, weights=path)])
def test_nothing_is_initialised_first(tmp_path, state, make):
    """Blind spot: seconds of random numbers that the file's overwrite. Random numbers drawn would move the generator."""
    save_file(state, tmp_path / "file.safetensors")
    before = torch.get_rng_state()
    make(tmp_path / "file.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("build", [False, True])
def test_dtype_and_device(tmp_path, state, build):
    """Blind spot: the file's dtype in the place of PyTorch's default or the asked one; counters made floats."""
    mixed = {key: value.to(random.Random(key).choice([torch.float16, torch.float64, torch.bfloat16])) for key, value in state.items()}
    torch.save(mixed, tmp_path / "file.pth")
    make = (lambda **options: dpt.build(CONFIG, weights=tmp_path / "file.pth", **options)) if build else None
    make = make or (lambda **options: dpt.load(tmp_path / "file.pth", CONFIG, **options))
    assert {p.dtype for p in make().parameters()} == {torch.float32}
    assert {p.dtype for p in make(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        assert {p.device.type for p in make().parameters()} == {"meta"}
        colours = palette(7)
    assert colours == palette(7)
    assert {p.device.type for p in make(device="cpu").parameters()} == {"cpu"}
    names = small("dpt-base-ade20k")
    dpt.save(names, tmp_path / "labels.safetensors")
    assert dpt.load(tmp_path / "labels.safetensors", dtype=torch.float16).head.norm.num_batches_tracked.dtype == torch.int64

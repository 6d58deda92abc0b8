"""When a graph no longer holds: what is exchanged in a model, and what runs without one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cuda_graphs import SIZE, warmed
from small import wide
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpt
from dpt.fast.acceleration import decelerate
from dpt.inference import graphs


def exchanged_data(model):
    model.part[0].weight.data = torch.randn(4, 4)


def exchanged_buffer(model):
    model.shift = torch.randn(4)


def assigned(model):
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()}, assign=True)


def exchanged_module(model):
    model.part[0] = nn.Linear(4, 4).eval()


def exchanged_kind(model):
    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    model.part[1].__class__ = Doubled


def exchanged_forward(model):
    model.part[1].forward = lambda x: x - 1


def other_dtype(model):
    model.to(torch.float64).to(torch.float32)


def other_order(model):
    """At the address that it had."""
    weight = model.part[0].weight
    weight.data = weight.data.t()


def other_numbers(model):
    """At the address that they had."""
    model.shift.data = model.shift.data.view(torch.int32)


EXCHANGES = [
    exchanged_data, exchanged_buffer, assigned, exchanged_module, exchanged_kind, exchanged_forward, other_dtype, other_order,
    other_numbers,
]  # fmt: skip


@pytest.mark.parametrize("change", EXCHANGES)
def test_what_is_exchanged_is_captured_anew(card, model, change):
    """Blind spot: a replay that reads memory that is another's by now, or runs a module that was exchanged."""
    x = torch.randn(SIZE)
    quick = warmed(model, x)
    [before], stale = card.graphs, quick(x)
    with torch.inference_mode(False), torch.no_grad():
        change(model)
    for _ in range(3):
        assert torch.equal(quick(x), model(x))
    assert change is other_dtype or not torch.equal(stale, model(x))
    assert len(card.captures) == 2 and before() is None


def test_what_changes_in_place_is_seen(card, model):
    """Blind spot: weights of before in a replay, or a capture after every step of an optimiser."""
    x = torch.randn(SIZE)
    quick = warmed(model, x)
    with torch.inference_mode(False), torch.no_grad():
        model.part[0].weight.mul_(2)
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert torch.equal(quick(x), model(x)) and len(card.captures) == 1


def test_accelerated_and_back(card):
    """Blind spot: the plain modules' launches in a graph of a fast model, the weights in the order that they had; what is kept between
    forwards, as a resized positional embedding is, of weights as they were."""
    with torch.inference_mode(False):
        model = wide()
    x = torch.randn(1, 3, 80, 48)
    quick = warmed(model, x)
    for count, change in enumerate((dpt.accelerate, decelerate), 2):
        with torch.inference_mode(False):
            change(model)
        for _ in range(3):
            assert torch.equal(quick(x), model(x))
        assert len(card.captures) == count
    with torch.inference_mode(False), torch.no_grad():
        model.encoder.pos_embed.mul_(3)
    assert torch.equal(quick(x), model(x)) and len(card.captures) == 3


@contextlib.contextmanager
def hook_inside(model):
    handle = model.part[1].register_forward_hook(lambda module, args, output: output + 1)
    yield
    handle.remove()


@contextlib.contextmanager
def hook_of_all(model):
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: output + 1)
    yield
    handle.remove()


@contextlib.contextmanager
def training(model):
    model.part[1].train()
    yield
    model.part[1].eval()


@contextlib.contextmanager
def gradients(model):
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def compiled_part(model):
    model.part.compile(backend="eager")
    yield
    del model.part._compiled_call_impl


@contextlib.contextmanager
def compiled(model):
    model.compile(backend="eager")
    yield
    del model._compiled_call_impl


@contextlib.contextmanager
def other_device(model):
    graphs.DEVICE = "cuda"
    yield
    graphs.DEVICE = "cpu"


@contextlib.contextmanager
def dispatched(model):
    seen = []

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Sees():
        yield
    assert seen.count("aten::relu") == 8, "of four calls, and of what they should give"


@contextlib.contextmanager
def capture_under_way(model):
    card = torch.cuda.is_current_stream_capturing.__self__
    card.now.capture = object()
    yield
    card.now.capture = None


WITHOUT = [hook_inside, hook_of_all, training, gradients, compiled_part, compiled, other_device, dispatched, capture_under_way]


@pytest.mark.parametrize("when", WITHOUT)
@pytest.mark.parametrize("later", [False, True])
def test_what_runs_without_a_graph(card, model, when, later):
    """Blind spot: a hook that no longer runs, a gradient that is lost, a module in training that is not; from the first call on, or when
    there is a graph already."""
    x = torch.randn(SIZE).clone()
    quick = warmed(model, x) if later else dpt.graphed(model)
    recorded = card.alive()
    replays = [graph.replays for graph in recorded]
    with when(model):
        for _ in range(4):
            with torch.inference_mode(False) if when is gradients else contextlib.nullcontext():
                x = torch.randn(SIZE)
                found, wanted = quick(x), model(x)
            assert torch.equal(found, wanted) and found.requires_grad == (when is gradients)
    assert len(card.captures) == later and [graph.replays for graph in recorded] == replays
    del recorded
    for _ in range(3):
        x = torch.randn(SIZE)
        assert torch.equal(quick(x), model(x))
    assert len(card.alive()) == 1 and card.alive()[0].replays > 1, "and then with one again"

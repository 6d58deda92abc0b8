"""CUDA graphs on a card that a CPU plays (tests/helpers/cuda_graphs.py). Blind spots: CUDA itself, whose allocator, streams and driver no
test here has seen; two devices, of which CPU tensors have one."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from cuda_graphs import NOT_RECORDED, SIZE, Model, in_threads, warmed
from small import wide
from torch import nn
from torch.utils import _pytree as pytree

import dpt
from dpt.inference import graphs
from dpt.inference.graphs import FIRST_SIGHTS, WORTH, Graphs


def assert_same(found, wanted) -> None:
    found, wanted = pytree.tree_flatten(found), pytree.tree_flatten(wanted)
    assert found[1] == wanted[1]
    for one, other in zip(found[0], wanted[0], strict=True):
        assert torch.equal(one, other)


def test_a_replay_has_the_numbers_of_its_own_input(card, model):
    """Blind spot: a graph that reads the input it was captured with, runs the forward again, or computes in another mode."""
    quick, inputs = dpt.graphed(model), [torch.randn(SIZE) for _ in range(6)]
    wanted = [model(x) for x in inputs]
    model.ran.clear()
    for number, (x, one) in enumerate(zip(inputs, wanted, strict=True), 1):
        with torch.no_grad() if number % 2 else torch.inference_mode():
            assert torch.equal(quick(x), one)
        assert len(card.captures) == (number >= FIRST_SIGHTS)
    assert len(model.ran) == FIRST_SIGHTS - 1 + 2, "eagerly, to warm up, captured"
    assert [graph.replays for graph in card.alive()] == [6 - FIRST_SIGHTS + 1]


def test_nobody_gets_memory_twice(card, model):
    """Blind spot: an output that the next replay overwrites, the graph's own memory handed out, tasks of a dictionary, distances between
    pixels that the next op reads by."""

    class Apart(Model):
        def forward(self, x, prompt=None):
            found = super().forward(x, prompt)
            return {**found, "apart": torch.cat((x, x), dim=-1)[..., :3], "x": x}

    with torch.inference_mode(False):
        model = Apart()
    quick = warmed(model, torch.randn(SIZE), torch.randn(SIZE))
    kept = []
    for _ in range(4):
        x, prompt = torch.randn(SIZE), torch.randn(SIZE)
        found, wanted = quick(x, prompt), model(x, prompt)
        assert_same(found, wanted)
        assert {name: y.stride() for name, y in found.items()} == {name: y.stride() for name, y in wanted.items()}
        kept.append((found, {name: y.clone() for name, y in wanted.items()}))
    for found, wanted in kept:
        assert_same(found, wanted)
    storages = [y.untyped_storage()._cdata for found, _ in kept for y in found.values()]
    [graph] = card.alive()
    assert len({*storages}) == 16 and not graph.memory & {*storages} and len(card.captures) == 1


def test_inputs_in_any_order_of_memory(card):
    """Blind spot: a graph of contiguous pictures that channels-last ones, or windows of a picture, are run through in another order."""
    with torch.inference_mode(False):
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    quick = dpt.graphed(model)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        for picture in (x, x.to(memory_format=torch.channels_last), torch.randn(2, 3, 20, 20)[..., 5:13, 5:13]):
            assert torch.equal(quick(picture), model(picture))
    assert len(card.captures) == 2


@pytest.mark.parametrize("most", [1, 2])
def test_bounded_and_the_least_recently_used_goes(card, model, most, monkeypatch):
    """Blind spot: graphs that pile up, the wrong one dropped, one that is dropped and held; a pool whose last graph went before the next
    came, which PyTorch refuses."""
    monkeypatch.setattr(graphs, "WORTH", 0)  # each is worth it
    quick = dpt.graphed(model, most=most)
    x, y, z = (torch.randn(rows, 4) for rows in (1, 2, 3))
    for each in (x, x, y, y, x, z, z):  # x was used after y
        assert torch.equal(quick(each), model(each))
        assert len(Graphs.of(model)) <= most
    left = {1: (z,), 2: (x, z)}[most]
    assert len(card.captures) == 3 and len(card.alive()) == most
    replays = sum(graph.replays for graph in card.alive())
    for each in left:
        quick(each)
    assert len(card.captures) == 3 and sum(graph.replays for graph in card.alive()) == replays + len(left)
    assert len({pool for *_, pool in card.captures}) == 1, "they share their memory"
    with pytest.raises(ValueError, match="most=0"):
        dpt.graphed(model, most=0)
    with pytest.raises(TypeError, match="function"):
        dpt.graphed(lambda x: x)


def test_sizes_that_come_seldom_run_without(card, model):
    """Blind spot: a folder of pictures of many sizes, each of which pays for a capture; sizes in turn, which drop each other's graphs for
    ever; one that then comes often and gets none."""
    quick = dpt.graphed(model)
    for rows in range(1, 51):
        quick(torch.randn(rows, 4))
    assert not card.captures
    for _ in range(60):
        for rows in range(1, 15):
            quick(torch.randn(rows, 4))
    assert 14 <= len(card.captures) < 60, "of 840 calls"
    before = len(card.captures)
    for _ in range(WORTH * FIRST_SIGHTS + 5):
        quick(torch.randn(99, 4))
    assert len(card.captures) == before + 1


def test_what_comes_often_gets_a_graph_at_last(card, model):
    """Blind spot: so many graphs dropped unpaid that no form can come often enough any more."""
    quick = dpt.graphed(model, most=1)
    for rows in range(1, 12):
        for _ in range(WORTH * FIRST_SIGHTS):
            if len(card.captures) < rows:
                quick(torch.randn(rows, 4))
    assert len(card.captures) == 11


def test_warmed_up_and_captured_on_a_stream_of_its_own(card, model):
    """Blind spot: what the first call on a stream or in a thread makes, made in the capture; the stream of the caller left changed."""
    warmed(model, torch.randn(SIZE))
    (eager, *_), (warm, recorded, thread), (own, capturing, again) = model.ran
    assert eager == 0 and own == warm > 0 and (recorded, capturing) == (False, True) and thread == again == threading.get_ident()
    assert card.current_stream() is card.default
    [(_, _, stream, _)] = card.captures
    assert stream.number == own and stream.device == torch.device("cpu") and card.chosen() is None


def test_threads_get_their_own_numbers(card, model):
    """Blind spot: two threads that share the graphs' memory, and a stream that does not wait for the copy of another's output: the card
    raises there. Two forms, so that pools are shared too; a second model at once, whose captures must not meet these."""
    with torch.inference_mode(False):
        other = Model()
    quick, second = dpt.graphed(model), dpt.graphed(other)
    inputs = [[torch.randn(2 + number % 2, 4) for number in range(40)] for _ in range(4)]
    wanted = [[which(x) for x in xs] for which, xs in zip((model, model, other, other), inputs, strict=True)]

    def work(which, xs, ys):
        def run():
            for x, y in zip(xs, ys, strict=True):
                assert torch.equal(which(x), y)

        return run

    in_threads(*(work(which, xs, ys) for which, xs, ys in zip((quick, quick, second, second), inputs, wanted, strict=True)))
    assert len(card.captures) == 4 and sum(graph.replays for graph in card.alive()) > 100
    assert len({stream.number for _, _, stream, _ in card.captures}) == 2 == len({pool for *_, pool in card.captures})


def test_models_are_captured_one_after_the_other(card):
    """Blind spot: two captures at a time, which a process cannot have: the card raises, and the second one would fail."""

    class Slow(Model):
        def forward(self, x, prompt=None):
            if card.capturing():
                threading.Event().wait(0.2)
            return super().forward(x, prompt)

    with torch.inference_mode(False):
        pair, x, both = [dpt.graphed(Slow()) for _ in range(2)], torch.randn(SIZE), threading.Barrier(2)

    def work(quick):
        def run():
            quick(x)
            both.wait()
            quick(x)

        return run

    in_threads(*map(work, pair))
    assert len(card.captures) == 2


def test_memory_is_used_again_behind_the_last_copy(card, model):
    """Blind spot: a graph that is dropped while another stream still copies from its memory, which the next capture then gets."""
    x = torch.randn(SIZE)
    quick = warmed(model, x)
    in_threads(lambda: quick(x))
    [(_, _, own, pool)] = card.captures
    number, count = card.last[pool]
    assert number not in (own.number, 0) and own.clock[number] >= count


def test_the_card_sees_a_stream_that_does_not_wait(card, model, monkeypatch):
    """Blind spot: a card whose clocks see nothing, so that the test before this one could not fail."""
    x = torch.randn(SIZE)
    quick = warmed(model, x)
    monkeypatch.setattr("cuda_graphs.Stream.wait_event", lambda stream, event: None)
    quick(x)
    with pytest.raises(AssertionError, match="has not waited"):
        in_threads(lambda: quick(x))


def test_released_with_the_model(card, model):
    """Blind spot: GPU memory that stays when the model is gone, or goes with a garbage collection alone."""
    warmed(model, torch.randn(SIZE))
    [graph], kept = card.graphs, weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        assert graph() is not None
        del model  # the fixture's is pytest's own
        assert kept() is not None
    finally:
        gc.enable()

    def scope() -> tuple[weakref.ref, weakref.ref]:
        with torch.inference_mode(False):
            own = wide()
        quick = warmed(own, torch.randn(1, 3, 64, 64))
        assert quick.config is own.config
        return weakref.ref(own), card.graphs[-1]

    gc.disable()
    try:
        gone = scope()
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_forgotten_on_request(card, model):
    """Blind spot: memory that nobody can get back while the model lives."""
    x = torch.randn(SIZE)
    quick = warmed(model, x)
    Graphs.of(model).forget()
    assert not card.alive() and not len(Graphs.of(model))
    assert torch.equal(quick(x), model(x))


def test_a_wrapper_of_torch_compile_is_called_itself(card):
    """Blind spot: the model uncompiled, or the compiled one captured."""
    runs, model = [], nn.Linear(4, 4).eval()

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph(*args)

    with torch.inference_mode(False):
        quick = dpt.graphed(torch.compile(model, backend=backend))
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(SIZE)
            found, wanted = quick(x), model(x)
            assert torch.equal(found, wanted)
    assert len(runs) == 4 and not card.captures


def test_hooks_of_the_model_itself_run(card, model):
    """Blind spot: a stopwatch that stands still in replays, what hooks change, one that has to run when the forward fails."""
    x, told = torch.randn(SIZE), []
    quick = warmed(model, x)
    model.register_forward_pre_hook(lambda module, args: told.append(module.part) or (args[0] + 1,))
    model.register_forward_hook(lambda module, args, output: told.append("behind") or output, always_call=True)
    wanted = model(x)
    told.clear()
    assert torch.equal(quick(x), wanted) and told == [model.part, "behind"]
    assert len(card.captures) == 1 and card.alive()[0].replays > 1
    told.clear()
    with pytest.raises(RuntimeError):
        quick(torch.randn(2, 3))
    assert told == [model.part, "behind"]


def test_settings_are_part_of_a_graph(card, model):
    """Blind spot: the kernels of TF32 or of autocast after it was switched off; a cache of autocast's that a graph would read."""
    x, caches = torch.randn(SIZE), []
    warmed(model, x)
    model.part[1].forward = lambda y: caches.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())) or y.relu()
    quick = warmed(model, x)
    assert len(card.captures) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        warmed(model, x)
        assert torch.equal(quick(x), model(x))
    assert len(card.captures) == 3 and caches[-3:-1] == [(True, False)] * 2, "to warm up and captured"
    assert torch.equal(quick(x), model(x)) and len(card.captures) == 3
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
        warmed(model, x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(card.captures) == 4


def test_copies_and_pickles_have_no_graphs(card, model):
    """Blind spot: a graph that is pickled, or a copy that replays the original's weights."""
    x = torch.randn(SIZE)
    quick = warmed(model, x)
    names = set(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not len(Graphs.of(copied)) and type(copied) is Model
    for copied in (copy.deepcopy(quick), pickle.loads(pickle.dumps(dpt.graphed(model, most=3)))):
        assert torch.equal(copied(x), model(x)) and copied.part[0].weight.data_ptr() != model.part[0].weight.data_ptr()
    assert Graphs.of(copied._model).most == 3 == Graphs.of(model).most
    buffer = io.BytesIO()
    torch.save(quick.state_dict(), buffer)
    assert set(quick.state_dict()) == names and len(card.captures) == 1


def test_all_else_is_the_model(card, model):
    """Blind spot: `.eval()` or `.to()` that gives the model without its graphs, an attribute set on the wrapper alone."""
    quick = dpt.graphed(model)
    assert quick.eval() is quick and quick.to(torch.float32) is quick and quick.returned() is quick and dpt.graphed(quick)._model is model
    assert list(quick.parameters())[0] is model.part[0].weight and [*quick.modules()][0] is model
    quick.config = "of the model"
    assert model.config == "of the model" and quick.part is model.part and repr(model) in repr(quick)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        quick.nothing_like_it  # noqa: B018


class Asks(Model):
    """Its forward cannot be recorded: the host wants a number."""

    def forward(self, x, prompt=None):
        y = super().forward(x, prompt)
        return y if y.sum().item() > -1e30 else -y


def test_a_capture_that_fails(card):
    """Blind spot: a process or a thread's stream that is broken by it; a size that is tried again and again; a warning at each picture, or
    none; an allocator that goes on recording."""
    with torch.inference_mode(False):
        model = Asks()
    quick = dpt.graphed(model)
    with pytest.warns(RuntimeWarning, match=f"Asks runs without a CUDA graph for \\(2, 3, 4\\): CUDA error: {NOT_RECORDED}$") as told:
        for rows in (2, 5):
            for _ in range(5):
                x = torch.randn(rows, 3, 4)
                assert torch.equal(quick(x), model(x))
                assert card.current_stream() is card.default
    assert len(told) == 1 and not card.alive() and not card.recording_to and len(card.released) == 2
    assert sum(capturing for _, capturing, _ in model.ran) == 2


def out_of_memory_once(monkeypatch, model, when) -> None:
    forward, left = model.forward, [1]

    def run(*inputs):
        if left and when():
            left.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*inputs)

    monkeypatch.setattr(model, "forward", run)


@pytest.mark.parametrize("captured", [False, True])
def test_no_memory_for_a_graph(card, model, monkeypatch, captured):
    """Blind spot: a prediction that fails for want of a graph's memory, where it runs without; others' graphs left in a pool whose state is
    unknown."""
    x, y = torch.randn(SIZE), torch.randn(7, 4)
    own = lambda: card.current_stream().number > 0 and card.capturing() == captured  # noqa: E731
    quick = warmed(model, y)
    out_of_memory_once(monkeypatch, model, lambda: own() and len(card.captures) == 2)
    warmed(model, y)
    with pytest.warns(RuntimeWarning, match=r"for \(2, 3, 4\): CUDA out of memory"):
        for _ in range(4):
            assert torch.equal(quick(x), model(x))
    assert not card.alive() and not card.released, "PyTorch ends such a capture itself"
    for _ in range(3):
        assert torch.equal(quick(y), model(y))
    assert len(card.alive()) == 1


def test_no_memory_beside_the_graphs(card, model, monkeypatch):
    """Blind spot: a large picture that fails because small ones have graphs, and one that fails and is tried for ever."""
    x, large = torch.randn(SIZE), torch.randn(50, 4)
    quick = warmed(model, x)
    wanted, forward = model(large), model.forward

    def run(*inputs):
        if inputs[0].shape[0] == 50 and card.alive():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*inputs)

    monkeypatch.setattr(model, "forward", run)
    warmed(model, x)
    assert len(Graphs.of(model)) == 1
    found = quick(large)
    assert torch.equal(found, wanted) and not card.alive()
    monkeypatch.setattr(model, "forward", lambda *inputs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        quick(large)


def test_a_mistake_is_the_models(card, model):
    """Blind spot: a wrong shape that is told as a capture that failed."""
    quick = dpt.graphed(model)
    for _ in range(4):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            quick(torch.randn(2, 3))
    assert not card.captures and not card.released

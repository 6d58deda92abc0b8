"""A card that records CUDA graphs, played on a CPU: what `torch.cuda` has for them, with CPU tensors standing in for CUDA's.

A capture keeps the operators that run within it, and a replay runs them again into the same memory: a forgotten copy of an input or an
output shows in the numbers. Streams and events have clocks: memory of a graph that is touched on a stream which has not waited for the last
one that touched it is an AssertionError. So is what CUDA or PyTorch refuse: two captures at a time in a process, one on the default stream,
a pool without a graph used again, a synchronisation within a capture, whose end then fails too.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dpt
from dpt.inference import graphs
from dpt.kernels.cpu import plain

NOT_RECORDED = "operation not permitted when stream is capturing"
SIZE = (2, 3, 4)  # of a model's input
Clock = dict[int, int]  # of each stream, up to which of its operations


def _storages(tree: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)}


class Stream:
    def __init__(self, card: Card, device: Any = None):
        self.card, self.device, self.number = card, device, len(card.streams)
        self.clock: Clock = {self.number: 0}
        card.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        self.see(other.clock)

    def wait_event(self, event: Event) -> None:
        self.see(event.clock)

    def see(self, clock: Clock) -> None:
        for number, count in clock.items():
            self.clock[number] = max(self.clock.get(number, 0), count)


class Event:
    def __init__(self) -> None:
        self.clock: Clock = {}  # one that was never recorded is not waited for

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


class Operators(TorchDispatchMode):
    """Keeps what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            raise RuntimeError(f"CUDA error: {NOT_RECORDED}\nCUDA kernel errors might be asynchronously reported")
        found = func(*args, **(kwargs or {}))
        self.kept.append((func, args, kwargs or {}, found))
        return found

    def run_again(self) -> None:
        for func, args, kwargs, before in self.kept:
            if func.is_view or func._schema.name.startswith("aten::empty"):
                continue
            given = _storages((args, kwargs))
            with torch.no_grad():
                again = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and not _storages(old) & given:  # else it was written in place
                        old.copy_(new)


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, card: Card):
        self.card, self.operators, self.memory, self.handle = card, Operators(), set(), None
        self.replays = 0
        card.graphs.append(weakref.ref(self))

    def pool(self) -> Any:
        assert self.handle is not None, "not captured"
        return self.handle

    def replay(self) -> None:
        assert self.handle is not None, "replayed before it was captured"
        assert not self.card.capturing(), "replayed within a capture"
        assert self.card.chosen(), "on whatever device is the current one"
        self.card.touch(self.handle)
        self.operators.run_again()
        self.replays += 1


class Capture:
    """torch.cuda.graph."""

    def __init__(self, card: Card, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str):
        assert capture_error_mode == "thread_local" and stream.number > 0, "another thread's calls, or the default stream"
        self.card, self.graph, self.pool, self.stream = card, graph, pool, stream

    def __enter__(self) -> None:
        card, graph = self.card, self.graph
        assert card.chosen(), "on whatever device is the current one"
        assert card.under_way is None, "two captures at a time in a process"
        for stream in card.streams:  # the device is synchronised
            for other in card.streams:
                stream.see(other.clock)
        assert self.pool not in card.used or card.users(self.pool), "a pool that no graph has any more"
        card.used.add(self.pool)
        card.under_way, card.now.capture = graph, graph
        self._before, card.now.stream = card.current_stream(), self.stream
        graph.operators.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        card, graph = self.card, self.graph
        graph.operators.__exit__(kind, error, trace)
        card.under_way = card.now.capture = None
        if error is not None and NOT_RECORDED in str(error):
            card.recording_to.add(self.pool)
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # and the stream stays current
        graph.handle = self.pool
        touched = [found for *_, found in graph.operators.kept] + [args for _, args, _, _ in graph.operators.kept]
        graph.memory = _storages(touched)
        card.now.stream = self._before
        card.captures.append((graph.operators, threading.get_ident(), self.stream, self.pool))


class Card:
    """What is installed in place of `torch.cuda`'s."""

    def __init__(self, patch: Any):
        self.streams: list[Stream] = []
        self.graphs: list[weakref.ref[Graph]] = []
        self.captures: list[Any] = []  # one a graph that was captured
        self.used: set[Any] = set()
        self.recording_to: set[Any] = set()  # pools of captures that could not be ended
        self.released: list[Any] = []
        self.under_way: Graph | None = None
        self.last: dict[Any, tuple[int, int]] = {}  # of a pool: the stream and its operation that touched it
        self.now = threading.local()
        self.handles = 0
        self.default = Stream(self)
        patch.setattr(graphs, "DEVICE", "cpu")
        patch.setattr(plain, "KINDS", ())  # on a card nothing goes a CPU's own ways
        for name in ("current_stream", "graph_pool_handle", "device", "stream"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "is_current_stream_capturing", self.capturing)
        patch.setattr(torch.cuda, "Stream", lambda device=None: Stream(self, device))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        patch.setattr(torch.cuda, "graph", lambda graph, **how: Capture(self, graph, **how))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self._end)
        patch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.released.append(pool))
        copy = Tensor.copy_

        def copied(target: Tensor, source: Tensor, *rest: Any) -> Tensor:
            for graph in self.alive():
                if _storages((target, source)) & graph.memory and not self.capturing():
                    self.touch(graph.handle)
            return copy(target, source, *rest)

        patch.setattr(Tensor, "copy_", copied)

    def alive(self) -> list[Graph]:
        return [graph for reference in self.graphs if (graph := reference()) is not None and graph.handle is not None]

    def users(self, pool: Any) -> list[Graph]:
        return [graph for graph in self.alive() if graph.handle == pool]

    def touch(self, pool: Any) -> None:
        """The current stream reads or writes what graphs of a pool do."""
        stream = self.current_stream()
        number, count = self.last.get(pool, (stream.number, 0))
        assert stream.clock.get(number, 0) >= count, f"stream {stream.number} has not waited for stream {number}"
        stream.clock[stream.number] += 1
        self.last[pool] = stream.number, stream.clock[stream.number]

    def capturing(self) -> bool:
        return getattr(self.now, "capture", None) is not None

    def chosen(self) -> Any:
        """The device that was made the current one; None outside of such a context."""
        return getattr(self.now, "device", None)

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self.now, "stream", self.default)

    def graph_pool_handle(self) -> tuple[int, int]:
        self.handles += 1
        return 0, self.handles

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.now.stream = before

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self.chosen()
        self.now.device = device
        try:
            yield
        finally:
            self.now.device = before

    def _end(self, device: Any, pool: Any) -> None:
        if pool not in self.recording_to:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording_to.remove(pool)


class Model(nn.Module):
    """Keeps on which streams and in which threads its forward ran, and whether in a capture."""

    def __init__(self):
        super().__init__()
        self.part, self.ran = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), []
        self.register_buffer("shift", torch.randn(4))
        self.eval()

    def forward(self, x, prompt=None):
        self.ran.append((torch.cuda.current_stream().number, torch.cuda.is_current_stream_capturing(), threading.get_ident()))
        y = self.part(x) + self.shift
        return y if prompt is None else {"added": y + prompt, "y": y}

    def returned(self):
        return self


def warmed(model: nn.Module, *inputs: Tensor) -> Any:
    """The model's graphed form, which has a graph of these inputs' form."""
    quick = dpt.graphed(model)
    for _ in range(graphs.FIRST_SIGHTS):
        quick(*inputs)
    return quick


def in_threads(*works: Callable[[], object]) -> None:
    """Each in a thread with a stream of its own; the first error is raised here."""
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]

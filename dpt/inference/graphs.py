"""CUDA graphs: a model's forward recorded once for a size of input and then replayed, one launch of the host for all those inside.

`graphed(model)` is called like the model, and `predict` runs through the same graphs. They belong to the model: one collection for each,
which goes when the model goes, and which copies, pickles and state dicts do not have.

A replay reads the addresses that were recorded, so whatever could make them wrong is looked at before each one (`_Addresses`), and the
graphs are dropped where it changed. What may not be left out of a forward, or is no forward of a GPU's, runs without a graph.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

DEVICE = "cuda"  # the type of device that has such graphs
MOST = 8  # graphs of a model
FIRST_SIGHTS = 2  # so often an input's form has to come before a graph is made of it, which takes as long as several forwards
REMEMBERED = 64  # forms that have no graph
AFTER_FAILURE = 1000  # so often a form has to come before its capture is tried again
WORTH = 16  # replays that pay for a graph; where one is dropped before, forms have to come twice as often from then on

ModelT = TypeVar("ModelT")


def graphed(model: ModelT, most: int = MOST) -> ModelT:
    """The model, called through its CUDA graphs; in all else the model itself, with its parameters, hooks and modes. It stays as it was.

    An input's form (shape, dtype, device, channels-last or not) that comes a second time is captured, and replayed from then on: the same
    numbers, in memory that nobody else gets. What runs without a graph: the first time of a form; inputs on no CUDA device; a gradient that
    is wanted (call it under `torch.inference_mode()`); a model in training mode, a compiled one, or one with hooks on its parts (those on
    the model itself run, and are given this object); a capture that failed, of which a warning tells. Weights that change in place are seen
    by a replay; weights, modules or devices that are exchanged make the graphs anew. A number that somebody writes into a part, such as a
    norm's `eps`, is not seen: `Graphs.of(model).forget()`.

    Threads may share it: one at a time replays, on its own stream. While one captures, no other may synchronise the whole device.

    Args:
        most: graphs that are kept, the least recently used being dropped; `model.predict` keeps to it too.

    Raises:
        ValueError: fewer than one. TypeError: no module.
    """
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"most={most!r}: a model keeps at least one graph")
    found = Graphed(model)
    if not isinstance(found._model, nn.Module):
        raise TypeError(f"{type(model).__name__}: graphs are made of a module of PyTorch's")
    Graphs.of(found._model).most = most
    return cast(ModelT, found)


class Graphed:
    """What `graphed` gives, of a module or of whatever predicts like one."""

    _model: Any

    def __init__(self, model: Any):
        self.__dict__["_model"] = model._model if isinstance(model, Graphed) else model

    def __call__(self, *inputs: Any, **others: Any) -> Any:
        if not _replays(self._model, inputs, others):
            return self._model(*inputs, **others)
        return cast(Any, nn.Module)._call_impl(self, *inputs)  # `forward` below, between the hooks of the model

    def forward(self, *inputs: Any, **others: Any) -> Any:
        if not _replays(self._model, inputs, others):  # a hook has changed them
            return self._model.forward(*inputs, **others)
        return Graphs.of(self._model).forward(self._model, inputs)

    def __getattr__(self, name: str) -> Any:
        """The model's; of a method that returns the model, such as `eval` and `to`, one that returns this."""
        found = getattr(self._model, name)
        if not isinstance(found, MethodType) or found.__self__ is not self._model:
            return found

        @wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            returned = found(*args, **kwargs)
            return self if returned is self._model else returned

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __repr__(self) -> str:
        return f"graphed({self._model!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return graphed, (self._model, Graphs.of(self._model).most)


def ungraphed(model: ModelT) -> ModelT:
    """What a `Graphed` calls through its graphs; any other model itself."""
    return cast(ModelT, model._model) if isinstance(model, Graphed) else model


def _replays(model: Any, inputs: tuple[Any, ...], others: dict[str, Any]) -> bool:
    """Whether a call can be a replay, by all that does not depend on the model's parts."""
    return (
        bool(inputs)
        and not others
        and all(type(x) is Tensor and x.device.type == DEVICE for x in inputs)
        and isinstance(model, nn.Module)
        and type(model).__call__ is nn.Module.__call__  # not what `torch.compile` wraps
        and model._compiled_call_impl is None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and _get_current_dispatch_mode() is None  # which wants to see every operator
        and not nn.modules.module._has_any_global_hook()
        and not torch.cuda.is_current_stream_capturing()
    )


def _form(x: Tensor) -> Hashable:
    """What a graph's own input has in common with those that are copied into it."""
    return x.shape, x.dtype, x.device, _memory_format(x)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _switches() -> tuple[Hashable, ...]:
    """PyTorch's settings by which it chooses what to launch: they are part of a graph."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        products.fp32_precision,
        products.allow_fp16_reduced_precision_reduction,
        products.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE),
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRAINING, _DTYPE = operator.itemgetter("training"), operator.attrgetter("dtype")


class _Addresses:
    """The parts of a model and the memory of its tensors, at one time, to be compared with what they are later, quickly.

    It refers to no tensor, and not to the model, which would then never be released.
    """

    def __init__(self, model: nn.Module):
        self._parts = list(model.modules())[1:]
        modules = [model, *self._parts]
        self._attributes = list(map(vars, modules))
        self._held: list[Any] = [held for m in modules for held in (m._modules, m._parameters, m._buffers) if held]
        self._tensors = [held for m in modules for held in (m._parameters, m._buffers) if held]
        self._hooks = [getattr(part, hooks) for part in self._parts for hooks in _HOOKS]
        # Of these a graph cannot be told from outside what it needs: wrappers of other tensors, and what compiles itself.
        plain = all(type(tensor) in (nn.Parameter, Tensor) for tensor in self._now_held())
        self.plain = plain and all(type(m).__call__ is nn.Module.__call__ and m._compiled_call_impl is None for m in self._parts)
        self._state = self._now(model)

    def _now_held(self) -> list[Tensor]:
        return [tensor for held in self._tensors for tensor in held.values() if tensor is not None]

    def _now(self, model: nn.Module) -> tuple[Any, ...]:
        tensors = self._now_held() if self.plain else []
        return (
            type(model),
            list(map(type, self._parts)),
            list(map(len, self._attributes)),  # a `forward` of its own
            list(map(id, itertools.chain.from_iterable(map(dict.values, self._held)))),
            list(map(Tensor.data_ptr, tensors)),
            list(map(_DTYPE, tensors)),
            list(map(Tensor.is_contiguous, tensors)),  # of another order in memory
        )

    def are_those_of(self, model: nn.Module) -> bool:
        return self._now(model) == self._state

    def can_be_recorded(self) -> bool:
        """Whether a forward now, without gradients, is nothing but launches that could be replayed."""
        return self.plain and not any(map(_TRAINING, self._attributes)) and not any(self._hooks)

    def want_gradients(self, inputs: tuple[Tensor, ...]) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *self._now_held()))


@dataclass(eq=False)
class _Recorded:
    """A graph, the tensors that it reads its inputs from, and those that it leaves its outputs in."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Any
    replays: int = 0


_all: weakref.WeakKeyDictionary[nn.Module, Graphs] = weakref.WeakKeyDictionary()
_all_lock = threading.Lock()
_capturing = threading.RLock()  # of a process one thread at a time
_unended: list[torch.cuda.CUDAGraph] = []  # which the allocator of pinned memory goes on asking: they must not be freed


class Graphs:
    """The graphs of one model, and when one is made.

    All share one pool of memory: nothing in it is read after a replay but the outputs, and these are copied before the next one, which
    waits for that by an event, whatever its stream. Graphs are captured on a stream of their own, and what they read their inputs from is
    that stream's memory, so that it is used again only behind the last copy.
    """

    def __init__(self) -> None:
        self.most = MOST
        self._lock = threading.RLock()
        self._addresses: _Addresses | None = None
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._sights: OrderedDict[Hashable, int] = OrderedDict()
        self._enough = FIRST_SIGHTS
        self._warned = False
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @staticmethod
    def of(model: nn.Module) -> Graphs:
        """The one collection of a model."""
        with _all_lock:
            found = _all.get(model)
            if found is None:
                found = _all[model] = Graphs()
            return found

    def __len__(self) -> int:
        return len(self._recorded)

    def forget(self) -> None:
        """Drop all graphs, and what is known of forms; the memory goes back to PyTorch."""
        with self._lock:
            self._recorded.clear()
            self._sights.clear()
            self._addresses = self._stream = self._copied = None

    def forward(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """`model.forward(*inputs)`, by a replay where there is a graph, and from now on where one is worth it."""
        with self._lock:
            recorded = self._of_form(model, inputs)
            if recorded is not None:
                return self._replayed(recorded, inputs)
        try:
            return model.forward(*inputs)
        except torch.OutOfMemoryError:
            if not self._recorded or torch.is_grad_enabled():
                raise
        self.forget()  # whose memory is then there for those that run without
        return model.forward(*inputs)

    def _of_form(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> _Recorded | None:
        if self._addresses is None or not self._addresses.are_those_of(model):
            self.forget()
            self._addresses = _Addresses(model)
        if self._addresses.want_gradients(inputs) or not self._addresses.can_be_recorded():
            return None
        form = (*map(_form, inputs), *_switches())
        if form in self._recorded:
            self._recorded.move_to_end(form)
            return self._recorded[form]
        if not self._comes_often(form):
            return None
        recorded = self._captured(model, inputs)
        if recorded is None:
            self._sights[form] = -AFTER_FAILURE
            return None
        self._recorded[form] = recorded
        while len(self._recorded) > self.most:  # after the capture: a pool that no graph has any more could not be shared
            _, dropped = self._recorded.popitem(last=False)
            if dropped.replays < WORTH:
                self._enough = min(2 * self._enough, WORTH * FIRST_SIGHTS)
        return recorded

    def _comes_often(self, form: Hashable) -> bool:
        sights = self._sights.pop(form, 0) + 1
        if sights >= self._enough:
            return True
        self._sights[form] = sights
        if len(self._sights) > REMEMBERED:
            self._sights.popitem(last=False)
        return False

    def _replayed(self, recorded: _Recorded, inputs: tuple[Tensor, ...]) -> Any:
        device = inputs[0].device
        own, copied = cast(torch.cuda.Stream, self._stream), cast(torch.cuda.Event, self._copied)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            stream.wait_event(copied)
            try:
                for static, x in zip(recorded.inputs, inputs, strict=True):
                    static.copy_(x)
                recorded.graph.replay()
                return pytree.tree_map_only(Tensor, _copy, recorded.outputs)
            finally:
                recorded.replays += 1
                copied.record(stream)
                own.wait_event(copied)

    def _captured(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> _Recorded | None:
        """A graph of `model.forward`; None where it could not be captured, which a warning tells the first time."""
        device = inputs[0].device
        with _capturing, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad(), _autocast_without_cache():
            if self._stream is None:
                self._stream, self._copied = torch.cuda.Stream(device), torch.cuda.Event()
            pool = next(iter(self._recorded.values())).graph.pool() if self._recorded else torch.cuda.graph_pool_handle()
            graph, current, warm = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), False
            self._stream.wait_stream(current)
            try:
                # Where a capture fails PyTorch leaves its stream the current one: the context around it puts back what was.
                with torch.cuda.stream(self._stream):
                    static = [torch.empty_like(x, memory_format=_memory_format(x)).copy_(x) for x in inputs]
                    model.forward(*static)  # in this thread, on this stream: what is made at the first call must not be made in the capture
                    warm = True
                    with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                        outputs = model.forward(*static)
            except BaseException as error:
                _end(graph, device, pool)
                if not isinstance(error, Exception) or not warm and not isinstance(error, torch.OutOfMemoryError):
                    raise  # the model's own
                self._recorded.clear()  # they share their memory with what is in an unknown state
                self._warn(model, inputs, error)
                return None
            finally:
                current.wait_stream(self._stream)
        return _Recorded(graph, static, outputs)

    def _warn(self, model: nn.Module, inputs: tuple[Tensor, ...], error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        cause = error.__context__ or error  # the end of a capture that has failed raises too
        why = (str(cause).splitlines() or [type(cause).__name__])[0]
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        warnings.warn(f"{type(model).__name__} runs without a CUDA graph for {shapes}: {why}", RuntimeWarning, stacklevel=2)


def _copy(tensor: Tensor) -> Tensor:
    """The same numbers, at the same distances, in memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _autocast_without_cache() -> AbstractContextManager[object]:
    """Under autocast, that without its cache: a graph would read weights in it that are freed when autocast ends."""
    if not torch.is_autocast_enabled(DEVICE):
        return nullcontext()
    return torch.autocast(DEVICE, dtype=torch.get_autocast_dtype(DEVICE), cache_enabled=False)


def _end(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """What PyTorch leaves undone where a capture cannot be ended: its allocator goes on as if that were under way, and would ask a graph
    that is no more."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)  # RuntimeError: it was ended, or never begun
        torch._C._cuda_releasePool(device.index, pool)
        _unended.append(graph)

"""Plans: what an op does to tensors of a form, worked out once and done again without asking.

An op checks its arguments, reads the table, makes views and descriptors and has Triton find the compiled kernel: all of it follows from
what is known of its arguments besides their numbers. So the first call of a form is recorded, what it asked of PyTorch and what it
launched, and written out as a function of Python that allocates, takes addresses and calls Triton's launcher of the compiled kernels
(`written`). Later calls of the form run that.

Two calls are of one form if PyTorch's own guards of a graph say so (sizes, strides, dtypes, devices, dispatch keys, modes), the addresses
are multiples of 16 bytes, and all else is equal. The op's registration is passed by, so there is no plan where anything but the result is
wanted of it: gradients, a trace, a mode that looks on, a recorded launch. Weights are looked at afresh in each call: nothing is kept of
them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch._library.custom_ops import OPDEFS
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from . import devices, recording, table
from .written import ANOTHER_FORM, Tape, Unplannable, replay_of

P, R = ParamSpec("P"), TypeVar("R")
# Of tensors: whether they are of its form; and the op's result, or ANOTHER_FORM. The second is None for a form that has to be worked out in
# each call.
Plan = tuple[Callable[..., bool], Callable[..., Any] | None]

# What is kept of an op; beyond, all is forgotten. A model has a few forms of it, and as many again for each size of pictures.
MOST, MOST_OF_A_KEY = 512, 32
SIMPLE = {int, float, bool, str}
SEQUENCES = {tuple, list, torch.Size}

_tape: ContextVar[Tape | None] = ContextVar("dpt_kernels_tape", default=None)
_off: ContextVar[bool] = ContextVar("dpt_kernels_without_plans", default=os.environ.get("DPT_KERNELS_PLANS") == "0")


def implementation(name: str) -> Callable[..., Any]:
    """What an op of `dpt.kernels`, "dpt::attention", does with real tensors."""
    return OPDEFS[name]._init_fn


def launched(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any], compiled: Any) -> None:
    """Told of each launch that was made."""
    tape = _tape.get()
    if tape is not None:
        tape.launched(kernel, grid, args, kwargs, compiled)


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    """Do everything anew in each call: to compare. The environment variable ``DPT_KERNELS_PLANS=0`` does so in the whole process."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def planned(op: Callable[P, R]) -> Callable[P, R]:
    """``op`` with a plan for each form of its arguments on which it runs kernels, used where nobody wants more than its result."""
    plans: dict[tuple[Any, ...], list[Plan]] = {}  # by what is no tensor among the arguments, and the first one's sizes
    table.forgetting.append(plans.clear)

    @functools.wraps(op)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return op(*args, **kwargs)
        tensors: list[Tensor] = []
        rest: list[Any] = []
        plain = _sort(args, tensors, rest) and (not kwargs or _sort((*kwargs, *kwargs.values()), tensors, rest))
        if not plain or not tensors or not devices.may_have_kernels(tensors[0]) or _in_the_way(tensors):
            return op(*args, **kwargs)
        key = (tensors[0].shape, devices.named_family(), *rest)
        for is_of_form, replay in plans.get(key, ()):
            if is_of_form(*tensors):
                result = op(*args, **kwargs) if replay is None else replay(*tensors)
                if result is not ANOTHER_FORM:
                    return result
        result, plan = _first(op, args, kwargs, tensors)
        if plan is not None:  # each step is whole by itself: two threads may do this at once
            if len(plans) >= MOST:
                plans.clear()
            of_key = plans.setdefault(key, [])
            if len(of_key) >= MOST_OF_A_KEY:
                of_key.clear()
            of_key.append(plan)
        return result

    return wrapper


def _sort(values: Any, tensors: list[Tensor], rest: list[Any]) -> bool:
    """Tensors among arguments to the one, all else, and where they stood, to the other; False where there is something that has no plan."""
    for value in values:
        kind = type(value)
        if kind is Parameter or kind is Tensor:
            tensors.append(value)
            rest.append(Tensor)
        elif value is None or kind in SIMPLE:
            rest.append(value)
        elif kind in SEQUENCES:
            rest += (kind, len(value))
            if not _sort(value, tensors, rest):
                return False
        else:
            return False
    return True


def _in_the_way(tensors: list[Tensor]) -> bool:
    """Whether somebody wants more of the op than its result at present, who is not seen by the guards of a form."""
    return (
        _off.get()
        or recording.in_force() is not None
        or table.overridden()
        or devices.restriction() is not None
        or torch._C._is_any_autocast_enabled()
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or _is_watched()
    )


def _is_watched() -> bool:
    """Whether somebody, such as Triton's profiler, is told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool((enter and getattr(enter, "calls", True)) or (leave and getattr(leave, "calls", True)))


class _Recording(TorchDispatchMode):
    """Tells the tape what is asked of PyTorch; of an op of ours, what it does inside."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "dpt":
            with self:
                return implementation(func._schema.name)(*args, **kwargs or {})
        result = func(*args, **kwargs or {})
        self.tape.called(func, args, kwargs or {}, result)
        return result


def _first(op: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[Any, Plan | None]:
    """An op's result, and how to get it again; None if that cannot be told, or there is a mode that looks on."""
    if not devices.has_kernels(tensors[0]):
        return op(*args, **kwargs), None
    if len(set(map(id, tensors))) < len(tensors):  # one tensor as two arguments, which others of these forms need not be
        return op(*args, **kwargs), None
    looked_on = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() or torch._C._functorch.peek_interpreter_stack()
    if looked_on:
        return op(*args, **kwargs), None
    tape = Tape(tensors)
    token = _tape.set(tape)
    try:
        with _Recording(tape):
            result = op(*args, **kwargs)
    finally:
        _tape.reset(token)
    replay = None
    with contextlib.suppress(Unplannable):
        replay = replay_of(tape, result)
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    return result, (TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check, replay)

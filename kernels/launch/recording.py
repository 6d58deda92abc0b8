"""What a launcher would launch, recorded instead: for compiling and tuning without a GPU, with tensors that hold no memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree
from triton.tools.tensor_descriptor import TensorDescriptor

from .families import TABLES


@dataclass(frozen=True)
class CompileCase:
    """One recorded launch, and what its compiled code has to show.

    ``tensor_cores``: True if the family's own tensor-core instruction must be there (HGMMA on sm_90), a mnemonic if another suffices
    (a dot of fewer than 64 rows is HMMA on sm_90), False for element-wise and float32 kernels. ``async_copies``: whether copies that do
    not pass through registers must be there. ``args`` are as given to the kernel; the tensors are on the meta device, so a case holds
    no memory. ``used``: the (kernel, conditions) of the table's entries that the launcher looked up. ``grid``: of the launch; ``moved``:
    bytes of all its tensors, each once.
    """

    name: str
    family: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensor_cores: bool | str = True
    async_copies: bool = True
    used: tuple[tuple[str, str], ...] = ()
    grid: tuple[int, ...] = ()
    moved: int = 0

    def specialisation(self) -> tuple[Any, ...]:
        """What Triton's compiled code depends on: two cases that agree here compile to the same binary."""
        return (self.family, self.function, tuple(sorted(self.kwargs.items())), *map(_specialisation, self.args))


def _specialisation(arg: Any) -> Any:
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, tuple(arg.block_shape)
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, tuple):
        return tuple(map(_specialisation, arg))
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, arg >= 2**31
    return type(arg)


def stand_in(arg: Any) -> Any:
    """``arg`` with tensors that hold no memory: of its dtype, and as far from an address that 16 divides."""
    if isinstance(arg, torch.Tensor):
        return _without_memory(arg.dtype, arg.data_ptr() % 16 // arg.element_size())
    if isinstance(arg, TensorDescriptor):
        return replace(arg, base=stand_in(arg.base))
    return tuple(map(stand_in, arg)) if isinstance(arg, tuple) else arg


@functools.cache
def _without_memory(dtype: torch.dtype, beyond: int) -> torch.Tensor:
    return torch.empty(beyond + 1, dtype=dtype, device="meta")[beyond:]


def bytes_of(args: Iterable[Any]) -> int:
    """Bytes of all tensors among ``args``: of several that share memory what they span, but no more than there is. So what is written in
    place counts once."""
    tensors = [getattr(part, "base", part) for part in pytree.tree_leaves(list(args))]
    shared: dict[int, list[torch.Tensor]] = {}
    for tensor in (tensor for tensor in tensors if isinstance(tensor, torch.Tensor)):
        shared.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    spans = {storage: {(t.storage_offset(), t.shape, t.stride()): t.nbytes for t in views} for storage, views in shared.items()}
    return sum(min(sum(spans[storage].values()), views[0].untyped_storage().nbytes()) for storage, views in shared.items())


class Recorder:
    """What has been launched, (kernel, grid, bytes of its tensors, arguments, options), and what of the table was looked up for it."""

    def __init__(self, family: str):
        self.family = family
        self.launches: list[tuple[Any, tuple[int, ...], int, tuple[Any, ...], dict[str, Any]]] = []
        self.used: list[tuple[str, str]] = []


_recorder: ContextVar[Recorder | None] = ContextVar("dpt_kernels_recorder", default=None)


def in_force() -> Recorder | None:
    """Who records launches at present; None where they are made."""
    return _recorder.get()


@contextlib.contextmanager
def _recording(family: str) -> Iterator[Recorder]:
    if family not in TABLES:
        raise ValueError(f"family {family!r}: must be one of {', '.join(TABLES)}")
    recorder = Recorder(family)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def record(
    family: str, variant: str, launcher: Any, *args: Any, tensor_cores: bool | str = True, async_copies: bool = True, **kwargs: Any
) -> list[CompileCase]:
    """The compile cases of the launches that ``launcher(*args, **kwargs)`` makes for ``family``: nothing runs.

    Give it tensors on the meta device, or a CPU's whose memory nobody touches; the cases keep their dtype and alignment alone. So what is
    compiled without a GPU is what is launched on one, argument for argument.
    """
    with _recording(family) as recorder:
        launcher(*args, **kwargs)
    used = tuple(recorder.used)
    return [
        CompileCase(f"{function.__name__} {variant}", family, function, given, options, tensor_cores, async_copies, used, grid, moved)
        for function, grid, moved, given, options in recorder.launches
    ]


def distinct(cases: Iterable[CompileCase]) -> Iterator[CompileCase]:
    """The cases, each only once though several shapes lead to it; an entry of the table that a dropped case used is not lost."""
    first: dict[Any, CompileCase] = {}
    for case in cases:
        known = first.setdefault(case.specialisation(), case)
        if known is not case:
            first[case.specialisation()] = replace(known, used=known.used + case.used)
    yield from first.values()

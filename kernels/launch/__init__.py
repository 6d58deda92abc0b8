"""What every op shares at launch: which tensors run kernels, the configuration table, the launch itself, and its recording.

The table is one JSON file a device family in ``configs/``. It holds, for every kernel, a list of entries that is read from the top;
the first whose conditions hold is used, and the last one has no conditions:

    {"attention_forward": [{"when": {"D_max": 64, "dtype": "bfloat16"}, "config": {"BLOCK_M": 128, ...}, "provenance": "..."}, ...]}

A condition is ``"X": value`` (equal), ``"X_min"`` or ``"X_max"`` (inclusive) on a keyword that the launcher passes to :func:`config`,
or ``"dtype"``. There is no run-time autotuner: it breaks graph capture, races between threads and costs minutes on first use.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

CONFIGS = Path(__file__).parents[1] / "configs"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The oldest compute capability of each family: a device belongs to the last family that is not newer than it.
FAMILIES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_120"}
# sm_86 has the instructions of sm_80 but the shared memory of sm_89 (99 KB), which is what decides a configuration.
TABLES = {"sm_80": "sm_80", "sm_86": "sm_89", "sm_89": "sm_89", "sm_90": "sm_90", "sm_100": "sm_100", "sm_120": "sm_120"}

# Triton decides when a kernel is decorated whether it is interpreted, so this is fixed from the import on.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# The family whose table and code path CPU tensors take in the interpreter.
INTERPRETED_FAMILY_VARIABLE = "DPT_KERNELS_FAMILY"


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether there are kernels for the device of ``tensor``.

    True for tensors on an NVIDIA GPU of compute capability 8.0 or newer, for CPU tensors in Triton's interpreter, and for all while
    tensors stand in for a GPU's (:func:`stand_ins`).
    """
    if _standing_in:
        return True
    if tensor.is_cuda:
        return torch.version.hip is None and torch.cuda.get_device_properties(tensor.device).major >= 8
    return tensor.device.type == "cpu" and INTERPRETED


_standing_in = False


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Take CPU tensors for a GPU's, in the whole process: where nothing is launched, or by a driver that only looks at the launch."""
    global _standing_in
    before, _standing_in = _standing_in, True
    try:
        yield
    finally:
        _standing_in = before


_only: frozenset[str] | None = None


def runs_kernels(tensor: torch.Tensor, op: str) -> bool:
    """Whether ``op``, a module of this folder, runs its kernels on ``tensor``, rather than the same algebra in PyTorch."""
    return has_kernels(tensor) and (_only is None or op in _only)


@contextlib.contextmanager
def only(*ops: str) -> Iterator[None]:
    """Leave all ops but these to PyTorch, in the whole process: to measure what each of them gains."""
    global _only
    before, _only = _only, frozenset(ops)
    try:
        yield
    finally:
        _only = before


def family_of_capability(capability: tuple[int, int]) -> str:
    """The device family of a compute capability, e.g. ``(9, 0)`` -> ``"sm_90"``; ValueError below 8.0."""
    older = [family for oldest, family in FAMILIES.items() if oldest <= tuple(capability)]
    if not older:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 or newer")
    return older[-1]


@functools.cache
def _family_of_gpu(index: int) -> str:
    return family_of_capability(torch.cuda.get_device_capability(index))


def device_family(device: torch.device) -> str:
    """The family of the device that a launch is meant for.

    While launches are recorded, the family they are recorded for. In the interpreter (CPU tensors) the one named by the environment
    variable ``DPT_KERNELS_FAMILY``, or sm_80: the path without descriptors.
    """
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.family
    if device.type == "cuda":
        return _family_of_gpu(torch.cuda.current_device() if device.index is None else device.index)
    family = os.environ.get(INTERPRETED_FAMILY_VARIABLE, "sm_80")
    if family not in TABLES:
        raise ValueError(f"{INTERPRETED_FAMILY_VARIABLE}={family}: must be one of {', '.join(TABLES)}")
    return family


@functools.cache
def load_table(family: str) -> Mapping[str, list[dict[str, Any]]]:
    """The configuration table of ``family``: kernel name -> entries, read once a process."""
    return json.loads((CONFIGS / f"{TABLES[family]}.json").read_text())


def _holds(condition: str, value: Any, shape: Mapping[str, Any]) -> bool:
    name, _, bound = condition.rpartition("_")
    if bound not in ("min", "max"):
        name, bound = condition, "equal"
    if name not in shape:
        raise ValueError(f"the table has a condition on {name!r}; the launcher gives {', '.join(sorted(shape))}")
    if bound == "equal":
        return shape[name] == value
    return shape[name] >= value if bound == "min" else shape[name] <= value


def select(entries: Sequence[Mapping[str, Any]], shape: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first entry all of whose conditions hold for ``shape``, or None."""
    return next((entry for entry in entries if all(_holds(c, v, shape) for c, v in entry["when"].items())), None)


@functools.lru_cache(maxsize=4096)
def _entry(kernel_name: str, family: str, dtype: torch.dtype, shape: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    table = load_table(family)
    if kernel_name not in table:
        raise ValueError(f"no configuration of kernel {kernel_name!r} in configs/{TABLES[family]}.json")
    entry = select(table[kernel_name], {"dtype": str(dtype).removeprefix("torch."), **dict(shape)})
    if entry is None:
        raise ValueError(
            f"configs/{TABLES[family]}.json has no entry of {kernel_name!r} for {dict(shape)}, {dtype}: the last needs no conditions"
        )
    return entry


_overrides: ContextVar[Mapping[str, Mapping[str, Any]]] = ContextVar("dpt_kernels_config_overrides", default=MappingProxyType({}))


@contextlib.contextmanager
def using(kernel_name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Launch ``kernel_name`` with ``config`` instead of the table's: for the tuning command and the tests. Nested, both hold."""
    token = _overrides.set({**_overrides.get(), kernel_name: config})
    try:
        yield
    finally:
        _overrides.reset(token)


def overridden() -> bool:
    """Whether a configuration of the table is replaced at present, by :func:`using`."""
    return bool(_overrides.get())


def config(kernel_name: str, family: str, dtype: torch.dtype, **shape: Any) -> dict[str, Any]:
    """The launch configuration of ``kernel_name``: block sizes, ``num_warps``, ``num_stages``, ``descriptor``, ...

    ``shape`` are the keywords that the table's conditions may name, e.g. ``D=64, N=1025``. ValueError if nothing matches.
    """
    override = _overrides.get().get(kernel_name)
    if override is not None:
        return dict(override)
    entry = _entry(kernel_name, family, dtype, tuple(sorted(shape.items())))
    recorder = _recorder.get()
    if recorder is not None:
        recorder.used.append((kernel_name, json.dumps(entry["when"])))
    return dict(entry["config"])


def input_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s ``input_precision``: "ieee", or "tf32" for float32 where PyTorch's own switch for matmuls allows it.

    The switch is ``torch.backends.cuda.matmul.fp32_precision``, which ``allow_tf32`` and ``set_float32_matmul_precision`` set too.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on, as PyTorch's own matmuls take theirs; else as they are."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def describable(*tensors: torch.Tensor) -> bool:
    """Whether TMA can address every tensor: the base and all strides but the last multiples of 16 bytes, the last stride 1, none 0."""
    return all(_describable(tensor) for tensor in tensors)


def _describable(tensor: torch.Tensor) -> bool:
    *outer, last = tensor.stride()
    return tensor.data_ptr() % 16 == 0 and last == 1 and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in outer)


@dataclass(frozen=True)
class CompileCase:
    """One recorded launch, and what its compiled code has to show.

    ``tensor_cores``: True if the family's own tensor-core instruction must be there (HGMMA on sm_90), a mnemonic if another suffices
    (a dot of fewer than 64 rows is HMMA on sm_90), False for element-wise and float32 kernels. ``async_copies``: whether copies that do
    not pass through registers must be there. ``args`` are as given to the kernel; the tensors are on the meta device, so a case holds
    no memory. ``used``: the (kernel, conditions) of the table's entries that the launcher looked up.
    """

    name: str
    family: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensor_cores: bool | str = True
    async_copies: bool = True
    used: tuple[tuple[str, str], ...] = ()

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


def _stand_in(arg: Any) -> Any:
    """``arg`` with tensors that hold no memory: of its dtype, and as far from an address that 16 divides."""
    if isinstance(arg, torch.Tensor):
        beyond = arg.data_ptr() % 16 // arg.element_size()
        return torch.empty(beyond + 1, dtype=arg.dtype, device="meta")[beyond:]
    if isinstance(arg, TensorDescriptor):
        return replace(arg, base=_stand_in(arg.base))
    return tuple(map(_stand_in, arg)) if isinstance(arg, tuple) else arg


class _Recorder:
    def __init__(self, family: str):
        self.family = family
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.used: list[tuple[str, str]] = []


_recorder: ContextVar[_Recorder | None] = ContextVar("dpt_kernels_recorder", default=None)


@contextlib.contextmanager
def _recording(family: str) -> Iterator[_Recorder]:
    if family not in TABLES:
        raise ValueError(f"family {family!r}: must be one of {', '.join(TABLES)}")
    recorder = _Recorder(family)
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
    return [
        CompileCase(
            f"{function.__name__} {variant}", family, function, arguments, options, tensor_cores, async_copies, tuple(recorder.used)
        )
        for function, arguments, options in recorder.launches
    ]


def distinct(cases: Iterable[CompileCase]) -> Iterator[CompileCase]:
    """The cases, each only once though several shapes lead to it; an entry of the table that a dropped case used is not lost."""
    first: dict[Any, CompileCase] = {}
    for case in cases:
        known = first.setdefault(case.specialisation(), case)
        if known is not case:
            first[case.specialisation()] = replace(known, used=known.used + case.used)
    yield from first.values()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """``kernel[grid](*args, **kwargs)`` on the device of the first tensor among ``args``; every launch of every op goes through here.

    ``kwargs``: constexprs, ``num_warps``, ``num_stages``. An empty grid launches nothing.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append((kernel, tuple(_stand_in(arg) for arg in args), kwargs))
        return
    if 0 in grid:
        return
    with _device_of(args):
        kernel[grid](*args, **kwargs)


def _device_of(args: Iterable[Any]) -> contextlib.AbstractContextManager:
    for arg in args:
        tensor = arg.base if isinstance(arg, TensorDescriptor) else arg
        if isinstance(tensor, torch.Tensor):
            return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    return contextlib.nullcontext()

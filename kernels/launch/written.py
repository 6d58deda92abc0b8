"""A recorded call of an op, written out as a function of Python that does it again for other tensors of the same forms. In outline:

    def replay(v0, v1, v2):
        stream = current_stream(device)
        a0 = v0.data_ptr()
        a1 = v1.data_ptr()
        a2 = v2.data_ptr()
        v3 = empty((1, 1024, 768), (786432, 768, 1), bfloat16)
        a3 = v3.data_ptr()
        launch4(8, 6, 1, stream, 32, 0, 0, ..., (m5[a0 + 1536], 1024, 768, 768, 1, m6[a1], ..., a3, 1024, ...))
        return v3

A view needs no tensor where only its address is asked for, and what nobody asks for is not made. ``m5`` are the tensor maps of an argument,
by address. In the interpreter a launch is :func:`run`'s, of tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda
from torch.utils import _pytree as pytree
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .devices import INTERPRETED

aten = torch.ops.aten
ALLOCATES = (aten.empty, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.empty_like)  # memory that nobody has filled
EMPTY = {"cpu": _empty_strided_cpu, "cuda": _empty_strided_cuda}  # torch.empty_strided on the current device
ANOTHER_FORM = object()  # what a replay gives where its tensors are not what they were in a way that PyTorch's guards do not see
ALIGNMENT = 16  # bytes: what Triton asks of an address, and TMA
MAPS = 64  # tensor maps kept of an argument of a launch; beyond, all are forgotten


def reads_behind(tensor: torch.Tensor) -> bool:
    """Whether an op may read what is behind the last number of a tensor: of a map whose pixels are apart (`parts.maps`)."""
    return tensor.ndim == 4 and tensor.stride(1) == 1 and tensor.stride(3) > tensor.shape[1]


_interpreter = threading.Lock() if INTERPRETED else contextlib.nullcontext()  # which has one place for the program that it is at


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    """``kernel[grid](*args, **kwargs)``: what was compiled, or None of the interpreter, which threads use one after the other."""
    with _interpreter:
        return kernel[grid](*args, **kwargs)


class Unplannable(Exception):
    """What was recorded depends on more than forms, or is launched in a way that is not known here."""


@dataclass(eq=False)
class Value:
    """A tensor of a tape: an argument, or what a step made; or a view ``of`` one, so many bytes ``behind`` its address."""

    name: str
    tensor: torch.Tensor
    of: Value | None = None
    behind: int = 0

    @property
    def root(self) -> Value:
        """Whose memory it is."""
        return self.of or self

    @property
    def span(self) -> tuple[int, int]:
        """Where it begins, in bytes behind what it is a view of, and how many numbers there are from its first to its last."""
        return self.behind, 1 + sum((side - 1) * step for side, step in zip(self.tensor.shape, self.tensor.stride(), strict=True))


@dataclass(eq=False)
class Step:
    """``function(*args, **kwargs)`` of PyTorch, and what of its results is new (None: the others); or a launch.

    ``many``: whether the results are a tuple. ``changes``: whether it does more than to give them. ``grid``, ``compiled``: of a launch; the
    second is None in the interpreter.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Value | None, ...] = ()
    many: bool = False
    changes: bool = True
    grid: tuple[int, ...] | None = None
    compiled: Any = None

    def tensors(self) -> list[torch.Tensor]:
        leaves = [getattr(leaf, "base", leaf) for leaf in pytree.tree_leaves((self.args, self.kwargs))]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@dataclass
class Tape:
    """What a call did, in its order. ``arguments``: its tensors. ``unplannable``: None, or why it cannot be done again."""

    arguments: Sequence[torch.Tensor]
    steps: list[Step] = field(default_factory=list)
    values: dict[int, Value] = field(default_factory=dict)  # by the identity of their tensors, which they keep
    unplannable: str | None = None

    def __post_init__(self) -> None:
        for tensor in self.arguments:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor, of: Value | None = None, behind: int = 0) -> Value:
        return self.values.setdefault(id(tensor), Value(f"v{len(self.values)}", tensor, of, behind))

    def value(self, tensor: torch.Tensor) -> Value:
        found = self.values.get(id(tensor))
        if found is None:
            raise Unplannable(f"a tensor of unknown origin, {tuple(tensor.shape)}")
        return found

    def called(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Told of each function of PyTorch."""
        if function.overloadpacket in ALLOCATES:
            memory = {"dtype": result.dtype, "device": result.device}
            form = tuple(result.shape), result.stride()
            self.steps.append(Step(torch.empty_strided, form, memory, (self._add(result),), changes=False))
            return
        many, changes = isinstance(result, (tuple, list)), function._schema.is_mutable
        results = tuple(result) if many else (result,)
        step = Step(function, args, kwargs, many=many, changes=changes)
        if not all(isinstance(tensor, torch.Tensor) for tensor in results):
            if step.tensors():  # else it is of dtypes or the like
                self.unplannable = f"{function} gives a number"
            return
        step.results = tuple(None if id(tensor) in self.values else self._new(tensor, step.tensors()) for tensor in results)
        if changes or any(value is not None and value.of is None for value in step.results):
            self.steps.append(step)

    def _new(self, tensor: torch.Tensor, given: list[torch.Tensor]) -> Value:
        """A tensor that was not there before: a view of one that was given, or not."""
        storage = tensor.untyped_storage()._cdata
        parent = next((known for known in given if known.untyped_storage()._cdata == storage), None)
        if parent is None:
            return self._add(tensor)
        if tensor.dtype != parent.dtype:
            self.unplannable = "a view as another dtype"
        value = self.values.get(id(parent))
        if value is None:
            self.unplannable = "a view of a tensor of unknown origin"
            return self._add(tensor)
        return self._add(tensor, value.root, tensor.data_ptr() - value.root.tensor.data_ptr() if tensor.numel() else 0)

    def launched(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any], compiled: Any) -> None:
        """Told of each launch."""
        self.steps.append(Step(kernel, args, kwargs, grid=(*grid, 1, 1)[:3], compiled=compiled))


class Maps(dict[int, Any]):
    """The tensor maps of one argument of a launch, by address, made as Triton makes them."""

    def __init__(self, descriptor: TensorDescriptor, encoding: dict[str, Any]):
        super().__init__()
        self.form = {name: value for name, value in vars(descriptor).items() if name != "base"}
        self.encoding = encoding

    def __missing__(self, address: int) -> Any:
        if len(self) >= MAPS:
            self.clear()
        base = SimpleNamespace(data_ptr=lambda: address)
        made = self[address] = make_tensordesc_arg(SimpleNamespace(base=base, **self.form), self.encoding)[0]
        return made


def replay_of(tape: Tape, result: Any) -> Callable[..., Any]:
    """``replay(*tensors)``, which does what the tape did for other tensors of the same forms; its text is its ``__doc__``. Unplannable."""
    if tape.unplannable:
        raise Unplannable(tape.unplannable)
    if any(tensor.data_ptr() % ALIGNMENT for tensor in tape.arguments):
        raise Unplannable("an address that Triton takes for an odd one")
    text = _Text(tape, [tape.value(tensor) for tensor in pytree.tree_leaves(result) if isinstance(tensor, torch.Tensor)])
    lines = [*text.lines(), f"return {text.expression(result)}"]
    arguments = ", ".join(tape.value(tensor).name for tensor in tape.arguments)
    written = f"def replay({arguments}):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(written, "<plan>", "exec"), text.names)
    replay: Callable[..., Any] = text.names["replay"]
    replay.__doc__ = written
    return replay


class _Text:
    """The lines of a replay, and what its ``names`` stand for."""

    def __init__(self, tape: Tape, results: list[Value]):
        self.tape, self.results = tape, results
        self.device = tape.arguments[0].device
        self.names: dict[str, Any] = {}
        self.constants: dict[int, str] = {}
        self.as_tensors, self.addressed = set(results), set[Value]()
        self.steps = self._needed()
        self.last = {value.root: step for step in self.steps for value in self._used(step)}
        for value in (*map(tape.value, tape.arguments), *results):  # which nobody drops
            self.last.pop(value.root, None)
        self.written = set(map(tape.value, tape.arguments))

    def _used(self, step: Step) -> list[Value]:
        return [self.tape.value(tensor) for tensor in step.tensors()]

    def _needed(self) -> list[Step]:
        """The steps that change something or make what is needed; and notes which values are needed as tensors, which by their address."""
        needed, alive = [], {value.root for value in self.results}
        for step in reversed(self.tape.steps):
            if step.changes or not alive.isdisjoint(step.results):
                needed.append(step)
                used = self._used(step)
                alive.update(value.root for value in used)
                if step.compiled is None:
                    self.as_tensors.update(used)
                else:
                    self.addressed.update(value.root for value in used)
        return needed[::-1]

    def lines(self) -> Iterator[str]:
        yield from self._guards()
        for step in self.steps:
            if step.function is torch.empty_strided:
                yield from self._allocation(step)
            else:
                if step.compiled is None:
                    yield from self._views(self._used(step))
                yield from self._step(step)
            gone = [value.name for value in self.written if self.last.get(value.root) is step]
            if gone:
                yield f"del {', '.join(sorted(gone))}"
        yield from self._views(self.results)

    def _guards(self) -> Iterator[str]:
        """The device is made the current one, where memory is allocated; and what is not as it was in the tape's call is another form."""
        arguments = [self.tape.value(tensor) for tensor in self.tape.arguments]
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            yield f"if {self.name(driver.active.get_current_device)}() != {self.device.index}:"
            yield f"    with {self.name(torch.cuda.device)}({self.device.index}):"
            yield f"        return replay({', '.join(value.name for value in arguments)})"
        if self.addressed:
            device = self.device.index if on_gpu else driver.active.get_current_device()
            yield f"stream = {self.name(driver.active.get_current_stream)}({device})"
        yield from (f"a{value.name} = {value.name}.data_ptr()" for value in arguments)
        differs = [f"({' | '.join(f'a{value.name}' for value in arguments)}) % {ALIGNMENT}"]
        for value in arguments:
            if reads_behind(value.tensor):
                behind = f"{value.name}.untyped_storage().nbytes() - {value.tensor.element_size()} * {value.name}.storage_offset()"
                differs.append(f"{behind} != {eval(behind, {value.name: value.tensor})}")
        if any(tensor.dtype == torch.float32 for tensor in self.tape.arguments):
            for backend in ("matmul", "conv"):
                precision = self.name(torch._C._get_fp32_precision_getter)
                differs.append(f"{precision}('cuda', {backend!r}) != {torch._C._get_fp32_precision_getter('cuda', backend)!r}")
        yield f"if {' or '.join(differs)}:"
        yield f"    return {self.name(ANOTHER_FORM)}"

    def _addresses(self, values: Iterable[Value | None]) -> Iterator[str]:
        return (f"a{value.name} = {value.name}.data_ptr()" for value in values if value in self.addressed)

    def _views(self, values: list[Value]) -> Iterator[str]:
        """The tensors among them that are not there yet."""
        for value in values:
            if value not in self.written:
                self.written.add(value)
                tensor, of = value.tensor, value.root
                form = tuple(tensor.shape), tensor.stride()
                if value.behind == 0 and form == (tuple(of.tensor.shape), of.tensor.stride()):
                    yield f"{value.name} = {of.name}"
                else:
                    place = f", {of.name}.storage_offset() + {value.behind // tensor.element_size()}" if value.behind else ""
                    yield f"{value.name} = {of.name}.as_strided({form[0]}, {form[1]}{place})"

    def _allocation(self, step: Step) -> Iterator[str]:
        """Memory; where only one view of all of it is ever a tensor, as that."""
        (root,) = step.results
        views = [value for value in self.as_tensors if value.root is root]
        value = views[0] if len(views) == 1 and views[0].span == root.span else root
        self.written.add(value)
        if value.tensor.device != self.device:
            raise Unplannable(f"memory on {value.tensor.device} beside arguments on {self.device}")
        form = f"{tuple(value.tensor.shape)}, {value.tensor.stride()}, {self.name(value.tensor.dtype)}"
        yield f"{value.name} = {self.name(EMPTY[self.device.type])}({form})"
        if root in self.addressed:
            yield f"a{root.name} = {value.name}.data_ptr()"

    def _step(self, step: Step) -> Iterator[str]:
        if step.compiled is not None:
            yield self._launch(step)
            return
        made = [value for value in step.results if value is not None and value.of is None]
        self.written.update(made)
        names = [value.name if value in made else "_" for value in step.results]
        left = f"{', '.join(names)}{',' * step.many} = " if made else ""
        function, args = (run, (step.function, step.grid, *step.args)) if step.grid else (step.function, step.args)
        yield f"{left}{self.name(function)}({self._arguments(args, step.kwargs)})"
        yield from self._addresses(made)

    def _launch(self, step: Step) -> str:
        """Triton's launcher, called as its `CudaLauncher` does. ``stream`` is the present one."""
        launcher, compiled = step.compiled.run, step.compiled
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise Unplannable("a kernel that wants memory of its own")
        signature = step.function.signature
        known = {key: value for key, value in step.kwargs.items() if key in signature.parameters}
        bound = signature.bind(*step.args, **known)
        bound.apply_defaults()
        encodings = iter(compiled.metadata.tensordesc_meta or ())
        args = "".join(f"{self._kernel_argument(value, encodings)}, " for value in bound.arguments.values())
        before = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
        where = f"{', '.join(map(str, step.grid))}, stream, {self._arguments(before, {})}"
        packed = self.name(compiled.packed_metadata)
        if hasattr(launcher, "arg_annotations"):
            described = f"{self.name(launcher.arg_annotations)}, {self.name(launcher.kernel_signature)}"
            rest = f"{packed}, None, None, None, None, None, {described}"
            return f"{self.name(driver.active.utils.launch)}({where}, {rest}, ({args}))"
        direct = launcher.launch  # of an older Triton: a function made for the kernel, or what makes tensor maps for it
        if not inspect.isbuiltin(direct):
            direct = inspect.getclosurevars(direct).nonlocals["launcher"]
        return f"{self.name(direct)}({where}, None, None, {packed}, None, None, None, {args})"

    def _kernel_argument(self, value: Any, encodings: Iterator[dict[str, Any]]) -> str:
        if not isinstance(value, TensorDescriptor):
            return self.expression(value, self._address)
        maps = Maps(value, next(encodings))
        sides = ", ".join(map(str, (*value.shape, *value.strides)))
        return f"{self.name(maps)}[{self._address(value.base)}], {sides}"

    def _address(self, tensor: torch.Tensor) -> str:
        value = self.tape.value(tensor)
        return f"a{value.root.name}" + (f" + {value.behind}" if value.behind else "")

    def name(self, value: Any) -> str:
        """A name for an object."""
        if id(value) not in self.constants:
            self.constants[id(value)] = f"c{len(self.constants)}"
            self.names[self.constants[id(value)]] = value
        return self.constants[id(value)]

    def expression(self, value: Any, tensor: Callable[[torch.Tensor], str] | None = None) -> str:
        """A value as it is written; its tensors by their names, or by ``tensor``."""
        if isinstance(value, torch.Tensor):
            return tensor(value) if tensor else self.tape.value(value).name
        if isinstance(value, (tuple, list)):
            return "(" + "".join(f"{self.expression(part, tensor)}, " for part in value) + ")"
        if isinstance(value, TensorDescriptor):  # in the interpreter
            parts = (value.base, value.shape, value.strides, value.block_shape, value.padding)
            return f"{self.name(TensorDescriptor)}({self._arguments(parts, {})})"
        return repr(value) if value is None or type(value) in (bool, int, str) else self.name(value)

    def _arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        return ", ".join([*map(self.expression, args), *(f"{key}={self.expression(value)}" for key, value in kwargs.items())])

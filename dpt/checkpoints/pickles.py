"""Pickles, read without running them: plain values and dense tensors are made, everything else becomes an `Opaque`.

A pickle is a program for a stack machine. This one knows the stack and no import: a global stays a name, and the only names that mean
something are those of `_REBUILD`, each a few lines of ours. So a class that is not installed and a call that would do harm come to the
same thing: a value that says what it would have been.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from .stored import Opaque, Storage, Stored

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KINDS = {  # what to call that which other functions would rebuild
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values, of the meta device",
    "_rebuild_from_type_v2": "a tensor subclass",
    "_rebuild_wrapper_subclass": "a tensor subclass",
}


@dataclass(frozen=True)
class Global:
    """The name of something that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


def unpickle(file: BinaryIO, storage: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the file's position, which afterwards stands behind it.

    Args:
        storage: a persistent id -> its value, a `Storage` or an `Opaque`.

    Raises:
        Exception: of whatever kind the bytes lead to, where they are no pickle.
    """
    machine = _Machine(storage)
    for operation, argument, _ in pickletools.genops(file):
        _OPERATIONS[operation.name](machine, argument)
    return machine.stack.pop()


class _Machine:
    """The stack, the stacks below each mark, and the memo."""

    def __init__(self, storage: Callable[[Any], Any]):
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storage = storage

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def call(self, function: Any, arguments: Any) -> None:
        self.push(_called(function, arguments))

    def set_items(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_dictionary(values))

    def append(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)


def _dictionary(values: list[Any]) -> dict[Any, Any]:
    """Of keys and values in turn."""
    return _pairs(zip(values[::2], values[1::2], strict=True))


def _pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dictionary of the pairs whose keys are text or numbers; what hashing or printing another key would run into is not tried."""
    return {key: value for key, value in pairs if type(key) is str or (type(key) is int and key.bit_length() < 64)}


def _called(function: Any, arguments: Any) -> Any:
    """What a call gives: a plain value or a tensor where the function is known and the arguments are its own, else an `Opaque`."""
    if not isinstance(function, Global):
        return Opaque(function.what if isinstance(function, Opaque) else f"a call of a {type(function).__name__}")
    rebuild = _REBUILD.get((function.module, function.name))
    try:
        made = None if rebuild is None else rebuild(*arguments)
    except (TypeError, ValueError):
        made = None
    return Opaque(_KINDS.get(function.name, f"a {function}")) if made is None else made


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Stored | None:
    if not isinstance(storage, Storage):
        return None
    return Stored(storage, storage.dtype, offset, tuple(shape), tuple(stride))


def _typed_tensor(storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *_: Any) -> Stored | None:
    known = isinstance(storage, Storage) and isinstance(dtype, Global) and dtype.module == "torch" and dtype.name in _DTYPES
    return Stored(storage, _DTYPES[dtype.name], offset, tuple(shape), tuple(stride)) if known else None


def _with_attributes(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor that somebody set attributes on; subclasses are not rebuilt."""
    plain = isinstance(kind, Global) and str(kind) in ("torch.Tensor", "torch.nn.parameter.Parameter")
    made = _called(function, arguments) if plain else None
    return made if isinstance(made, Stored) else None


_REBUILD: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): lambda pairs=(): _pairs(pairs),
    ("collections", "defaultdict"): lambda *_: {},
}

_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
)
_NOTHING = "PROTO FRAME STOP READONLY_BUFFER"


def _named(argument: str) -> Global:
    """The two words that genops makes of a module and a name."""
    return Global(*argument.split(" ", 1))


def _named_by_values(values: list[Any]) -> Any:
    return Global(*values) if all(type(value) is str for value in values) else Opaque("something without a name")


_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_LITERALS.split(), _Machine.push),
    **dict.fromkeys(_NOTHING.split(), lambda machine, argument: None),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(Opaque("a set")),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "DICT": lambda machine, _: machine.push(_dictionary(machine.since_mark())),
    "FROZENSET": lambda machine, _: machine.call(Opaque("a frozenset"), machine.since_mark()),
    "APPEND": lambda machine, _: machine.append(machine.last(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.since_mark(),
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    "GLOBAL": lambda machine, argument: machine.push(_named(argument)),
    "STACK_GLOBAL": lambda machine, _: machine.push(_named_by_values(machine.last(2))),
    "INST": lambda machine, argument: machine.call(_named(argument), machine.since_mark()),
    "OBJ": lambda machine, _: machine.call((values := machine.since_mark())[0], values[1:]),
    "REDUCE": lambda machine, _: machine.call(*machine.last(2)),
    "NEWOBJ": lambda machine, _: machine.call(*machine.last(2)),
    "NEWOBJ_EX": lambda machine, _: machine.call(*machine.last(3)[:2]),
    "BUILD": lambda machine, _: machine.last(1),  # state for an object that was not made, or a dictionary's attributes
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda machine, code: machine.push(Opaque(f"the registered extension {code}"))),
    "PERSID": lambda machine, argument: machine.push(machine.storage(argument)),
    "BINPERSID": lambda machine, _: machine.push(machine.storage(*machine.last(1))),
    "NEXT_BUFFER": lambda machine, _: machine.push(Opaque("a buffer beside the pickle")),
}

"""PyTorch without its arithmetic: a model runs through with the shapes, strides and dtypes that it has, and nothing is computed. What an
op makes of its arguments' forms is asked of PyTorch once.

For what a model launches, on a machine without a GPU. Tensors are a CPU's; their memory is reserved and not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpt.kernels import launch

# What does run: it makes tensors without filling them, or asks about them.
RUNS = ("empty", "empty_strided", "empty_like", "new_empty", "set_", "resize_", "is_same_size", "item", "_local_scalar_dense", "lift_fresh")
COPIES_IF_IT_MUST = ("contiguous", "reshape", "to", "flatten")  # else these give a view
TRUE = ("equal", "allclose", "is_nonzero")  # what is said of values, where there are none


class Hollow(TorchDispatchMode):
    """In this mode PyTorch's own ops compute nothing. The ops of `dpt.kernels` run their launchers; or, if not ``launches``, they compute
    nothing either. ``called`` is told (name, arguments) of each; ``computed`` (name, arguments, result) of each of PyTorch's own that would
    compute."""

    def __init__(
        self,
        called: Callable[[str, tuple[Any, ...]], None] = lambda name, arguments: None,
        launches: bool = True,
        computed: Callable[[str, tuple[Any, ...], Any], None] = lambda name, arguments, result: None,
    ):
        super().__init__()
        self.called, self.launches, self.computed = called, launches, computed

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if any(issubclass(kind, FakeTensor) for kind in types):  # something is traced
            return func(*args, **kwargs)
        if func.namespace == "dpt":
            self.called(name, args)
        if func.namespace == "dpt" and self.launches:
            with self:
                return launch.implementation(name)(*args, **kwargs)
        short = name.removeprefix("aten::")
        if short in RUNS or short == "_unsafe_view" or (func.is_view and short not in COPIES_IF_IT_MUST):
            return func(*args, **kwargs)
        if short in TRUE:
            return True
        if short.endswith("_"):  # in place
            changed = args[0] if args else kwargs["self"]
            self.computed(short, args, changed)
            return changed
        key = func, _form(args), *((word, _form(value)) for word, value in kwargs.items())
        found = _outcomes.get(key, _outcomes)
        if found is _outcomes:
            found = _outcomes[key] = _outcome(func, args, kwargs)
        if found is VIEW:
            return func(*args, **kwargs)
        result = _made(found)
        self.computed(short, args, result)
        return result


class Form(NamedTuple):
    """What is known of a tensor whose numbers are not."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def tensor(self, device: str) -> torch.Tensor:
        """A tensor of this form, not filled."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


VIEW = object()
_outcomes: dict[Any, Any] = {}  # by the op and the forms of its arguments


def _form(value: Any) -> Any:
    """A tensor's form, those of what a sequence holds, or (type, value): by 1, 1.0 and True, which are equal, an op makes results of three
    dtypes."""
    if isinstance(value, torch.Tensor):
        return Form.of(value)
    kind = type(value)
    return (kind, *map(_form, value)) if kind is tuple or kind is list else (kind, value)


def _made(found: Any) -> Any:
    """What was a form, as a tensor."""
    if isinstance(found, Form):
        return found.tensor("cpu")
    return type(found)(map(_made, found)) if isinstance(found, (tuple, list)) else found


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Form.of(value).tensor("meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _outcome(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The results of an op as forms, by what it makes of tensors on the meta device; or VIEW."""
    args, kwargs = pytree.tree_map(_on_meta, (args, kwargs))
    found = func(*args, **kwargs)
    if func._schema.name.removeprefix("aten::") in COPIES_IF_IT_MUST and found.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
        return VIEW
    return pytree.tree_map(lambda value: Form.of(value) if isinstance(value, torch.Tensor) else value, found)

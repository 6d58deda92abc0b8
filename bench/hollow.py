"""PyTorch without its arithmetic: a model runs through with the shapes, strides and dtypes that it has, and nothing is computed.

For what a model launches, on a machine without a GPU. Tensors are a CPU's; their memory is reserved and not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What does run: it makes tensors without filling them, or asks about them.
RUNS = ("empty", "empty_strided", "empty_like", "new_empty", "set_", "resize_", "is_same_size", "item", "_local_scalar_dense", "lift_fresh")
COPIES_IF_IT_MUST = ("contiguous", "reshape", "to", "flatten")  # else these give a view
TRUE = ("equal", "allclose", "is_nonzero")  # what is said of values, where there are none


class Hollow(TorchDispatchMode):
    """In this mode PyTorch's own ops compute nothing. The ops of `dpt.kernels` run their launchers; or, if not ``launches``, they compute
    nothing either. ``called`` is told (name, arguments) of each."""

    def __init__(self, called: Callable[[str, tuple[Any, ...]], None] = lambda name, arguments: None, launches: bool = True):
        super().__init__()
        self.called, self.launches = called, launches

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if any(issubclass(kind, FakeTensor) for kind in types):  # something is traced
            return func(*args, **kwargs)
        if func.namespace == "dpt":
            self.called(name, args)
        if func.namespace == "dpt" and self.launches:
            with self:
                return implementation(name)(*args, **kwargs)
        short = name.removeprefix("aten::")
        if short in RUNS or short == "_unsafe_view" or (func.is_view and short not in COPIES_IF_IT_MUST):
            return func(*args, **kwargs)
        if short in TRUE:
            return True
        if short.endswith("_"):  # in place
            return args[0] if args else kwargs["self"]
        given = pytree.tree_map(_to_meta, (args, kwargs))
        found = func(*given[0], **given[1])
        if short in COPIES_IF_IT_MUST and found.untyped_storage()._cdata == given[0][0].untyped_storage()._cdata:
            return func(*args, **kwargs)
        return pytree.tree_map(_from_meta, found)


def implementation(name: str) -> Callable[..., Any]:
    """What an op of `dpt.kernels`, "dpt::attention", does with real tensors."""
    return OPDEFS[name]._init_fn


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _from_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type == "meta":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return value

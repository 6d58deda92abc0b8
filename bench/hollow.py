"""PyTorch without its arithmetic: a model runs through with the shapes, strides and dtypes that it has, and nothing is computed.

For what a model launches, on a machine without a GPU. Tensors are a CPU's; their memory is reserved and not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What does run: it makes tensors without filling them, or asks about them. What is asked of values is told of memory that holds none.
RUNS = ("empty", "empty_strided", "empty_like", "new_empty", "set_", "resize_", "is_same_size", "item", "_local_scalar_dense", "lift_fresh")
COPIES_IF_IT_MUST = ("contiguous", "reshape", "to", "flatten")  # else they give a view
TRUE = ("equal", "allclose", "is_nonzero")


class Hollow(TorchDispatchMode):
    """In this mode PyTorch's own ops compute nothing, and the ops of `dpt.kernels` run their launchers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if func.namespace == "dpt":
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        short = name.removeprefix("aten::")
        if short in RUNS or (func.is_view and short not in COPIES_IF_IT_MUST) or short == "_unsafe_view":
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


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _from_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type == "meta":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return value

"""Tensors that lie one behind the other in memory, as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def spanning(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one behind the other in one piece of memory as one tensor, along their first dimension; None if they do not."""
    first = tensors[0]
    place, storage = first.data_ptr(), first.untyped_storage()._cdata
    for tensor in tensors:
        if tensor.data_ptr() != place or tensor.untyped_storage()._cdata != storage or not tensor.is_contiguous():
            return None
        if tensor.dtype != first.dtype or tensor.shape[1:] != first.shape[1:]:
            return None
        place += tensor.numel() * tensor.element_size()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())

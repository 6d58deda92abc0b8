"""Tensors that lie one behind the other in memory, as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def spanning(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one behind the other in one piece of memory as one tensor, along their first dimension; None if they do not."""
    first = tensors[0]
    if not first.is_contiguous():
        return None
    start, dtype, stride, (rows, *rest) = first.data_ptr(), first.dtype, first.stride(), first.shape
    step = first.element_size() * (stride[0] if rest else 1)  # bytes a row
    for tensor in tensors[1:]:
        if tensor.data_ptr() != start + rows * step or tensor.dtype != dtype or tensor.stride() != stride or [*tensor.shape[1:]] != rest:
            return None
        rows += tensor.shape[0]
    storage = first.untyped_storage()
    if start + rows * step > storage.data_ptr() + storage.nbytes():  # another piece of memory, which happens to lie behind
        return None
    return first.detach().as_strided((rows, *rest), stride)

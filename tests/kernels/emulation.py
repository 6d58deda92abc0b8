"""A tensor core's TF32 in Triton's interpreter, which by itself multiplies float32 exactly whatever `input_precision` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from dpt.kernels.tools.parity import truncated


def truncate_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a dot in TF32 drops the bits of its float32 operands that the tensor core does not read."""
    exact = InterpreterBuilder.create_dot

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, precision: Any, *rest: Any) -> TensorHandle:
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(truncated(torch.from_numpy(t.data)).numpy(), t.dtype) for t in (a, b))
        return exact(self, a, b, c, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)

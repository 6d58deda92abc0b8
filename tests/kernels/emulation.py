"""What the tests change in Triton's interpreter: TF32 is a tensor core's; and what it does in each call anew, or twice, is not done."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from dpt.kernels.tools.parity import truncated


def truncate_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a dot in TF32 drops the bits of its float32 operands that the tensor core does not read. By itself the interpreter
    multiplies float32 exactly, whatever `input_precision` says."""
    exact = InterpreterBuilder.create_dot

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, precision: Any, *rest: Any) -> TensorHandle:
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle(truncated(torch.from_numpy(t.data)).numpy(), t.dtype) for t in (a, b))
        return exact(self, a, b, c, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what is interpreted takes the place of Triton's language once in a launch, where by itself each function that a kernel
    calls puts it there once more, to no effect; and NumPy's name for a dtype is asked for once."""
    patch, in_place = interpreter._patch_lang, set[str]()
    dtype_of, dtypes = interpreter._get_np_dtype, dict[str, Any]()

    class Scope(interpreter._LangPatchScope):  # of a launch: those of what its kernel calls are not restored
        def restore(self) -> None:
            in_place.clear()
            super().restore()

    @functools.cache
    def seen_by(function: Any) -> set[str]:
        return {module.__name__ for module in function.__globals__.values() if module is tl or module is tl.core}

    def patch_once(function: Any) -> interpreter._LangPatchScope:
        if seen_by(function) <= in_place:
            return interpreter._LangPatchScope()
        in_place.update(seen_by(function))
        return patch(function)

    def named(dtype: tl.dtype) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = dtype_of(dtype)
        return dtypes[dtype.name]

    monkeypatch.setattr(interpreter, "_LangPatchScope", Scope)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", named)


def let_integers_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on as in compiled code. By itself the interpreter does sums and products of integers twice, in 64 bits the second time."""
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))

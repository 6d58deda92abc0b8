"""Why a model cannot be exported: the operator or the line of a module, and not the exporter's stack trace; and what exporters print, kept
quiet."""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import re
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

TORCH = Path(torch.__file__).parent


class ExportError(ValueError):
    """A model that an exporter does not take. The message names the operator, the module and, where it is known, the line."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print, log and warn of, none of which is the user's to act on; in the whole process."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def untraced(model: nn.Module, error: Exception) -> ExportError:
    """Of what `torch.export` raised: the innermost line of a module that is not PyTorch's, such as a choice by the numbers in a tensor."""
    place = ""
    for frame, line in _frames(error):
        module, file = frame.f_locals.get("self"), Path(frame.f_code.co_filename)
        if isinstance(module, nn.Module) and TORCH not in file.parents:
            names = {id(each): name for name, each in model.named_modules()}
            code = linecache.getline(str(file), line).strip()
            place = f" in {_module(names.get(id(module), ''), type(module).__name__)}, {file.name}:{line} ({code})"
    return ExportError(f"torch.export cannot trace it{place}: {_reason(error)}")


def unconverted(error: Exception) -> ExportError:
    """Of what `torch.onnx` raised: the operator and the module that calls it."""
    node = None
    for frame, _ in _frames(error):
        node = next((value for value in frame.f_locals.values() if isinstance(value, torch.fx.Node)), node)
    if node is None:
        return ExportError(f"torch's ONNX exporter cannot convert it: {_reason(error)}")
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    kind = kind if isinstance(kind, str) else kind.__name__
    place = f" in {_module(path, kind.rpartition('.')[2])}" if kind else ""
    lacking = any("No ONNX function found" in str(each) for each in _chain(error))
    why = "has no translation to ONNX" if lacking else f"cannot be translated to ONNX: {_reason(error)}"
    return ExportError(f"the operator {node.target}{place} {why}")


def _module(path: str, kind: str) -> str:
    return f"{path} ({kind})" if path else kind


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and those that it came from, the first one last."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found


def _frames(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    """Of the whole chain, the innermost frame last."""
    for each in _chain(error):
        yield from traceback.walk_tb(each.__traceback__)


def _reason(error: BaseException) -> str:
    """The innermost error in one line: of several that are listed the first."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", str(_chain(error)[-1])).splitlines() if line.strip()]
    listed = next((line.removeprefix("- ") for line in lines if line.startswith("- ")), None)
    return listed or (lines[0] if lines else type(error).__name__)

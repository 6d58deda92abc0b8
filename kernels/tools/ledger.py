"""What the launches have compiled to before: a line a specialisation, in ``compiled-code/<family>.json``.

A specialisation is what Triton compiles once: a kernel, its arguments' types and alignment, its constants and options, for one
architecture. Its key hashes all that the machine code depends on, the source and the compiler's version included, and nothing else, so
facts that stand under a key are those of the code as it is now; and nobody has to compile again to know them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

FOLDER = Path(__file__).parents[1] / "compiled-code"
Facts = dict[str, Any]


@functools.cache
def source_of(function: Any) -> str:
    """A hash of a jit function, of those that it calls and of the constants that it reads: of the code, not of comments or of its place."""
    found: dict[Any, str] = {}
    _gather(function, found)
    return hashlib.sha256("\n".join(sorted(found.values())).encode()).hexdigest()


def _gather(function: Any, found: dict[Any, str]) -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    body = tree.body[0].body
    if ast.get_docstring(tree.body[0]) is not None:
        del body[0]
    found[function] = f"{function.fn.__qualname__} {ast.unparse(tree)}"
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        value = function.fn.__globals__.get(name)
        if isinstance(value, triton.runtime.JITFunction):
            if value not in found:
                _gather(value, found)
        elif isinstance(value, tl.constexpr | list | int | float | str):
            found[f"{function.fn.__module__}.{name}"] = f"{name} {value}"


def key(compiled: Mapping[str, Any], function: Any, architecture: int) -> str:
    """The key of a specialisation, from what Triton tells its ``jit_cache_hook`` as ``compile``."""
    told = json.loads(compiled["specialization_data"])
    options = {name: value for name, value in told["options"].items() if name != "extern_libs"}  # a path of this machine
    parts = [triton.__version__, architecture, source_of(function), options]
    parts += [told[name] for name in ("signature", "constant_keys", "constant_vals", "attrs_keys", "attrs_vals")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def key_asked_for(call: Callable[[], Any], architecture: int) -> str:
    """The key of what ``call()``, one launch or warm-up of a jit function, asks Triton to compile; nothing is compiled."""
    asked: list[str] = []

    def hook(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        asked.append(key(compile, fn.jit_function, architecture))
        return True  # there is nothing to do, so Triton forgets it

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        call()
    if len(asked) != 1:
        raise RuntimeError(f"{len(asked)} specialisations were asked for, not one: another was compiled in this process before")
    return asked[0]


def read(family: str, folder: Path = FOLDER) -> dict[str, Facts]:
    """Key -> facts, as recorded for ``family``; nothing where there is no file."""
    path = folder / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(family: str, facts: Mapping[str, Facts], folder: Path = FOLDER) -> None:
    """Make ``facts`` the whole record of ``family``: a line each, in the order of kernels, so that a change of one is a change of one line;
    written whole or not at all."""
    lines = [f"{json.dumps(name)}: {json.dumps(facts[name])}" for name in sorted(facts, key=lambda name: (facts[name]["kernel"], name))]
    path = folder / f"{family}.json"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)

"""The ops' benchmark cases, a file an op, named as the op's file in `kernels/`: its ``OPS`` are what of it is measured.

Nobody else names them: `ops()` lists the folder. What their tensors and shapes are made of is in `shapes.py`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..shapes import Argument


@dataclass(frozen=True)
class Op:
    """An op with its reference. ``arguments(shape)``: its tensors; ``call`` and ``plain`` take them in that order, with the shape first.

    ``peers``: what else can do the same, by name: given the opened case (`kernels.OpenedOp`), a function like ``plain``; or it raises
    Unavailable. ``judged``: what the gate compares in place of the output. ``module``: the file in `kernels/`, by that of its case.
    """

    name: str
    arguments: Callable[[Any], Sequence[Argument]]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: Sequence[Any]
    toy: Any
    peers: Mapping[str, Callable[[Any], Callable[..., Tensor]]] = field(default_factory=dict, hash=False)
    backward: bool = True
    judged: Callable[..., Tensor] | None = None
    module: str = ""

    @property
    def has_maps(self) -> bool:
        """Whether any of its tensors has a memory format."""
        return any(argument.map for argument in self.arguments(self.toy))


def both(ours: Callable[..., Tensor], reference: Callable[..., Tensor], call: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """``call(function, shape, *tensors)`` for an op and for its reference."""
    return {"call": lambda *arguments: call(ours, *arguments), "plain": lambda *arguments: call(reference, *arguments)}


def modules() -> tuple[str, ...]:
    """The names of the files here, which are those of the op modules."""
    return tuple(found.name for found in pkgutil.iter_modules(__path__))


@functools.cache
def ops() -> tuple[Op, ...]:
    """All of them. A function, since importing the ops imports Triton."""
    return tuple(replace(op, module=name) for name in modules() for op in importlib.import_module(f"{__name__}.{name}").OPS)

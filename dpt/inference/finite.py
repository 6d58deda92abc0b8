"""Maps that are not finite are errors, which name the first module that gave such a number, and not black pictures.

No map of ours may hold NaN or infinity: depth that is the reciprocal of nothing is bounded, and sky is as far as the rest of its picture.
Labels are asked of their logits, for the largest of NaN is a class like any other. The largest and the smallest number of each picture's
map are taken on the device, behind the network, and what they tell is fetched with its results: nothing is waited for that was not.
Only then, and only of a picture whose map is not finite, a second forward finds the stage.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from ..system.endings import out_of_memory
from .windows import Maps, Network

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ENOUGH = (torch.bfloat16, torch.float32)  # dtypes whose largest number no activation of a sound model comes near
INPUT = "the input"  # what is called the stage where the network was given such a number


class NotFinite(FloatingPointError):
    """A picture whose map holds NaN or infinity; the message names the picture, the stage, its dtype, and what to do.

    Attributes:
        stage: the path of the first module whose output is not finite, as `model.get_submodule` takes it; "" is the whole model, `INPUT`
            what it was given, and None where a second forward gave finite numbers, or memory ran out in it.
    """

    def __init__(self, message: str, stage: str | None = None):
        super().__init__(message)
        self.stage = stage


class Watch:
    """Looks at the maps of a batch of pictures as they are made."""

    def __init__(self) -> None:
        self._extremes: list[Tensor] = []  # (2, B), of each task in each pass

    def over(self, passes: Iterator[Maps]) -> Iterator[Maps]:
        for maps in passes:
            for found in maps.values():
                inside = tuple(range(1, found.dim()))
                self._extremes.append(torch.stack((found.amax(inside), found.amin(inside))))  # NaN is larger than all, and smaller
            yield maps

    def not_finite(self) -> Tensor:
        """Of each picture of the batch, bool (B,), on the maps' device, whether a map holds NaN or infinity."""
        return torch.cat(self._extremes).isfinite().logical_not().any(0)


class Stage(NamedTuple):
    """The first module whose output is not finite; `kind` is its class's name."""

    path: str
    kind: str
    dtype: torch.dtype


def error_of(model: Network, name: str, again: Callable[[Network], Iterator[Maps]]) -> NotFinite:
    """The error of a picture whose map is not finite; `again` are its passes through a network."""
    network = cast(nn.Module, getattr(model, "_orig_mod", model))  # of torch.compile's wrapper, what it wraps
    bad = next((key for key, value in network.state_dict().items() if not _is_finite(value)), None)
    stage = first_stage(network, again)
    where, dtype = "a second forward of this picture alone gave finite numbers", next(network.parameters()).dtype
    if stage is not None:
        dtype = stage.dtype
        what = INPUT if stage.path == INPUT else f"{stage.path or 'the model'} ({stage.kind})"
        where = f"the first number that is none came from {what}, in {_short(dtype)}"
    dtype = dtype if bad is None else network.state_dict()[bad].dtype
    others = [_short(other) for other in ENOUGH if torch.finfo(other).max > 2 * torch.finfo(dtype).max]
    instead = f"--dtype {' or '.join(others)} (dtype=torch.{others[0]})" if others else ""
    if bad is not None:
        advice = f"{bad} itself is not finite in {_short(dtype)}: "
        advice += f"it is too large for it, which {instead} mends, or the file is damaged" if others else "the file is damaged"
    elif stage is not None and stage.path == INPUT:
        advice = "the picture, or its prompt, is not finite once it is normalised"
    elif others:
        advice = f"the weights are finite; {_short(dtype)} ends at {torch.finfo(dtype).max:g}, and {instead} has room for more"
    else:
        advice = f"the weights are finite, and {_short(dtype)} has room for all that a sound model computes: they are not of this model"
        advice += ", or its training went astray"
    return NotFinite(f"{name}: the map is not finite: {where}; {advice}", None if stage is None else stage.path)


def first_stage(network: nn.Module, again: Callable[[Network], Iterator[Maps]]) -> Stage | None:
    """Runs `again` until a module's output is not finite; None where all are, or memory runs out. A module comes behind its children."""
    copied = _with_hooks_of_its_own(network)
    found: list[Stage] = []

    def look(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            wrong = None if found else next((tensor for tensor in _tensors(output) if not _is_finite(tensor)), None)
            if wrong is not None:
                found.append(Stage(path, type(module).__name__, wrong.dtype))

        return hook

    def look_at_input(_: nn.Module, inputs: Any) -> None:
        wrong = next((tensor for tensor in _tensors(inputs) if not _is_finite(tensor)), None)
        if wrong is not None and not found:
            found.append(Stage(INPUT, "", wrong.dtype))

    copied.register_forward_pre_hook(look_at_input)
    for path, module in copied.named_modules():
        module.register_forward_hook(look(path))
    try:
        for _ in again(cast(Network, copied)):
            if found:
                break
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    return found[0] if found else None


def _with_hooks_of_its_own(module: ModuleT, made: dict[nn.Module, Any] | None = None) -> ModuleT:
    """The module and those within it again, of the same parameters: a hook on it runs in nobody else's forward, and neither it nor what
    is in it is compiled."""
    made = {} if made is None else made
    if module not in made:
        own = made[module] = copy.copy(module)
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            setattr(own, kind, OrderedDict(getattr(module, kind)))
        children = module._modules.items()
        own._modules = {name: None if child is None else _with_hooks_of_its_own(child, made) for name, child in children}
    return cast(ModuleT, made[module])


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floats in what a module takes or gives."""
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

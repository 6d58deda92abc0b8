"""A state dict brought from a family's keys to ours, strictly: every expected key once, in its shape, type and finite."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..spanning import spanning
from ..zoo import LAYOUTS, CheckpointError, Layout
from .stored import Opaque, Stored

State = Mapping[str, Stored | Opaque | Tensor]
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32)


def layout_of(state: Mapping[str, object], path: str | Path = "state dict") -> Layout:
    """The layout whose marker the state has; CheckpointError if none."""
    for layout in LAYOUTS:
        if layout.is_of(state):
            return layout
    for layout in LAYOUTS:
        here, lacking = ([key for key in layout.markers if (key in state) is there] for there in (True, False))
        if here:  # a backbone, or a head
            message = f"of the {layout.name} layout it has {here[0]} but not {lacking[0]}: is that in another file? Give both, as a list"
            raise CheckpointError(f"{path}: {message}")
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointError(f"{path}: no known layout (known: {known}); its first keys are {', '.join(sorted(state)[:3])}")


def problems(state: State, layout: Layout, expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state from being the expected one, told by names, types and shapes: none of its values is read."""
    foreign: list[str] = []
    found: list[str] = []
    used: set[str] = set()
    for key, tensor in expected.items():
        try:
            parts = layout.source(key)
        except CheckpointError as error:
            foreign.append(str(error))
            continue
        names = [name for name in parts if name is not None]
        used.update(names)
        missing = [name for name in names if name not in state]
        if missing:
            found += [] if _may_be_missing(key) else [f"{', '.join(missing)} is missing"]
            continue
        wrong = [f"{name} {problem}" for name in names if (problem := _unfit(state[name], tensor)) is not None]
        shape = None if wrong else _joined_shape([cast("Stored | Tensor", state[name or names[0]]) for name in parts])
        if shape is not None and shape != tuple(tensor.shape):
            wrong = [f"{names[0]} has shape {shape}, the model's {key} {tuple(tensor.shape)}"]
        found += wrong
    unused = re.compile("|".join(layout.unused) or r"(?!)")
    left = [f"{name} is not used by the model" for name in state if name not in used and not unused.fullmatch(name)]
    return foreign + found + left or _overlaps([value for name in used if isinstance(value := state.get(name), Stored)])


def _overlaps(values: list[Stored]) -> list[str]:
    """What to say of tensors that share their storages' bytes: a small file could claim any amount of memory that way."""
    claimed = sum(math.prod(value.shape) * value.dtype.itemsize for value in values)
    held = sum(storage.size for storage in {value.storage for value in values})
    return [f"tensors overlap: they claim {claimed} bytes of storages of {held}"] if claimed > held else []


def _may_be_missing(key: str) -> bool:
    """BatchNorm's step counter came with PyTorch 0.4.1 and is not in every file."""
    return key.endswith("num_batches_tracked")


def _unfit(value: Stored | Opaque | Tensor, expected: Tensor) -> str | None:
    """Why a value cannot be a tensor like the expected one, whatever its shape; None if it can."""
    if isinstance(value, Opaque):
        return f"is {value.what}, where a dense tensor is needed"
    allowed = FLOATING if expected.is_floating_point() else INTEGER
    if value.dtype not in allowed:
        return f"is of {value.dtype}, where one of {', '.join(map(str, allowed))} is needed"
    return value.problem() if isinstance(value, Stored) else None


def _joined_shape(parts: list[Stored | Tensor]) -> tuple[int, ...]:
    """The shape of tensors joined along their first dimension; that of the first which does not fit the others, if so."""
    shapes = [tuple(part.shape) for part in parts]
    odd = [shape for shape in shapes if shape[1:] != shapes[0][1:] or (len(shapes) > 1 and not shape)]
    if odd or len(shapes) == 1:
        return (odd or shapes)[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def convert(
    state: State,
    layout: Layout,
    expected: Mapping[str, Tensor],
    path: str | Path = "state dict",
    *,
    device: torch.device | str | None = "cpu",
    as_stored: bool = False,
) -> dict[str, Tensor]:
    """The state under our keys, strictly: every expected key once and in its shape, every key of the file used or known unused.

    Args:
        expected: the model's state dict; shapes and dtypes are looked at, so it may be on the meta device.
        device: where the tensors go; each goes as it is read. None leaves them where they are.
        as_stored: floating tensors keep the dtypes that they have in the file.

    A tensor of the state that has its place and its dtype already, and is one of ours, is taken as it is, on the same memory.

    Raises:
        CheckpointError: naming the keys that are missing, left over or of another shape or type, or whose values are not finite, or, of a
            running variance, negative.
    """
    wrong = problems(state, layout, expected)
    if wrong:
        raise CheckpointError(f"{path} ({layout.name} layout) does not fit the model: {shortened(wrong)}")
    converted = {}
    for key, tensor in expected.items():
        names = layout.source(key)
        target = tensor.dtype
        first = next(name for name in names if name is not None)
        if first not in state:
            converted[key] = torch.zeros(tensor.shape, dtype=target, device=device)
            continue
        if as_stored and tensor.is_floating_point():
            target = cast("Stored | Tensor", state[first]).dtype
        parts = [_masked(state, layout, name, key, target, path).to(device) for name in names if name is not None]
        if None in names:
            parts = [parts.pop(0) if name is not None else torch.zeros_like(parts[0]) for name in names]
        converted[key] = joined(parts)
    return converted


def parted(value: Tensor, count: int) -> tuple[Tensor, ...]:
    """A tensor in equal parts along its first dimension, which need not have one where there is one part: views of it."""
    return value.chunk(count) if count > 1 else (value,)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined along their first dimension: a view where they lie one behind the other already."""
    if len(parts) == 1:
        return parts[0]
    whole = spanning(parts)
    return torch.cat(list(parts)) if whole is None else whole


def reverted(state: Mapping[str, Tensor], layout: Layout, width: int) -> dict[str, Tensor]:
    """Our state under a layout's keys, the inverse of `convert`: views of the same memory, and what the layout's own code wants beside it.

    Args:
        width: of the encoder's tokens.

    Raises:
        CheckpointError: the layout has no place for one of the tensors.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        names = layout.source(key)
        for name, part in zip(names, parted(value, len(names)), strict=True):
            if name is not None:
                found[name] = part
            elif part.any():
                raise CheckpointError(f"{key} is not zero where the layout {layout.name} has no place for it")
    some = next(iter(state.values()))
    sides = {"D": width, "8D": 8 * width, "F": len(state["fusion.convs.0.weight"])}
    for name, shape, number in layout.filled:
        size = [sides[side] if isinstance(side, str) else side for side in shape]
        values = torch.tensor(number, dtype=some.dtype, device=some.device)
        found[name] = values.reshape(size) if values.dim() else values.expand(size).clone()
    return found


def shortened(wrong: list[str], count: int = 5) -> str:
    """The first of a list of problems, and how many more there are."""
    return "; ".join(wrong[:count]) + (f"; and {len(wrong) - count} more" if len(wrong) > count else "")


def _masked(state: State, layout: Layout, name: str, key: str, dtype: torch.dtype, path: str | Path) -> Tensor:
    """A tensor's values, times its mask's where the layout has masks and the file one for it."""
    values = _checked(cast("Stored | Tensor", state[name]), name, key, dtype, path)
    mask = None if layout.masked is None else name + layout.masked
    if mask is None or mask not in state:
        return values
    problem = _unfit(state[mask], values)
    if problem is not None:
        raise CheckpointError(f"{path}: {mask} {problem}")
    factors = _checked(cast("Stored | Tensor", state[mask]), mask, key, dtype, path)
    if factors.shape != values.shape:
        raise CheckpointError(f"{path}: {mask} has shape {tuple(factors.shape)}, {name} {tuple(values.shape)}")
    return values * factors


def _checked(value: Stored | Tensor, name: str, key: str, dtype: torch.dtype, path: str | Path) -> Tensor:
    """A tensor's values in a dtype; CheckpointError if some are not finite there, or negative where they must not be."""
    values = (value.read() if isinstance(value, Stored) else value).to(dtype)
    if not _finite(values):
        original = value.read() if isinstance(value, Stored) else value
        first = original[~values.isfinite()][0].item()
        raise CheckpointError(f"{path}: {name} holds {first:g}, where every value must be finite in {dtype}")
    # Zero is right: a channel that never fired has no variance, and epsilon is added to it.
    if key.endswith(("running_var", "num_batches_tracked")) and values.numel() and values.min() < 0:
        raise CheckpointError(f"{path}: {name} holds {values.min().item():g}, where nothing may be below 0")
    return values


_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}  # integers of as many bytes


def _finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN.

    Seen as integers, infinity and NaN are the largest: of those without a sign bit signed, of those with one unsigned. Two maxima by NumPy
    read the memory twice and write none, on one thread: PyTorch's would wake its others between any two reads from the file.
    """
    if not values.is_floating_point() or not values.numel():
        return True
    if values.device.type != "cpu":
        return bool(values.isfinite().all())
    signed, unsigned = _BITS[values.element_size()]
    integers = values.detach().view(signed).numpy()
    infinity = torch.tensor([torch.inf, -torch.inf], dtype=values.dtype, device="cpu").view(signed).numpy()
    return bool(integers.max() < infinity[0]) and bool(integers.view(unsigned).max() < infinity.view(unsigned)[1])

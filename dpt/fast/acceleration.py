"""A model put on the fused kernels, and the report of it.

`accelerate` exchanges the class of each module whose `rules.refusal` is None, so names, state dict, hooks, copies and pickles stay as
they are; and it lays out the weights of convolutions in memory as the kernels read them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import TypeVar

from torch import nn

from ..kernels import launch
from ..kernels.cpu import choices, memory
from ..nets.functional import LastConv2d
from .modules import is_class_forward
from .rules import FAST, NO_FORM, PLAIN, refusal
from .transformers import encoder, reading, table, unread

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Row:
    """One module that has a fast form: its name, its class now, and how it runs."""

    name: str
    kind: str
    fused: bool
    how: str


class Report(list[Row]):
    """The rows of `fast_report`; printed, a table."""

    def __str__(self) -> str:
        width = max((len(row.name) for row in self), default=0)
        lines = [f"{row.name:{width}}  {'fused' if row.fused else 'plain':5}  {row.how}" for row in self]
        return "\n".join([*lines, f"{sum(row.fused for row in self)} of {len(self)} run fused"])


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    table.learn(model)
    return ((name, module) for name, module in model.named_modules() if type(module) in FAST or type(module) in PLAIN)


def accelerate(model: ModelT, strict: bool = False) -> ModelT:
    """Put a model on the fused kernels, in place, and return it. Parameters, names, dtype and state dict stay as they are.

    The weights of convolutions get the order in memory that the kernels read, where the module is in evaluation mode and its weight has no
    gradient. A fused optimizer (`fused=True`) that has made steps before goes on only with weights as they were: make it afterwards, or
    accelerate in training mode. `dpt.save`, `torch.save` and transformers' `save_pretrained` take such weights as any; safetensors' own
    `save_file` wants `.contiguous()` of them.

    Of a model of transformers the modules inside take fast forms, by `fast.transformers.table`; the model's own class, outputs, hooks and
    `save_pretrained` stay, and it gets hooks by which only those hidden states are kept that are read or asked for.
    Queries, keys and values move into one piece of memory, still three parameters each. What a fast form cannot
    give in a call (attentions, a mask, dropout) upstream's own forward gives, and so where a child has become another (LoRA, a quantised
    weight) or is hooked.

    Args:
        model: a `dpt.DPT`, a model of transformers, or any module that holds the blocks of one.
        strict: raise where a module refuses, instead of leaving it plain; nothing is changed then.

    Raises:
        ValueError: the model holds nothing that has a fast form; or, if strict, naming each module that refuses and why.
    """
    candidates = dict(_candidates(model))
    if not candidates:
        raise ValueError(f"{type(model).__name__} holds no module that has a fast form ({', '.join(kind.__name__ for kind in FAST)})")
    refused = {name: reason for name, module in candidates.items() if (reason := refusal(module)) is not None}
    if strict and refused:
        raise ValueError("; ".join(f"{name or 'the module'} cannot run fused: {reason}" for name, reason in refused.items()))
    for name, module in candidates.items():
        if name not in refused and type(module) in FAST:
            _become(module, FAST[type(module)].fast)
    unread.install(model)
    _lay_out(model)
    weakref.finalize(model, memory.release).atexit = False
    return model


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Exchange a module's class; and the forward of it that accelerate's `device_map` calls, or has left."""
    bound = [name for name in ("forward", "_old_forward") if is_class_forward(module, vars(module).get(name))]
    module.__class__ = kind
    for name in bound:
        setattr(module, name, MethodType(kind.forward, module))


def decelerate(model: ModelT) -> ModelT:
    """Take a model off the fused kernels, in place, and return it: the inverse of `accelerate`, but for the order of weights in memory."""
    unread.remove(model)
    for module in model.modules():
        _become(module, PLAIN.get(type(module), type(module)))
    return model


def as_on_a_gpu() -> AbstractContextManager[None]:
    """A context in which fast modules do with fake tensors what they do on a GPU that has the kernels; in the whole process."""
    stand_ins: AbstractContextManager[None] = launch.stand_ins()
    return stand_ins


# The order of a convolution's weight in memory as the kernels read it: (O, kh, kw, I), which is channels-last; and of a transposed one,
# (I, O, kh, kw), (kh, kw, O, I). The channels that are summed over come last. Exceptions are in `rules.FAST`.
MEMORY = {nn.Conv2d: (0, 2, 3, 1), LastConv2d: (0, 2, 3, 1), nn.ConvTranspose2d: (2, 3, 1, 0)}


def _lay_out(model: nn.Module) -> None:
    """Lay the weights of the fast modules' convolutions out in memory as they are read, for else each call copies them.

    Parameters, shapes and values stay. Left as they are: weights in training, for PyTorch's fused optimizers step through a parameter's
    memory and their state's as if their orders were the same; and a weight whose memory another parameter or process has too.
    """
    users = Counter(parameter.untyped_storage()._cdata for parameter in model.parameters() if type(parameter) is nn.Parameter)
    for fast in (module for _, module in _candidates(model) if type(module) in PLAIN):
        others = FAST[PLAIN[type(fast)]].memory(fast)
        if isinstance(fast, encoder.Layer) and not fast.training:
            for tensors in encoder.tensors_together(fast):
                reading.adjoin(tensors)
        for name, module in fast.named_modules():
            weight = module._parameters.get("weight")
            if type(module) not in MEMORY or type(weight) is not nn.Parameter or module.training or weight.grad is not None:
                continue
            storage, order = weight.untyped_storage(), others.get(name, MEMORY[type(module)])
            whole = storage.nbytes() == weight.numel() * weight.element_size() and users[storage._cdata] == 1
            if whole and not (weight.device.type == "cpu" and weight.is_shared()):
                back = [order.index(axis) for axis in range(4)]
                weight.data = weight.data.permute(order).contiguous().permute(back)


def fast_report(model: nn.Module) -> Report:
    """Which modules run fused, which do not, and why: a list of rows that prints as a table."""
    table.learn(model)
    report = Report()
    for name, module in ((name, module) for name, module in model.named_modules() if type(module) in {**FAST, **PLAIN, **NO_FORM}):
        reason = refusal(module)
        fused = type(module) in PLAIN and (reason is None or not FAST[PLAIN[type(module)]].cautious)
        how = _how(module) if fused and reason is None else reason or "not accelerated"
        report.append(Row(name, type(module).__name__, fused, how))
    return report


def _how(module: nn.Module) -> str:
    note = FAST[PLAIN[type(module)]].note(module)
    if note is not None:
        return note
    parameter = next(module.parameters())
    if launch.has_kernels(parameter):
        return "kernels"
    what = "there are no kernels, they need an NVIDIA GPU of compute capability 8.0 or newer"
    chosen = f"; {choices.told()}" if parameter.device.type == "cpu" else ""
    return f"the same algebra in PyTorch: on {parameter.device} {what}{chosen}"

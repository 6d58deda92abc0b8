"""Of a backbone only what its head reads is kept, in a call that asks for no more: by hooks, for a model's own class is never exchanged.

transformers' heads ask their backbone for all hidden states and read four. In a call whose caller asks for none, the backbone is asked for
those four, by index, as transformers itself allows; the others are tensors without tokens, on which a norm costs nothing. So is the
last state of which nobody reads the norm.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modules import has_own_forward

CAPTURING = "transformers.utils.output_capturing"
# Backbones, by class: where in it the module is whose hidden states are collected.
COLLECTED = {
    "DPTModel": None,
    "Dinov2Backbone": "encoder",
    "Dinov2WithRegistersBackbone": "encoder",
    "Tipsv2VisionBackbone": "encoder",
    "DINOv3ViTBackbone": "model",
    "BeitBackbone": "beit",
}


class Reading(NamedTuple):
    """A call that is under way: the module whose hidden states are collected, and which of them are read."""

    collected: nn.Module
    indices: frozenset[int]


_READING: ContextVar[Reading | None] = ContextVar("dpt_reading", default=None)


def _parts(model: nn.Module) -> tuple[Any, Any] | None:
    """(backbone, the module in it whose hidden states are collected) of a model of transformers that has a head; None of anything else."""
    if not type(model).__module__.startswith("transformers.models."):
        return None
    found: Any = model._modules.get("backbone")
    backbone = model._modules.get("dpt") if found is None else found
    if backbone is None or not type(backbone).__module__.startswith("transformers.models.") or type(backbone).__name__ not in COLLECTED:
        return None
    name = COLLECTED[type(backbone).__name__]
    collected = backbone if name is None else backbone._modules.get(name)
    return None if collected is None else (backbone, collected)


def _indices(model: Any, backbone: Any) -> frozenset[int]:
    """Which hidden states the head reads, the first being the embeddings; and the last, by which a backbone ends."""
    if hasattr(backbone, "stage_names"):
        names = list(backbone.stage_names)
        return frozenset({names.index(name) for name in backbone.out_features} | {len(names) - 1})
    chosen = model.config.backbone_out_indices
    return frozenset(index + 1 for index in (chosen[2:] if model.config.is_hybrid else chosen))


def _unread_last(collected: nn.Module) -> nn.Module | None:
    """The encoder whose last state is normalised for nobody: there is no pooling behind the norm."""
    children = collected._modules
    if "layernorm" in children and children.get("pooler") is None:
        return children.get("encoder")
    return None


def _is_ours_alone(module: nn.Module) -> bool:
    """Whether nobody else looks at what a module gets and gives."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *module._backward_hooks.values()]
    return not has_own_forward(module) and all(hook in OURS for hook in hooks)


def _begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    parts = None if torch.compiler.is_compiling() else _parts(model)
    if parts is None:
        return
    backbone, collected = parts
    asked = kwargs.get("output_hidden_states") or any(getattr(owner.config, "output_hidden_states", False) for owner in (model, backbone))
    norms = (owner._modules.get(name) for owner in (backbone, collected) for name in ("norm", "layernorm"))
    seen = (backbone, collected, *norms, _unread_last(collected))
    if len(args) > 1 or asked or not all(_is_ours_alone(module) for module in seen if module is not None):
        _READING.set(None)
    else:
        _READING.set(Reading(collected, _indices(model, backbone)))


def _end(model: Any, args: tuple[Any, ...], output: Any) -> None:
    if not torch.compiler.is_compiling():
        _READING.set(None)


def _of(module: nn.Module) -> Reading | None:
    """The call that is under way, where it collects of this module."""
    found = None if torch.compiler.is_compiling() else _READING.get()
    return found if found is not None and found.collected is module else None


def _ask(collected: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    reading = _of(collected)
    if reading is None or kwargs.get("output_hidden_states") is not True:
        return None
    return args, {**kwargs, "output_hidden_states": sorted(reading.indices)}


def _fill(collected: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    reading = _of(collected)
    states = None if reading is None else output.get("hidden_states")
    if states is not None:
        nothing = next(state for state in states if state is not None)[:, :0]
        output["hidden_states"] = tuple(nothing if state is None else state for state in states)


def _drop_last(encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    reading = None if torch.compiler.is_compiling() else _READING.get()
    if reading is not None and reading.collected._modules.get("encoder") is encoder:
        output["last_hidden_state"] = output["last_hidden_state"][:, :0]


OURS = (_begin, _end, _ask, _fill, _drop_last)


def install(model: nn.Module) -> None:
    """Hook what is in a model; once. Nothing, where transformers cannot be asked for some hidden states alone (before 5.23)."""
    for head in model.modules():
        parts = _parts(head)
        if parts is None or _begin in head._forward_pre_hooks.values() or not _can_select():
            continue
        head.register_forward_pre_hook(_begin, with_kwargs=True)
        head.register_forward_hook(_end, always_call=True)
        collected = parts[1]
        collected.register_forward_pre_hook(_ask, with_kwargs=True)
        collected.register_forward_hook(_fill)
        last = _unread_last(collected)
        if last is not None:
            last.register_forward_hook(_drop_last)


def _can_select() -> bool:
    if importlib.util.find_spec(CAPTURING) is None:
        return False
    return hasattr(importlib.import_module(CAPTURING), "selected_hidden_states")


def remove(model: nn.Module) -> None:
    """Take the hooks off again."""
    for module in model.modules():
        before = (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,))
        after = (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called))
        for hooks, told in (before, after):
            for key in [key for key, hook in hooks.items() if hook in OURS]:
                for each in (hooks, *told):
                    each.pop(key, None)

"""What the fast forms read of transformers' modules: children by name, weights side by side, and what is asked of a call."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nets.encoders.kept import KeptBySize
from ...spanning import spanning
from ..modules import has_hooks, has_own_forward

_KEPT: weakref.WeakKeyDictionary[nn.Module, KeptBySize] = weakref.WeakKeyDictionary()


def kept(module: nn.Module) -> KeptBySize:
    """What is kept of a module's parameters, beside the module: its copies and pickles have none."""
    found = _KEPT.get(module)
    return _KEPT.setdefault(module, KeptBySize()) if found is None else found


def collects(what: str) -> bool:
    """Whether transformers collects "attentions" or "hidden_states" of the call that runs now."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    if capturing is None:
        return False
    collector = capturing._active_collector
    if torch.compiler.is_compiling() and not collector.compiling:
        return False
    return what in (collector.get() or ())


def child(module: nn.Module, path: tuple[str, ...]) -> Any:
    """A module's child by its name in parts; None where there is none."""
    found: Any = module
    for name in path:
        found = found._modules.get(name)
        if found is None:
            return None
    return found


def is_unchanged(module: Any) -> bool:
    """Whether nobody has hooked a module or given it a forward."""
    return module is not None and not has_own_forward(module) and not has_hooks(module)


def as_it_was(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a child that was of a kind still is, nobody has hooked it or given it a forward, and its weight is a plain tensor."""
    if type(module) is not kind or not is_unchanged(module):
        return False
    weight = module._parameters.get("weight")
    return type(weight) in (nn.Parameter, Tensor) or weight is None and not hasattr(module, "weight")


def _wants_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def adjoin(tensors: Sequence[Any]) -> None:
    """Move parameters into one piece of memory, one behind the other: the same parameters with the same values.

    Left as they are: parameters whose memory something else has too, those that have a gradient, and those made in inference mode.
    """
    if any(type(tensor) is not nn.Parameter or tensor.is_inference() or tensor.grad is not None or tensor.is_meta for tensor in tensors):
        return
    if len({(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}) > 1 or len(set(map(id, tensors))) < len(tensors):
        return
    if tensors[0].device.type == "cpu" and any(tensor.is_shared() for tensor in tensors):
        return
    if any(tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size() for tensor in tensors):
        return
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([tensor.detach() for tensor in tensors])
        for tensor, part in zip(tensors, whole.split([tensor.shape[0] for tensor in tensors]), strict=True):
            tensor.data = part


def side_by_side(module: nn.Module, layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of linear layers with one input as those of one layer; a bias that a layer has not is zero.

    Without a gradient they are moved into one piece of memory the first time, so that nothing is copied later; what is made of biases
    of which some are missing is kept. With one they are concatenated each time, and it goes to each.
    """
    weights: Any = [layer._parameters["weight"] for layer in layers]
    biases = [layer._parameters["bias"] for layer in layers]
    given: Any = [bias for bias in biases if bias is not None]
    if len(given) in (0, len(biases)):
        return _one(weights), _one(given) if given else None

    def filled() -> Tensor:
        return torch.cat([given[0].new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])

    bias = filled() if torch.compiler.is_compiling() else kept(module).get("bias", tuple(given), filled)
    return _one(weights), bias


def _one(tensors: Sequence[Any]) -> Tensor:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _wants_gradient(tensors):  # type: ignore[attr-defined, no-untyped-call]
        return torch.cat(tuple(tensors))
    if any(type(tensor) is not nn.Parameter for tensor in tensors):
        return torch.cat(tuple(tensors))
    whole = spanning(tensors)
    if whole is None and not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        adjoin(tensors)
        whole = spanning(tensors)
    return torch.cat(tuple(tensors)) if whole is None else whole

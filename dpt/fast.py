"""The seam between the model and the kernels: the only file that imports `dpt.kernels`.

`FAST` maps a module of the plain model to its fast form, a subclass that overrides `forward` and nothing else: no parameters, no
buffers, no constructor. `accelerate` exchanges the class of each module whose `refusal` is None, so names, state dict, hooks, copies
and pickles stay as they are. On an NVIDIA GPU the fast forward launches the kernels; elsewhere the ops compute the same algebra in
PyTorch; under TRITON_INTERPRET=1 the kernels themselves run on CPU tensors.

Under autocast the fused block keeps the residual stream in autocast's dtype, where the plain one keeps it in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .encoder import MLP, Attention, Block, LayerScale

try:
    from .kernels import launch
    from .kernels.attention import attention
    from .kernels.layernorm_mlp import layernorm_linear, layernorm_mlp, linear_residual
except ImportError as error:
    raise ImportError("fast=True needs Triton, which PyPI has for Linux: pip install triton") from error


def _gamma(module: nn.Module) -> Tensor | None:
    """LayerScale's factor; None for the identity."""
    return module.gamma if isinstance(module, LayerScale) else None


class FastBlock(Block):
    """`Block` in five launches: LN + qkv, attention, projection + residual, LN + fc1 + GELU, fc2 + residual."""

    def forward(self, x: Tensor) -> Tensor:
        attn, mlp = self.attn, self.mlp
        qkv = layernorm_linear(x, self.norm1.weight, self.norm1.bias, attn.qkv.weight, attn.qkv.bias, self.norm1.eps)
        mixed = attention(qkv, attn.num_heads)
        x = linear_residual(mixed, attn.proj.weight, attn.proj.bias, x, _gamma(self.ls1))
        fc1, fc2, norm = mlp.fc1, mlp.fc2, self.norm2
        return layernorm_mlp(x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm.eps, _gamma(self.ls2))


@dataclass(frozen=True)
class Replacement:
    """A fast class, the types its children must have, by name, and a further rule: the reason it refuses a module, or None."""

    fast: type[nn.Module]
    children: dict[str, tuple[type[nn.Module], ...]]
    rule: Callable[[nn.Module], str | None] = lambda module: None


def _head_size(block: Block) -> str | None:
    size = block.attn.proj.in_features // block.attn.num_heads
    if size % 16 or not 32 <= size <= 128:
        return f"heads of {size} channels: the attention kernel takes multiples of 16 from 32 to 128"
    return None


FAST: dict[type[nn.Module], Replacement] = {
    Block: Replacement(
        FastBlock,
        {
            "norm1": (nn.LayerNorm,),
            "attn": (Attention,),
            "attn.qkv": (nn.Linear,),
            "attn.proj": (nn.Linear,),
            "ls1": (LayerScale, nn.Identity),
            "norm2": (nn.LayerNorm,),
            "mlp": (MLP,),
            "mlp.fc1": (nn.Linear,),
            "mlp.fc2": (nn.Linear,),
            "ls2": (LayerScale, nn.Identity),
        },
        _head_size,
    ),
}
PLAIN = {replacement.fast: plain for plain, replacement in FAST.items()}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot run fused; None if it can. The fast forward reads its children's parameters and never calls them.

    So it refuses what would be passed over: hooks on a child, parametrizations, children added or of another type (LoRA,
    quantised layers), a forward that was replaced, and dtypes the kernels have no code for.
    """
    plain = PLAIN.get(type(module), type(module))
    if plain not in FAST:
        return f"{type(module).__name__} has no fast form"
    replacement = FAST[plain]
    found = dict(module.named_modules())
    for name, child in found.items():
        if name and type(child) not in replacement.children.get(name, ()):
            return f"{name} is a {type(child).__name__}, which the fused kernels would pass over"
        if name and _hooks(child):
            return f"{name} has hooks, which the fused kernels would not call"
        if parametrize.is_parametrized(child):
            return f"{name or 'it'} is parametrized"
        if "forward" in vars(child):
            return f"{name or 'it'} has a forward of its own"
    missing = [name for name in replacement.children if name not in found]
    if missing:
        return f"{missing[0]} is missing"
    for name, parameter in module.named_parameters():
        if parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}: the kernels take float32, float16 and bfloat16"
    return replacement.rule(module)


def _hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def supports(module: nn.Module) -> bool:
    """Whether `accelerate` would put this module on the kernels; `refusal` says why not."""
    return refusal(module) is None


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
    return ((name, module) for name, module in model.named_modules() if type(module) in FAST or type(module) in PLAIN)


def accelerate(model: nn.Module, strict: bool = False) -> nn.Module:
    """Put a model on the fused kernels, in place, and return it. Parameters, names, dtype and state dict stay as they are.

    Args:
        model: a `dpt.DPT`, or any module that holds its blocks.
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
            module.__class__ = FAST[type(module)].fast
    return model


def fast_report(model: nn.Module) -> Report:
    """Which modules run fused, which do not, and why: a list of rows that prints as a table."""
    report = Report()
    for name, module in _candidates(model):
        fused = type(module) in PLAIN
        reason = refusal(module)
        report.append(Row(name, type(module).__name__, fused, _how(module) if fused and not reason else reason or "not accelerated"))
    return report


def _how(module: nn.Module) -> str:
    parameter = next(module.parameters())
    if launch.has_kernels(parameter):
        return "kernels"
    return f"the same algebra in PyTorch: on {parameter.device} there are no kernels, they need an NVIDIA GPU of compute capability 8.0"

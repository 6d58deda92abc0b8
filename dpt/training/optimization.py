"""The optimiser of a recipe: groups of parameters with their own rates and decays, the rate along the steps, an average of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .recipes import Recipe

_POSITIONS = ("cls_token", "pos_embed")
# Which parameters have no weight decay, by `Recipe.undecayed`. "positions" is how mmsegmentation's recipe of DPT acts: its rule for norms
# names "norm", which no parameter of that model is called.
UNDECAYED: dict[str, Callable[[str, Tensor], bool]] = {
    "vectors": lambda name, parameter: parameter.dim() < 2 or name.endswith((*_POSITIONS, "registers")),
    "positions": lambda name, parameter: name.endswith(_POSITIONS),
    "nothing": lambda name, parameter: False,
}
_BLOCK = re.compile(r"encoder\.(?:stages\.\d+\.)?blocks\.\d+\.")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters that are learnt, in groups of one factor on the learning rate and one weight decay, each with both and the names.

    The encoder's factor is `encoder_rate`; with `layer_decay` it falls by that from each block to the one before, and once more for what
    lies before the blocks.
    """
    named = list(model.named_parameters())
    blocks = list(dict.fromkeys(found[0] for name, _ in named if (found := _BLOCK.match(name))))  # in the order that they run in
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        factor = 1.0
        if name.startswith("encoder."):
            found = _BLOCK.match(name)
            before = len(blocks) - blocks.index(found[0]) if found else 0 if name.startswith("encoder.norm.") else len(blocks) + 1
            factor = recipe.encoder_rate * recipe.layer_decay**before
        decay = 0.0 if UNDECAYED[recipe.undecayed](name, parameter) else recipe.weight_decay
        group = groups.setdefault((factor, decay), {"params": [], "names": [], "factor": factor, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = parameter_groups(model, recipe)
    for group in groups:
        group["lr"] = recipe.learning_rate * group["factor"]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum)
    kind: Any = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
    return cast(torch.optim.Optimizer, kind(groups, betas=recipe.betas))


def rate(recipe: Recipe, step: int) -> float:
    """The factor on every learning rate at a step, from 0: a line from `warmup_start` to 1, then the schedule, down to 0 at the last step.

    These are mmengine's LinearLR and PolyLR, one after the other, where the schedule is "polynomial".
    """
    if step < recipe.warmup:
        return recipe.warmup_start + (1 - recipe.warmup_start) * step / max(recipe.warmup - 1, 1)
    done = min((step - recipe.warmup) / max(recipe.steps - recipe.warmup - 1, 1), 1.0)
    if recipe.schedule == "polynomial":
        return float((1 - done) ** recipe.power)
    return 0.5 * (1 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> float:
    """Give every group its learning rate of a step; returns that of a factor of 1."""
    value = recipe.learning_rate * rate(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = value * group["factor"]
    return value


class Average:
    """An exponential moving average of a model's parameters, in float32; its buffers are the model's last.

    As timm's, it follows sooner at first: the decay of step n is at most (1 + n) / (10 + n).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: value.detach().clone().float() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights behind a step, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            self.values[name].lerp_(value.detach().float(), 1 - decay)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.values.items()

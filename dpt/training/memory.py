"""The memory of a training step, counted before there is any: what PyTorch keeps for the backward, plain and on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ..config import DPTConfig
from ..nets.dpt import DPTNetwork
from ..nets.hollow import hollow_forward, unreached, without_numbers
from .objective import objective
from .recipes import Recipe

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes of a training on one device. `saved`: kept for the backward by the plain model; `saved_fast`: with fast=True, None without
    Triton."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    saved: int
    saved_fast: int | None

    def __str__(self) -> str:
        """A table of GB = 1e9 bytes, plain and fast side by side."""
        columns = {"plain": self.saved} if self.saved_fast is None else {"plain": self.saved, "fast": self.saved_fast}
        shared = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "average of the weights": self.average,
        }
        rows = {name: [size] * len(columns) for name, size in shared.items() if size}
        rows["saved for the backward"] = list(columns.values())
        rows["together"] = [sum(shared.values()) + saved for saved in columns.values()]
        width = max(map(len, rows))
        lines = [f"{'GB':{width}}" + "".join(f"{name:>9}" for name in columns)]
        return "\n".join([*lines, *(f"{name:{width}}" + "".join(f"{size / GB:9.2f}" for size in sizes) for name, sizes in rows.items())])


def of_recipe(recipe: Recipe, config: DPTConfig, processes: int = 1) -> Memory:
    """The memory of a step of a recipe in each of several processes that share its batch; with all parameters in each."""
    with torch.device("meta"):
        model = DPTNetwork(config).train()
    model.set_drop_path(recipe.drop_path)
    model.set_checkpointing(recipe.checkpointing)
    pictures = max(recipe.batch_size // (processes * recipe.accumulate), 1)

    def loss(outputs: list[Tensor]) -> Tensor:
        first = outputs[0]
        labels = config.head.task == "segmentation"
        size = (first.shape[0], *recipe.crop)
        targets = first.new_zeros(size, dtype=torch.long) if labels else first.new_ones(size, dtype=torch.float32)
        return objective(config.head, recipe, outputs, targets)

    return counted(
        model,
        pictures,
        recipe.crop,
        None if recipe.amp is None else getattr(torch, recipe.amp),
        moments=1 if recipe.optimizer == "sgd" else 2,
        average=recipe.ema is not None,
        loss=loss,
    )


def counted(
    model: DPTNetwork,
    batch: int,
    size: tuple[int, int],
    autocast: torch.dtype | None = None,
    *,
    moments: int = 2,
    average: bool = False,
    loss: Callable[[list[Tensor]], Tensor] | None = None,
) -> Memory:
    """The memory that steps of a model take, as it is: its modes, what of it wants gradients, its checkpointing. Nothing is computed, the
    model may lie anywhere, on the meta device too, and stays as it is.

    Counted are distinct pieces of memory that are no parameters, as PyTorch keeps them on a CPU; what lives for a moment within an op, in
    a block that is computed again, or in the backward is not among them. A GPU keeps less of a dropout: a byte a number.

    Args:
        batch, size: pictures of a step on this device, and their height and width.
        autocast: its dtype, or None.
        moments: numbers that the optimizer keeps for each that it trains: AdamW two, SGD with momentum one.
        average: whether a moving average of the weights is kept.
        loss: of the outputs, a list; the targets are made up from these (`output.new_empty`). Without it the loss's own share is left out.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: it must be at least 1")
    plain = without_numbers(model, lambda value: torch.empty_like(value, device="meta"))
    fast = find_spec("triton") is not None
    if fast:
        from ..fast.acceleration import accelerate, as_on_a_gpu, decelerate

        plain = decelerate(plain)
    saved = _saved(plain, batch, size, autocast, loss, nullcontext())
    unmoved = set(unreached(plain))
    trained = sum(_bytes(p) for name, p in plain.named_parameters() if p.requires_grad and name not in unmoved)
    whole = sum(map(_bytes, plain.parameters()))
    return Memory(
        parameters=whole,
        gradients=trained,
        optimizer=moments * trained,
        average=whole if average else 0,
        saved=saved,
        saved_fast=_saved(accelerate(plain), batch, size, autocast, loss, as_on_a_gpu()) if fast else None,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _saved(
    model: DPTNetwork,
    batch: int,
    size: tuple[int, int],
    autocast: torch.dtype | None,
    loss: Callable[[list[Tensor]], Tensor] | None,
    where: AbstractContextManager[None],
) -> int:
    """Bytes that a step of this model keeps for its backward."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with where, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            parameters, outputs = hollow_forward(model, batch, size)
        if loss is not None:
            loss(outputs)
    for parameter in parameters.values():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())

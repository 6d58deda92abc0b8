"""Training steps as cases: forward, loss, backward and optimiser, on random pictures and targets.

The gate is on the gradients of all parameters after one backward pass from the same weights. Dropout is off, so that they can be compared.
"saved GB" is counted, not measured: what a step keeps for its backward, on the kernels also where there are none.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpt
from dpt.kernels.tools import parity
from dpt.training.memory import Memory, counted

from ..harness import measure
from ..harness.runner import Context, Prepared
from . import models

LEARNING_RATE = 1e-6


class OpenedTraining:
    """Steps of AdamW on one segmentation model; under autocast unless ``dtype`` is float32. The parameters are float32."""

    unit = "steps"
    per_run = 1.0
    bytes = None
    rms = True

    def __init__(self, name: str, sizes: models.Sizes, dtype: torch.dtype, context: Context):
        self.name, self.dtype, self.context = name, dtype, context
        self.master = models.build(name, context)
        if context.toy:
            side = 4 * self.master.config.encoder.patch_size
            sizes = models.Sizes(2, side, side)
        self.sizes = sizes
        for module in self.master.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        shape = (sizes.batch, sizes.height, sizes.width)
        generator = torch.Generator().manual_seed(1)
        self.batches = [self._batch(shape, generator) for _ in range(models.INPUTS)]
        self.flops = None if context.toy else models.count_flops(name, (sizes.height, sizes.width), sizes.batch, backward=True)

    def _batch(self, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) and labels (B, H, W)."""
        pictures = torch.randn(shape[0], 3, *shape[1:], generator=generator)
        labels = torch.randint(len(self.master.config.head.classes), shape, generator=generator)
        return pictures.to(self.context.device), labels.to(self.context.device)

    def loss(self, model: nn.Module, index: int, dtype: torch.dtype) -> Tensor:
        """The cross entropy of a batch in a dtype: half precision by autocast."""
        pictures, labels = self.batches[index % len(self.batches)]
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.context.device.type, dtype=dtype if half else None, enabled=half):
            output = model(pictures if half else pictures.to(dtype))
        return F.cross_entropy(output.float() if half else output, labels)

    def gradients(self, model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        """The gradients of a model at the first batch; parameters that take no part in it (a dead unit) are left out."""
        model.zero_grad(set_to_none=True)
        self.loss(model, 0, dtype).backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    @functools.cached_property
    def saved(self) -> Memory:
        """What a step keeps for its backward, plain and on the kernels: counted, so that the second is known where there are none."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        batch, height, width = self.sizes.batch, self.sizes.height, self.sizes.width
        return counted(copy.deepcopy(self.master).train(), batch, (height, width), self.dtype if half else None)

    def other_plain(self) -> None:
        """As of the model's forward."""

    def exact(self) -> list[Tensor]:
        wide = parity.exact_dtype(self.dtype)
        with measure.full_precision():
            return self.gradients(copy.deepcopy(self.master).to(wide).train(), wide)

    def prepare(self, contender: str) -> Prepared:
        model = CONTENDERS[contender](copy.deepcopy(self.master)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

        def step(index: int) -> None:
            self.loss(model, index, self.dtype).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def judged() -> list[Tensor]:
            model.load_state_dict(self.master.state_dict())
            return self.gradients(model, self.dtype)

        def held() -> int:
            state = sum(t.nbytes for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor))
            return models.held_bytes(model) + state

        # The first step makes the optimiser's state, which is held from then on.
        fast = contender == "fast"
        note, saved = (models.report_note(model), self.saved.saved_fast) if fast else ("", self.saved.saved)
        return Prepared(step, outputs=judged, recorded=lambda: step(0), held=held, warm_up=1, note=note, facts={"saved_bytes": saved})


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {"plain": lambda model: model, "fast": dpt.accelerate}

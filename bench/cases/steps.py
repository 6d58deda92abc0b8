"""The cumulative gain: each step keeps what the steps above it brought, and adds one thing.

On a GPU that is half precision, a memory format, the exact rewrites, and then the kernels, op by op (`dpt.kernels.launch.only`). On a CPU
there are no kernels, and half precision only if the CPU is faster in it.

What is measured is what `predict` does on the device: for depth the map, for segmentation the logits and from them the labels.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dpt
from dpt.inference.prediction import decided_labels
from dpt.kernels import launch

from ..harness import measure, records
from ..harness.runner import Context, Prepared, Unavailable
from . import models
from .ops import modules

NO_KERNELS = "no kernels on this device: they need an NVIDIA GPU of compute capability 8.0 or newer"


@dataclass(frozen=True)
class Step:
    """``half``: parameters and input in half precision. ``ops``: which ops run their kernels; None: the plain model."""

    name: str
    half: bool = True
    channels_last: bool = True
    ops: tuple[str, ...] | None = None
    graph: bool = False


ATTENTION = ("attention",)
MLP = (*ATTENTION, "layernorm_linear", "linear_residual", "layernorm_mlp")
CONVOLUTIONS = (*MLP, "residual_conv", "conv_norm_relu", "upsample", "reassemble")
HEADS = modules()  # and whatever else there is
STEPS = {
    step.name: step
    for step in (
        Step("plain float32", half=False, channels_last=False),
        Step("half precision", channels_last=False),
        Step("+ channels_last"),
        Step("+ exact rewrites", ops=()),
        Step("+ fused attention", ops=ATTENTION),
        Step("+ fused MLP", ops=MLP),
        Step("+ fused convolutions", ops=CONVOLUTIONS),
        Step("+ fused heads", ops=HEADS),
        Step("+ CUDA graph", ops=HEADS, graph=True),
    )
}
# What turns them into a name for the dtype that was measured.
HALF = "half precision"


class OpenedSteps(models.OpenedModel):
    """One model through all steps. ``dtype`` is that of the steps after the first."""

    def __init__(self, name: str, sizes: models.Sizes, dtype: torch.dtype, context: Context):
        super().__init__(name, sizes, dtype, context)
        self.segments = self.master.config.head.task == "segmentation"
        self.single = models.shared_copy(self.master)
        self.channels_last: dict[torch.dtype, nn.Module] = {}
        self.half_refused = self._half_refused()

    def _half_refused(self) -> str | None:
        """Why half precision is no step here."""
        if self.dtype == torch.float32:
            return "this run is in float32"
        if self.context.device.type == "cuda" or self.context.toy:
            return None
        half, single = (measure.gemm_rate(dtype, self.context.device, side=512) for dtype in (self.dtype, torch.float32))
        if half > single:
            return None
        return f"half precision is no gain on this CPU: its GEMM runs at {half / single:.2f} of float32's; the steps below stay in float32"

    def exact(self) -> list[Tensor]:
        (result,) = super().exact()
        return [result, result.amax(1)] if self.segments else [result]

    def prepare(self, contender: str) -> Prepared:
        step = STEPS[contender]
        if step.half and contender == HALF and self.half_refused:
            raise Unavailable(self.half_refused)
        if step.ops and not launch.has_kernels(self.pictures[0]):
            raise Unavailable(models.NO_GRAPHS if step.graph else NO_KERNELS)
        dtype = self.dtype if step.half and not self.half_refused else torch.float32
        model = self._model(step, dtype)
        restricted = contextlib.nullcontext if step.ops is None else lambda: launch.only(*step.ops)

        def forward(x: Tensor) -> tuple[Tensor, ...]:
            with restricted():
                return self._forward(model, x)

        view = _InDtype(self, dtype, step.channels_last)
        prepared = models.captured(forward, view) if step.graph else Prepared(models.run_of(view, forward))
        run = prepared.run
        prepared.outputs = lambda: self._judged(*run(0))
        prepared.recorded = prepared.recorded or (lambda: run(0))
        prepared.held, prepared.dtype = (lambda: models.held_bytes(model)), dtype
        prepared.note = "" if step.ops is None else models.report_note(model) if step.ops else f"{records.ALGEBRA}, no kernels in this step"
        return prepared

    def _model(self, step: Step, dtype: torch.dtype) -> nn.Module:
        model = self.plain if dtype == self.dtype else self.single
        if step.channels_last:
            if dtype not in self.channels_last:
                self.channels_last[dtype] = copy.deepcopy(model).to(memory_format=torch.channels_last)
            model = self.channels_last[dtype]
        return model if step.ops is None else dpt.accelerate(models.shared_copy(model))

    def _forward(self, model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """(depth,), or (logits, labels (B, H, W))."""
        result = model(x)
        if not self.segments:
            return (result,)
        size = tuple(x.shape[2:])
        labels = [decided_labels(model.head, logits, size, model.config.input)[0] for logits in result]
        return result, torch.stack(labels)

    def _judged(self, result: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """What the gate compares: the map; and for labels the exact logit of each, which is the largest where the label is right."""
        if labels is None:
            return [result]
        return [result, super().exact()[0].gather(1, labels[:, None].long())[:, 0]]


class _InDtype:
    """An opened case's inputs in another dtype and memory format."""

    def __init__(self, opened: OpenedSteps, dtype: torch.dtype, channels_last: bool):
        self.context, self.prompt = opened.context, opened.prompt
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.inputs = [picture.to(dtype, memory_format=layout) for picture in opened.pictures]

    def input(self, index: int) -> Tensor:
        return self.inputs[index % len(self.inputs)]

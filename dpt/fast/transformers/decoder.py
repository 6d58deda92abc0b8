"""The decoders of transformers' dense-prediction models on the kernels: reassembling, residual units, fusion and heads.

The families' classes differ in name and say the same, so a form serves all of them. Each is mixed into the class that `table.fast` makes of
upstream's, and takes its forward when a call, or what became of a child, is not for the kernels.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.conv_norm_relu import conv_norm_relu, conv_norm_relu_conv1x1
from ...kernels.cpu import convolution
from ...kernels.depth_head import depth_head
from ...kernels.reassemble import transposed_conv
from ...kernels.residual_conv import residual_conv_unit
from ...kernels.upsample import conv1x1, upsample_bilinear
from ...nets.functional import statically_equal
from ..modules import _norm, _weights, has_hooks, uses_batch_statistics
from . import reading


def _are(*modules: Any) -> bool:
    """Whether children are still as they were when the model was accelerated: of PyTorch's types, without hooks."""
    return all(
        module is not None and reading.as_it_was(module, type(module)) and type(module).__module__.startswith("torch.nn.")
        for module in modules
    )


class ReassembleLayer:
    """A map (B, D, h, w) projected to C channels, and resampled."""

    def forward(self, hidden_state: Tensor) -> Any:
        children: Any = self._modules  # type: ignore[attr-defined]
        projection, resize = children["projection"], children["resize"]
        if not _are(projection, resize):
            return super().forward(hidden_state)  # type: ignore[misc]
        x = conv1x1(hidden_state, *_weights(projection))
        if isinstance(resize, nn.Identity):
            return x
        return (transposed_conv if isinstance(resize, nn.ConvTranspose2d) else convolution.halved)(x, *_weights(resize))


class ResidualLayer:
    """A residual unit of two 3x3 convolutions, with or without batch norm, in two launches; and what is added to it."""

    def forward(self, hidden_state: Tensor, add: Tensor | None = None) -> Any:
        """`add` (B, F, h, w) of the same size is added to the result."""
        children: Any = self._modules  # type: ignore[attr-defined]
        conv1, conv2 = children["convolution1"], children["convolution2"]
        norms = [children[name] for name in ("batch_norm1", "batch_norm2") if name in children]
        if not _are(conv1, conv2, *norms) or uses_batch_statistics(*norms):
            found = super().forward(hidden_state)  # type: ignore[misc]
            return found if add is None else found + add
        both = {f"norm{index}": _norm(norm) for index, norm in enumerate(norms, 1)}
        return residual_conv_unit(hidden_state, *_weights(conv1), *_weights(conv2), **both, add=add)


class FusionLayer:
    """One level of the fusion, its 1x1 projection before the upsampling, with which it commutes: a quarter of the work."""

    def forward(self, hidden_state: Tensor, residual: Tensor | None = None, size: Any = None, prompt_depth: Tensor | None = None) -> Any:
        layer: Any = self
        children = layer._modules
        x = hidden_state
        if residual is not None and not getattr(layer, "is_first_layer", False):
            if not statically_equal(tuple(residual.shape[2:]), tuple(x.shape[2:])):
                residual = upsample_bilinear(residual, (x.shape[2], x.shape[3]), False)
            unit = children["residual_layer1"]
            x = unit(residual, x) if isinstance(unit, ResidualLayer) and not has_hooks(unit) else x + unit(residual)
        x = children["residual_layer2"](x)
        if prompt_depth is not None:
            prompt = F.interpolate(prompt_depth, size=x.shape[2:], mode="bilinear", align_corners=False)
            x = x + children["prompt_depth_layer"](prompt)
        target = (2 * x.shape[2], 2 * x.shape[3]) if size is None else tuple(size)
        projection = children["projection"]
        if _are(projection):
            x = upsample_bilinear(conv1x1(x, *_weights(projection)), target, getattr(layer, "align_corners", True))
            return x
        return projection(F.interpolate(x, size=target, mode="bilinear", align_corners=getattr(layer, "align_corners", True)))


class Neck:
    """Reassembling, the 3x3 convolutions to one width, and fusion."""

    def _features(self, hidden_states: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        neck: Any = self
        if neck.reassemble_stage is not None:
            hidden_states = neck.reassemble_stage(hidden_states, *args, **kwargs)
        convs = [neck.convs[index] for index in range(len(hidden_states))]
        return [convolution.conv3x3(x, *_weights(conv)) if _are(conv) else conv(x) for conv, x in zip(convs, hidden_states, strict=True)]


class SequentialDepthHead:
    """DPT's head: convolutions of 3x3, 3x3 and 1x1 in a Sequential, upsampling by two between the first and the second."""

    def forward(self, hidden_states: Any) -> Any:
        head: Any = self
        first, _, second, _, last, _ = layers = list(head.head)
        if not _are(*layers) or head.projection is not None and not _are(head.projection):
            return super().forward(hidden_states)  # type: ignore[misc]
        x = hidden_states[head.config.head_in_index]
        if head.projection is not None:
            x = conv_norm_relu(x, *_weights(head.projection))
        x = conv_norm_relu(x, *_weights(first), relu=False)
        depth = depth_head(x, *_weights(second), *_weights(last), (2 * x.shape[2], 2 * x.shape[3]), "relu")
        return depth.to(last.weight.dtype)


class DepthHead:
    """Depth Anything's head: upsampled to whole patches, then a ReLU or metres by a sigmoid."""

    def forward(self, hidden_states: Any, patch_height: Any, patch_width: Any) -> Any:
        head: Any = self
        if not _are(head.conv1, head.conv2, head.activation1, head.conv3, head.activation2):
            return super().forward(hidden_states, patch_height, patch_width)  # type: ignore[misc]
        x = conv_norm_relu(hidden_states[head.head_in_index], *_weights(head.conv1), relu=False)
        size = (int(patch_height * head.patch_size), int(patch_width * head.patch_size))
        metric = isinstance(head.activation2, nn.Sigmoid)
        most = getattr(head, "max_depth", 1)
        depth = depth_head(
            x, *_weights(head.conv2), *_weights(head.conv3), size, "sigmoid" if metric else "relu", float(most) if metric else 1.0
        )
        return (depth if metric or most == 1 else depth * most).to(head.conv3.weight.dtype)


class SequentialSegmentationHead:
    """DPT's head of classes: its norm and ReLU in the convolution, the classifier behind them, logits upsampled by two."""

    def forward(self, hidden_states: Any) -> Any:
        head: Any = self
        conv, norm, activation, dropout, classifier, upsampling = layers = list(head.head)
        if not _are(*layers) or uses_batch_statistics(norm) or dropout.training and dropout.p:
            return super().forward(hidden_states)  # type: ignore[misc]
        x = hidden_states[head.config.head_in_index]
        logits = conv_norm_relu_conv1x1(x, *_weights(conv), *_weights(classifier), norm=_norm(norm), padded=False)
        return upsample_bilinear(logits, (2 * logits.shape[2], 2 * logits.shape[3]), upsampling.align_corners)

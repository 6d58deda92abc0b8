"""The decoders of transformers' dense-prediction models on the kernels: reassembling, residual units, fusion and heads.

The families' classes differ in name and say the same, so a form serves all of them. Each is mixed into the class that `table.fast` makes of
upstream's, and takes its forward when a call, or what became of a child, is not for the kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.conv_norm_relu import conv_norm_relu, conv_norm_relu_conv1x1
from ...kernels.cpu import convolution
from ...kernels.depth_head import depth_head
from ...kernels.reassemble import ACTIVATIONS as READOUTS
from ...kernels.reassemble import transposed_conv
from ...kernels.residual_conv import residual_conv_unit
from ...kernels.upsample import conv1x1, upsample_bilinear
from ...nets.bins import mean_depth, mixed_log
from ...nets.functional import statically_equal
from ..modules import _norm, _reassembled, _weights, uses_batch_statistics
from . import reading
from .encoder import activation as activation_of


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
        if not _are(conv1, conv2, *norms, children["activation1"], children["activation2"]) or uses_batch_statistics(*norms):
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
            fused = issubclass(type(unit), ResidualLayer) and reading.is_unchanged(unit)  # hooks see what upstream gives
            x = unit(residual, x) if fused else x + unit(residual)
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


class ReassembleStage:
    """The hooked layers' tokens (B, 1 + N, D) to maps: readout, projection and resampling as products, without the concatenation with the
    class token and without a copy of the tokens as a map."""

    def forward(self, hidden_states: Any, patch_height: Any = None, patch_width: Any = None) -> Any:
        stage: Any = self
        ignored = getattr(stage, "neck_ignore_stages", ())
        levels = [None if index in ignored else _level(stage, index) for index in range(len(hidden_states))]
        if any(level is None and index not in ignored for index, level in enumerate(levels)):
            return super().forward(hidden_states, patch_height, patch_width)  # type: ignore[misc]
        skipped = getattr(stage, "num_register_tokens", 0)
        found = []
        for tokens, level in zip(hidden_states, levels, strict=True):
            if level is not None:
                tokens = self.tokens(tokens)
                readout, projection, resize = level
                grid = (patch_height, patch_width) if patch_height is not None else (math.isqrt(tokens.shape[1] - 1),) * 2
                if skipped and readout is not None:
                    tokens = torch.cat((tokens[:, :1], tokens[:, 1 + skipped :]), dim=1)
                elif readout is None:
                    tokens = tokens[:, 1 + skipped :]
                upsampling = _weights(resize) if isinstance(resize, nn.ConvTranspose2d) else None
                tokens = _reassembled(tokens, grid, readout, _weights(projection), upsampling)
                if isinstance(resize, nn.Conv2d):
                    tokens = convolution.halved(tokens, *_weights(resize))
            found.append(tokens)
        return found

    def tokens(self, hidden_state: Any) -> Tensor:
        found: Tensor = hidden_state
        return found


class PairedReassembleStage(ReassembleStage):
    """Of levels that are a map (B, D, h, w) and the class token (B, D)."""

    def tokens(self, hidden_state: Any) -> Tensor:
        x, cls = hidden_state
        return torch.cat((cls[:, None], x.flatten(2).transpose(1, 2)), dim=1)


def _level(stage: Any, index: int) -> tuple[Any, Any, Any] | None:
    """The readout's weight, bias and activation or None, the projection and the resampling of a level; None where upstream computes it."""
    layer = stage.layers[index]
    if not issubclass(type(layer), ReassembleLayer) or not reading.is_unchanged(layer):
        return None
    children = layer._modules
    projection, resize, readout = children["projection"], children["resize"], None
    if not _are(projection, resize):
        return None
    if "readout_projects" in stage._modules:
        project = stage.readout_projects[index]
        linear, activation = project if isinstance(project, nn.Sequential) else project.layers
        if (
            not _are(linear)
            or not reading.is_unchanged(project)
            or not reading.is_unchanged(activation)
            or activation_of(activation) not in READOUTS
        ):
            return None
        readout = (*_weights(linear), activation_of(activation))
    return readout, projection, resize


class Neck:
    """Reassembling, a 3x3 convolution to one width for each level, and fusion."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        neck: Any = self
        convs = list(neck.convs)
        if not _are(*convs) or not isinstance(hidden_states, tuple | list) or len(hidden_states) != len(convs):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        prompt = kwargs.pop("prompt_depth", None)
        if neck.reassemble_stage is not None:
            hidden_states = neck.reassemble_stage(hidden_states, *args, **kwargs)
        features = [convolution.conv3x3(x, *_weights(conv)) for x, conv in zip(hidden_states, convs, strict=True)]
        fused = neck.fusion_stage(features) if prompt is None else neck.fusion_stage(features, prompt_depth=prompt)
        return self.returned(fused, features)

    def returned(self, fused: Any, features: list[Tensor]) -> Any:
        return fused


class NeckWithBottleneck(Neck):
    """As `Neck`, and the deepest level before its fusion."""

    def returned(self, fused: Any, features: list[Tensor]) -> Any:
        return fused, features[-1]


class FeaturesHead:
    """CHMv2's neck, within its head."""

    def forward_features(self, hidden_states: Any, patch_height: Any, patch_width: Any) -> Any:
        head: Any = self
        if not _are(*head.convs):
            return super().forward_features(hidden_states, patch_height, patch_width)  # type: ignore[misc]
        maps = head.reassemble_stage(hidden_states, patch_height, patch_width)
        features = [convolution.conv3x3(x, *_weights(conv)) for x, conv in zip(maps, head.convs, strict=True)]
        fused = head.fusion_layers[0](features.pop())
        for layer in list(head.fusion_layers)[1:]:
            fused = layer(fused, features.pop())
        return fused


class PromptLayer:
    """The prompt (B, 1, h, w) to what is added to a level, its two large convolutions on the kernels."""

    def forward(self, prompt_depth: Tensor) -> Any:
        layer: Any = self
        if not _are(layer.convolution1, layer.activation1, layer.convolution2, layer.activation2, layer.convolution3):
            return super().forward(prompt_depth)  # type: ignore[misc]
        x = conv_norm_relu(F.relu(layer.convolution1(prompt_depth)), *_weights(layer.convolution2))
        return conv_norm_relu(x, *_weights(layer.convolution3), relu=False)


class BinsHead:
    """CHMv2's head: convolutions of 3x3, 3x3 and 1x1, upsampling by two between the first and the second."""

    def forward(self, hidden_states: Tensor) -> Any:
        head: Any = self
        first, _, second, _, last = layers = list(head.head)
        if not _are(*layers):
            return super().forward(hidden_states)  # type: ignore[misc]
        x = conv_norm_relu(hidden_states, *_weights(first), relu=False)
        x = conv_norm_relu(upsample_bilinear(x, (2 * x.shape[2], 2 * x.shape[3]), True), *_weights(second))
        return conv1x1(x, *_weights(last))


class BinsDepth:
    """CHMv2's depth of its bins, which are of mixed spacing and weigh their ReLU."""

    SHIFT, SCALE = 1e-8, 8.0  # what a weight is more than its ReLU; the largest depth over that of the bins

    def forward(self, x: Tensor) -> Any:
        depth: Any = self
        if x.dtype != torch.float32 or x.shape[1] == 1:
            return super().forward(x)  # type: ignore[misc]
        depths = mixed_log(depth.min_depth * self.SCALE, depth.max_depth, x.shape[1], x.device)
        return mean_depth(x, depths, self.SHIFT)[:, None]


class LinearDecoder:
    """TIPSv2's head: a 3x3 convolution, with a ReLU or nothing behind it, and a linear layer of each pixel."""

    def forward(self, hidden_state: Tensor) -> Any:
        head: Any = self
        if not _are(head.project, head.activation, head.head):
            return super().forward(hidden_state)  # type: ignore[misc]
        x = conv_norm_relu(hidden_state, *_weights(head.project), relu=isinstance(head.activation, nn.ReLU))
        return head.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class RelativeHead:
    """ZoeDepth's relative head: inverse depth, and the features before its last convolution."""

    def forward(self, hidden_states: Any) -> Any:
        head: Any = self
        if not _are(head.conv1, head.upsample, head.conv2, head.conv3) or head.projection is not None and not _are(head.projection):
            return super().forward(hidden_states)  # type: ignore[misc]
        x = hidden_states[head.head_in_index]
        if head.projection is not None:
            x = conv_norm_relu(x, *_weights(head.projection))
        x = conv_norm_relu(x, *_weights(head.conv1), relu=False)
        features = conv_norm_relu(upsample_bilinear(x, (2 * x.shape[2], 2 * x.shape[3]), True), *_weights(head.conv2))
        return F.relu(conv1x1(features, *_weights(head.conv3))).squeeze(1), features


class SequentialDepthHead:
    """DPT's head: convolutions of 3x3, 3x3 and 1x1 in a Sequential, upsampling by two between the first and the second."""

    def forward(self, hidden_states: Any) -> Any:
        head: Any = self
        first, _, second, _, last, _ = layers = list(head.head)
        if not _are(head.head, *layers) or head.projection is not None and not _are(head.projection):
            return super().forward(hidden_states)  # type: ignore[misc]
        x = hidden_states[head.config.head_in_index]
        if head.projection is not None:
            x = conv_norm_relu(x, *_weights(head.projection))
        x = conv_norm_relu(x, *_weights(first), relu=False)
        depth = depth_head(x, *_weights(second), *_weights(last), (2 * x.shape[2], 2 * x.shape[3]), "relu")
        return depth.to(last.weight.dtype)


class DepthHead:
    """Depth Anything's head: upsampled to whole patches, then a ReLU or a sigmoid, and times the largest depth where there is one."""

    def index(self) -> int:
        found: int = self.head_in_index  # type: ignore[attr-defined]
        return found

    def most(self) -> Any:
        return getattr(self, "max_depth", 1)

    def forward(self, hidden_states: Any, patch_height: Any, patch_width: Any) -> Any:
        head: Any = self
        if not _are(head.conv1, head.conv2, head.activation1, head.conv3, head.activation2):
            return super().forward(hidden_states, patch_height, patch_width)  # type: ignore[misc]
        x = conv_norm_relu(hidden_states[self.index()], *_weights(head.conv1), relu=False)
        size = (int(patch_height * head.patch_size), int(patch_width * head.patch_size))
        metric = isinstance(head.activation2, nn.Sigmoid)
        most = self.most()
        depth = depth_head(
            x, *_weights(head.conv2), *_weights(head.conv3), size, "sigmoid" if metric else "relu", float(most) if metric else 1.0
        )
        return (depth if metric or most == 1 else depth * most).to(head.conv3.weight.dtype)


class PromptDepthHead(DepthHead):
    """Prompt Depth Anything's: as `DepthHead`, always of the last map, and its largest depth is the prompt's."""

    def index(self) -> int:
        return -1

    def most(self) -> Any:
        return 1


class SequentialSegmentationHead:
    """DPT's head of classes: its norm and ReLU in the convolution, the classifier behind them, logits upsampled by two."""

    def forward(self, hidden_states: Any) -> Any:
        head: Any = self
        conv, norm, activation, dropout, classifier, upsampling = layers = list(head.head)
        if not _are(head.head, *layers) or uses_batch_statistics(norm) or dropout.training and dropout.p:
            return super().forward(hidden_states)  # type: ignore[misc]
        x = hidden_states[head.config.head_in_index]
        logits = conv_norm_relu_conv1x1(x, *_weights(conv), *_weights(classifier), norm=_norm(norm), padded=False)
        return upsample_bilinear(logits, (2 * logits.shape[2], 2 * logits.shape[3]), upsampling.align_corners)

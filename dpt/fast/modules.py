"""The fast forms of the model's modules: each overrides what computes and nothing else, no parameters, no buffers, no constructor.

On an NVIDIA GPU the ops launch the kernels; elsewhere they compute the same algebra in PyTorch; under TRITON_INTERPRET=1 the kernels
themselves run on CPU tensors. Under autocast the fused block keeps the residual stream in autocast's dtype, where the plain one keeps it in
float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import launch
from ..kernels.argmax_upsample import upsample_argmax
from ..kernels.attention import attention
from ..kernels.conv_norm_relu import conv_norm_relu, conv_norm_relu_conv1x1, conv_norm_relu_training
from ..kernels.cpu import convolution
from ..kernels.depth_head import ACTIVATIONS, depth_head
from ..kernels.layernorm_mlp import layernorm_linear, layernorm_mlp, linear_residual
from ..kernels.parts.pointwise import pointwise
from ..kernels.reassemble import ACTIVATIONS as READOUTS
from ..kernels.reassemble import readout_project, transposed_conv
from ..kernels.residual_conv import residual_conv_unit, residual_conv_unit_training
from ..kernels.upsample import conv1x1, upsample_bilinear
from ..nets.decoder import Fusion, ReadoutProject, Reassemble, ResidualConvUnit
from ..nets.encoders.beit import BEiTBlock
from ..nets.encoders.vit import Block, LayerScale, SwiGLU
from ..nets.functional import in_single, single, statically_equal
from ..nets.heads import ACTIVATION, DepthHead, LinearHead, SegmentationHead, depth_from, finished, own_size
from ..nets.metric_bins import MetricBinsHead
from ..nets.prompt import PromptBranch
from ..nets.sky import SkyBranch, with_far_sky


def _weights(layer: Any) -> tuple[Any, Any]:
    """Weight and bias of a layer. For `layer.weight` Python looks in the usual places first, in vain, and slowly; so children are read from
    `_modules` here too."""
    own = layer._parameters
    try:
        return own["weight"], own["bias"]
    except KeyError:  # something computes them, such as a parametrization since the model was accelerated
        return layer.weight, layer.bias


def _gamma(module: nn.Module) -> Tensor | None:
    """LayerScale's factor; None for the identity."""
    return module.gamma if isinstance(module, LayerScale) else None


@launch.planned
def _block(
    x: Tensor,
    rotation: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    norm1: tuple[Tensor, Tensor],
    eps1: float,
    qkv: tuple[Tensor, Tensor | None],
    projection: tuple[Tensor, Tensor | None, Tensor | None],
    norm2: tuple[Tensor, Tensor],
    eps2: float,
    mlp: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    scale2: Tensor | None,
    activation: str,
) -> Tensor:
    """A block's four ops, worked out as one; the projection's parameters end with its LayerScale."""
    mixed = attention(layernorm_linear(x, *norm1, *qkv, eps1, None, rotation), num_heads, None, bias)
    weight, linear_bias, scale1 = projection
    return layernorm_mlp(linear_residual(mixed, weight, linear_bias, x, scale1), *norm2, *mlp, eps2, scale2, activation)


def _layers(mlp: Any) -> tuple[str, Any, Any]:
    """The activation of a block's MLP, and the linear layers on either side of it."""
    layers = mlp._modules
    return ("swiglu", layers["w12"], layers["w3"]) if isinstance(mlp, SwiGLU) else (mlp.activation, layers["fc1"], layers["fc2"])


def _whole(block: Block, x: Tensor, rotation: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A block's forward; ``bias`` (H, N, N) is added to the attention's scores."""
    children: Any = block._modules
    norm1, attn, norm2 = children["norm1"], children["attn"], children["norm2"]
    layers = attn._modules
    if block.drops:
        packed = layernorm_linear(x, *_weights(norm1), *_weights(layers["qkv"]), norm1.eps, None, rotation)
        return _with_drops(block, attention(packed, attn.num_heads, None, bias), x)
    activation, first, second = _layers(children["mlp"])
    return _block(
        x,
        rotation,
        bias,
        attn.num_heads,
        _weights(norm1),
        norm1.eps,
        _weights(layers["qkv"]),
        (*_weights(layers["proj"]), _gamma(children["ls1"])),
        _weights(norm2),
        norm2.eps,
        (*_weights(first), *_weights(second)),
        _gamma(children["ls2"]),
        activation,
    )


def _with_drops(block: Block, mixed: Tensor, x: Tensor) -> Tensor:
    """A block behind its attention, which gave `mixed`, where it drops branches: the kernels cannot, so these are added as the plain
    block does."""
    norm, (activation, first, second) = block.norm2, _layers(block.mlp)
    x = block.added(x, block.ls1(block.attn.proj(mixed)))
    hidden = layernorm_linear(x, norm.weight, norm.bias, first.weight, first.bias, norm.eps, activation)
    return block.added(x, block.ls2(second(hidden)))


class FastBlock(Block):
    """`Block` in seven launches: LN, qkv, attention, projection + residual, LN, fc1 + activation, fc2 + residual."""

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        return _whole(self, x, rotation)


class FastBEiTBlock(BEiTBlock):
    """`BEiTBlock` as `FastBlock`, its bias by relative position read by the attention."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        attn: Any = self.attn
        dtype = launch.product_dtype(_weights(attn.qkv)[0])
        return _whole(self, x, None, attn.position(grid)[0].to(dtype))


@launch.planned
def _reassembled(
    tokens: Tensor,
    grid: tuple[int, int],
    readout: tuple[Tensor, Tensor | None, str] | None,
    project: tuple[Tensor, Tensor | None],
    upsampling: tuple[Tensor, Tensor | None] | None,
) -> Tensor:
    """Tokens to their map (B, C, h, w), worked out as one op; the readout and the upsampling where they are given."""
    weight, bias = project
    x = tokens if readout is None else readout_project(tokens, *readout)
    x = pointwise(x, weight.flatten(1), bias).transpose(1, 2).unflatten(2, grid)
    return x if upsampling is None else transposed_conv(x, *upsampling)


class FastReassemble(Reassemble):
    """`Reassemble` on channels-last memory, which tokens are: the split readout, the projection and the upsampling as matrix products.

    A norm of the tokens is PyTorch's, and so is a readout with another activation than GELU.
    """

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        children: Any = self._modules
        readout, norm, project, resize = (children[name] for name in ("readout", "norm", "project", "resize"))
        parameters = None
        if isinstance(readout, ReadoutProject) and readout.activation in READOUTS:
            parameters = (*_weights(readout._modules["linear"]), readout.activation)
        else:
            tokens = readout(tokens)
        if not isinstance(norm, nn.Identity):
            tokens = tokens if parameters is None else readout_project(tokens, *parameters)
            tokens, parameters = norm(tokens.transpose(1, 2)[..., None])[..., 0].transpose(1, 2), None
        upsampling = _weights(resize) if isinstance(resize, nn.ConvTranspose2d) else None
        x = _reassembled(tokens, grid, parameters, _weights(project), upsampling)
        return convolution.halved(x, *_weights(resize)) if isinstance(resize, nn.Conv2d) else x


BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # which differ in training alone, by whose statistics they take


def uses_batch_statistics(*norms: nn.Module) -> bool:
    return any(isinstance(norm, BATCH_NORMS) and norm.training for norm in norms)


def fuses_batch_statistics(x: Tensor, *norms: nn.Module) -> bool:
    """Whether the kernels run for a tensor like x, and all norms take the statistics of this process's batch: those of several
    processes are PyTorch's."""
    return launch.has_kernels(x) and all(isinstance(norm, BATCH_NORMS) and norm.training and not _shares(norm) for norm in norms)


def _shares(norm: Any) -> bool:
    initialised = isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()
    return initialised and dist.get_world_size(norm.process_group) > 1


@torch.no_grad()
def _track(norm: Any, moments: Tensor, count: int) -> None:
    """Move a norm's running statistics towards those of a batch, (2, C) mean and biased variance, as PyTorch does; without `momentum` to
    the average of all batches."""
    norm.num_batches_tracked.add_(1)
    share = norm.num_batches_tracked.reciprocal() if norm.momentum is None else norm.momentum
    unbiased = moments[1] * (count / (count - 1))
    for running, value in ((norm.running_mean, moments[0]), (norm.running_var, unbiased)):
        running.copy_(running + share * (value - running))


def _norm(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float] | None:
    """A batch norm in evaluation form; None for the identity. TypeError for what took its place since the model was accelerated."""
    if isinstance(module, BATCH_NORMS):
        statistics = module._buffers
        return *_weights(module), statistics["running_mean"], statistics["running_var"], module.eps
    if isinstance(module, nn.Identity):
        return None
    known = " and ".join(kind.__name__ for kind in BATCH_NORMS)
    raise TypeError(f"a {type(module).__name__} in place of a batch norm: the kernels know {known}; exchange it before dpt.accelerate")


class FastResidualConvUnit(ResidualConvUnit):
    """`ResidualConvUnit` in two launches; norms that take the statistics of the batch are passes of their own behind the convolutions."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """`add` (B, F, h, w), of any size, is resized to x's (bilinear, align_corners=True) and added."""
        children: Any = self._modules
        conv1, norm1, conv2, norm2 = (children[name] for name in ("conv1", "norm1", "conv2", "norm2"))
        if (norm1.training or norm2.training) and uses_batch_statistics(norm1, norm2):
            return self._with_batch_statistics(x, add)
        norms = {"norm1": _norm(norm1), "norm2": _norm(norm2)}
        return residual_conv_unit(x, *_weights(conv1), *_weights(conv2), **norms, add=add)

    def _with_batch_statistics(self, x: Tensor, add: Tensor | None) -> Tensor:
        conv1, norm1, conv2, norm2 = self.conv1, self.norm1, self.conv2, self.norm2
        if not fuses_batch_statistics(x, norm1, norm2):
            y = super().forward(x)
            return y if add is None else y + upsample_bilinear(add, y.shape[2:], True)
        norms: Any = {"norm1": (norm1.weight, norm1.bias, norm1.eps), "norm2": (norm2.weight, norm2.bias, norm2.eps)}
        y, moments = residual_conv_unit_training(x, conv1.weight, conv1.bias, conv2.weight, conv2.bias, **norms, add=add)
        count = y.shape[0] * y.shape[2] * y.shape[3]
        _track(norm1, moments[:2], count)
        _track(norm2, moments[2:], count)
        return y


def _merge(unit: ResidualConvUnit, skip: Tensor, previous: Tensor) -> Tensor:
    """unit(skip) + previous, resized to the skip; a unit that is plain, or has hooks, sees only what it sees in the plain model."""
    if isinstance(unit, FastResidualConvUnit) and not has_hooks(unit):
        return unit(skip, previous)
    return unit(skip) + upsample_bilinear(previous, skip.shape[2:], True)


def _level(block: Any, previous: Tensor, skip: Tensor, size: tuple[int, int] | None, prompt: Tensor | None) -> Tensor:
    """One block, of which the parts are given, up to its projection; `size` is that of the previous map once upsampled, None on the deepest
    level."""
    if size is None:
        x = block["unit2"](skip)
    else:
        if not statically_equal(tuple(skip.shape[2:]), size):
            skip = upsample_bilinear(skip, size, False)
        x = block["unit2"](_merge(block["unit1"], skip, previous))
    return x if prompt is None else x + block["prompt"](prompt, (x.shape[2], x.shape[3]))


class FastFusion(Fusion):
    """`Fusion` with each 1x1 projection before the upsampling, with which it commutes: a quarter of the work.

    The upsampled map of the three deeper levels is never written: the next level's first unit gathers it where it adds it.
    """

    def forward(self, maps: Iterable[Tensor], deeper: int = 0, prompt: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        blocks: Any = [block._modules for block in self.blocks]  # the parts of each FusionBlock
        skips = [conv(x) if has_hooks(conv) else convolution.conv3x3(x, *_weights(conv)) for conv, x in zip(self.convs, maps, strict=True)]
        x, size = skips[3], None
        found = [x] if deeper > 3 else []
        for level in (3, 2, 1):
            x = _level(blocks[level], x, skips.pop(), size, prompt)
            size = tuple(skips[-1].shape[2:]) if self.match_size else (2 * x.shape[2], 2 * x.shape[3])
            x = conv1x1(x, *_weights(blocks[level]["project"]))
            if deeper >= level:  # somebody else reads the upsampled map
                found.insert(0, upsample_bilinear(x, size, True))
        x = _level(blocks[0], x, skips.pop(), size, prompt)
        x = conv1x1(x, *_weights(blocks[0]["project"]))
        x = upsample_bilinear(x, (2 * x.shape[2], 2 * x.shape[3]), True)
        return (x, *found) if deeper else x


class FastPromptBranch(PromptBranch):
    """`PromptBranch` with its two large convolutions on the kernels; of the one channel of the prompt PyTorch makes the first."""

    def forward(self, prompt: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.relu(self.conv1(self.resized(prompt, size)))
        x = conv_norm_relu(x, *_weights(self.conv2))
        return conv_norm_relu(x, *_weights(self.conv3), relu=False)


def _last_convolutions(module: DepthHead | SkyBranch) -> tuple[Tensor, Any, Tensor, Any]:
    return *_weights(module.conv2), *_weights(module.conv3)


class FastDepthHead(DepthHead):
    """`DepthHead` in three launches, or with `project` four: its first convolution; the library's product with the taps; resize, sums and
    activation. The last two come again for the sky. What follows the activation is PyTorch's, and an activation that the kernel has not.
    With bins the resize and the two convolutions are three launches, and the maps between them are written.

    The last convolution, its activation and what follows are float32.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if isinstance(self.project, nn.Conv2d):
            x = conv_norm_relu(x, *_weights(self.project))
        x = conv_norm_relu(x, *_weights(self.conv1), relu=False)
        size = own_size(x, size, self.config)
        depth = finished(self._depth(x, size), self.config)
        if not isinstance(self.sky, SkyBranch):
            return depth
        return with_far_sky(depth, depth_head(x, *_last_convolutions(self.sky), size, "relu"))

    def _depth(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.config.bins:
            x = conv_norm_relu(upsample_bilinear(x, size, self.align_corners), *_weights(self.conv2))
            return depth_from(single(conv1x1(*in_single(x, self.conv3))), self.config)
        known = self.activation in ACTIVATIONS
        depth = depth_head(x, *_last_convolutions(self), size, self.activation if known else "linear", self.max_depth)
        return depth if known else ACTIVATION[self.activation](depth, self.max_depth)


def fused_labels(
    logits: Tensor, size: tuple[int, int], mode: str, align_corners: bool, probability: bool
) -> tuple[Tensor, Tensor | None] | None:
    """`dpt.inference.resizing.labels_from_logits` without writing the resized logits; None where no kernel does that."""
    if mode != "bilinear" or logits.dtype not in launch.DTYPES or not launch.runs_kernels(logits, "argmax_upsample"):
        return None
    found = upsample_argmax(logits[None], size, align_corners, probability)
    return (found[0][0], found[1][0]) if probability else (found[0], None)


class FastMetricBinsHead(MetricBinsHead):
    """`MetricBinsHead` with the convolutions and the resize that its depth head begins with as kernels; the bins are PyTorch's."""

    def forward(self, maps: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        x = conv_norm_relu(maps[0], *_weights(self.conv1), relu=False)
        x = conv_norm_relu(upsample_bilinear(x, own_size(x, size, self.config), True), *_weights(self.conv2))
        return self.metres(x, maps)


class FastSegmentationHead(SegmentationHead):
    """`SegmentationHead` with its norm and ReLU in the convolution, and labels decided in one kernel with the upsampling.

    The pixels of its logits are a multiple of 16 classes apart in memory, for wide loads; `.contiguous()` copies them side by side.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return upsample_bilinear(self.logits(x), size, self.align_corners)

    def logits(self, x: Tensor) -> Tensor:
        children: Any = self._modules
        norm, dropout, classifier = children["norm"], children["dropout"], children["classifier"]
        if not uses_batch_statistics(norm) and not dropout.training and not has_hooks(dropout):
            weight = _weights(children["conv"])[0]
            return conv_norm_relu_conv1x1(x, weight, None, *_weights(classifier), norm=_norm(norm), padded=True)
        if not uses_batch_statistics(norm):
            x = conv_norm_relu(x, _weights(children["conv"])[0], norm=_norm(norm))
        elif fuses_batch_statistics(x, norm):
            x, moments = conv_norm_relu_training(x, self.conv.weight, norm=(norm.weight, norm.bias, norm.eps))
            _track(norm, moments, x.shape[0] * x.shape[2] * x.shape[3])
        else:
            x = F.relu(norm(self.conv(x)))
        return conv1x1(dropout(x), *_weights(classifier), padded=True)

    fused_labels = staticmethod(fused_labels)


class FastLinearHead(LinearHead):
    """`LinearHead` with its convolution on the kernels, and labels decided in one kernel with the upsampling."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.read(conv_norm_relu(x, *_weights(self.project), relu=self.config.between == "relu"))

    fused_labels = staticmethod(fused_labels)


RECORDER = "output_capturing_hook"  # transformers' own, which does nothing unless outputs are collected


def is_recorder(hook: Any) -> bool:
    """Whether a forward hook is one of those by which transformers collects hidden states and attentions."""
    return getattr(hook, "__name__", "") == RECORDER and str(getattr(hook, "__module__", "")).startswith("transformers.")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody other than transformers has hooked a module."""
    if module._forward_hooks and not all(map(is_recorder, module._forward_hooks.values())):
        return True
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_class_forward(module: nn.Module, function: Any) -> bool:
    """Whether a function is the forward of a module's class, bound to it: what accelerate keeps, and leaves when its hooks are removed."""
    return getattr(function, "__func__", None) is type(module).forward and function.__self__ is module


def moves_inputs(module: nn.Module) -> bool:
    """Whether a module's own forward is that of accelerate's `device_map`, which moves what comes in to where the weights lie and calls the
    class' forward. Not one by which weights come and go."""
    hook: Any = vars(module).get("_hf_hook")
    known = (type(hook).__module__, type(hook).__name__) == ("accelerate.hooks", "AlignDevicesHook")
    return known and not hook.offload and is_class_forward(module, vars(module).get("_old_forward"))


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has given a module another forward than its class has."""
    own = vars(module).get("forward")
    return own is not None and not is_class_forward(module, own) and not moves_inputs(module)

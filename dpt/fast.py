"""The seam between the model and the kernels: the only file that imports `dpt.kernels`.

`FAST` maps a module of the plain model to its fast form, a subclass that overrides what computes and nothing else: no parameters, no
buffers, no constructor. `accelerate` exchanges the class of each module whose `refusal` is None, so names, state dict, hooks, copies
and pickles stay as they are; and it lays out the weights of convolutions in memory as the kernels read them. On an NVIDIA GPU the fast
forward launches the kernels; elsewhere the ops compute the same algebra in PyTorch; under TRITON_INTERPRET=1 the kernels themselves run on
CPU tensors.

Under autocast the fused block keeps the residual stream in autocast's dtype, where the plain one keeps it in float32.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .config import InputConfig
from .decoder import Fusion, FusionBlock, ReadoutAdd, ReadoutIgnore, ReadoutProject, Reassemble, ResidualConvUnit
from .encoder import MLP, Attention, Block, LayerScale, statically_equal
from .head import DepthHead, SegmentationHead

try:
    from .kernels import launch
    from .kernels.argmax_upsample import upsample_argmax
    from .kernels.attention import attention
    from .kernels.conv_norm_relu import conv_norm_relu
    from .kernels.depth_head import HIDDEN_CHANNELS, depth_head
    from .kernels.layernorm_mlp import layernorm_linear, layernorm_mlp, linear_residual
    from .kernels.reassemble import readout_project, transposed_conv
    from .kernels.residual_conv import residual_conv_unit
    from .kernels.upsample import conv1x1, conv1x1_upsample, upsample_bilinear
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


class FastReassemble(Reassemble):
    """`Reassemble` on channels-last memory, which tokens are: the split readout, the projection and the upsampling as matrix products."""

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if isinstance(self.readout, ReadoutProject):
            x = readout_project(tokens, self.readout.linear.weight, self.readout.linear.bias)
        else:
            x = self.readout(tokens)
        x = F.linear(x, self.project.weight.flatten(1), self.project.bias).transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
        if isinstance(self.resize, nn.ConvTranspose2d):
            return transposed_conv(x, self.resize.weight, self.resize.bias)
        return self.resize(x)


def _uses_batch_statistics(*norms: nn.Module) -> bool:
    return any(isinstance(norm, nn.BatchNorm2d) and norm.training for norm in norms)


def _norm(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float] | None:
    """A batch norm in evaluation form; None for the identity."""
    if not isinstance(module, nn.BatchNorm2d):
        return None
    return module.weight, module.bias, module.running_mean, module.running_var, module.eps


class FastResidualConvUnit(ResidualConvUnit):
    """`ResidualConvUnit` in two launches; PyTorch's convolutions and norms where these take the statistics of the batch."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """`add` (B, F, h, w), of any size, is resized to x's (bilinear, align_corners=True) and added."""
        if _uses_batch_statistics(self.norm1, self.norm2):
            y = super().forward(x)
            return y if add is None else y + upsample_bilinear(add, y.shape[2:], True)
        conv1, conv2 = self.conv1, self.conv2
        norms = {"norm1": _norm(self.norm1), "norm2": _norm(self.norm2)}
        return residual_conv_unit(x, conv1.weight, conv1.bias, conv2.weight, conv2.bias, **norms, add=add)


def _merge(unit: ResidualConvUnit, skip: Tensor, previous: Tensor) -> Tensor:
    """unit(skip) + previous, resized to the skip; a unit that is plain, or has hooks, sees only what it sees in the plain model."""
    if isinstance(unit, FastResidualConvUnit) and not _hooks(unit):
        return unit(skip, previous)
    return unit(skip) + upsample_bilinear(previous, skip.shape[2:], True)


class FastFusion(Fusion):
    """`Fusion` with each 1x1 projection before the upsampling, with which it commutes: a quarter of the work.

    The upsampled map of the three deeper levels is never written: the next level's first unit gathers it where it adds it.
    """

    def forward(self, maps: list[Tensor], deeper: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        skips = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        x, size = skips[3], None
        for level in (3, 2, 1):
            x = self._level(level, x, skips[level], size)
            size = tuple(skips[level - 1].shape[2:]) if self.match_size else (2 * x.shape[2], 2 * x.shape[3])
            x = conv1x1(x, self.blocks[level].project.weight, self.blocks[level].project.bias)
        below = upsample_bilinear(x, size, True) if deeper else None
        x = self._level(0, x, skips[0], size)
        project = self.blocks[0].project
        x = conv1x1_upsample(x, project.weight, project.bias, (2 * x.shape[2], 2 * x.shape[3]), True)
        return (x, below) if deeper else x

    def _level(self, level: int, previous: Tensor, skip: Tensor, size: tuple[int, int] | None) -> Tensor:
        """One block up to its projection; `size` is that of the previous map once upsampled, None on the deepest level."""
        block = self.blocks[level]
        if size is None:
            return block.unit2(skip)
        if not statically_equal(tuple(skip.shape[2:]), size):
            skip = upsample_bilinear(skip, size, False)
        return block.unit2(_merge(block.unit1, skip, previous))


class FastDepthHead(DepthHead):
    """`DepthHead` in three launches: its first convolution; the weights of the resize; resize, convolutions and activation."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = conv_norm_relu(x, self.conv1.weight, self.conv1.bias, relu=False)
        parameters = (self.conv2.weight, self.conv2.bias, self.conv3.weight, self.conv3.bias)
        return depth_head(x, *parameters, size, self.activation, self.max_depth)


class FastSegmentationHead(SegmentationHead):
    """`SegmentationHead` with its norm and ReLU in the convolution, and labels decided in one kernel with the upsampling."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return upsample_bilinear(self.logits(x), size, self.align_corners)

    def logits(self, x: Tensor) -> Tensor:
        if _uses_batch_statistics(self.norm):
            return super().logits(x)
        return self.classifier(self.dropout(conv_norm_relu(x, self.conv.weight, norm=_norm(self.norm))))

    def labels(self, logits: Tensor, size: tuple[int, int], config: InputConfig, probability: bool = False) -> tuple[Tensor, Tensor | None]:
        fused = config.output_mode == "bilinear" and logits.dtype in launch.DTYPES and launch.runs_kernels(logits, "argmax_upsample")
        if not fused:
            return super().labels(logits, size, config, probability)
        found = upsample_argmax(logits[None], size, config.output_align_corners, probability)
        return (found[0][0], found[1][0]) if probability else (found[0], None)


Check = Callable[[nn.Module], str | None]  # what is wrong with a child, or None


def _is(*types: type[nn.Module]) -> Check:
    return lambda module: None if type(module) in types else f"is a {type(module).__name__}, which the fused kernels would pass over"


def _has(expected: dict[str, object], kind: type[nn.Module]) -> Check:
    """Of this very type, with these attributes."""

    def check(module: nn.Module) -> str | None:
        if type(module) is not kind:
            return _is(kind)(module)
        other = [f"{name}={getattr(module, name)!r}, not {value!r}" for name, value in expected.items() if getattr(module, name) != value]
        return f"has {other[0]}: the kernels are for that alone" if other else None

    return check


def _convolution(side: int) -> Check:
    geometry = {"kernel_size": (side,) * 2, "stride": (1, 1), "padding": (side // 2,) * 2, "dilation": (1, 1), "groups": 1}
    return _has({**geometry, "padding_mode": "zeros"}, nn.Conv2d)


def _either(*checks: Check) -> Check:
    """What the first check says, unless another has no complaint."""
    return lambda module: None if any(check(module) is None for check in checks) else checks[0](module)


_IDENTITY = _is(nn.Identity)
_LINEAR = _is(nn.Linear)
_BATCH_NORM = _has({"affine": True, "track_running_stats": True}, nn.BatchNorm2d)
_LAYER_SCALE = _is(LayerScale, nn.Identity)


def _layer_norm(module: nn.Module) -> str | None:
    problem = _is(nn.LayerNorm)(module)
    return problem or ("has no weight or no bias" if module.weight is None or module.bias is None else None)


def _resampling(module: nn.Module) -> str | None:
    if type(module) is not nn.ConvTranspose2d:
        return _is(nn.Identity, nn.Conv2d)(module)
    side = module.kernel_size[0]
    geometry = {"kernel_size": (side,) * 2, "stride": (side,) * 2, "padding": (0, 0), "output_padding": (0, 0)}
    return _has({**geometry, "dilation": (1, 1), "groups": 1}, nn.ConvTranspose2d)(module)


def _head_size(block: Block) -> str | None:
    size = block.attn.proj.in_features // block.attn.num_heads
    if size % 16 or not 32 <= size <= 128:
        return f"heads of {size} channels: the attention kernel takes multiples of 16 from 32 to 128"
    return None


def _depth_head_is_known(head: DepthHead) -> str | None:
    hidden = head.conv2.out_channels
    if hidden not in HIDDEN_CHANNELS:
        return f"{hidden} channels before the last convolution: the kernel takes {', '.join(map(str, HIDDEN_CHANNELS))}"
    return None if head.align_corners else "align_corners=False: the kernel upsamples with True"


def _statistics(*names: str) -> Callable[[nn.Module], str | None]:
    """What runs otherwise in a module whose norms now take the batch's statistics."""

    def tell(module: nn.Module) -> str | None:
        batch = _uses_batch_statistics(*(getattr(module, name) for name in names))
        return "PyTorch's convolutions and batch norm, since it trains with the batch's statistics" if batch else None

    return tell


@dataclass(frozen=True)
class Replacement:
    """A fast class, and when a module may take it.

    `reads` names the children whose parameters the fast forward reads without calling them (`*` is a number), and what they must be;
    `calls` those that it calls as the plain one does, whatever they are. `rule`: a further reason to refuse, or None. `note`: what
    does not run fused at the moment, or None.
    """

    fast: type[nn.Module]
    reads: dict[str, Check]
    calls: tuple[str, ...] = ()
    rule: Callable[[nn.Module], str | None] = field(default=lambda module: None)
    note: Callable[[nn.Module], str | None] = field(default=lambda module: None)


FAST: dict[type[nn.Module], Replacement] = {
    Block: Replacement(
        FastBlock,
        reads={
            "norm1": _layer_norm,
            "attn": _is(Attention),
            "attn.qkv": _LINEAR,
            "attn.proj": _LINEAR,
            "ls1": _LAYER_SCALE,
            "norm2": _layer_norm,
            "mlp": _has({"activation": "gelu"}, MLP),
            "mlp.fc1": _LINEAR,
            "mlp.fc2": _LINEAR,
            "ls2": _LAYER_SCALE,
        },
        rule=_head_size,
    ),
    Reassemble: Replacement(
        FastReassemble,
        reads={
            "readout": _either(_has({"activation": "gelu"}, ReadoutProject), _is(ReadoutIgnore, ReadoutAdd)),
            "readout.linear": _LINEAR,
            "project": _convolution(1),
            "resize": _resampling,
        },
    ),
    ResidualConvUnit: Replacement(
        FastResidualConvUnit,
        reads={
            "conv1": _convolution(3),
            "norm1": _either(_BATCH_NORM, _IDENTITY),
            "conv2": _convolution(3),
            "norm2": _either(_BATCH_NORM, _IDENTITY),
        },
        note=_statistics("norm1", "norm2"),
    ),
    Fusion: Replacement(
        FastFusion,
        reads={
            "convs": _is(nn.ModuleList),
            "blocks": _is(nn.ModuleList),
            "blocks.*": _is(FusionBlock),
            "blocks.*.project": _convolution(1),
        },
        calls=("convs.*", "blocks.*.unit1", "blocks.*.unit2"),
    ),
    DepthHead: Replacement(
        FastDepthHead,
        reads={"conv1": _convolution(3), "conv2": _convolution(3), "conv3": _convolution(1)},
        rule=_depth_head_is_known,
    ),
    SegmentationHead: Replacement(
        FastSegmentationHead,
        reads={"conv": _convolution(3), "norm": _BATCH_NORM},
        calls=("dropout", "classifier"),
        note=_statistics("norm"),
    ),
}
PLAIN = {replacement.fast: plain for plain, replacement in FAST.items()}
DTYPES = launch.DTYPES


def _general(name: str) -> str:
    """A child's name with `*` for each number in it, as the tables have it."""
    return re.sub(r"(?<=\.)\d+", "*", name)


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot run fused; None if it can. The fast forward reads some children's parameters and never calls them.

    So it refuses what would be passed over: hooks on such a child, parametrizations, children added or of another type or geometry
    (LoRA, quantised layers, dilation), a forward that was replaced, and dtypes the kernels have no code for.
    """
    plain = PLAIN.get(type(module), type(module))
    if plain not in FAST:
        return f"{type(module).__name__} has no fast form"
    replacement = FAST[plain]
    found = {name: child for name, child in module.named_modules() if not _is_called(name, replacement)}
    for name, child in found.items():
        if name:
            if _general(name) not in replacement.reads:
                return f"{name} is a {type(child).__name__}, which the fused kernels would pass over"
            problem = replacement.reads[_general(name)](child)
            if problem is not None:
                return f"{name} {problem}"
            if _hooks(child):
                return f"{name} has hooks, which the fused kernels would not call"
        if parametrize.is_parametrized(child):
            return f"{name or 'it'} is parametrized"
        if "forward" in vars(child):
            return f"{name or 'it'} has a forward of its own"
        for kind, tensors in (("parameter", child._parameters), ("buffer", child._buffers)):
            for tensor_name, tensor in tensors.items():
                problem = None if tensor is None else _unreadable(kind, tensor)
                if problem is not None:
                    return f"{name or 'it'}.{tensor_name} {problem}"
    missing = [name for name in replacement.reads if "." not in name and name not in found]
    return f"{missing[0]} is missing" if missing else replacement.rule(module)


def _unreadable(kind: str, tensor: Tensor) -> str | None:
    """Why the kernels, which read a tensor's memory, would not read its values; None if they would."""
    if type(tensor) not in (Tensor, nn.Parameter):  # torchao's quantised tensors, DTensor, ...
        return f"is a {type(tensor).__name__}: the kernels would read its memory, and not what that stands for"
    if kind == "parameter" and tensor.dtype not in DTYPES:
        return f"is {tensor.dtype}: the kernels take float32, float16 and bfloat16"
    return None


def _is_called(name: str, replacement: Replacement) -> bool:
    return any(_general(name) == called or _general(name).startswith(f"{called}.") for called in replacement.calls)


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

    The weights of convolutions get the order in memory that the kernels read, where the module is in evaluation mode and its weight has no
    gradient. A fused optimizer (`fused=True`) that has made steps before goes on only with weights as they were: make it afterwards, or
    accelerate in training mode. `dpt.save` and `torch.save` take such weights as any; safetensors' own `save_file` wants `.contiguous()` of
    them.

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
    _lay_out(model)
    return model


# The order of a convolution's weight in memory as the kernels read it: (O, kh, kw, I), which is channels-last; and of a transposed one,
# (I, O, kh, kw), (kh, kw, O, I). The channels that are summed over come last.
MEMORY = {nn.Conv2d: (0, 2, 3, 1), nn.ConvTranspose2d: (2, 3, 1, 0)}


def _lay_out(model: nn.Module) -> None:
    """Lay the weights of the fast modules' convolutions out in memory as they are read, for else each call copies them.

    Parameters, shapes and values stay. Left as they are: weights in training, for PyTorch's fused optimizers step through a parameter's
    memory and their state's as if their orders were the same; and a weight whose memory another parameter or process has too.
    """
    users = Counter(parameter.untyped_storage()._cdata for parameter in model.parameters() if type(parameter) is nn.Parameter)
    for fast in (module for _, module in _candidates(model) if type(module) in PLAIN):
        for module in fast.modules():
            weight = module._parameters.get("weight")
            if type(module) not in MEMORY or type(weight) is not nn.Parameter or module.training or weight.grad is not None:
                continue
            storage, order = weight.untyped_storage(), MEMORY[type(module)]
            whole = storage.nbytes() == weight.numel() * weight.element_size() and users[storage._cdata] == 1
            if whole and not (weight.device.type == "cpu" and weight.is_shared()):
                back = [order.index(axis) for axis in range(4)]
                weight.data = weight.data.permute(order).contiguous().permute(back)


def fast_report(model: nn.Module) -> Report:
    """Which modules run fused, which do not, and why: a list of rows that prints as a table."""
    report = Report()
    for name, module in _candidates(model):
        fused = type(module) in PLAIN
        reason = refusal(module)
        how = _how(module) if fused and reason is None else reason or "not accelerated"
        report.append(Row(name, type(module).__name__, fused, how))
    return report


def _how(module: nn.Module) -> str:
    note = FAST[PLAIN[type(module)]].note(module)
    if note is not None:
        return note
    parameter = next(module.parameters())
    if launch.has_kernels(parameter):
        return "kernels"
    what = "there are no kernels, they need an NVIDIA GPU of compute capability 8.0 or newer"
    return f"the same algebra in PyTorch: on {parameter.device} {what}"

"""Which modules have a fast form, and when a module may take it: `FAST`, with what the children must be whose parameters are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..kernels import launch
from ..kernels.depth_head import HIDDEN_CHANNELS
from ..kernels.reassemble import ACTIVATIONS as READOUTS
from ..nets.decoder import Fusion, FusionBlock, ReadoutAdd, ReadoutIgnore, ReadoutProject, Reassemble, ResidualConvUnit
from ..nets.encoders.beit import BEiTAttention, BEiTBlock
from ..nets.encoders.swinv2 import SwinBlock
from ..nets.encoders.vit import MLP, Attention, Block, LayerScale, SwiGLU
from ..nets.functional import LastConv2d
from ..nets.heads import DepthHead, LinearHead, SegmentationHead
from ..nets.metric_bins import MetricBinsHead
from ..nets.prompt import PromptBranch
from ..nets.sky import SkyBranch
from .modules import (
    BATCH_NORMS,
    FastBEiTBlock,
    FastBlock,
    FastDepthHead,
    FastFusion,
    FastLinearHead,
    FastMetricBinsHead,
    FastPromptBranch,
    FastReassemble,
    FastResidualConvUnit,
    FastSegmentationHead,
    fuses_batch_statistics,
    has_hooks,
    has_own_forward,
    uses_batch_statistics,
)

Check = Callable[[nn.Module], str | None]  # what is wrong with a child, or None


def is_a(*types: type[nn.Module]) -> Check:
    return lambda module: None if type(module) in types else f"is a {type(module).__name__}, which the fused kernels would pass over"


def has(expected: dict[str, object], *kinds: type[nn.Module]) -> Check:
    """Of one of these very types, with these attributes."""

    def check(module: nn.Module) -> str | None:
        if type(module) not in kinds:
            return is_a(*kinds)(module)
        other = [f"{name}={getattr(module, name)!r}, not {value!r}" for name, value in expected.items() if getattr(module, name) != value]
        return f"has {other[0]}: the kernels are for that alone" if other else None

    return check


def convolution(side: int, kind: type[nn.Module] = nn.Conv2d) -> Check:
    geometry = {"kernel_size": (side,) * 2, "stride": (1, 1), "padding": (side // 2,) * 2, "dilation": (1, 1), "groups": 1}
    return has({**geometry, "padding_mode": "zeros"}, kind)


def either(*checks: Check) -> Check:
    """What the first check says, unless another has no complaint."""
    return lambda module: None if any(check(module) is None for check in checks) else checks[0](module)


IDENTITY = is_a(nn.Identity)
LINEAR = is_a(nn.Linear)
BATCH_NORM = has({"affine": True, "track_running_stats": True}, *BATCH_NORMS)
LAYER_SCALE = is_a(LayerScale, nn.Identity)


def layer_norm(module: nn.Module) -> str | None:
    problem = is_a(nn.LayerNorm)(module)
    return problem or ("has no weight or no bias" if module.weight is None or module.bias is None else None)


HALVING = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def resampling(module: nn.Module) -> str | None:
    if type(module) is not nn.ConvTranspose2d:
        return either(IDENTITY, has({**HALVING, "padding_mode": "zeros"}, nn.Conv2d))(module)
    side = module.kernel_size[0]
    geometry = {"kernel_size": (side,) * 2, "stride": (side,) * 2, "padding": (0, 0), "output_padding": (0, 0)}
    return has({**geometry, "dilation": (1, 1), "groups": 1}, nn.ConvTranspose2d)(module)


def head_size(block: Block) -> str | None:
    size = block.attn.proj.in_features // block.attn.num_heads
    if size % 8 or not 32 <= size <= 128:
        return f"heads of {size} channels: the attention kernel takes multiples of 8 from 32 to 128"
    return None


def depth_head_is_known(head: DepthHead) -> str | None:
    if head.config.bins:
        return None  # behind kernels that take any number of channels
    hidden = head.conv2.out_channels
    if hidden not in HIDDEN_CHANNELS:
        return f"{hidden} channels before the last convolution: the kernel takes {', '.join(map(str, HIDDEN_CHANNELS))}"
    return None if head.align_corners else "align_corners=False: the kernel upsamples with True"


def taps_first(head: DepthHead) -> dict[str, tuple[int, ...]]:
    """The depth head's kernel takes a product with each tap, the bins' convolution is as others are."""
    return {} if head.config.bins else dict.fromkeys(("conv2", "sky.conv2"), (2, 3, 0, 1))


def readout_is_plain(module: nn.Module) -> str | None:
    activation = getattr(module.readout, "activation", "gelu")
    return None if activation in READOUTS else f"its readout in PyTorch, since the kernel has no {activation!r}; the rest as elsewhere"


def drops_branches(block: Block) -> str | None:
    """What runs otherwise in a block that now drops branches."""
    return "its projections and residual sums in PyTorch, since it drops branches; the rest as elsewhere" if block.drops else None


def takes_statistics(*names: str) -> Callable[[nn.Module], str | None]:
    """What runs otherwise in a module whose norms now take the batch's statistics."""

    def tell(module: nn.Module) -> str | None:
        norms = [getattr(module, name) for name in names]
        if not uses_batch_statistics(*norms) or fuses_batch_statistics(next(module.parameters()), *norms):
            return None
        return "PyTorch's convolutions and batch norm, since it trains with the batch's statistics"

    return tell


@dataclass(frozen=True)
class Replacement:
    """A fast class, and when a module may take it.

    `reads` names the children whose parameters the fast forward reads without calling them (`*` is a number), and what they must be;
    `calls` those that it calls as the plain one does, whatever they are. `rule`: a further reason to refuse, or None. `note`: what
    does not run fused at the moment, or None. `memory`: children whose weights are read in another order of memory than others of their
    kind, and that order. `cautious`: whether the fast forward looks at the children at each call, and takes the plain one where they are
    not what it reads; such a module need not have all of them.
    """

    fast: type[nn.Module]
    reads: dict[str, Check]
    calls: tuple[str, ...] = ()
    rule: Callable[[Any], str | None] = field(default=lambda module: None)
    note: Callable[[Any], str | None] = field(default=lambda module: None)
    memory: Callable[[Any], dict[str, tuple[int, ...]]] = field(default=lambda module: {})
    cautious: bool = False


BLOCK: dict[str, Check] = {
    "norm1": layer_norm,
    "attn": is_a(Attention),
    "attn.qkv": LINEAR,
    "attn.proj": LINEAR,
    "ls1": LAYER_SCALE,
    "norm2": layer_norm,
    "mlp": either(has({"activation": "gelu"}, MLP), has({"activation": "gelu_tanh"}, MLP), is_a(SwiGLU)),
    "mlp.fc1": LINEAR,
    "mlp.fc2": LINEAR,
    "mlp.w12": LINEAR,
    "mlp.w3": LINEAR,
    "ls2": LAYER_SCALE,
}
FAST: dict[type[nn.Module], Replacement] = {
    Block: Replacement(FastBlock, reads=BLOCK, rule=head_size, note=drops_branches),
    BEiTBlock: Replacement(
        FastBEiTBlock,
        reads={**BLOCK, "attn": is_a(BEiTAttention)},
        calls=("attn.position",),
        rule=head_size,
        note=drops_branches,
    ),
    Reassemble: Replacement(
        FastReassemble,
        reads={
            "readout": is_a(ReadoutProject, ReadoutIgnore, ReadoutAdd),
            "readout.linear": LINEAR,
            "project": convolution(1),
            "resize": resampling,
        },
        calls=("norm",),
        note=readout_is_plain,
    ),
    ResidualConvUnit: Replacement(
        FastResidualConvUnit,
        reads={
            "conv1": convolution(3),
            "norm1": either(BATCH_NORM, IDENTITY),
            "conv2": convolution(3),
            "norm2": either(BATCH_NORM, IDENTITY),
        },
        note=takes_statistics("norm1", "norm2"),
    ),
    Fusion: Replacement(
        FastFusion,
        reads={
            "convs": is_a(nn.ModuleList),
            "convs.*": convolution(3),
            "blocks": is_a(nn.ModuleList),
            "blocks.*": is_a(FusionBlock),
            "blocks.*.project": convolution(1),
        },
        calls=("blocks.*.unit1", "blocks.*.unit2", "blocks.*.prompt"),
    ),
    PromptBranch: Replacement(FastPromptBranch, reads={"conv2": convolution(3), "conv3": convolution(3)}, calls=("conv1",)),
    DepthHead: Replacement(
        FastDepthHead,
        reads={
            "project": either(convolution(3), IDENTITY),
            "conv1": convolution(3),
            "conv2": convolution(3),
            "conv3": convolution(1, LastConv2d),
            "sky": is_a(SkyBranch, nn.Identity),
            "sky.conv2": convolution(3),
            "sky.conv3": convolution(1, LastConv2d),
        },
        rule=depth_head_is_known,
        memory=taps_first,
    ),
    MetricBinsHead: Replacement(
        FastMetricBinsHead,
        reads={"conv1": convolution(3), "conv2": convolution(3)},
        calls=("conv3", "bottleneck", "seed_projector", "projectors", "domains", "router"),
        note=lambda module: "its first two convolutions and the resize between them; the bins are PyTorch's",
    ),
    SegmentationHead: Replacement(
        FastSegmentationHead,
        reads={"conv": convolution(3), "norm": BATCH_NORM, "classifier": convolution(1)},
        calls=("dropout",),
        note=takes_statistics("norm"),
    ),
    LinearHead: Replacement(FastLinearHead, reads={"project": convolution(3)}, calls=("linear",)),
}
NO_FORM: dict[type[nn.Module], str] = {  # what makes much of a model, and why the kernels do not compute it
    SwinBlock: "its norms stand behind attention and MLP, and the kernels' before; its attention is by windows",
}
PLAIN = {replacement.fast: plain for plain, replacement in FAST.items()}


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
        return NO_FORM.get(plain, f"{type(module).__name__} has no fast form")
    replacement = FAST[plain]
    found = {name: child for name, child in module.named_modules() if not _is_called(name, replacement)}
    for name, child in found.items():
        if name:
            if _general(name) not in replacement.reads:
                return f"{name} is a {type(child).__name__}, which the fused kernels would pass over"
            problem = replacement.reads[_general(name)](child)
            if problem is not None:
                return f"{name} {problem}"
            if has_hooks(child):
                return f"{name} has hooks, which the fused kernels would not call"
        if parametrize.is_parametrized(child):
            return f"{name or 'it'} is parametrized"
        if has_own_forward(child):
            return f"{name or 'it'} has a forward of its own"
        for kind, tensors in (("parameter", child._parameters), ("buffer", child._buffers)):
            for tensor_name, tensor in tensors.items():
                problem = None if tensor is None else _unreadable(kind, tensor)
                if problem is not None:
                    return f"{name or 'it'}.{tensor_name} {problem}"
    missing = [name for name in replacement.reads if not replacement.cautious and "." not in name and name not in found]
    return f"{missing[0]} is missing" if missing else replacement.rule(module)


def _unreadable(kind: str, tensor: Tensor) -> str | None:
    """Why the kernels, which read a tensor's memory, would not read its values; None if they would."""
    if type(tensor) not in (Tensor, nn.Parameter):  # torchao's quantised tensors, DTensor, ...
        return f"is a {type(tensor).__name__}: the kernels would read its memory, and not what that stands for"
    if kind == "parameter" and tensor.dtype not in launch.DTYPES:
        return f"is {tensor.dtype}: the kernels take float32, float16 and bfloat16"
    return None


def _is_called(name: str, replacement: Replacement) -> bool:
    return any(_general(name) == called or _general(name).startswith(f"{called}.") for called in replacement.calls)


def supports(module: nn.Module) -> bool:
    """Whether `accelerate` would put this module on the kernels; `refusal` says why not."""
    return refusal(module) is None

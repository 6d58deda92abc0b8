"""The ops one by one, at the shapes the models use, against what PyTorch can do on the same tensors.

FLOPs are those of the plain algorithm, counted on its graph; bytes are what has to move at least: inputs and outputs once, and in a
backward pass the inputs again, the cotangent and the gradients. An op that saves work beyond fusing can therefore be below the floor.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpt.kernels import launch

from .. import gate
from ..harness import measure
from ..harness.runner import Case, Context, Prepared, Unavailable
from ..reporting import tables
from . import models, peers

CALLS_IN_A_GRAPH = 10
EPS = 1e-6
FORWARD, BOTH = "forward", "forward+backward"
NOT_COMPILED_HERE = "on a CPU there are no kernels to compare: compiled PyTorch is measured on whole models only"


@dataclass(frozen=True)
class Argument:
    """One tensor of an op. ``scale`` times a normal variable plus ``shift``; ``map``: a (B, C, H, W) tensor that has a memory format."""

    shape: tuple[int, ...]
    scale: float = 1.0
    shift: float = 0.0
    map: bool = False
    gradient: bool = True
    positive: bool = False

    def make(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
        value = self.scale * torch.randn(self.shape, generator=generator) + self.shift
        return (value.abs() + 0.5 if self.positive else value).to(device, dtype)


def tokens(*shape: int) -> Argument:
    return Argument(shape)


def feature_map(*shape: int) -> Argument:
    return Argument(shape, map=True)


def weight(*shape: int) -> Argument:
    """A matrix or convolution of unit gain."""
    inputs = 1
    for side in shape[1:]:
        inputs *= side
    return Argument(shape, scale=inputs**-0.5, map=len(shape) == 4)


def bias(channels: int) -> Argument:
    return Argument((channels,), scale=0.1)


def gain(channels: int) -> Argument:
    return Argument((channels,), scale=0.1, shift=1.0)


def norm(channels: int) -> tuple[Argument, ...]:
    """Weight, bias, mean and variance of a batch norm in evaluation form; the statistics are constants."""
    mean = Argument((channels,), scale=0.1, gradient=False)
    return gain(channels), bias(channels), mean, Argument((channels,), gradient=False, positive=True)


@dataclass(frozen=True)
class Op:
    """An op with its reference. ``arguments(shape)``: its tensors; ``call`` and ``plain`` take them in that order, with the shape first."""

    module: str
    name: str
    arguments: Callable[[Any], Sequence[Argument]]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: Sequence[Any]
    toy: Any
    peers: tuple[str, ...] = ()
    backward: bool = True
    judged: Callable[..., Tensor] | None = None  # what the gate compares in place of the output


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"dpt.kernels.{module}"), name)


def _both(module: str, name: str, call: Callable[..., Any]) -> dict[str, Callable[..., Tensor]]:
    """``call(function, shape, *tensors)`` for the op and for its reference."""
    ours, reference = _function(module, name), _function(module, f"{name}_ref")
    return {"call": lambda *arguments: call(ours, *arguments), "plain": lambda *arguments: call(reference, *arguments)}


@dataclass(frozen=True)
class Tokens:
    """Tokens of an encoder: batch, tokens with the class token, width, heads."""

    batch: int
    tokens: int
    width: int
    heads: int

    def __str__(self) -> str:
        return f"B={self.batch} N={self.tokens} D={self.width} H={self.heads}"


@dataclass(frozen=True)
class Map:
    """A feature map and what comes out of it: batch, channels, side; channels and side of the result."""

    batch: int
    channels: int
    side: int
    out_channels: int = 0
    out_side: int = 0

    def __str__(self) -> str:
        to = f" to {self.out_channels}" if self.out_channels else ""
        side = f" to {self.out_side}^2" if self.out_side else ""
        return f"B={self.batch} C={self.channels}{to}, {self.side}^2{side}"


# Base at 512, Large at 384, Depth Anything V2 S, B and L at 518; then larger pictures. In order of importance.
BASE, LARGE = Tokens(1, 1025, 768, 12), Tokens(1, 577, 1024, 16)
ENCODERS = (BASE, LARGE, Tokens(16, 1025, 768, 12), Tokens(1, 1370, 384, 6), Tokens(1, 1370, 768, 12), Tokens(1, 1370, 1024, 16))
LONG = (Tokens(1, 2305, 768, 12), Tokens(1, 4097, 768, 12))
FUSION = (
    Map(1, 256, 128),
    Map(1, 256, 64),
    Map(1, 256, 32),
    Map(1, 256, 16),
    Map(16, 256, 128),
    Map(16, 256, 64),
    Map(1, 256, 256),
    Map(1, 128, 148),
    Map(1, 64, 148),
    Map(4, 256, 128),
)
SDPA = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
CHANNELS_LAST = "eager, channels_last"


def _residual_unit(function: Callable, shape: Map, x, w1, w2, *rest) -> Tensor:
    """With batch norms and the previous level's map added, as in segmentation models; with biases and alone, as in depth models."""
    if len(rest) == 2:
        return function(x, w1, rest[0], w2, rest[1])
    return function(x, w1, None, w2, None, norm1=(*rest[:4], EPS), norm2=(*rest[4:8], EPS), add=rest[8])


@functools.cache
def ops() -> tuple[Op, ...]:
    """The table. A function, since importing the ops imports Triton."""
    return (
        Op(
            "attention",
            "attention",
            lambda s: [tokens(s.batch, s.tokens, 3 * s.width)],
            **_both("attention", "attention", lambda f, s, qkv: f(qkv, s.heads)),
            shapes=(*ENCODERS, *LONG),
            toy=Tokens(2, 17, 64, 2),
            peers=(*SDPA, "xformers"),
        ),
        Op(
            "layernorm_linear",
            "layernorm_linear",
            lambda s: [tokens(s.batch, s.tokens, s.width), gain(s.width), bias(s.width), weight(3 * s.width, s.width), bias(3 * s.width)],
            **_both("layernorm_linear", "layernorm_linear", lambda f, s, *t: f(*t, EPS)),
            shapes=ENCODERS,
            toy=Tokens(2, 17, 64, 2),
        ),
        Op(
            "linear_residual",
            "linear_residual",
            lambda s: [tokens(s.batch, s.tokens, s.width), weight(s.width, s.width), bias(s.width), tokens(s.batch, s.tokens, s.width)],
            **_both("linear_residual", "linear_residual", lambda f, s, *t: f(*t)),
            shapes=ENCODERS,
            toy=Tokens(2, 17, 64, 2),
        ),
        Op(
            "layernorm_mlp",
            "layernorm_mlp",
            lambda s: [
                *(tokens(s.batch, s.tokens, s.width), gain(s.width), bias(s.width)),
                *(weight(4 * s.width, s.width), bias(4 * s.width), weight(s.width, 4 * s.width), bias(s.width)),
            ],
            **_both("layernorm_mlp", "layernorm_mlp", lambda f, s, *t: f(*t, EPS)),
            shapes=ENCODERS,
            toy=Tokens(2, 17, 64, 2),
        ),
        Op(
            "residual_conv",
            "residual_conv_unit, biases",
            lambda s: [
                *(feature_map(s.batch, s.channels, s.side, s.side), weight(s.channels, s.channels, 3, 3)),
                *(weight(s.channels, s.channels, 3, 3), bias(s.channels), bias(s.channels)),
            ],
            **_both("residual_conv", "residual_conv_unit", _residual_unit),
            shapes=FUSION,
            toy=Map(2, 32, 6),
            peers=(CHANNELS_LAST,),
        ),
        Op(
            "residual_conv",
            "residual_conv_unit, norms and add",
            lambda s: [
                *(feature_map(s.batch, s.channels, s.side, s.side), weight(s.channels, s.channels, 3, 3)),
                *(weight(s.channels, s.channels, 3, 3), *norm(s.channels), *norm(s.channels)),
                feature_map(s.batch, s.channels, s.side // 2, s.side // 2),
            ],
            **_both("residual_conv", "residual_conv_unit", _residual_unit),
            shapes=FUSION[:7],
            toy=Map(2, 32, 6),
            peers=(CHANNELS_LAST,),
        ),
        Op(
            "conv_norm_relu",
            "conv_norm_relu",
            lambda s: [
                *(feature_map(s.batch, s.channels, s.side, s.side), weight(s.out_channels, s.channels, 3, 3)),
                *norm(s.out_channels),
            ],
            **_both("conv_norm_relu", "conv_norm_relu", lambda f, s, x, w, *n: f(x, w, norm=(*n, EPS))),
            shapes=(Map(1, 256, 256, 256), Map(1, 256, 192, 128), Map(16, 256, 256, 256)),
            toy=Map(2, 32, 6, 16),
            peers=(CHANNELS_LAST,),
        ),
        Op(
            "upsample",
            "upsample_bilinear",
            lambda s: [feature_map(s.batch, s.channels, s.side, s.side)],
            **_both("upsample", "upsample_bilinear", lambda f, s, x: f(x, (s.out_side, s.out_side), True)),
            shapes=(Map(1, 256, 64, 0, 128), Map(1, 256, 128, 0, 256), Map(16, 256, 64, 0, 128)),
            toy=Map(2, 32, 6, 0, 12),
            peers=(CHANNELS_LAST,),
        ),
        Op(
            "upsample",
            "conv1x1_upsample",
            lambda s: [
                *(feature_map(s.batch, s.channels, s.side, s.side), weight(s.out_channels, s.channels, 1, 1), bias(s.out_channels)),
            ],
            call=lambda s, x, w, b: _function("upsample", "conv1x1_upsample")(x, w, b, (s.out_side, s.out_side), True),
            plain=lambda s, x, w, b: F.conv2d(
                F.interpolate(x, size=(s.out_side, s.out_side), mode="bilinear", align_corners=True), w, b
            ),  # in the plain model's order
            shapes=(Map(1, 256, 128, 256, 256), Map(16, 256, 128, 256, 256)),
            toy=Map(2, 32, 6, 32, 12),
            peers=(CHANNELS_LAST,),
        ),
        Op(
            "reassemble",
            "readout_project",
            lambda s: [tokens(s.batch, s.tokens, s.width), weight(s.width, 2 * s.width), bias(s.width)],
            **_both("reassemble", "readout_project", lambda f, s, *t: f(*t)),
            shapes=ENCODERS[:3],
            toy=Tokens(2, 17, 64, 2),
        ),
        Op(
            "reassemble",
            "transposed_conv",
            lambda s: [
                *(feature_map(s.batch, s.channels, s.side, s.side), bias(s.channels)),
                Argument((s.channels, s.channels, *(s.out_side // s.side,) * 2), scale=s.channels**-0.5),
            ],
            **_both("reassemble", "transposed_conv", lambda f, s, x, b, w: f(x, w, b)),
            shapes=(Map(1, 96, 32, 0, 128), Map(1, 192, 32, 0, 64), Map(1, 256, 24, 0, 96), Map(16, 96, 32, 0, 128)),
            toy=Map(2, 16, 3, 0, 12),
            peers=(CHANNELS_LAST,),
        ),
        Op(
            "depth_head",
            "depth_head",
            lambda s: [
                *(feature_map(s.batch, s.channels, s.side, s.side), weight(32, s.channels, 3, 3), bias(32)),
                *(weight(1, 32, 1, 1), gain(1)),
            ],
            **_both("depth_head", "depth_head", lambda f, s, *t: f(*t, (s.out_side, s.out_side))),
            shapes=(Map(1, 128, 192, 0, 384), Map(1, 128, 296, 0, 518), Map(1, 32, 296, 0, 518), Map(16, 128, 192, 0, 384)),
            toy=Map(2, 32, 6, 0, 12),
            peers=(CHANNELS_LAST,),
        ),
        Op(
            "argmax_upsample",
            "upsample_argmax",
            lambda s: [feature_map(s.batch, s.channels, s.side, s.side)],
            **_both("argmax_upsample", "upsample_argmax", lambda f, s, x: f(x, (s.out_side, s.out_side), False)),
            shapes=(Map(1, 150, 512, 0, 1024), Map(16, 150, 256, 0, 512)),
            toy=Map(2, 5, 6, 0, 12),
            peers=(CHANNELS_LAST,),
            backward=False,
            judged=lambda s, labels, x: _chosen_logit(x, labels),
        ),
    )


def _chosen_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The resized logit of each pixel's label, in float32: the largest of its pixel where the label is right."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    resized = F.interpolate(wide, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return resized.gather(1, labels[:, None].long())[:, 0]


@dataclass
class KernelWorkload:
    """One op at one shape, with sets of tensors that are rotated. Maps are channels-last for the contenders that say so, and for ours."""

    op: Op
    shape: Any
    direction: str
    dtype: torch.dtype
    context: Context
    replays: int = 0
    unit: str = "calls"
    per_run: float = 1.0
    flops: int | None = field(init=False, default=None)
    bytes: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.context.toy:
            self.shape = self.op.toy
        self.arguments = self.op.arguments(self.shape)
        generator = torch.Generator().manual_seed(1)
        device = self.context.device
        self.sets = [[a.make(generator, device, self.dtype) for a in self.arguments] for _ in range(models.INPUTS)]
        self.rms = self.direction == BOTH
        self.flops, self.bytes = count(self.op, self.shape, self.direction, self.dtype)
        self.cotangents: dict[torch.dtype, Tensor] = {}

    def _leaves(self, tensors: Sequence[Tensor], channels_last: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The tensors to be handed to a contender, which need gradients if it is to give them."""
        found = []
        for argument, tensor in zip(self.arguments, tensors, strict=True):
            layout = torch.channels_last if argument.map and channels_last else torch.preserve_format
            tensor = tensor.detach().to(dtype or self.dtype, memory_format=layout)
            found.append(tensor.requires_grad_(argument.gradient and self.direction == BOTH))
        return found

    def _both_passes(self, function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        """[output], or [output, gradients]."""
        if self.direction == FORWARD:
            with torch.no_grad():
                return [function(self.shape, *leaves)]
        out = function(self.shape, *leaves)
        if out.dtype not in self.cotangents:
            generator = torch.Generator().manual_seed(2)
            self.cotangents[out.dtype] = torch.randn(out.shape, generator=generator).to(out)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, self.cotangents[out.dtype])]

    def _judged(self, results: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        if self.op.judged is None:
            return results
        inputs = self._leaves(self.sets[0], False, dtype or gate.exact_dtype(self.dtype))
        return [self.op.judged(self.shape, results[0], *inputs)]

    def exact(self) -> list[Tensor]:
        wide = gate.exact_dtype(self.dtype)
        with measure.full_precision():
            return self._judged(self._both_passes(self.op.plain, self._leaves(self.sets[0], False, wide)))

    def other_plain(self) -> list[Tensor] | None:
        """Of maps, in channels-last memory."""
        if not any(argument.map for argument in self.arguments):
            return None
        return self._judged(self._both_passes(self.op.plain, self._leaves(self.sets[0], True)))

    def prepare(self, contender: str) -> Prepared:
        function, channels_last, note = self._contender(contender)
        sets = [self._leaves(tensors, channels_last) for tensors in self.sets]
        if self.replays:
            run = self._captured(function, sets)
        else:

            def run(index: int) -> list[Tensor]:
                return self._both_passes(function, sets[index % len(sets)])

        compiled = contender == "torch.compile"
        held = sum(tensor.nbytes for tensor in sets[0])
        return Prepared(
            run,
            outputs=lambda: self._judged(run(0)),
            recorded=lambda: self._both_passes(function, sets[0]),
            held=lambda: held,
            warm_up=int(compiled),
            note=note,
        )

    def _contender(self, name: str) -> tuple[Callable[..., Tensor], bool, str]:
        """Its function, whether its maps are channels-last, and what to say of it."""
        if name == "eager" or name == CHANNELS_LAST:
            return self.op.plain, name == CHANNELS_LAST, ""
        if name == tables.FUSED:
            runs = launch.runs_kernels(self.sets[0][0], self.op.module)
            return self.op.call, True, "" if runs else f"{tables.ALGEBRA}, no kernel on this device"
        if name == "torch.compile":
            return self._compiled()
        return (self._sdpa(SDPA[name]) if name in SDPA else self._xformers()), False, ""

    def _compiled(self) -> tuple[Callable[..., Tensor], bool, str]:
        if self.context.toy:
            return torch.compile(self.op.plain, backend="eager", dynamic=False), True, "traced only"
        if self.context.device.type == "cpu":
            raise Unavailable(NOT_COMPILED_HERE)
        # Graphs are captured here, for all contenders alike.
        return torch.compile(self.op.plain, mode="max-autotune-no-cudagraphs", dynamic=False), True, "max-autotune"

    def _sdpa(self, backend: SDPBackend) -> Callable[..., Tensor]:
        """PyTorch's attention on one backend; Unavailable where that has no code for the device or the shape."""
        if self.context.device.type == "cpu" and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            raise Unavailable("on a CPU PyTorch has the backends flash and math only")

        def attend(shape: Tokens, qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return self.op.plain(shape, qkv)

        try:
            self._both_passes(attend, self._leaves(self.sets[0], False))
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise Unavailable("this backend has no kernel for this device, dtype and shape") from error
            raise
        return attend

    def _xformers(self) -> Callable[..., Tensor]:
        peers.installed("xformers")
        from dpt.encoder import xformers_attention

        return lambda shape, qkv: xformers_attention(qkv, shape.heads)

    def _captured(self, function: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]]) -> measure.Run:
        """Several calls in one CUDA graph, over the sets of inputs in turn; what it returns is of the first set, which comes last."""
        if self.context.device.type != "cuda":
            raise Unavailable(models.NO_GRAPHS)
        models.on_side_stream(lambda: [self._both_passes(function, tensors) for tensors in sets], self.context.device)
        graph, made = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for call in reversed(range(self.replays)):
                made[:] = self._both_passes(function, sets[call % len(sets)])

        def run(index: int) -> list[Tensor]:
            graph.replay()
            return made

        return run


@functools.cache
def count(op: Op, shape: Any, direction: str, dtype: torch.dtype) -> tuple[int, int]:
    """FLOPs of the plain algorithm and the bytes that have to move, counted on the meta device."""
    arguments = op.arguments(shape)
    leaves = [torch.empty(a.shape, dtype=dtype, device="meta", requires_grad=a.gradient and direction == BOTH) for a in arguments]
    with FlopCounterMode(display=False) as counter:
        out = op.plain(shape, *leaves)
        if direction == BOTH:
            out.backward(torch.empty_like(out))
    inputs = sum(leaf.nbytes for leaf in leaves)
    moved = inputs + out.nbytes
    if direction == BOTH:
        moved += inputs + out.nbytes + sum(leaf.nbytes for leaf in leaves if leaf.requires_grad)
    return counter.get_total_flops(), moved


def contenders(op: Op) -> tuple[str, ...]:
    """In order of importance; the first is the baseline."""
    return ("eager", tables.FUSED, *op.peers, "torch.compile")


def cases(device_type: str, dtypes: Iterable[torch.dtype], importance: float) -> Iterator[Case]:
    """Every op, shape, direction and dtype; on a GPU each timed by events and by graph replay."""
    for op in ops():
        for place, shape in enumerate(op.shapes):
            for direction in (FORWARD, BOTH) if op.backward else (FORWARD,):
                for dtype in dtypes:
                    for replays in (0, CALLS_IN_A_GRAPH) if device_type == "cuda" else (0,):
                        yield _case(op, shape, direction, dtype, replays, importance + place)


def _case(op: Op, shape: Any, direction: str, dtype: torch.dtype, replays: int, importance: float) -> Case:
    how = ", graph replay" if replays else ""
    return Case(
        suite="kernels",
        name=f"{op.name} {direction}, {shape}, {str(dtype).removeprefix('torch.')}{how}",
        dtype=dtype,
        shape=op.arguments(shape)[0].shape,
        contenders=contenders(op),
        open=lambda context: KernelWorkload(op, shape, direction, dtype, context, replays),
        importance=importance + (0.5 if direction == BOTH else 0.0),
        estimate=lambda: count(op, shape, direction, dtype)[0],
        replays=replays,
        key=f"{op.name} {direction} {dtype} {replays}",
        facts={"op": op.module, "direction": direction},
    )

"""What a model is, as data: frozen dataclasses that check themselves. `dpt.zoo` has the named ones. Nothing here needs PyTorch."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar

from .rules import FINITE, NAME, POSITIVE, TEXT, TRUTH, Checked, Rule, instance_of, number, one_of, or_none, tuple_of, whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

MAX_WIDTH, MAX_DEPTH, MAX_SIDE = 1 << 16, 1 << 10, 1 << 12  # beyond any model's: a damaged number ends in an error and not in a wait


def numbered_classes(count: int) -> tuple[str, ...]:
    """The names of classes that have none."""
    return tuple(f"class {index}" for index in range(count))


_WIDTH, _BLOCK, _SIDE = whole(1, MAX_WIDTH), whole(0, MAX_DEPTH - 1), whole(1, MAX_SIDE)
_RESIZE = one_of("bilinear", "bicubic")


def _increasing(values: tuple[int, ...]) -> bool:
    return list(values) == sorted(set(values))


ENCODERS = ("vit", "dinov3", "beit", "swinv2")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu")
TASKS = ("depth", "segmentation", "normals")
BIN_SPACINGS = ("linear", "mixed_log")
_NOT_IN = {  # by an encoder's kind, the fields of what it has not: they stay at their defaults
    "beit": (
        *("stem", "stem_hooks", "final_norm", "final_norm_eps", "pos_mode", "pos_offset", "pos_by_count", "pos_antialias"),
        *("attention", "registers"),
    ),
    "dinov3": ("stem", "stem_hooks"),
    "swinv2": (
        *("stem", "stem_hooks", "final_norm", "final_norm_eps", "layer_scale", "pos_mode", "pos_offset", "pos_by_count", "pos_antialias"),
        *("attention", "registers", "mlp", "qkv_bias"),
    ),
}
DEPTHS = ("relu", "sigmoid", "exp", "linear")  # what turns the last channel into depth


@dataclass(frozen=True)
class EncoderConfig(Checked):
    """An encoder; the fields are a Vision Transformer's, and what other kinds have beside or instead."""

    embed_dim: int
    depth: int
    num_heads: int
    hooks: tuple[int, ...]  # 0-based blocks whose tokens go to the decoder, shallow to deep; four with `stem_hooks`
    patch_size: int = 16
    stem: str = "patch"  # the patch embedding: one convolution; "convolutions": four, each halving (Xiao et al. 2021); or "resnetv2"
    stem_hooks: tuple[int, ...] = ()  # 0-based convolutions or stages of the stem whose maps go to the decoder before the tokens
    pos_grid: tuple[int, int] = (24, 24)  # rows and columns of patches the positional embedding, or BEiT's table, is stored for
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    final_norm: str = (
        "none"  # LayerNorm on hooked layers: "none", "every" (Depth Anything), or "last" behind the last block (mmsegmentation)
    )
    layer_scale: bool = False  # DINOv2
    pos_mode: str = "bilinear"  # how the positional embedding is resized
    pos_offset: float = 0.0  # DINOv2 resizes by (n + 0.1) / grid instead of to n
    pos_by_count: bool = False  # mmsegmentation resizes only when the NUMBER of patches differs
    attention: str = "sdpa"  # "sdpa" or "xformers"
    activation: str = "gelu"  # between the MLP's linear layers; "gelu" is the exact one
    kind: str = "vit"  # which of `dpt.nets.encoders`
    final_norm_eps: float | None = None  # of the norm on hooked layers; None is `norm_eps`
    registers: int = 0  # tokens between the class token and the patches, which no decoder reads (DINOv2 with registers)
    pos_antialias: bool = False  # of the resize of the positional embedding
    mlp: str = "mlp"  # "mlp", or "swiglu", whose activation is SiLU (DINOv2 g)
    stem_width: int = 64  # "resnetv2": channels of its first convolution; its stages have 4, 8 and 16 times as many
    stem_depths: tuple[int, int, int] = (3, 4, 9)  # "resnetv2": blocks of each stage
    stem_groups: int = 32  # "resnetv2": of its group norms
    stem_eps_on: str = "deviation"  # "resnetv2": its weights are divided by (deviation + 1e-5), or by the root of ("variance" + 1e-8)
    qkv_bias: bool = True  # of the queries, keys and values
    rope_theta: float = 100.0  # "dinov3": the base of the frequencies by which queries and keys are rotated
    stage_depths: tuple[int, ...] = ()  # "swinv2": blocks of each of four stages; the next has half the grid and twice the width
    stage_heads: tuple[int, ...] = ()  # "swinv2": of each stage, the first `num_heads`
    window: int = 0  # "swinv2": side of the windows in patches; of a grid that is smaller, its own
    pretrained_windows: tuple[int, ...] = ()  # "swinv2": of each stage, the side that distances are measured by; 0 is the window's own
    window_mask: float = -100.0  # "swinv2": added to the scores of patches that only the shift brought into one window

    RULES: ClassVar[Mapping[str, Rule]] = {
        "embed_dim": _WIDTH,
        "depth": whole(1, MAX_DEPTH),
        "num_heads": _WIDTH,
        "hooks": tuple_of(_BLOCK, 0, 4),
        "patch_size": _SIDE,
        "stem": one_of("patch", "convolutions", "resnetv2"),
        "stem_hooks": tuple_of(whole(0, 3), 0, 4),
        "pos_grid": tuple_of(_SIDE, 2),
        "mlp_ratio": number("above 0, at most 64", lambda value: 0 < value <= 64),
        "norm_eps": POSITIVE,
        "final_norm": one_of("none", "every", "last"),
        "layer_scale": TRUTH,
        "pos_mode": _RESIZE,
        "pos_offset": number("from 0 to 1", lambda value: 0 <= value <= 1),
        "pos_by_count": TRUTH,
        "attention": one_of("sdpa", "xformers"),
        "activation": one_of(*ACTIVATIONS),
        "kind": one_of(*ENCODERS),
        "final_norm_eps": or_none(POSITIVE),
        "registers": whole(0, MAX_DEPTH),
        "pos_antialias": TRUTH,
        "mlp": one_of("mlp", "swiglu"),
        "stem_width": _WIDTH,
        "stem_depths": tuple_of(whole(1, 64), 3),
        "stem_groups": _WIDTH,
        "stem_eps_on": one_of("deviation", "variance"),
        "qkv_bias": TRUTH,
        "rope_theta": number("above 1", lambda value: value > 1),
        "stage_depths": tuple_of(whole(1, 64), 0, 4),
        "stage_heads": tuple_of(_WIDTH, 0, 4),
        "window": whole(0, MAX_SIDE),
        "pretrained_windows": tuple_of(whole(0, MAX_SIDE), 0, 4),
        "window_mask": number("below 0", lambda value: value < 0),
    }

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Channels of the maps that `stem_hooks` counts."""
        first, count = {"patch": (0, 0), "convolutions": (self.embed_dim // 8, 4), "resnetv2": (4 * self.stem_width, 3)}[self.stem]
        return tuple(first << index for index in range(count))

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of the levels that the encoder gives as maps, which nothing reassembles, shallow to deep; tokens follow."""
        if self.kind == "swinv2":
            return tuple(self.embed_dim << stage for stage in range(4))
        return tuple(self.stem_widths[index] for index in self.stem_hooks)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width of a picture, of an encoder that takes no other."""
        rows, columns = self.pos_grid
        return (rows * self.patch_size, columns * self.patch_size) if self.kind == "swinv2" else None

    def _conflicts(self) -> Iterable[tuple[bool, str]]:
        hooks, stem = self.hooks, self.stem_hooks
        yield self.embed_dim % self.num_heads != 0, f"embed_dim={self.embed_dim}: it must be a multiple of num_heads={self.num_heads}"
        yield len(hooks) + len(stem) != 4, f"hooks={hooks}: with stem_hooks={stem} they must be four"
        yield not _increasing(hooks), f"hooks={hooks}: they must increase"
        yield bool(hooks) and hooks[-1] >= self.depth, f"hooks={hooks}: they must be below depth={self.depth}"
        yield not _increasing(stem), f"stem_hooks={stem}: they must increase"
        maps = len(self.stem_widths)
        yield bool(stem) and stem[-1] >= maps, f'stem_hooks={stem}: stem="{self.stem}" has {maps or "no"} maps to hook'
        halved = self.stem != "patch"
        yield halved and self.patch_size != 16, f'patch_size={self.patch_size}: stem="{self.stem}" halves four times, for 16'
        eighth = self.stem == "convolutions" and self.embed_dim % 8 != 0
        yield eighth, f'embed_dim={self.embed_dim}: stem="convolutions" begins with an eighth of it'
        grouped = self.stem == "resnetv2" and self.stem_width % self.stem_groups != 0
        yield grouped, f"stem_width={self.stem_width}: it must be a multiple of stem_groups={self.stem_groups}"
        size, rotary = self.embed_dim // self.num_heads, self.kind == "dinov3"
        unturned = rotary and size % 4 != 0
        yield unturned, f"embed_dim={self.embed_dim}: heads of {size} channels cannot be rotated, that takes a multiple of 4"
        for name in _NOT_IN.get(self.kind, ()):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            yield value != default, f"{name}={value!r}: it must be {default!r} with kind={self.kind!r}, which has nothing of that"
        yield self.mlp_ratio * self.embed_dim < 1, f"mlp_ratio={self.mlp_ratio}: it leaves no channel of embed_dim={self.embed_dim}"
        if self.kind == "swinv2":
            yield from self._stage_conflicts()
        else:
            for name in ("stage_depths", "stage_heads", "window", "pretrained_windows"):
                yield bool(getattr(self, name)), f'{name}={getattr(self, name)}: only kind="swinv2" has that'

    def _stage_conflicts(self) -> Iterable[tuple[bool, str]]:
        """Of a kind with four stages."""
        depths, heads, window = self.stage_depths, self.stage_heads, self.window
        for name in ("stage_depths", "stage_heads", "pretrained_windows"):
            value = getattr(self, name)
            yield len(value) != 4, f"{name}={value}: it must be of four stages"
        ends = tuple(sum(depths[: stage + 1]) - 1 for stage in range(4))
        yield self.depth != sum(depths), f"depth={self.depth}: it must be the sum of stage_depths={depths}"
        yield self.hooks != ends, f"hooks={self.hooks}: they must be the stages' last blocks, {ends}"
        yield self.num_heads != heads[0], f"num_heads={self.num_heads}: it must be the first of stage_heads={heads}"
        uneven = any((self.embed_dim << stage) % count for stage, count in enumerate(heads))
        yield uneven, f"stage_heads={heads}: they must divide embed_dim={self.embed_dim} times 1, 2, 4 and 8"
        yield window < 2, f"window={window}: it must be at least 2"
        yield 1 in self.pretrained_windows, f"pretrained_windows={self.pretrained_windows}: 1 measures no distance"
        rows, columns = self.pos_grid
        yield rows != columns or rows % 8 != 0, f"pos_grid={self.pos_grid}: it must be a square that can be halved three times"
        grids = [rows >> stage for stage in range(4)]
        yield any(side > window and side % window for side in grids), f"window={window}: it must divide the grids of {grids} patches"
        yield grids[3] < 2, f"pos_grid={self.pos_grid}: a last grid of one patch has no distances"


@dataclass(frozen=True)
class DecoderConfig(Checked):
    """Reassemble and Fusion."""

    neck_channels: tuple[int, int, int, int]
    features: int = 256
    readout: str = "project"  # how the class token is read: "project", "ignore" or "add"
    readout_activation: str = "gelu"  # behind the readout's projection
    batch_norm: bool = False  # in the residual units
    match_size: bool = False  # upsample to the next level's size (Depth Anything) instead of by two
    dead_unit: bool = False  # the deepest block carries a first unit that is never run (kept for a round trip)
    prompt: bool = False  # each level sees a sensor's depth beside the picture, which sets the scale of the depth (Prompt Depth Anything)
    unit_bias: bool | None = None  # of the residual units' convolutions; None: where there is no batch norm
    float32: bool = False  # decoder and head stay in float32, whatever the encoder's dtype or autocast's (Depth Anything 3)
    token_norm: bool = False  # a batch norm of the tokens' maps, before their projections (DINOv3's 7B)

    RULES: ClassVar[Mapping[str, Rule]] = {
        "neck_channels": tuple_of(_WIDTH, 4),
        "features": whole(2, MAX_WIDTH),
        "readout": one_of("project", "ignore", "add"),
        "readout_activation": one_of(*ACTIVATIONS),
        "batch_norm": TRUTH,
        "match_size": TRUTH,
        "dead_unit": TRUTH,
        "prompt": TRUTH,
        "unit_bias": or_none(TRUTH),
        "float32": TRUTH,
        "token_norm": TRUTH,
    }


@dataclass(frozen=True)
class HeadConfig(Checked):
    """What the fused map is turned into."""

    task: str  # "depth", "segmentation" or "normals"
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    hidden: int = 32  # depth: channels before the last 1x1 convolution
    activation: str = "relu"  # depth: "relu", "sigmoid" times max_depth, "exp" or "linear"
    max_depth: float = 1.0
    inverse: bool = True  # depth: the output is inverse depth up to scale and shift, and not metres (or `relative` depth)
    dropout: float = 0.1
    auxiliary: bool = False  # segmentation: a second classifier on the map one level deeper, for training
    align_corners: bool = True  # of the last upsampling
    project: bool = False  # depth: a 3x3 convolution and ReLU before the head
    offset: float = 0.0  # depth: added behind the activation
    reciprocal: tuple[float, float] | None = None  # depth: scale, shift: then 1 / (scale * x + shift), the sum at least 1e-8
    bounds: tuple[float, float] | None = None  # depth: what it is clamped to, at last
    depth_scale: float = 1000.0  # units of a metre in files of 16 bits
    relative: bool = False  # depth: known up to scale and shift, and not in metres, though it is not inverse
    sky: bool = False  # depth: a second branch finds the sky, which is put as far as the rest of the picture goes
    focal: float | None = None  # depth: metres are the output times the focal length, in pixels of the network's input, over this
    bins: int = 0  # depth: channels of the last layer, each the weight of one depth, of which the mean is taken; 0: one, which is depth
    bin_range: tuple[float, float] = (0.001, 10.0)  # metres: the first and the last of the bins' depths
    bin_spacing: str = "linear"  # between them: "linear", or "mixed_log": from even ratios, near, to even steps, far (CHMv2)
    bin_floor: float = 0.1  # added to each weight, behind a ReLU
    kind: str = "convolutions"  # the paper's, or "linear": a 3x3 convolution and a linear layer, at the fused map's own size (TIPSv2)
    between: str = "relu"  # "linear": what stands between its two layers, "relu" or "none"
    upsample: int | None = None  # depth: the fused map by this factor (DINOv2's: 16 pixels a patch of 14); None: to the input's size
    attractors: tuple[int, ...] = ()  # depth: by how many points each level moves the bins, deep to shallow: ZoeDepth's head
    bin_centres: str = "softplus"  # with attractors: of any depth, or "normed", which stay within `bin_range`
    bin_width: int = 128  # with attractors: channels of the levels' embeddings
    temperature: tuple[float, float] = (0.0212, 50.0)  # with attractors: the bounds of what the bins' weights are divided by
    domains: tuple[str, ...] = ()  # with attractors: names of those between which a router chooses, each with bins of its own

    RULES: ClassVar[Mapping[str, Rule]] = {
        "task": one_of(*TASKS),
        "classes": tuple_of(TEXT, 0, MAX_WIDTH),
        "palette": tuple_of(tuple_of(whole(0, 255), 3), 0, MAX_WIDTH),
        "hidden": _WIDTH,
        "activation": one_of(*DEPTHS),
        "max_depth": POSITIVE,
        "inverse": TRUTH,
        "dropout": number("from 0 to 1", lambda value: 0 <= value <= 1),
        "auxiliary": TRUTH,
        "align_corners": TRUTH,
        "project": TRUTH,
        "offset": FINITE,
        "reciprocal": or_none(tuple_of(FINITE, 2)),
        "bounds": or_none(tuple_of(FINITE, 2)),
        "depth_scale": POSITIVE,
        "relative": TRUTH,
        "sky": TRUTH,
        "focal": or_none(POSITIVE),
        "bins": whole(0, MAX_WIDTH),
        "bin_range": tuple_of(POSITIVE, 2),
        "bin_spacing": one_of(*BIN_SPACINGS),
        "bin_floor": POSITIVE,
        "kind": one_of("convolutions", "linear"),
        "between": one_of("relu", "none"),
        "upsample": or_none(whole(1, 16)),
        "attractors": tuple_of(whole(1, MAX_WIDTH), 0, 4),
        "bin_centres": one_of("softplus", "normed"),
        "bin_width": whole(2, MAX_WIDTH),
        "temperature": tuple_of(POSITIVE, 2),
        "domains": tuple_of(NAME, 0, 16),
    }

    @property
    def metric(self) -> bool:
        """Whether it predicts metres, and nothing that is known up to scale and shift."""
        return self.task == "depth" and not self.inverse and not self.relative

    def _conflicts(self) -> Iterable[tuple[bool, str]]:
        segmentation, classes, colours = self.task == "segmentation", len(self.classes), len(self.palette)
        yield classes != colours, f"palette of {colours} colours: it must have one for each of the {classes} classes"
        yield segmentation and not classes, "classes=(): segmentation needs at least one"
        convolutions = self.kind == "convolutions"
        yield self.auxiliary and not (segmentation and convolutions), "auxiliary=True: only segmentation by convolutions has that head"
        yield self.task == "normals" and convolutions, "task='normals': only kind=\"linear\" gives them"
        for name in ("relative", "sky", "focal"):
            value = getattr(self, name)
            yield bool(value) and (self.task != "depth" or self.inverse), f"{name}={value}: only depth that is not inverse has it"
        yield self.sky and not convolutions, 'sky=True: only kind="convolutions" has that branch'
        yield self.relative and self.focal is not None, f"focal={self.focal}: it makes metres, and relative=True says there are none"
        for name in ("bin_range", "temperature"):
            low, high = getattr(self, name)
            yield low >= high, f"{name}={(low, high)}: the first must be below the second"
        levels = len(self.attractors)
        yield levels not in (0, 4), f"attractors={self.attractors}: they must be of four levels, or none"
        yield levels > 0 and self.bins < 2, f"attractors={self.attractors}: they move at least two bins, not {self.bins}"
        yield levels > 0 and (segmentation or self.project), f"attractors={self.attractors}: only depth, without project, has them"
        single = len(set(self.domains)) < max(2, len(self.domains))
        yield bool(self.domains) and (not levels or single), f"domains={self.domains}: two different ones at least, with attractors"
        yield self.bounds is not None and self.bounds[0] >= self.bounds[1], f"bounds={self.bounds}: the first must be below the second"
        yield self.bins == 1, "bins=1: a mean is of two at least"
        yield self.bins > 0 and self.task != "depth", f"bins={self.bins}: only depth is a mean of bins"


@dataclass(frozen=True)
class InputConfig(Checked):
    """How a picture becomes the model's input, and its output a map of the picture's size."""

    mean: tuple[float, float, float]  # on RGB in 0..1
    std: tuple[float, float, float]
    size: tuple[int, int]  # height, width that `rule` aims at
    rule: str = "minimal"  # see `dpt.inference.resizing.network_size`
    multiple: int = 16
    pad: str = "none"  # how the multiple is reached: by resizing, or with zeros, see `dpt.inference.resizing.padded`
    mode: str = (
        "bicubic"  # of the resize on the way in; OpenCV's: "area_cubic", INTER_AREA down and INTER_CUBIC up of 8 bits; "area" of floats
    )
    antialias: bool = False  # average over the pixels that a smaller map leaves out; every upstream but ours does not
    output_mode: str = "bicubic"  # of the resize on the way out
    output_align_corners: bool = False
    grey_levels: bool = False  # the resize on the way in ends in whole ones from 0 to 255, of pictures of 8 bits (transformers)
    align_corners: bool = False  # of the resize on the way in (ZoeDepth)
    border: float = 0.0  # reflect the picture beyond its edges before that resize, by this times the root of half a side (ZoeDepth: 3)
    flip: bool = False  # predict the mirrored picture, too, and average (ZoeDepth)

    RULES: ClassVar[Mapping[str, Rule]] = {
        "mean": tuple_of(FINITE, 3),
        "std": tuple_of(POSITIVE, 3),
        "size": tuple_of(whole(1, MAX_WIDTH), 2),
        "rule": one_of(
            *("minimal", "lower_bound", "upper_bound", "short_side", "short_and_long_side", "longest_side", "at_most", "square", "none")
        ),
        "multiple": _SIDE,
        "pad": one_of("none", "corner", "centre"),
        "mode": one_of("bilinear", "bicubic", "area", "area_cubic"),
        "antialias": TRUTH,
        "output_mode": _RESIZE,
        "output_align_corners": TRUTH,
        "grey_levels": TRUTH,
        "align_corners": TRUTH,
        "border": number("from 0 to 64", lambda value: 0 <= value <= 64),
        "flip": TRUTH,
    }

    def _conflicts(self) -> Iterable[tuple[bool, str]]:
        yield self.antialias and self.mode.startswith("area"), f"antialias=True: mode={self.mode} averages by itself"
        resized = self.antialias or self.mode.startswith("area")
        yield self.align_corners and resized, "align_corners=True: a resize that averages has no such form"


OPEN_LICENCES = ("Apache-2.0", "MIT", "BSD-3-Clause")
SECTIONS: dict[str, type] = {"encoder": EncoderConfig, "decoder": DecoderConfig, "head": HeadConfig, "input": InputConfig}


@dataclass(frozen=True)
class TaskConfig(Checked):
    """A further task on an encoder: a decoder and a head of its own."""

    decoder: DecoderConfig
    head: HeadConfig

    RULES: ClassVar[Mapping[str, Rule]] = {"decoder": instance_of(DecoderConfig), "head": instance_of(HeadConfig)}


@dataclass(frozen=True)
class DPTConfig(Checked):
    """One named model.

    `source` is where `weights="pretrained"` comes from: a file name inside the package, an address, or two, of a backbone and a head; a
    file whose name there ends in the first hex digits of its SHA-256 is checked. `licence` is that of the weights.
    """

    name: str
    encoder: EncoderConfig
    decoder: DecoderConfig
    head: HeadConfig
    input: InputConfig
    source: str | tuple[str, ...] | None = None
    licence: str = "Apache-2.0"
    further: tuple[TaskConfig, ...] = ()  # more tasks on the same encoder, each another than the first and the others

    RULES: ClassVar[Mapping[str, Rule]] = {
        "name": NAME,  # it becomes part of files' names
        **{name: instance_of(section) for name, section in SECTIONS.items()},
        "source": Rule("text, two of it, or None", lambda value: value is None or type(value) is str or tuple_of(TEXT, 2).holds(value)),
        "licence": TEXT,
        "further": tuple_of(instance_of(TaskConfig), 0, len(TASKS) - 1),
    }

    def _conflicts(self) -> Iterable[tuple[bool, str]]:
        tasks = [head.task for head in self.heads]
        float32 = {self.decoder.float32, *(task.decoder.float32 for task in self.further)}
        yield len(float32) > 1, "further: float32 is of all decoders, or of none"
        yield len(set(tasks)) < len(tasks), f"further: the tasks are {', '.join(tasks)}, of which each must be another"
        border, others = self.input.border, [task for task in tasks if task != "depth"]
        yield border > 0 and bool(others), f"input.border={border}: it is cut off depth maps alone, not off {' and '.join(others)}"

    @property
    def heads(self) -> tuple[HeadConfig, ...]:
        """Of all tasks, the first one first."""
        return self.head, *(task.head for task in self.further)

    @property
    def carried(self) -> bool:
        """Whether the package holds the pretrained weights; all others are downloads."""
        return isinstance(self.source, str) and "://" not in self.source

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the files that are downloaded: none, one, or a backbone's and a head's."""
        if self.source is None or self.carried:
            return ()
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def restricted(self) -> bool:
        """Whether the licence of the weights does not allow every use, so that it has to be accepted before they are downloaded."""
        return not self.carried and self.licence not in OPEN_LICENCES

    def with_(self, section: str, **changes: Any) -> DPTConfig:
        """A copy with fields of one section changed, e.g. `config.with_("encoder", attention="xformers")`."""
        return replace(self, **{section: replace(getattr(self, section), **changes)})


_EARLIER = {  # values that files written before hold
    ("encoder", "final_norm"): {False: "none", True: "every"},
    ("input", "pad"): {False: "none", True: "corner"},
}


def differences(config: DPTConfig, other: DPTConfig) -> Iterator[tuple[str, Any, Any]]:
    """Of each field, but for names and colours of classes, whose values are not the same: its name, ours and theirs."""
    for section in ("encoder", "decoder", "head", "input"):
        ours, theirs = getattr(config, section), getattr(other, section)
        for field in fields(ours):
            one, two = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name not in ("classes", "palette", "attention", "depth_scale") and not _same(one, two):
                yield f"{section}.{field.name}", one, two


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple) and isinstance(two, tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, float) and isinstance(two, float | int):
        return abs(one - two) <= 1e-6 * abs(one)
    return bool(one == two)


def config_from(values: Any) -> DPTConfig:
    """The configuration that `dataclasses.asdict` and JSON made these values of; ValueError names the field, its value and the rule."""
    given = dict(_mapping(values, "the configuration"))
    for name in SECTIONS:
        if name in given:
            given[name] = _section(name, given[name])
    if "further" in given:
        given["further"] = tuple(_task(index, values) for index, values in enumerate(_list(given["further"], "further")))
    config: DPTConfig = _made(DPTConfig, {name: _tuples(value) for name, value in given.items()}, "")
    # Not a rule of DPTConfig: with_ changes one section at a time, and the two need not agree in between.
    encoder, channels, size = config.encoder, config.decoder.neck_channels, config.input.size
    for level, width in enumerate(encoder.map_widths):
        if channels[level] != width:
            raise ValueError(f"DecoderConfig.neck_channels={channels}: level {level} is a map of the encoder, which has {width} channels")
    if encoder.fixed_size not in (None, size) or (encoder.fixed_size and config.input.rule != "square"):
        rule = f'the encoder takes {encoder.fixed_size} alone, with rule="square"'
        raise ValueError(f"InputConfig.size={size}, rule={config.input.rule!r}: {rule}")
    return config


def _section(name: str, values: Any, where: str = "") -> Any:
    part = {key: _earlier(name, key, _tuples(value)) for key, value in _mapping(values, where + name).items()}
    return _made(SECTIONS[name], part, f"{where}{name}.")


def _task(index: int, values: Any) -> TaskConfig:
    where = f"further[{index}]."
    given = {
        name: _section(name, value, where) if name in TaskConfig.RULES else value for name, value in _mapping(values, where[:-1]).items()
    }
    task: TaskConfig = _made(TaskConfig, given, where)
    return task


def _list(values: Any, name: str) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} is a {type(values).__name__}: it must be a list")
    return list(values)


def _mapping(values: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is a {type(values).__name__}: it must be an object with a value for each field")
    return values


def _made(section: type, values: dict[str, Any], where: str) -> Any:
    known = {field.name: field.default is MISSING for field in fields(section)}
    for name in values:
        if name not in known:
            raise ValueError(f"{where}{name}={reprlib.repr(values[name])}: no such field, {section.__name__} has {', '.join(known)}")
    for name, required in known.items():
        if required and name not in values:
            raise ValueError(f"{where}{name} is missing")
    return section(**values)


def _earlier(section: str, field: str, value: Any) -> Any:
    table = _EARLIER.get((section, field), {})
    return table[value] if type(value) is bool and value in table else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

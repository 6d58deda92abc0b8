"""Each family's keys in terms of ours, one table a layout, and a state dict brought from one to the other, strictly.

A table row is (our key, their key). `{n}` is a block, `{i}` a level from 0 (shallow) to 3, `{j}` = 3 - i, `{k}` = i + 1, and `{p}`
the rest of the key. A row whose second part is a tuple joins tensors along their first dimension.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .stored import CheckpointError, Opaque, Stored

State = Mapping[str, Stored | Opaque | Tensor]
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Layout:
    """How one family of files names its tensors.

    `marker` is a key only this layout has. `unused` are patterns of keys that the network never reads. `norm_eps`, where the
    family's own code runs another LayerNorm epsilon than the named model. `final_norm`: what it means that a file holds the encoder's norm.
    """

    name: str
    marker: str
    rows: tuple[tuple[str, str | tuple[str, ...]], ...]
    unused: tuple[str, ...] = ()
    norm_eps: float | None = None
    final_norm: str = "every"

    def source(self, key: str) -> tuple[str, ...]:
        """Their key(s) for one of ours."""
        for ours, theirs in self.rows:
            match = _pattern(ours).fullmatch(key)
            if match:
                names = match.groupdict()
                if "i" in names:
                    names |= {"j": str(3 - int(names["i"])), "k": str(int(names["i"]) + 1)}
                return tuple(their.format(**names) for their in ((theirs,) if isinstance(theirs, str) else theirs))
        raise CheckpointError(f"the layout {self.name} has no {key}: its models have no such part")

    def find(self, key: str, state: State) -> Stored | Opaque | Tensor | None:
        """The state's (first) tensor for one of our keys; None if it or the layout has none."""
        try:
            return state.get(self.source(key)[0])
        except CheckpointError:
            return None


@functools.cache
def _pattern(template: str) -> re.Pattern:
    """The regular expression of one of our keys in a table."""
    escaped = re.escape(template)
    for name, what in (("n", r"\d+"), ("i", r"\d"), ("p", r"[\w.]+")):
        escaped = escaped.replace(rf"\{{{name}\}}", f"(?P<{name}>{what})")
    return re.compile(escaped)


def _residual_units(theirs: str, conv: str, norm: str) -> tuple[tuple[str, str], ...]:
    """The rows of both residual units; in the templates `#` is the unit and `@` the convolution within it."""
    return tuple(
        (f"fusion.blocks.{{i}}.unit{unit}.{ours}{index}.{{p}}", theirs.replace("#", str(unit)) + their.replace("@", str(index)) + ".{p}")
        for unit in (1, 2)
        for index in (1, 2)
        for ours, their in (("conv", conv), ("norm", norm))
    )


MMSEG = Layout(
    name="mmsegmentation",
    marker="backbone.patch_embed.projection.weight",
    rows=(
        ("encoder.cls_token", "backbone.cls_token"),
        ("encoder.pos_embed", "backbone.pos_embed"),
        ("encoder.patch_embed.{p}", "backbone.patch_embed.projection.{p}"),
        ("encoder.blocks.{n}.norm1.{p}", "backbone.layers.{n}.ln1.{p}"),
        ("encoder.blocks.{n}.attn.qkv.{p}", "backbone.layers.{n}.attn.attn.in_proj_{p}"),
        ("encoder.blocks.{n}.attn.proj.{p}", "backbone.layers.{n}.attn.attn.out_proj.{p}"),
        ("encoder.blocks.{n}.norm2.{p}", "backbone.layers.{n}.ln2.{p}"),
        ("encoder.blocks.{n}.mlp.fc1.{p}", "backbone.layers.{n}.ffn.layers.0.0.{p}"),
        ("encoder.blocks.{n}.mlp.fc2.{p}", "backbone.layers.{n}.ffn.layers.1.{p}"),
        ("encoder.norm.{p}", "backbone.ln1.{p}"),
        ("reassemble.{i}.readout.linear.{p}", "decode_head.reassemble_blocks.readout_projects.{i}.0.{p}"),
        ("reassemble.{i}.project.{p}", "decode_head.reassemble_blocks.projects.{i}.conv.{p}"),
        ("reassemble.{i}.resize.{p}", "decode_head.reassemble_blocks.resize_layers.{i}.{p}"),
        ("fusion.convs.{i}.{p}", "decode_head.convs.{i}.conv.{p}"),
        ("fusion.blocks.{i}.project.{p}", "decode_head.fusion_blocks.{j}.project.conv.{p}"),
        *_residual_units("decode_head.fusion_blocks.{j}.res_conv_unit#.", "conv@.conv", "conv@.bn"),
        ("head.conv.{p}", "decode_head.project.conv.{p}"),
        ("head.norm.{p}", "decode_head.project.bn.{p}"),
        ("head.classifier.{p}", "decode_head.conv_seg.{p}"),
    ),
    unused=(r"auxiliary_head\..*",),
    final_norm="last",
)

ISL = Layout(
    name="isl-org",
    marker="pretrained.model.patch_embed.proj.weight",
    rows=(
        ("encoder.cls_token", "pretrained.model.cls_token"),
        ("encoder.pos_embed", "pretrained.model.pos_embed"),
        ("encoder.patch_embed.{p}", "pretrained.model.patch_embed.proj.{p}"),
        ("encoder.blocks.{n}.{p}", "pretrained.model.blocks.{n}.{p}"),
        ("reassemble.{i}.readout.linear.{p}", "pretrained.act_postprocess{k}.0.project.0.{p}"),
        ("reassemble.{i}.project.{p}", "pretrained.act_postprocess{k}.3.{p}"),
        ("reassemble.{i}.resize.{p}", "pretrained.act_postprocess{k}.4.{p}"),
        ("fusion.convs.{i}.{p}", "scratch.layer{k}_rn.{p}"),
        ("fusion.blocks.{i}.project.{p}", "scratch.refinenet{k}.out_conv.{p}"),
        *_residual_units("scratch.refinenet{k}.resConfUnit#.", "conv@", "bn@"),
        ("head.conv1.{p}", "scratch.output_conv.0.{p}"),
        ("head.conv2.{p}", "scratch.output_conv.2.{p}"),
        ("head.conv3.{p}", "scratch.output_conv.4.{p}"),
        ("head.conv.{p}", "scratch.output_conv.0.{p}"),
        ("head.norm.{p}", "scratch.output_conv.1.{p}"),
        ("head.classifier.{p}", "scratch.output_conv.4.{p}"),
        ("auxiliary_head.conv.{p}", "auxlayer.0.{p}"),
        ("auxiliary_head.norm.{p}", "auxlayer.1.{p}"),
        ("auxiliary_head.classifier.{p}", "auxlayer.4.{p}"),
    ),
    unused=(r"pretrained\.model\.(norm|head|pre_logits)\..*",),
)

TRANSFORMERS = Layout(
    name="transformers",
    marker="dpt.embeddings.patch_embeddings.projection.weight",
    rows=(
        ("encoder.cls_token", "dpt.embeddings.cls_token"),
        ("encoder.pos_embed", "dpt.embeddings.position_embeddings"),
        ("encoder.patch_embed.{p}", "dpt.embeddings.patch_embeddings.projection.{p}"),
        ("encoder.blocks.{n}.norm1.{p}", "dpt.encoder.layer.{n}.layernorm_before.{p}"),
        (
            "encoder.blocks.{n}.attn.qkv.{p}",
            tuple(f"dpt.encoder.layer.{{n}}.attention.attention.{part}.{{p}}" for part in ("query", "key", "value")),
        ),
        ("encoder.blocks.{n}.attn.proj.{p}", "dpt.encoder.layer.{n}.attention.output.dense.{p}"),
        ("encoder.blocks.{n}.norm2.{p}", "dpt.encoder.layer.{n}.layernorm_after.{p}"),
        ("encoder.blocks.{n}.mlp.fc1.{p}", "dpt.encoder.layer.{n}.intermediate.dense.{p}"),
        ("encoder.blocks.{n}.mlp.fc2.{p}", "dpt.encoder.layer.{n}.output.dense.{p}"),
        ("reassemble.{i}.readout.linear.{p}", "neck.reassemble_stage.readout_projects.{i}.0.{p}"),
        ("reassemble.{i}.project.{p}", "neck.reassemble_stage.layers.{i}.projection.{p}"),
        ("reassemble.{i}.resize.{p}", "neck.reassemble_stage.layers.{i}.resize.{p}"),
        ("fusion.convs.{i}.{p}", "neck.convs.{i}.{p}"),
        ("fusion.blocks.{i}.project.{p}", "neck.fusion_stage.layers.{j}.projection.{p}"),
        *_residual_units("neck.fusion_stage.layers.{j}.residual_layer#.", "convolution@", "batch_norm@"),
        ("head.conv1.{p}", "head.head.0.{p}"),
        ("head.conv2.{p}", "head.head.2.{p}"),
        ("head.conv3.{p}", "head.head.4.{p}"),
        ("head.conv.{p}", "head.head.0.{p}"),
        ("head.norm.{p}", "head.head.1.{p}"),
        ("head.classifier.{p}", "head.head.4.{p}"),
        ("auxiliary_head.conv.{p}", "auxiliary_head.head.0.{p}"),
        ("auxiliary_head.norm.{p}", "auxiliary_head.head.1.{p}"),
        ("auxiliary_head.classifier.{p}", "auxiliary_head.head.4.{p}"),
    ),
    unused=(r"dpt\.(layernorm|pooler)\..*",),
    norm_eps=1e-12,
)

NATIVE = Layout(name="dpt", marker="encoder.pos_embed", rows=(("{p}", "{p}"),))

LAYOUTS = (NATIVE, MMSEG, ISL, TRANSFORMERS)


def layout_of(state: Mapping[str, object], path: str | Path = "state dict") -> Layout:
    """The layout whose marker the state has; CheckpointError if none."""
    for layout in LAYOUTS:
        if layout.marker in state:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointError(f"{path}: no known layout (known: {known}); its first keys are {', '.join(sorted(state)[:3])}")


def problems(state: State, layout: Layout, expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state from being the expected one, told by names, types and shapes: none of its values is read."""
    foreign, found, used = [], [], set()
    for key, tensor in expected.items():
        try:
            names = layout.source(key)
        except CheckpointError as error:
            foreign.append(str(error))
            continue
        used.update(names)
        missing = [name for name in names if name not in state]
        if missing:
            found += [] if _may_be_missing(key) else [f"{', '.join(missing)} is missing"]
            continue
        wrong = [f"{name} {problem}" for name in names if (problem := _unfit(state[name], tensor)) is not None]
        shape = None if wrong else _joined_shape([state[name] for name in names])
        if shape is not None and shape != tuple(tensor.shape):
            wrong = [f"{names[0]} has shape {shape}, the model's {key} {tuple(tensor.shape)}"]
        found += wrong
    unused = re.compile("|".join(layout.unused) or r"(?!)")
    left = [f"{name} is not used by the model" for name in state if name not in used and not unused.fullmatch(name)]
    return foreign + found + left or _overlaps([value for name in used if isinstance(value := state.get(name), Stored)])


def _overlaps(values: list[Stored]) -> list[str]:
    """What to say of tensors that share their storages' bytes: a small file could claim any amount of memory that way."""
    claimed = sum(math.prod(value.shape) * value.dtype.itemsize for value in values)
    held = sum(storage.size for storage in {value.storage for value in values})
    return [f"tensors overlap: they claim {claimed} bytes of storages of {held}"] if claimed > held else []


def _may_be_missing(key: str) -> bool:
    """BatchNorm's step counter came with PyTorch 0.4.1 and is not in every file."""
    return key.endswith("num_batches_tracked")


def _unfit(value: Stored | Opaque | Tensor, expected: Tensor) -> str | None:
    """Why a value cannot be a tensor like the expected one, whatever its shape; None if it can."""
    if isinstance(value, Opaque):
        return f"is {value.what}, where a dense tensor is needed"
    allowed = FLOATING if expected.is_floating_point() else INTEGER
    if value.dtype not in allowed:
        return f"is of {value.dtype}, where one of {', '.join(map(str, allowed))} is needed"
    return value.problem() if isinstance(value, Stored) else None


def _joined_shape(parts: list[Stored | Tensor]) -> tuple[int, ...]:
    """The shape of tensors joined along their first dimension; that of the first which does not fit the others, if so."""
    shapes = [tuple(part.shape) for part in parts]
    odd = [shape for shape in shapes if shape[1:] != shapes[0][1:] or (len(shapes) > 1 and not shape)]
    if odd or len(shapes) == 1:
        return (odd or shapes)[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def convert(
    state: State,
    layout: Layout,
    expected: Mapping[str, Tensor],
    path: str | Path = "state dict",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The state under our keys, strictly: every expected key once and in its shape, every key of the file used or known unused.

    Args:
        expected: the model's state dict; shapes and dtypes are looked at, so it may be on the meta device.
        device: where the tensors go; each goes as it is read.
        dtype: of floating tensors; None is the expected one's.

    Raises:
        CheckpointError: naming the keys that are missing, left over or of another shape or type, or whose values are not finite, or, of a
            running variance, negative.
    """
    wrong = problems(state, layout, expected)
    if wrong:
        raise CheckpointError(f"{path} ({layout.name} layout) does not fit the model: {shortened(wrong)}")
    converted = {}
    for key, tensor in expected.items():
        names = layout.source(key)
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if names[0] not in state:
            converted[key] = torch.zeros(tensor.shape, dtype=target, device=device)
            continue
        parts = [_checked(state[name], name, key, target, path).to(device) for name in names]
        converted[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return converted


def shortened(wrong: list[str], count: int = 5) -> str:
    """The first of a list of problems, and how many more there are."""
    return "; ".join(wrong[:count]) + (f"; and {len(wrong) - count} more" if len(wrong) > count else "")


def _checked(value: Stored | Tensor, name: str, key: str, dtype: torch.dtype, path: str | Path) -> Tensor:
    """A tensor's values in a dtype; CheckpointError if some are not finite there, or negative where they must not be."""
    values = (value.read() if isinstance(value, Stored) else value).to(dtype)
    if not _finite(values):
        original = value.read() if isinstance(value, Stored) else value
        first = original[~values.isfinite()][0].item()
        raise CheckpointError(f"{path}: {name} holds {first:g}, where every value must be finite in {dtype}")
    # Zero is right: a channel that never fired has no variance, and epsilon is added to it.
    if key.endswith(("running_var", "num_batches_tracked")) and values.numel() and values.min() < 0:
        raise CheckpointError(f"{path}: {name} holds {values.min().item():g}, where nothing may be below 0")
    return values


_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}  # integers of as many bytes


def _finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN.

    Seen as integers, infinity and NaN are the largest: of those without a sign bit signed, of those with one unsigned. Two maxima by NumPy
    read the memory twice and write none, on one thread: PyTorch's would wake its others between any two reads from the file.
    """
    if not values.is_floating_point() or not values.numel():
        return True
    signed, unsigned = _BITS[values.element_size()]
    integers = values.detach().view(signed).numpy()
    infinity = torch.tensor([torch.inf, -torch.inf], dtype=values.dtype, device="cpu").view(signed).numpy()
    return bool(integers.max() < infinity[0]) and bool(integers.view(unsigned).max() < infinity.view(unsigned)[1])

"""Checkpoint files: reading them safely, telling their layout, and their keys in terms of ours, one table a layout.

A table row is (our key, their key). `{n}` is a block, `{i}` a level from 0 (shallow) to 3, `{j}` = 3 - i, `{k}` = i + 1, and `{p}`
the rest of the key. A row whose second part is a tuple joins tensors along their first dimension.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A file that is no checkpoint of the model it was loaded into; the message says which keys or why."""


@dataclass(frozen=True)
class Layout:
    """How one family of files names its tensors.

    `marker` is a key only this layout has. `unused` are patterns of keys that the network never reads. `norm_eps`, where the
    family's own code runs another LayerNorm epsilon than the named model.
    """

    name: str
    marker: str
    rows: tuple[tuple[str, str | tuple[str, ...]], ...]
    unused: tuple[str, ...] = ()
    norm_eps: float | None = None

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
    unused=(r"auxiliary_head\..*", r"backbone\.ln1\..*"),
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


def read(path: str | Path) -> tuple[State, dict[str, str]]:
    """The tensors and the metadata of a safetensors file or of a PyTorch file, which is read with `weights_only=True`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is truncated, is something else, or is a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: not a PyTorch file of plain tensors, which is all that is loaded from a pickle ({reason})"
        ) from error
    return _unwrap(content, path), {}


def _unwrap(content, path: Path) -> State:
    """The state dict inside what mmsegmentation ("state_dict"), isl-org ("model") or DDP ("module.") wrap around it."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a state dict of tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def layout_of(state: Mapping[str, Tensor], path: str | Path = "state dict") -> Layout:
    """The layout whose marker the state has; CheckpointError if none."""
    for layout in LAYOUTS:
        if layout.marker in state:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointError(f"{path}: no known layout (known: {known}); its first keys are {', '.join(sorted(state)[:3])}")


def convert(state: Mapping[str, Tensor], layout: Layout, expected: Mapping[str, Tensor], path: str | Path = "state dict") -> State:
    """The state under our keys, strictly: every expected key once and in its shape, every key of the file used or known unused.

    Raises:
        CheckpointError: naming the keys that are missing, left over or of another shape.
    """
    converted, used, problems = {}, set(), []
    for key, tensor in expected.items():
        names = layout.source(key)
        used.update(names)
        missing = [name for name in names if name not in state]
        if missing:
            # BatchNorm's step counter came with PyTorch 0.4.1 and is not in every file.
            if key.endswith("num_batches_tracked"):
                converted[key] = torch.zeros_like(tensor, device="cpu")
            else:
                problems.append(f"{', '.join(missing)} is missing")
            continue
        value = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        if value.shape != tensor.shape:
            problems.append(f"{names[0]} has shape {tuple(value.shape)}, the model's {key} {tuple(tensor.shape)}")
        converted[key] = value
    unused = re.compile("|".join(layout.unused) or r"(?!)")
    problems += [f"{name} is not used by the model" for name in state if name not in used and not unused.fullmatch(name)]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{path} ({layout.name} layout) does not fit the model: {shown}")
    return converted


def load_into(model: nn.Module, path: str | Path) -> None:
    """Load a file of any known layout into a model, strictly; CheckpointError names what does not fit."""
    state, _ = read(path)
    model.load_state_dict(convert(state, layout_of(state, path), model.state_dict(), path))


def save(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model of ours as safetensors with its configuration, whole or not at all.

    Args:
        dtype: floating-point tensors are stored in it; None keeps the model's own.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: models are saved as .safetensors")
    state = {
        key: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for key, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        temporary = file.name
    try:
        save_file(state, temporary, metadata={"format": "pt", "dpt": json.dumps(asdict(model.config))})
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def saved_config(metadata: Mapping[str, str], path: str | Path) -> DPTConfig | None:
    """The configuration a file of ours carries; None if it carries none, CheckpointError if it is not one."""
    if "dpt" not in metadata:
        return None
    try:
        fields = json.loads(metadata["dpt"])
        sections = {"encoder": EncoderConfig, "decoder": DecoderConfig, "head": HeadConfig, "input": InputConfig}
        for name, section in sections.items():
            fields[name] = section(**{key: _tuples(value) for key, value in fields[name].items()})
        return DPTConfig(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read ({error})") from error


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value

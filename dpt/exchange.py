"""Checkpoints from one family's layout to another's: the same tensors under other names, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoints
from .checkpoints import Checkpoint, CheckpointError, Layout
from .checkpoints.files import INPUT_FILE, MODEL_FILE, WEIGHTS
from .checkpoints.stored import Stored
from .config import DPTConfig
from .factory import config_in
from .model import DPT
from .system.disk import write_whole
from .zoo import FAMILIES, LAYOUTS, carried, configs_in, mmsegmentation
from .zoo.stated import Document

UNUSED = "unused."  # before what the network never reads, in files of ours; then the format that it is of
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

# Fields of a configuration that say how large a model is. The others say what is computed, and a layout's code computes nothing but what
# the named models of its families do.
SIZES = {
    "encoder": {
        *("embed_dim", "depth", "num_heads", "hooks", "pos_grid", "mlp_ratio", "attention"),
        *("stem_width", "stem_depths", "stem_groups"),
    },
    "decoder": {"neck_channels", "features"},
    "head": {"classes", "palette", "hidden", "max_depth", "dropout", "auxiliary", "depth_scale", "bins", "bin_width"},
}


def convert(source: checkpoints.Source, target: str | Path, to: str, name: str | DPTConfig | None = None) -> list[str]:
    """Write a checkpoint in another layout; whole or not at all.

    Args:
        source: what `dpt.load` takes.
        target: a file .safetensors or one of `TORCH_SUFFIXES`; for "hf" a folder.
        to: the `format` of one of `dpt.zoo.LAYOUTS`.
        name: a named model or a configuration, where the source does not settle the architecture.

    Returns:
        What that layout's own code computes otherwise than the source's, a line each.

    Raises:
        CheckpointError: the source fits no model, or that layout has no place for it. ValueError: the target's suffix.
    """
    target = Path(target)
    _check_suffix(target, to)
    checkpoint = checkpoints.find(source)
    layout = checkpoints.layout_of(checkpoint.state, checkpoint.path)
    config = config_in(checkpoint, layout, name)
    state, rest = _contents(checkpoint, layout, config)
    chosen, files = _chosen(config, state, to)
    notes: list[str] = []
    if chosen is carried.LAYOUT:
        before = "" if layout is chosen else f"{UNUSED}{layout.format}."
        tensors = dict(state) | {before + key: value for key, value in rest.items()}
    else:
        kept = rest if layout.format == to else _kept(rest, to)
        tensors = checkpoints.reverted(state, chosen, config.encoder.embed_dim) | kept
        tensors = {chosen.prefix + key: value for key, value in tensors.items()}
        notes = [
            f"{chosen.name} computes {field}={theirs!r}, {layout.name} {ours_!r}"
            for field, ours_, theirs in differences(config, run_by(chosen, files, config))
        ]
    _write(target, tensors, config, chosen, files)
    return notes


def vit2mmseg(source: checkpoints.Source, target: str | Path) -> list[str]:
    """Write a ViT of timm (or JAX' by timm, or DeiT) as mmsegmentation's backbone, key for key as its `vit2mmseg.py` does.

    The classifier is left out, and what has no other name is kept under its own. A target .safetensors holds the tensors, one of
    `TORCH_SUFFIXES` what torch.load gives as a dictionary.

    Raises:
        CheckpointError: the source is no such ViT. ValueError: the target's suffix.
    """
    target = Path(target)
    _check_suffix(target, "mmseg")
    checkpoint = checkpoints.find(source)
    if not {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= checkpoint.state.keys():
        first = ", ".join(sorted(checkpoint.state)[:3])
        raise CheckpointError(
            f"{checkpoint.path}: no ViT of timm's, which has patch_embed.proj.weight and blocks.0; its first keys are {first}"
        )
    found = {}
    for key, value in checkpoint.state.items():
        if not key.startswith("head"):
            if not isinstance(value, Stored) or value.problem():
                raise CheckpointError(f"{checkpoint.path}: {key} cannot be read")
            found[_in_mmsegmentation(key)] = value.read()
    _write(target, found, None, mmsegmentation.LAYOUT, None)
    return []


def _in_mmsegmentation(key: str) -> str:
    ours = "encoder." + re.sub(r"^patch_embed\.proj\.", "patch_embed.", key)
    try:
        (name,) = mmsegmentation.LAYOUT.source(ours)
    except CheckpointError:
        return key
    return str(name).removeprefix("backbone.")


def _check_suffix(target: Path, to: str) -> None:
    if to == "hf":
        if target.suffix in (".safetensors", *TORCH_SUFFIXES) or target.is_file():
            raise ValueError(f"{target}: transformers' layout is a folder, with config.json beside the weights")
        return
    allowed = (".safetensors",) if to == "dpt" else (".safetensors", *TORCH_SUFFIXES)
    if target.suffix not in allowed or target.is_dir():
        raise ValueError(f"{target}: the file to write must end in {', '.join(allowed)}")


def _contents(checkpoint: Checkpoint, layout: Layout, config: DPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors under our keys, those that are in the file, as they are there; and those that the network never reads, under theirs."""
    with torch.device("meta"):
        expected = DPT(config).state_dict()
    state = checkpoints.convert(checkpoint.state, layout, expected, checkpoint.path, as_stored=True)
    sources = {key: [name for name in layout.source(key) if name is not None] for key in expected}
    there = {key: value for key, value in state.items() if set(sources[key]) <= checkpoint.state.keys()}
    used = {name for names in sources.values() for name in names}
    rest = {
        key: value.read()
        for key, value in checkpoint.state.items()
        if key not in used and isinstance(value, Stored) and value.problem() is None
    }
    return there, rest


def _kept(rest: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """What a file of ours keeps of a format, under its own keys."""
    prefix = f"{UNUSED}{to}."
    return {key.removeprefix(prefix): value for key, value in rest.items() if key.startswith(prefix)}


def _chosen(config: DPTConfig, state: Mapping[str, Tensor], to: str) -> tuple[Layout, tuple[dict[str, Any], dict[str, Any]] | None]:
    """The layout of a format that has a place for a model, and, of transformers, what its configuration files say."""
    reasons = []
    for layout in (layout for layout in LAYOUTS if layout.format == to):
        try:
            keys = {name for key in state for name in layout.source(key) if name is not None}
            if not layout.is_of(keys):
                raise CheckpointError(f"its files hold {', '.join(sorted(set(layout.markers) - keys))}")
            if layout.stated is not None and layout.stated.write is not None:
                return layout, layout.stated.write(config)
            _check_computed(config, layout)
            return layout, None
        except CheckpointError as error:
            reasons.append(f"{layout.name}: {error}")
    known = ", ".join(sorted({layout.format for layout in LAYOUTS}))
    raise CheckpointError(f"{config.name} has no place in the layout {to} ({'; '.join(reasons) or f'the layouts are {known}'})")


def _check_computed(config: DPTConfig, layout: Layout) -> None:
    """CheckpointError unless some named model in the layout computes each thing as this one does."""
    if layout is carried.LAYOUT:
        return
    named = [layout.as_run(other) for other in configs_in(layout) if other.head.task == config.head.task]
    siblings = [other for family in FAMILIES if layout in family.LAYOUTS for other in family.LAYOUTS]
    for section, sizes in SIZES.items():
        ours = getattr(config, section)
        differing = {name for other in siblings for name in other.differs.get(section, ())}
        for field in fields(ours):
            values = {getattr(getattr(other, section), field.name) for other in named}
            value = getattr(ours, field.name)
            if field.name in sizes | differing or value in values:
                continue
            raise CheckpointError(f"its code computes {section}.{field.name}={' or '.join(map(repr, values)) or 'nothing'}, not {value!r}")


def run_by(layout: Layout, files: tuple[dict[str, Any], dict[str, Any]] | None, config: DPTConfig) -> DPTConfig:
    """The model as the layout's own code runs it."""
    if layout.stated is None or files is None:
        return layout.as_run(config)
    model, processor = (json.loads(json.dumps(values)) for values in files)
    return layout.stated.read(Document(MODEL_FILE, model), Document(INPUT_FILE, processor), config.name)


def differences(config: DPTConfig, other: DPTConfig) -> Iterator[tuple[str, Any, Any]]:
    """Of each field, but for names and colours of classes, whose values are not the same: its name, ours and theirs."""
    for section in (*SIZES, "input"):
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


def _write(
    target: Path,
    tensors: Mapping[str, Tensor],
    config: DPTConfig | None,
    layout: Layout,
    files: tuple[dict[str, Any], dict[str, Any]] | None,
) -> None:
    """Write what was converted, each file whole or not at all, transformers' configuration last."""
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}  # which share no memory then
    if files is not None:
        checkpoints.save_state(tensors, target / WEIGHTS[0])
        for name, values in zip((INPUT_FILE, MODEL_FILE), reversed(files), strict=True):
            _write_json(target / name, values)
    elif target.suffix == ".safetensors":
        checkpoints.save_state(tensors, target, config if layout is carried.LAYOUT else None)
    else:
        content: dict[str, Any] = {layout.wrapper: tensors} if layout.wrapper else tensors
        if layout is mmsegmentation.LAYOUT and config is not None:
            meta = {"CLASSES": config.head.classes, "PALETTE": [list(colour) for colour in config.head.palette]}
            content = {"meta": meta, "state_dict": tensors}
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda file: torch.save(content, file))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))

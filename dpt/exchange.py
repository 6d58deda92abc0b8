"""Checkpoints from one family's layout to another's, and models to transformers' objects: the same tensors by other names, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoints
from .checkpoints import Checkpoint, CheckpointError, Layout
from .checkpoints.files import INPUT_FILE, MODEL_FILE, WEIGHTS
from .checkpoints.stored import Opaque, Stored
from .config import DPTConfig, differences
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


def to_transformers(model: DPT, kind: str) -> Any:
    """A model of ours as transformers' own, for what takes its objects: on the same memory, with the same values bit for bit.

    Args:
        model: as `dpt.build` and `dpt.load` give it, accelerated or not. Nothing of it changes.
        kind: the `model_type`: "dpt" for DPTForDepthEstimation or DPTForSemanticSegmentation, whatever encoder that has,
            "depth_anything" for DepthAnythingForDepthEstimation, or another whose folders `dpt convert --to hf` writes.

    Returns:
        The model, on the same device, in the same dtypes and mode: `pixel_values` (B, 3, H, W) -> `predicted_depth` (B, H, W) or `logits`
        (B, K, H, W). Its configuration is what `dpt convert --to hf` writes as config.json. Its parameters are others than ours, with
        gradients of their own, on the memory of ours, of which query, key and value are slices: what one changes in place the other has.
        What our network never reads and the class has (a norm, a mask) is new. How pictures are prepared no model of transformers says:
        `model.config.input` does.

    Raises:
        CheckpointError: the class has no place for a part of the model, or computes otherwise, and what. Depth Anything's own code resizes
            positions otherwise: `dpt.build(config.with_("encoder", pos_offset=0.0), weights=...)` makes a model that does as the class.
        ValueError: the model is none of ours; an unknown kind.
        ImportError: transformers is not installed, or older than its version 5.
    """
    if not isinstance(model, DPT):
        raise ValueError(f"model of type {type(model).__name__}: it must be a dpt.DPT")
    kinds = {layout.stated.kind: None for layout in LAYOUTS if layout.stated is not None and layout.stated.kind}
    if kind not in kinds:
        raise ValueError(f"kind={kind!r}: it must be one of {', '.join(kinds)}")
    no_init_weights = checkpoints.of_transformers("transformers.initialization").no_init_weights
    config, state = model.config, model.state_dict()
    layout, files = _chosen(config, state, "hf", kind)
    assert files is not None
    made = getattr(checkpoints.of_transformers("transformers"), files[0]["architectures"][0])
    wrong = [
        f"{field}={theirs!r}, not {ours!r}"
        for field, ours, theirs in differences(config, run_by(layout, files, config))
        if not field.startswith("input.")
    ]
    if wrong:
        raise CheckpointError(f"{config.name} is not what {made.__name__} computes, which is {'; '.join(wrong)}")
    with no_init_weights():
        theirs = made(made.config_class.from_dict(files[0]))
    tensors = checkpoints.reverted(state, layout, config.encoder.embed_dim)
    names = checkpoints.own_names(theirs)
    odd = sorted(names.keys() ^ tensors.keys())
    if odd:
        raise CheckpointError(f"this version of {made.__name__} and the layout {layout.name} differ in {odd[0]}")
    own = {name: part for key in names for name, part in zip(names[key], checkpoints.parted(tensors[key], len(names[key])), strict=True)}
    theirs.load_state_dict(own, assign=True)
    _move_the_rest(theirs, own, next(model.parameters()))
    return theirs.train(model.training)


def _move_the_rest(module: nn.Module, own: Container[str], like: Tensor) -> None:
    """Bring buffers that no state dict has to a tensor's device, and to its dtype where they are of floating point."""
    for name, buffer in module.named_buffers():
        if name not in own:
            owner, _, last = name.rpartition(".")
            dtype = like.dtype if buffer.is_floating_point() else None
            setattr(module.get_submodule(owner), last, buffer.to(like.device, dtype))


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
    left = {key: value for key, value in checkpoint.state.items() if key not in used and not isinstance(value, Opaque)}
    rest = {
        key: value.read() if isinstance(value, Stored) else value
        for key, value in left.items()
        if not isinstance(value, Stored) or value.problem() is None
    }
    return there, rest


def _kept(rest: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """What a file of ours keeps of a format, under its own keys."""
    prefix = f"{UNUSED}{to}."
    return {key.removeprefix(prefix): value for key, value in rest.items() if key.startswith(prefix)}


def _chosen(
    config: DPTConfig, state: Mapping[str, Tensor], to: str, kind: str | None = None
) -> tuple[Layout, tuple[dict[str, Any], dict[str, Any]] | None]:
    """The layout of a format that has a place for a model, and, of transformers, what its configuration files say. `kind`: the only
    one of `Stated.kind` that is meant."""
    reasons = []
    for layout in (layout for layout in LAYOUTS if layout.format == to and kind in (None, layout.stated and layout.stated.kind)):
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
    to = to if kind is None else f"{to} of {kind}"
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

"""What files say of the model they hold: our own metadata, and transformers' config.json and preprocessor_config.json, as a `DPTConfig`.

transformers' fields are obeyed or refused, each by a row of a table; those that neither table names have no part in a model's output.
Defaults are those of transformers.DPTConfig and DPTImageProcessor (5.23), which older files leave out.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from ..classes import ade20k
from ..config import DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig, config_from
from ..zoo import CheckpointError, transformers_dpt
from .conversion import layout_of
from .files import INPUT_FILE, MODEL_FILE, Checkpoint, read_json

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}
_TASKS = {"DPTForDepthEstimation": "depth", "DPTForSemanticSegmentation": "segmentation"}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

Field = tuple[Any, str, Callable[[Any], bool]]  # the default, and what a value must be, in words and as a test


def _whole(value: Any, low: int = 1) -> bool:
    return type(value) is int and value >= low


def _wholes(value: Any, count: int, low: int = 1) -> bool:
    return isinstance(value, list) and len(value) == count and all(_whole(item, low) for item in value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_number, value))


def _fixed(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(fixed) and value == fixed for fixed in values)


_MODEL: dict[str, Field] = {
    "model_type": (None, "'dpt'", _fixed("dpt")),
    "architectures": (
        ["DPTForDepthEstimation"],
        f"one of {', '.join(_TASKS)}",
        lambda value: isinstance(value, list) and len(value) == 1 and type(value[0]) is str and value[0] in _TASKS,
    ),
    "is_hybrid": (False, "false: the encoder is a plain ViT", _fixed(False)),
    "backbone_config": (None, "null: the encoder is a plain ViT", _fixed(None)),
    "backbone": (None, "null: the encoder is a plain ViT", _fixed(None)),
    "hidden_size": (768, "a whole number above 0", _whole),
    "num_hidden_layers": (12, "a whole number above 0", _whole),
    "num_attention_heads": (12, "a whole number above 0", _whole),
    "intermediate_size": (3072, "a whole number above 0", _whole),
    "hidden_act": ("gelu", f"one of {', '.join(_ACTIVATIONS)}", lambda value: type(value) is str and value in _ACTIVATIONS),
    "layer_norm_eps": (1e-12, "a number above 0", lambda value: _number(value) and value > 0),
    "image_size": (384, "the side of a square, in whole patches", lambda value: _whole(_side(value))),
    "patch_size": (16, "16: transformers' head upsamples by that, whatever the patches are", lambda value: _side(value) == 16),
    "num_channels": (3, "3", _fixed(3)),
    "qkv_bias": (True, "true: our projections have a bias", _fixed(True)),
    "backbone_out_indices": (
        [2, 5, 8, 11],
        "four different blocks, counted from 0",
        lambda value: _wholes(value, 4, low=0) and len(set(value)) == 4,
    ),
    "readout_type": ("project", "one of project, ignore, add", _fixed("project", "ignore", "add")),
    "reassemble_factors": ([4, 2, 1, 0.5], "[4, 2, 1, 0.5]", lambda value: value == [4, 2, 1, 0.5]),
    "neck_hidden_sizes": ([96, 192, 384, 768], "four whole numbers above 0", lambda value: _wholes(value, 4)),
    "fusion_hidden_size": (256, "a whole number above 1", lambda value: _whole(value, 2)),
    "head_in_index": (-1, "-1 or 3: the head reads the last map", _fixed(-1, 3)),
    "use_batch_norm_in_fusion_residual": (False, "true or false", _fixed(True, False, None)),
    "use_bias_in_fusion_residual": (None, "true, false or null", _fixed(True, False, None)),
    "add_projection": (False, "false: our head has no convolution before it", _fixed(False)),
    "use_auxiliary_head": (True, "true or false", _fixed(True, False, None)),
    "semantic_classifier_dropout": (0.1, "a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
}
_INPUT: dict[str, Field] = {
    "do_resize": (True, "true: the network's sides are whole patches", _fixed(True)),
    "size": ({"height": 384, "width": 384}, "a height and a width", lambda value: _wholes(_height_width(value), 2)),
    "resample": (3, f"one of {', '.join(f'{key} ({name})' for key, name in _RESAMPLE.items())}", _fixed(*_RESAMPLE)),
    "keep_aspect_ratio": (False, "true or false", _fixed(True, False)),
    "ensure_multiple_of": (1, "a whole number above 0", _whole),
    "do_center_crop": (None, "false: pictures are not cropped", _fixed(False, None)),
    "do_pad": (False, "false: transformers pads on all sides", _fixed(False, None)),
    "do_rescale": (True, "true or false", _fixed(True, False)),
    "rescale_factor": (1 / 255, "a number above 0", lambda value: _number(value) and value > 0),
    "do_normalize": (True, "true or false", _fixed(True, False)),
    "image_mean": ([0.5, 0.5, 0.5], "three numbers", _numbers),
    "image_std": ([0.5, 0.5, 0.5], "three numbers above 0", lambda value: _numbers(value) and min(value) > 0),
}


def _side(value: Any) -> Any:
    """The side of a square that is written as a number or as a pair; None if it is no square."""
    if isinstance(value, list):
        return value[0] if len(value) == 2 and value[0] == value[1] else None
    return value


def _height_width(value: Any) -> Any:
    """[height, width] of a size, which older files write as one number."""
    if isinstance(value, dict):
        return [value.get("height"), value.get("width")] if value.keys() == {"height", "width"} else None
    return [value, value]


def _obeyed(values: Mapping[str, Any], table: Mapping[str, Field], path: Path) -> dict[str, Any]:
    """Each field's value, or its default; CheckpointError names the field, its value and the rule it breaks."""
    obeyed = {}
    for name, (default, rule, holds) in table.items():
        value = values.get(name, default)
        if not holds(value):
            raise _refusal(path, name, value, rule)
        obeyed[name] = value
    return obeyed


def _refusal(path: Path, name: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name}={reprlib.repr(value)}: it must be {rule}")


def stated_config(checkpoint: Checkpoint) -> DPTConfig | None:
    """The configuration that a checkpoint carries, in itself or beside it; None if it carries none, CheckpointError if a wrong one."""
    saved = saved_config(checkpoint.metadata, checkpoint.path)
    if saved is not None or layout_of(checkpoint.state, checkpoint.path) is not transformers_dpt.LAYOUT:
        return saved
    path = checkpoint.folder / MODEL_FILE
    return transformers_config(path, checkpoint.name, checkpoint.folder / INPUT_FILE) if path.is_file() else None


def saved_config(metadata: Mapping[str, str], path: str | Path) -> DPTConfig | None:
    """The configuration a file of ours carries; None if it carries none, CheckpointError if it is not one."""
    if "dpt" not in metadata:
        return None
    try:
        return config_from(json.loads(metadata["dpt"]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read ({error})") from error


def transformers_config(path: Path, name: str, input_path: Path) -> DPTConfig:
    """A config.json of transformers' DPT, with the preprocessor_config.json beside it, or without.

    Raises:
        CheckpointError: a field that our models cannot follow, or that is none of transformers'; it is named with its value and the rule.
    """
    stated = read_json(path)
    values = _obeyed(stated, _MODEL, path)
    task = _TASKS[values["architectures"][0]]
    batch_norm = bool(values["use_batch_norm_in_fusion_residual"])
    if values["use_bias_in_fusion_residual"] not in (None, not batch_norm):
        rule = f"null or {json.dumps(not batch_norm)}: units have a bias where they have no batch norm"
        raise _refusal(path, "use_bias_in_fusion_residual", values["use_bias_in_fusion_residual"], rule)
    side, activation = _side(values["image_size"]), _ACTIVATIONS[values["hidden_act"]]
    classes = _labels(stated, path) if task == "segmentation" else ()
    try:
        return DPTConfig(
            name=name,
            encoder=EncoderConfig(
                embed_dim=values["hidden_size"],
                depth=values["num_hidden_layers"],
                num_heads=values["num_attention_heads"],
                hooks=tuple(sorted(values["backbone_out_indices"])),  # transformers asks of each block whether it is among them
                pos_grid=(side // 16, side // 16),
                mlp_ratio=_ratio(values["intermediate_size"], values["hidden_size"]),
                norm_eps=values["layer_norm_eps"],
                activation=activation,
            ),
            decoder=DecoderConfig(
                neck_channels=tuple(values["neck_hidden_sizes"]),
                features=values["fusion_hidden_size"],
                readout=values["readout_type"],
                readout_activation=activation,
                batch_norm=batch_norm,
                dead_unit=True,
            ),
            head=HeadConfig(
                task=task,
                classes=classes,
                palette=palette(len(classes)),
                dropout=values["semantic_classifier_dropout"],
                auxiliary=task == "segmentation" and bool(values["use_auxiliary_head"]),
            ),
            input=_input(input_path, side, task),
            licence="unknown",
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _ratio(hidden: int, dim: int) -> float:
    """The ratio of which the encoder makes exactly `hidden` channels again, rounding down."""
    ratio = hidden / dim
    return ratio if int(ratio * dim) == hidden else math.nextafter(ratio, math.inf)


def _labels(stated: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The classes' names, by `id2label`; without it transformers numbers `num_labels` of them, or two."""
    if "id2label" not in stated:
        count = stated.get("num_labels", 2)
        if not _whole(count):
            raise _refusal(path, "num_labels", count, "a whole number above 0")
        return tuple(f"LABEL_{index}" for index in range(min(count, 1 << 16)))
    named = stated["id2label"]
    right = isinstance(named, dict) and named and set(named) == {str(index) for index in range(len(named))}
    if not right or not all(type(label) is str for label in named.values()):
        raise _refusal(path, "id2label", named, "a name for each number from 0 on")
    return tuple(named[str(index)] for index in range(len(named)))


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours for classes: ADE20K's where there are as many as it has, else the same ones in every run."""
    if count == len(ade20k.PALETTE):
        return ade20k.PALETTE
    colours = torch.randint(256, (count, 3), generator=torch.Generator().manual_seed(0), device="cpu")
    return tuple((red, green, blue) for red, green, blue in colours.tolist())


def _input(path: Path, side: int, task: str) -> InputConfig:
    """What the processor does: an antialiased resize, then scale, mean and standard deviation; without a file, its defaults at the model's
    own size. Maps are resized back as its post-processing does."""
    stated = read_json(path) if path.is_file() else {"size": side}
    values = _obeyed(stated, _INPUT, path)
    size, multiple = _height_width(values["size"]), values["ensure_multiple_of"]
    if not values["keep_aspect_ratio"] and multiple % 16 and all(length % 16 == 0 and length % multiple == 0 for length in size):
        multiple = 16
    if multiple % 16:
        raise _refusal(path, "ensure_multiple_of", multiple, "a multiple of 16, the patches' side, where the size does not see to it")
    # (p * factor - mean) / std of pixels p in 0..255 is (q - mean / range) / (std / range) of our q in 0..1, range = 255 * factor.
    value_range = 255 * (values["rescale_factor"] if values["do_rescale"] else 1)
    mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else ([0.0] * 3, [1.0] * 3)
    return InputConfig(
        mean=cast("tuple[float, float, float]", tuple(value / value_range for value in mean)),
        std=cast("tuple[float, float, float]", tuple(value / value_range for value in std)),
        size=tuple(size),
        rule="minimal" if values["keep_aspect_ratio"] else "square",
        multiple=multiple,
        mode=_RESAMPLE[values["resample"]],
        antialias=True,
        output_mode="bicubic" if task == "depth" else "bilinear",
    )

"""Reading and writing what transformers' config.json and preprocessor_config.json state: what their families share.

Fields are obeyed or refused, each by a row of a table; those that no table names have no part in a model's output. Defaults are those of
transformers' classes (5.23), which older files leave out.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..config import DPTConfig, EncoderConfig, InputConfig
from .layout import CheckpointError

Field = tuple[Any, str, Callable[[Any], bool]]  # the default, and what a value must be, in words and as a test
Table = Mapping[str, Field]

ACTIVATIONS = {
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
WRITTEN_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu", "quick_gelu": "quick_gelu"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Document:
    """A JSON object, and what errors call it."""

    path: str
    values: Mapping[str, Any]

    def obeyed(self, table: Table) -> dict[str, Any]:
        """Each field's value, or its default; CheckpointError names the field, its value and the rule it breaks."""
        obeyed = {}
        for name, (default, rule, holds) in table.items():
            value = self.values.get(name, default)
            if not holds(value):
                raise self.refusal(name, value, rule)
            obeyed[name] = value
        return obeyed

    def refusal(self, name: str, value: Any, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name}={reprlib.repr(value)}: it must be {rule}")

    def inner(self, name: str, default: Mapping[str, Any] | None = None) -> Document:
        """The object that a field holds; its fields are told as `name.field`."""
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, Mapping):
            raise self.refusal(name, value, "an object")
        return Document(f"{self.path}: {name}", value)


def whole(value: Any, low: int = 1) -> bool:
    return type(value) is int and value >= low


def wholes(value: Any, count: int, low: int = 1) -> bool:
    return isinstance(value, list) and len(value) == count and all(whole(item, low) for item in value)


def number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(number, value))


def fixed(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(other) and value == other for other in values)


def side(value: Any) -> Any:
    """The side of a square that is written as a number or as a pair; None if it is no square."""
    if isinstance(value, list):
        return value[0] if len(value) == 2 and value[0] == value[1] else None
    return value


def ratio(hidden: int, dim: int) -> float:
    """The ratio of which the encoder makes exactly `hidden` channels again, rounding down."""
    found = hidden / dim
    return found if int(found * dim) == hidden else math.nextafter(found, math.inf)


POSITIVE_WHOLE: Field = (None, "a whole number above 0", whole)
TRUTH: Field = (False, "true or false", fixed(True, False))


def default(field: Field, value: Any) -> Field:
    """The field with another default."""
    return (value, *field[1:])


ACTIVATION: Field = ("gelu", f"one of {', '.join(ACTIVATIONS)}", lambda value: type(value) is str and value in ACTIVATIONS)
EPSILON: Field = (1e-6, "a number above 0", lambda value: number(value) and value > 0)

DINOV2: Table = {
    "model_type": (None, "'dinov2'", fixed("dinov2")),
    "hidden_size": default(POSITIVE_WHOLE, 768),
    "num_hidden_layers": default(POSITIVE_WHOLE, 12),
    "num_attention_heads": default(POSITIVE_WHOLE, 12),
    "mlp_ratio": (4, "a number above 0", lambda value: number(value) and value > 0),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": EPSILON,
    "image_size": (224, "the side of a square, in whole patches", lambda value: whole(side(value))),
    "patch_size": (14, "the side of a square", lambda value: whole(side(value))),
    "num_channels": (3, "3", fixed(3)),
    "qkv_bias": (True, "true: our projections have a bias", fixed(True)),
    "use_swiglu_ffn": TRUTH,
    "apply_layernorm": default(TRUTH, True),
}


def dinov2_encoder(backbone: Document) -> EncoderConfig:
    """The encoder of a `backbone_config` of transformers' Dinov2."""
    values = backbone.obeyed(DINOV2)
    size, patch = side(values["image_size"]), side(values["patch_size"])
    try:
        return EncoderConfig(
            embed_dim=values["hidden_size"],
            depth=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            hooks=hooks_of(backbone, values["num_hidden_layers"]),
            patch_size=patch,
            pos_grid=(size // patch, size // patch),
            mlp_ratio=values["mlp_ratio"],
            norm_eps=values["layer_norm_eps"],
            final_norm="every" if values["apply_layernorm"] else "none",
            layer_scale=True,
            pos_mode="bicubic",
            activation=ACTIVATIONS[values["hidden_act"]],
            mlp="swiglu" if values["use_swiglu_ffn"] else "mlp",
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{backbone.path}: {error}") from error


def hooks_of(backbone: Document, depth: int) -> tuple[int, ...]:
    """The blocks that `out_indices` (0 is what goes into the first) or `out_features` ("stage1") name, counted from 0."""
    rule = f"four different blocks from 1 to {depth}"
    indices, features = (backbone.values.get(name) for name in ("out_indices", "out_features"))
    if indices is not None:
        if not wholes(indices, 4) or len(set(indices)) != 4 or max(indices) > depth:
            raise backbone.refusal("out_indices", indices, rule)
        return tuple(index - 1 for index in sorted(indices))
    names = {f"stage{index + 1}": index for index in range(depth)}
    if not isinstance(features, list) or len(features) != 4 or not all(type(name) is str and name in names for name in features):
        raise backbone.refusal("out_features", features, rule + ', as in "stage1"')
    return tuple(sorted(names[name] for name in features))


def dinov2_computes(encoder: EncoderConfig) -> dict[str, tuple[Any, ...]]:
    """Of the encoder's fields, what transformers' Dinov2 computes alone, for `check_writable`."""
    return {
        "kind": ("vit",),
        "stem": ("patch",),
        "final_norm": ("none", "every"),
        "final_norm_eps": (None, encoder.norm_eps),
        "layer_scale": (True,),
        "pos_mode": ("bicubic",),
        "pos_offset": (0.0,),
        "pos_by_count": (False,),
        "pos_antialias": (False,),
        "registers": (0,),
    }


def written_dinov2(encoder: EncoderConfig) -> dict[str, Any]:
    """A `backbone_config` of transformers' Dinov2; the inverse of `dinov2_encoder`."""
    return {
        "model_type": "dinov2",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "mlp_ratio": int(encoder.mlp_ratio),
        "hidden_act": WRITTEN_ACTIVATIONS[encoder.activation],
        "layer_norm_eps": encoder.norm_eps,
        "image_size": encoder.pos_grid[0] * encoder.patch_size,
        "patch_size": encoder.patch_size,
        "use_swiglu_ffn": encoder.mlp == "swiglu",
        "apply_layernorm": encoder.final_norm == "every",
        "reshape_hidden_states": False,
        "out_indices": [index + 1 for index in encoder.hooks],
        "out_features": [f"stage{index + 1}" for index in encoder.hooks],
    }


def check_writable(config: DPTConfig, expected: Mapping[str, Mapping[str, Iterable[Any]]], known: Iterable[str] = ()) -> None:
    """CheckpointError for a field, by section, whose value is none of those that transformers' code computes. `known`: fields, as
    "section.field", that it is known to compute otherwise."""
    for section, fields in expected.items():
        for name, values in fields.items():
            value = getattr(getattr(config, section), name)
            if value not in values and f"{section}.{name}" not in known:
                allowed = " or ".join(map(repr, values))
                raise CheckpointError(f"{config.name}: {section}.{name}={reprlib.repr(value)}: transformers computes {allowed} alone")


def height_width(value: Any) -> Any:
    """[height, width] of a size, which older files write as one number."""
    if isinstance(value, dict):
        return [value.get("height"), value.get("width")] if value.keys() == {"height", "width"} else None
    return [value, value]


PROCESSOR: Table = {  # transformers' DPTImageProcessor
    "do_resize": default(TRUTH, True),
    "size": ({"height": 384, "width": 384}, "a height and a width", lambda value: wholes(height_width(value), 2)),
    "resample": (3, f"one of {', '.join(f'{key} ({name})' for key, name in RESAMPLE.items())}", fixed(*RESAMPLE)),
    "keep_aspect_ratio": TRUTH,
    "ensure_multiple_of": (1, "a whole number above 0", whole),
    "do_center_crop": (None, "false: pictures are not cropped", fixed(False, None)),
    "do_pad": (False, "true, false or null", fixed(True, False, None)),
    "size_divisor": (None, "a whole number above 0, or null", lambda value: value is None or whole(value)),
    "do_rescale": default(TRUTH, True),
    "rescale_factor": (1 / 255, "a number above 0", lambda value: number(value) and value > 0),
    "do_normalize": default(TRUTH, True),
    "image_mean": ([0.5, 0.5, 0.5], "three numbers", numbers),
    "image_std": ([0.5, 0.5, 0.5], "three numbers above 0", lambda value: numbers(value) and min(value) > 0),
}


def processed(processor: Document | None, default_side: int, patch: int, output_mode: str, table: Table = PROCESSOR) -> InputConfig:
    """What DPTImageProcessor does: an antialiased resize of 8 bits, then scale, mean and standard deviation, or these alone and padding on
    all sides; without a file, its defaults at the model's own size. Maps are resized back as its post-processing does, in `output_mode`.
    `table`: of another class with these fields."""
    processor = processor or Document("preprocessor_config.json", {"size": default_side})
    values = processor.obeyed(table)
    size = height_width(values["size"])
    if values["do_resize"]:
        rule, multiple, pad = _resized(processor, values, size, patch)
    else:
        rule, multiple, pad = _own_size(processor, values, patch)
        size = size if all(length % patch == 0 for length in size) else [default_side] * 2  # which nothing is resized to
    # (p * factor - mean) / std of pixels p in 0..255 is (q - mean / range) / (std / range) of our q in 0..1, range = 255 * factor.
    value_range = 255 * (values["rescale_factor"] if values["do_rescale"] else 1)
    mean, std = (values["image_mean"], values["image_std"]) if values["do_normalize"] else ([0.0] * 3, [1.0] * 3)
    return InputConfig(
        mean=cast("tuple[float, float, float]", tuple(value / value_range for value in mean)),
        std=cast("tuple[float, float, float]", tuple(value / value_range for value in std)),
        size=tuple(size),
        rule=rule,
        multiple=multiple,
        pad=pad,
        mode=RESAMPLE[values["resample"]],
        antialias=values["do_resize"],
        output_mode=output_mode,
        grey_levels=values["do_resize"],
    )


def _own_size(processor: Document, values: Mapping[str, Any], patch: int) -> tuple[str, int, str]:
    """Rule, multiple and padding of pictures that are not resized."""
    divisor = values["size_divisor"]
    if not values["do_pad"]:
        raise processor.refusal("do_resize", False, "true where nothing is padded: the network's sides are whole patches")
    if divisor is None or divisor % patch:
        raise processor.refusal("size_divisor", divisor, f"a multiple of {patch}, the patches' side")
    return "none", divisor, "centre"


def _resized(processor: Document, values: Mapping[str, Any], size: list[int], patch: int) -> tuple[str, int, str]:
    """Rule, multiple and padding of pictures that are resized."""
    multiple, aspect = values["ensure_multiple_of"], values["keep_aspect_ratio"]
    if values["do_pad"]:
        raise processor.refusal("do_pad", True, "false where pictures are resized")
    if not aspect and multiple % patch and all(length % patch == 0 and length % multiple == 0 for length in size):
        multiple = patch
    if multiple % patch:
        rule = f"a multiple of {patch}, the patches' side, where the size does not see to it"
        raise processor.refusal("ensure_multiple_of", multiple, rule)
    return "minimal" if aspect else "square", multiple, "none"


def written_processor(config: InputConfig) -> dict[str, Any]:
    """What DPTImageProcessor's file says; the inverse of `processed`, of which any rule that keeps the aspect is transformers' one."""
    height, width = config.size
    padding = {"do_pad": True, "size_divisor": config.multiple} if config.pad == "centre" else {"do_pad": False}
    return {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": config.rule != "none",
        "size": {"height": height, "width": width},
        "keep_aspect_ratio": config.rule != "square",
        "ensure_multiple_of": config.multiple,
        "resample": next(key for key, mode in RESAMPLE.items() if mode == config.mode),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        **padding,
    }

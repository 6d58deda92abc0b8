"""Depth Anything V1 and V2, V2's metric models, and Distill-Any-Depth, which are V2's sizes with other weights.

Sources: https://github.com/DepthAnything/Depth-Anything-V2, https://github.com/LiheYoung/Depth-Anything,
https://github.com/Westlake-AGI-Lab/Distill-Any-Depth, https://huggingface.co/docs/transformers/model_doc/depth_anything
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..config import IMAGENET_MEAN, IMAGENET_STD, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from .keys import DINOV2, NECK, SCRATCH, VIT, under
from .layout import Layout, Stated
from .stated import (
    POSITIVE_WHOLE,
    Document,
    Table,
    check_writable,
    default,
    dinov2_computes,
    dinov2_encoder,
    fixed,
    number,
    processed,
    whole,
    wholes,
    written_dinov2,
    written_processor,
)

_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class _Size:
    encoder: EncoderConfig
    decoder: DecoderConfig
    parameters: int
    v1_hooks: tuple[int, ...]


def _size(dim: int, depth: int, heads: int, hooks: tuple[int, ...], features: int, neck: tuple[int, ...], parameters: int) -> _Size:
    encoder = EncoderConfig(
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        hooks=hooks,
        patch_size=14,
        pos_grid=(37, 37),
        final_norm="every",
        layer_scale=True,
        pos_mode="bicubic",
        pos_offset=0.1,
    )
    a, b, c, d = neck
    decoder = DecoderConfig(neck_channels=(a, b, c, d), features=features, readout="ignore", match_size=True, dead_unit=True)
    return _Size(encoder, decoder, parameters, tuple(range(depth - 4, depth)))


_SIZES = {
    "small": _size(384, 12, 6, (2, 5, 8, 11), 64, (48, 96, 192, 384), 24_784_705),
    "base": _size(768, 12, 12, (2, 5, 8, 11), 128, (96, 192, 384, 768), 97_470_017),
    "large": _size(1024, 24, 16, (4, 11, 17, 23), 256, (256, 512, 1024, 1024), 335_314_625),
}
_INPUT = InputConfig(
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    size=(518, 518),
    rule="lower_bound",
    multiple=14,
    output_mode="bilinear",
    output_align_corners=True,
)
_METRIC = {"hypersim": 20.0, "vkitti": 80.0}  # the farthest metres, indoors and outdoors
_NON_COMMERCIAL = "CC-BY-NC-4.0"


def _model(name: str, size: str, source: str, licence: str, **changes: Any) -> DPTConfig:
    encoder, decoder = _SIZES[size].encoder, _SIZES[size].decoder
    config = DPTConfig(name, encoder, decoder, HeadConfig(task="depth"), _INPUT, _HUB + source, licence)
    return replace(config, **changes)


def _models() -> Iterator[tuple[str, DPTConfig]]:
    """(size, configuration) of each."""
    for size in _SIZES:
        letter, title = size[0], size.capitalize()
        licence = "Apache-2.0" if size == "small" else _NON_COMMERCIAL
        path = f"depth-anything/Depth-Anything-V2-{title}/resolve/main/depth_anything_v2_vit{letter}.pth"
        yield size, _model(f"depth-anything-v2-{size}", size, path, licence)
        for data, metres in _METRIC.items():
            repository = f"depth-anything/Depth-Anything-V2-Metric-{'Hypersim' if data == 'hypersim' else 'VKITTI'}-{title}"
            path = f"{repository}/resolve/main/depth_anything_v2_metric_{data}_vit{letter}.pth"
            # 16 bits hold 65 m in millimetres, 255 m in 256ths
            head = HeadConfig(
                task="depth", activation="sigmoid", max_depth=metres, inverse=False, depth_scale=1000.0 if metres < 65 else 256.0
            )
            yield size, _model(f"depth-anything-v2-metric-{data}-{size}", size, path, licence, head=head)
        path = f"LiheYoung/depth_anything_vit{letter}14/resolve/main/pytorch_model.bin"
        v1 = replace(_SIZES[size].encoder, hooks=_SIZES[size].v1_hooks)
        inputs = replace(_INPUT, output_align_corners=False)
        yield size, _model(f"depth-anything-v1-{size}", size, path, "Apache-2.0", encoder=v1, input=inputs)
        path = f"xingyang1/Distill-Any-Depth/resolve/main/{size}/model.safetensors"
        inputs = replace(_INPUT, size=(700, 700), rule="square")
        yield size, _model(f"distill-any-depth-{size}", size, path, "MIT", input=inputs)


_KINDS = ("depth-anything-v2", *(f"depth-anything-v2-metric-{data}" for data in _METRIC), "depth-anything-v1", "distill-any-depth")
MODELS = tuple(sorted((config for _, config in _models()), key=lambda config: _KINDS.index(config.name.rpartition("-")[0])))
PARAMETERS = {config.name: _SIZES[size].parameters for size, config in _models()}

HEAD = (
    ("reassemble.{i}.project.{p}", "projects.{i}.{p}"),
    ("reassemble.{i}.resize.{p}", "resize_layers.{i}.{p}"),
    *SCRATCH,
    ("head.conv1.{p}", "scratch.output_conv1.{p}"),
    ("head.conv2.{p}", "scratch.output_conv2.0.{p}"),
    ("head.conv3.{p}", "scratch.output_conv2.2.{p}"),
)


def _original(name: str, prefix: str) -> Layout:
    """The original code's, which calls the encoder `prefix`."""
    return Layout(
        name=name,
        format="depth-anything",
        markers=(f"{prefix}patch_embed.proj.weight", "depth_head.scratch.output_conv1.weight"),
        rows=(*under(prefix, *VIT), *under("depth_head.", *HEAD)),
        unused=(rf"{prefix}mask_token".replace(".", r"\."),),
        filled=((f"{prefix}mask_token", (1, "D"), 0.0),),
        differs={
            "encoder": {"pos_offset": 0.1},
            "input": {"antialias": False, "grey_levels": False, "output_mode": "bilinear"},
        },
    )


ORIGINAL = _original("Depth Anything", "pretrained.")
DISTILLED = _original("Distill-Any-Depth", "backbone.")  # of its large model

_TYPES = ("relative", "metric")
TABLE: Table = {  # of transformers' DepthAnythingConfig, but for its backbone
    "model_type": (None, "'depth_anything'", fixed("depth_anything")),
    "patch_size": (14, "the backbone's", whole),
    "reassemble_factors": ([4, 2, 1, 0.5], "[4, 2, 1, 0.5]", lambda value: value == [4, 2, 1, 0.5]),
    "neck_hidden_sizes": ([48, 96, 192, 384], "four whole numbers above 0", lambda value: wholes(value, 4)),
    "fusion_hidden_size": (64, "a whole number above 1", lambda value: whole(value, 2)),
    "head_in_index": (-1, "-1 or 3: the head reads the last map", fixed(-1, 3)),
    "head_hidden_size": default(POSITIVE_WHOLE, 32),
    "depth_estimation_type": ("relative", f"one of {', '.join(_TYPES)}", fixed(*_TYPES)),
    "max_depth": (1, "a number above 0, or null", lambda value: value is None or (number(value) and value > 0)),
}
_DEFAULT_BACKBONE = {
    "model_type": "dinov2",
    "image_size": 518,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "out_indices": [9, 10, 11, 12],
}


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of DepthAnythingForDepthEstimation."""
    values = model.obeyed(TABLE)
    encoder = dinov2_encoder(model.inner("backbone_config", _DEFAULT_BACKBONE))
    if values["patch_size"] != encoder.patch_size:
        raise model.refusal("patch_size", values["patch_size"], f"the backbone's {encoder.patch_size}")
    metric, metres = values["depth_estimation_type"] == "metric", values["max_depth"]
    if metres is None or (not metric and metres != 1):  # transformers multiplies by it whatever the type
        raise model.refusal("max_depth", metres, "a number above 0" if metric else "1, of relative depth")
    head = HeadConfig(
        task="depth",
        hidden=values["head_hidden_size"],
        activation="sigmoid" if metric else "relu",
        max_depth=metres,
        inverse=not metric,
        depth_scale=256.0 if metres > 65 else 1000.0,
    )
    decoder = DecoderConfig(
        neck_channels=tuple(values["neck_hidden_sizes"]),
        features=values["fusion_hidden_size"],
        readout="ignore",
        match_size=True,
        dead_unit=True,
    )
    inputs = processed(processor, encoder.pos_grid[0] * encoder.patch_size, encoder.patch_size, "bicubic")
    return DPTConfig(name=name, encoder=encoder, decoder=decoder, head=head, input=inputs, licence="unknown")


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of DepthAnythingForDepthEstimation."""
    encoder, decoder, head = config.encoder, config.decoder, config.head
    computed: dict[str, dict[str, tuple[Any, ...]]] = {
        "encoder": {**dinov2_computes(encoder), "final_norm": ("every",)},
        "decoder": {
            "readout": ("ignore",),
            "match_size": (True,),
            "dead_unit": (True,),
            "batch_norm": (False,),
            "unit_bias": (None, True),
        },
        "head": {
            "task": ("depth",),
            "activation": ("relu",) if head.inverse else ("sigmoid",),
            "project": (False,),
            "offset": (0.0,),
            "reciprocal": (None,),
            "bounds": (None,),
            "align_corners": (True,),
            "upsample": (None,),
        },
    }
    check_writable(config, computed, known=("encoder.pos_offset",))
    model = {
        "model_type": "depth_anything",
        "architectures": ["DepthAnythingForDepthEstimation"],
        "backbone_config": written_dinov2(encoder),
        "patch_size": encoder.patch_size,
        "reassemble_hidden_size": encoder.embed_dim,
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_sizes": list(decoder.neck_channels),
        "fusion_hidden_size": decoder.features,
        "head_in_index": -1,
        "head_hidden_size": head.hidden,
        "depth_estimation_type": "relative" if head.inverse else "metric",
        "max_depth": int(head.max_depth) if float(head.max_depth).is_integer() else head.max_depth,
    }
    return model, written_processor(config.input)


TRANSFORMERS = Layout(
    name="transformers' Depth Anything",
    format="hf",
    markers=("backbone.embeddings.patch_embeddings.projection.weight", "head.conv1.weight"),
    rows=(*DINOV2, *NECK, ("head.{p}", "head.{p}")),
    unused=(r"backbone\.embeddings\.mask_token", r"backbone\.layernorm\..*"),  # the norm, where a file's config.json applies none
    filled=(("backbone.embeddings.mask_token", (1, "D"), 0.0),),
    differs={
        "encoder": {"pos_offset": 0.0},
        "input": {"rule": "minimal", "antialias": True, "grey_levels": True, "output_mode": "bicubic", "output_align_corners": False},
    },
    stated=Stated(read, write, "depth_anything"),
)
LAYOUTS = (ORIGINAL, DISTILLED, TRANSFORMERS)

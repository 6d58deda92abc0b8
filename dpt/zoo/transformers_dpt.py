"""transformers' DPT with a plain ViT: any model of it, whose configuration its own config.json states.

Source: https://huggingface.co/docs/transformers/model_doc/dpt
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..classes import palette
from ..config import DecoderConfig, DPTConfig, EncoderConfig, HeadConfig
from .keys import HEADS, NECK, QKV, under
from .layout import CheckpointError, Layout, Stated
from .stated import (
    ACTIVATION,
    ACTIVATIONS,
    EPSILON,
    POSITIVE_WHOLE,
    WRITTEN_ACTIVATIONS,
    Document,
    Table,
    check_writable,
    default,
    fixed,
    number,
    processed,
    ratio,
    side,
    whole,
    wholes,
    written_processor,
)

MODELS: tuple[DPTConfig, ...] = ()
PARAMETERS: dict[str, int] = {}

TASKS = {"DPTForDepthEstimation": "depth", "DPTForSemanticSegmentation": "segmentation"}
PLAIN_VIT = "the encoder is a plain ViT"
DPT: Table = {  # of transformers' DPTConfig, whatever the encoder
    "model_type": (None, "'dpt'", fixed("dpt")),
    "architectures": (
        ["DPTForDepthEstimation"],
        f"one of {', '.join(TASKS)}",
        lambda value: isinstance(value, list) and len(value) == 1 and type(value[0]) is str and value[0] in TASKS,
    ),
    "readout_type": ("project", "one of project, ignore, add", fixed("project", "ignore", "add")),
    "reassemble_factors": ([4, 2, 1, 0.5], "[4, 2, 1, 0.5]", lambda value: value == [4, 2, 1, 0.5]),
    "neck_hidden_sizes": ([96, 192, 384, 768], "four whole numbers above 0", lambda value: wholes(value, 4)),
    "fusion_hidden_size": (256, "a whole number above 1", lambda value: whole(value, 2)),
    "head_in_index": (-1, "-1 or 3: the head reads the last map", fixed(-1, 3)),
    "hidden_act": ACTIVATION,
    "use_batch_norm_in_fusion_residual": (False, "true, false or null", fixed(True, False, None)),
    "use_bias_in_fusion_residual": (None, "true, false or null", fixed(True, False, None)),
    "add_projection": (False, "true, false or null", fixed(True, False, None)),
    "use_auxiliary_head": (True, "true, false or null", fixed(True, False, None)),
    "semantic_classifier_dropout": (0.1, "a number from 0 to 1", lambda value: number(value) and 0 <= value <= 1),
}
VIT: Table = {  # of its own ViT
    "is_hybrid": (False, f"false: {PLAIN_VIT}", fixed(False)),
    "backbone_config": (None, f"null: {PLAIN_VIT}", fixed(None)),
    "backbone": (None, f"null: {PLAIN_VIT}", fixed(None)),
    "hidden_size": default(POSITIVE_WHOLE, 768),
    "num_hidden_layers": default(POSITIVE_WHOLE, 12),
    "num_attention_heads": default(POSITIVE_WHOLE, 12),
    "intermediate_size": default(POSITIVE_WHOLE, 3072),
    "layer_norm_eps": default(EPSILON, 1e-12),
    "image_size": (384, "the side of a square, in whole patches", lambda value: whole(side(value))),
    "patch_size": (16, "16: transformers' head upsamples by that, whatever the patches are", lambda value: side(value) == 16),
    "num_channels": (3, "3", fixed(3)),
    "qkv_bias": (True, "true: our projections have a bias", fixed(True)),
    "backbone_out_indices": (
        [2, 5, 8, 11],
        "four different blocks, counted from 0",
        lambda value: wholes(value, 4, low=0) and len(set(value)) == 4,
    ),
}


def decoder_of(model: Document, values: dict[str, Any]) -> DecoderConfig:
    """What `DPT`'s fields say of the decoder."""
    batch_norm, bias = bool(values["use_batch_norm_in_fusion_residual"]), values["use_bias_in_fusion_residual"]
    return DecoderConfig(
        neck_channels=tuple(values["neck_hidden_sizes"]),
        features=values["fusion_hidden_size"],
        readout=values["readout_type"],
        readout_activation=ACTIVATIONS[values["hidden_act"]],
        batch_norm=batch_norm,
        dead_unit=True,
        unit_bias=None if bias is None or bias == (not batch_norm) else bias,
    )


def head_of(model: Document, values: dict[str, Any]) -> HeadConfig:
    """What `DPT`'s fields, and the names of the classes, say of the head."""
    task = TASKS[values["architectures"][0]]
    if task == "depth":
        return HeadConfig(task=task, project=bool(values["add_projection"]), dropout=values["semantic_classifier_dropout"])
    classes = labels(model)
    auxiliary, dropout = bool(values["use_auxiliary_head"]), values["semantic_classifier_dropout"]
    return HeadConfig(task=task, classes=classes, palette=palette(len(classes)), dropout=dropout, auxiliary=auxiliary)


def labels(model: Document) -> tuple[str, ...]:
    """The classes' names, by `id2label`; without it transformers numbers `num_labels` of them, or two."""
    if "id2label" not in model.values:
        count = model.values.get("num_labels", 2)
        if not whole(count):
            raise model.refusal("num_labels", count, "a whole number above 0")
        return tuple(f"LABEL_{index}" for index in range(min(count, 1 << 16)))
    named = model.values["id2label"]
    right = isinstance(named, dict) and named and set(named) == {str(index) for index in range(len(named))}
    if not right or not all(type(label) is str for label in named.values()):
        raise model.refusal("id2label", named, "a name for each number from 0 on")
    return tuple(named[str(index)] for index in range(len(named)))


def output_mode(task: str) -> str:
    """How transformers' post-processing resizes a map."""
    return "bicubic" if task == "depth" else "bilinear"


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of a DPT with its own ViT."""
    return config_of(model, model.obeyed({**DPT, **VIT}), processor, name)


def config_of(model: Document, values: dict[str, Any], processor: Document | None, name: str, **stem: Any) -> DPTConfig:
    """What `DPT`'s and `VIT`'s fields say of a model; `stem`: the encoder's fields of what stands in the place of patches."""
    size = side(values["image_size"])
    head = head_of(model, values)
    encoder = EncoderConfig(
        embed_dim=values["hidden_size"],
        depth=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        hooks=tuple(sorted(values["backbone_out_indices"])),  # transformers asks of each block whether it is among them
        pos_grid=(size // 16, size // 16),
        mlp_ratio=ratio(values["intermediate_size"], values["hidden_size"]),
        norm_eps=values["layer_norm_eps"],
        activation=ACTIVATIONS[values["hidden_act"]],
        **stem,
    )
    inputs = processed(processor, size, 16, output_mode(head.task))
    return DPTConfig(name=name, encoder=encoder, decoder=decoder_of(model, values), head=head, input=inputs, licence="unknown")


def written_dpt(config: DPTConfig, known: Iterable[str] = (), **head_computes: tuple[Any, ...]) -> dict[str, Any]:
    """The fields of `DPT`, and the classes' names; the inverse of `decoder_of` and `head_of`.

    `known`: as `check_writable` has it. `head_computes`: fields of the head that transformers' code computes otherwise on a backbone.
    """
    decoder, head = config.decoder, config.head
    fixed_fields = {
        "decoder": {
            "match_size": (False,),
            "dead_unit": (True,),
            "readout_activation": (config.encoder.activation,),
            "features": (256,) if head.project else (decoder.features,),  # its projection has as many, whatever the configuration says
        },
        "head": {
            "activation": ("relu",),
            "align_corners": (True,),
            "hidden": (32,),
            "inverse": (True,),
            "offset": (0.0,),
            "reciprocal": (None,),
            "bounds": (None,),
            "upsample": (None,),
            **head_computes,
        },
    }
    check_writable(config, fixed_fields, known)
    bias = {} if decoder.unit_bias is None else {"use_bias_in_fusion_residual": decoder.unit_bias}
    names = {str(index): name for index, name in enumerate(head.classes)}
    classes = {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}} if names else {}
    return {
        "model_type": "dpt",
        "architectures": [next(name for name, task in TASKS.items() if task == head.task)],
        "readout_type": decoder.readout,
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_sizes": list(decoder.neck_channels),
        "fusion_hidden_size": decoder.features,
        "head_in_index": -1,
        "hidden_act": WRITTEN_ACTIVATIONS[config.encoder.activation],
        "use_batch_norm_in_fusion_residual": decoder.batch_norm,
        **bias,
        "add_projection": head.project,
        "use_auxiliary_head": head.auxiliary,
        "semantic_classifier_dropout": head.dropout,
        **classes,
    }


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of a DPT with its own ViT."""
    check_writable(config, {"encoder": {"stem": ("patch",)}})
    return {**written_vit(config), **written_dpt(config)}, written_processor(config.input)


def written_vit(config: DPTConfig) -> dict[str, Any]:
    """The fields of `VIT`, the inverse of `config_of`."""
    encoder = config.encoder
    plain = {
        "kind": ("vit",),
        "patch_size": (16,),
        "final_norm": ("none",),
        "layer_scale": (False,),
        "pos_mode": ("bilinear",),
        "pos_offset": (0.0,),
        "pos_by_count": (False,),
        "registers": (0,),
        "mlp": ("mlp",),
    }
    check_writable(config, {"encoder": plain})
    if encoder.pos_grid[0] != encoder.pos_grid[1]:
        raise CheckpointError(f"{config.name}: encoder.pos_grid={json.dumps(encoder.pos_grid)}: transformers' is a square")
    return {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": int(encoder.mlp_ratio * encoder.embed_dim),
        "layer_norm_eps": encoder.norm_eps,
        "image_size": encoder.pos_grid[0] * 16,
        "patch_size": 16,
        "backbone_out_indices": list(encoder.hooks),
        "is_hybrid": False,
    }


LAYOUT = Layout(
    name="transformers",
    format="hf",
    markers=("dpt.embeddings.patch_embeddings.projection.weight",),
    rows=(
        *under(
            "dpt.",
            ("encoder.cls_token", "embeddings.cls_token"),
            ("encoder.pos_embed", "embeddings.position_embeddings"),
            ("encoder.patch_embed.{p}", "embeddings.patch_embeddings.projection.{p}"),
            ("encoder.blocks.{n}.norm1.{p}", "encoder.layer.{n}.layernorm_before.{p}"),
            ("encoder.blocks.{n}.attn.qkv.{p}", tuple(f"encoder.layer.{{n}}.attention.attention.{part}.{{p}}" for part in QKV)),
            ("encoder.blocks.{n}.attn.proj.{p}", "encoder.layer.{n}.attention.output.dense.{p}"),
            ("encoder.blocks.{n}.norm2.{p}", "encoder.layer.{n}.layernorm_after.{p}"),
            ("encoder.blocks.{n}.mlp.fc1.{p}", "encoder.layer.{n}.intermediate.dense.{p}"),
            ("encoder.blocks.{n}.mlp.fc2.{p}", "encoder.layer.{n}.output.dense.{p}"),
        ),
        *NECK,
        *HEADS,
    ),
    unused=(r"dpt\.(layernorm|pooler)\..*",),
    filled=(("dpt.layernorm.weight", ("D",), 1.0), ("dpt.layernorm.bias", ("D",), 0.0)),
    differs={"encoder": {"norm_eps": 1e-12}},
    stated=Stated(read, write, "dpt"),
)
LAYOUTS = (LAYOUT,)

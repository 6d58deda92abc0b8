"""MiDaS 3.1's models on BEiT, and what other models on BEiT share with them.

Sources: https://github.com/isl-org/MiDaS, https://huggingface.co/docs/transformers/model_doc/dpt
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import HALF, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from . import dinov2_depthers, transformers_dpt
from .keys import HEADS, NECK, QKV, SCRATCH, under
from .layout import CheckpointError, Layout, Row, Stated
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
    hooks_of,
    processed,
    ratio,
    side,
    whole,
    written_processor,
)


def beit(dim: int, depth: int, heads: int, hooks: tuple[int, ...], grid: int) -> EncoderConfig:
    """BEiT in one of timm's sizes."""
    return EncoderConfig(dim, depth, heads, hooks, pos_grid=(grid, grid), layer_scale=True, kind="beit")


LARGE_NECK = (256, 512, 1024, 1024)


def _model(name: str, encoder: EncoderConfig, neck: tuple[int, int, int, int]) -> DPTConfig:
    side_length = encoder.pos_grid[0] * encoder.patch_size
    return DPTConfig(
        name=f"midas-3.1-beit-{name}",
        encoder=encoder,
        decoder=DecoderConfig(neck_channels=neck, match_size=True, dead_unit=True),
        head=HeadConfig(task="depth"),
        input=InputConfig(mean=HALF, std=HALF, size=(side_length, side_length), multiple=32),
        source=f"https://github.com/isl-org/MiDaS/releases/download/v3_1/dpt_beit_{name.replace('-', '_')}.pt",
        licence="MIT",
    )


MODELS = (
    _model("large-512", beit(1024, 24, 16, (5, 11, 17, 23), 32), LARGE_NECK),
    _model("large-384", beit(1024, 24, 16, (5, 11, 17, 23), 24), LARGE_NECK),
    _model("base-384", beit(768, 12, 12, (2, 5, 8, 11), 24), (96, 192, 384, 768)),
)
PARAMETERS = {"midas-3.1-beit-large-512": 344_011_969, "midas-3.1-beit-large-384": 343_336_129, "midas-3.1-beit-base-384": 110_770_369}

# isl-org's, whose encoder is timm's: its keys have no bias.
ORIGINAL_ROWS: tuple[Row, ...] = (
    *under(
        "pretrained.model.",
        ("encoder.cls_token", "cls_token"),
        ("encoder.patch_embed.{p}", "patch_embed.proj.{p}"),
        ("encoder.blocks.{n}.attn.qkv.bias", ("blocks.{n}.attn.q_bias", None, "blocks.{n}.attn.v_bias")),
        ("encoder.blocks.{n}.attn.position.table", "blocks.{n}.attn.relative_position_bias_table"),
        ("encoder.blocks.{n}.ls1.gamma", "blocks.{n}.gamma_1"),
        ("encoder.blocks.{n}.ls2.gamma", "blocks.{n}.gamma_2"),
        ("encoder.blocks.{n}.{p}", "blocks.{n}.{p}"),
    ),
    ("reassemble.{i}.readout.linear.{p}", "pretrained.act_postprocess{k}.0.project.0.{p}"),
    ("reassemble.{i}.project.{p}", "pretrained.act_postprocess{k}.3.{p}"),
    ("reassemble.{i}.resize.{p}", "pretrained.act_postprocess{k}.4.{p}"),
    *SCRATCH,
    ("head.conv1.{p}", "scratch.output_conv.0.{p}"),
    ("head.conv2.{p}", "scratch.output_conv.2.{p}"),
    ("head.conv3.{p}", "scratch.output_conv.4.{p}"),
)
# ImageNet's classifier, and where each two patches' bias stands in the table, which is computed here and in newer versions of timm.
ORIGINAL_UNUSED = r"pretrained\.model\.((norm|fc_norm|head)\..*|blocks\.\d+\.attn\.relative_position_index)"
ORIGINAL_FILLED: tuple[tuple[str, tuple[int | str, ...], float], ...] = (
    ("pretrained.model.fc_norm.weight", ("D",), 1.0),
    ("pretrained.model.fc_norm.bias", ("D",), 0.0),
    ("pretrained.model.head.weight", (1000, "D"), 0.0),
    ("pretrained.model.head.bias", (1000,), 0.0),
)
# transformers', with the names that its files have.
_LAYER = "encoder.layer.{n}."
BACKBONE: tuple[Row, ...] = under(
    "backbone.",
    ("encoder.cls_token", "embeddings.cls_token"),
    ("encoder.patch_embed.{p}", "embeddings.patch_embeddings.projection.{p}"),
    ("encoder.blocks.{n}.norm1.{p}", _LAYER + "layernorm_before.{p}"),
    ("encoder.blocks.{n}.attn.qkv.weight", tuple(f"{_LAYER}attention.attention.{part}.weight" for part in QKV)),
    ("encoder.blocks.{n}.attn.qkv.bias", (_LAYER + "attention.attention.query.bias", None, _LAYER + "attention.attention.value.bias")),
    ("encoder.blocks.{n}.attn.position.table", _LAYER + "attention.attention.relative_position_bias.relative_position_bias_table"),
    ("encoder.blocks.{n}.attn.proj.{p}", _LAYER + "attention.output.dense.{p}"),
    ("encoder.blocks.{n}.ls1.gamma", _LAYER + "lambda_1"),
    ("encoder.blocks.{n}.norm2.{p}", _LAYER + "layernorm_after.{p}"),
    ("encoder.blocks.{n}.mlp.fc1.{p}", _LAYER + "intermediate.dense.{p}"),
    ("encoder.blocks.{n}.mlp.fc2.{p}", _LAYER + "output.dense.{p}"),
    ("encoder.blocks.{n}.ls2.gamma", _LAYER + "lambda_2"),
)
BACKBONE_UNUSED = r"backbone\..*\.relative_position_index"
BACKBONE_MARKERS = (
    "backbone.embeddings.patch_embeddings.projection.weight",
    "backbone.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table",
)
TABLE: Table = {  # of transformers' BeitConfig
    "model_type": (None, "'beit'", fixed("beit")),
    "hidden_size": default(POSITIVE_WHOLE, 768),
    "num_hidden_layers": default(POSITIVE_WHOLE, 12),
    "num_attention_heads": default(POSITIVE_WHOLE, 12),
    "intermediate_size": default(POSITIVE_WHOLE, 3072),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": default(EPSILON, 1e-12),
    "image_size": (224, "the side of a square, in whole patches", lambda value: whole(side(value))),
    "patch_size": (16, "16: transformers' head upsamples by that, whatever the patches are", lambda value: side(value) == 16),
    "num_channels": (3, "3", fixed(3)),
    "use_mask_token": (False, "false: no patch is masked", fixed(False)),
    "use_absolute_position_embeddings": (False, "false: BEiT here knows places by its biases", fixed(False)),
    "use_relative_position_bias": (False, "true: BEiT here knows places by its biases", fixed(True)),
    "use_shared_relative_position_bias": (False, "false: each block has biases of its own", fixed(False)),
    "layer_scale_init_value": (0.1, "a number above 0: blocks have their factors", lambda value: type(value) in (int, float) and value > 0),
    "add_fpn": (False, "false: the decoder makes its own pyramid", fixed(False)),
    "reshape_hidden_states": (True, "false: the readout needs the class token", fixed(False)),
}


def beit_of(backbone: Document) -> EncoderConfig:
    """The encoder of a `backbone_config` of transformers' BEiT."""
    values = backbone.obeyed(TABLE)
    grid = side(values["image_size"]) // 16
    try:
        return EncoderConfig(
            embed_dim=values["hidden_size"],
            depth=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            hooks=hooks_of(backbone, values["num_hidden_layers"]),
            pos_grid=(grid, grid),
            mlp_ratio=ratio(values["intermediate_size"], values["hidden_size"]),
            norm_eps=values["layer_norm_eps"],
            layer_scale=True,
            activation=ACTIVATIONS[values["hidden_act"]],
            kind="beit",
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{backbone.path}: {error}") from error


def written_beit(config: DPTConfig) -> dict[str, Any]:
    """A `backbone_config` of transformers' BEiT; the inverse of `beit_of`."""
    encoder = config.encoder
    square = (encoder.pos_grid[0],) * 2
    computed = {"kind": ("beit",), "layer_scale": (True,), "mlp": ("mlp",), "patch_size": (16,), "pos_grid": (square,)}
    check_writable(config, {"encoder": computed})
    return {
        "model_type": "beit",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": int(encoder.mlp_ratio * encoder.embed_dim),
        "hidden_act": WRITTEN_ACTIVATIONS[encoder.activation],
        "layer_norm_eps": encoder.norm_eps,
        "image_size": encoder.pos_grid[0] * 16,
        "patch_size": 16,
        "use_relative_position_bias": True,
        "reshape_hidden_states": False,
        "out_indices": [index + 1 for index in encoder.hooks],
        "out_features": [f"stage{index + 1}" for index in encoder.hooks],
    }


_KNOWN = ("decoder.match_size",)  # of whole 32 pixels, the sizes upstream, the next level is twice as large, and so is the map


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of a DPT on BEiT."""
    values = model.obeyed({**transformers_dpt.DPT, **dinov2_depthers.BACKBONE})
    encoder, head = beit_of(model.inner("backbone_config")), replace(transformers_dpt.head_of(model, values), upsample=2)
    inputs = processed(processor, encoder.pos_grid[0] * 16, 16, "bicubic")
    return DPTConfig(name, encoder, transformers_dpt.decoder_of(model, values), head, inputs, licence="unknown")


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of a DPT on BEiT."""
    model = {
        **transformers_dpt.written_dpt(config, _KNOWN, upsample=(None, 2)),
        "backbone_config": written_beit(config),
        "is_hybrid": False,
    }
    return model, written_processor(config.input)


ORIGINAL = Layout(
    name="MiDaS 3.1 BEiT",
    format="isl",
    markers=("pretrained.model.patch_embed.proj.weight", "pretrained.model.blocks.0.attn.relative_position_bias_table"),
    rows=ORIGINAL_ROWS,
    unused=(ORIGINAL_UNUSED,),
    filled=ORIGINAL_FILLED,
)
TRANSFORMERS = Layout(
    name="transformers' DPT on BEiT",
    format="hf",
    markers=(*BACKBONE_MARKERS, "head.head.0.weight"),
    rows=(*BACKBONE, *NECK, *HEADS),
    unused=(BACKBONE_UNUSED,),
    differs={
        "encoder": {"norm_eps": 1e-12},
        "decoder": {"match_size": False},
        "head": {"upsample": 2},
        "input": {"rule": "square", "antialias": True, "grey_levels": True},
    },
    stated=Stated(read, write, "dpt"),
)
LAYOUTS = (ORIGINAL, TRANSFORMERS)

"""MiDaS 3.1's models on Swin Transformers V2.

Sources: https://github.com/isl-org/MiDaS, https://huggingface.co/docs/transformers/model_doc/dpt
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import HALF, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from . import transformers_dpt
from .keys import HEADS, NECK, OUTPUT_CONV, QKV, SCRATCH, under
from .layout import CheckpointError, Layout, Stated
from .stated import (
    ACTIVATION,
    ACTIVATIONS,
    POSITIVE_WHOLE,
    WRITTEN_ACTIVATIONS,
    Document,
    Table,
    check_writable,
    default,
    fixed,
    number,
    processed,
    side,
    whole,
    wholes,
    written_processor,
)


def swinv2(dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, pretrained: tuple[int, ...], grid: int) -> EncoderConfig:
    """Swin V2 with patches of 4."""
    return EncoderConfig(
        embed_dim=dim,
        depth=sum(depths),
        num_heads=heads[0],
        hooks=tuple(sum(depths[: stage + 1]) - 1 for stage in range(4)),
        patch_size=4,
        pos_grid=(grid, grid),
        norm_eps=1e-5,
        kind="swinv2",
        stage_depths=depths,
        stage_heads=heads,
        window=window,
        pretrained_windows=pretrained,
    )


def _model(name: str, encoder: EncoderConfig) -> DPTConfig:
    length = encoder.patch_size * encoder.pos_grid[0]
    a, b, c, d = encoder.map_widths
    return DPTConfig(
        name=f"midas-3.1-swin2-{name}",
        encoder=encoder,
        decoder=DecoderConfig(neck_channels=(a, b, c, d), dead_unit=True),
        head=HeadConfig(task="depth"),
        input=InputConfig(mean=HALF, std=HALF, size=(length, length), rule="square", multiple=32),
        source=f"https://github.com/isl-org/MiDaS/releases/download/v3_1/dpt_swin2_{name.replace('-', '_')}.pt",
        licence="MIT",
    )


_LEARNT = (12, 12, 12, 6)  # windows of 192 pixels, that those of 384 began with
MODELS = (
    _model("large-384", swinv2(192, (2, 2, 18, 2), (6, 12, 24, 48), 24, _LEARNT, 96)),
    _model("base-384", swinv2(128, (2, 2, 18, 2), (4, 8, 16, 32), 24, _LEARNT, 96)),
    _model("tiny-256", swinv2(96, (2, 2, 6, 2), (3, 6, 12, 24), 16, (0, 0, 0, 0), 64)),
)
PARAMETERS = {
    "midas-3.1-swin2-large-384": 211_889_845,
    "midas-3.1-swin2-base-384": 101_363_897,
    "midas-3.1-swin2-tiny-256": 40_935_211,
}

_STAGE, _BLOCK = "encoder.stages.{i}.", "encoder.stages.{i}.blocks.{n}."
_THEIRS = "layers.{i}.blocks.{n}.attn."
ORIGINAL = Layout(
    name="MiDaS 3.1 Swin2",
    format="isl",
    markers=("pretrained.model.patch_embed.norm.weight", "pretrained.model.layers.0.blocks.0.attn.logit_scale"),
    rows=(
        *under(
            "pretrained.model.",
            ("encoder.patch_embed.{p}", "patch_embed.{p}"),
            (_BLOCK + "attn.qkv.bias", (_THEIRS + "q_bias", None, _THEIRS + "v_bias")),
            (_BLOCK + "attn.position.mlp.{p}", _THEIRS + "cpb_mlp.{p}"),
            (_STAGE + "{p}", "layers.{i}.{p}"),
        ),
        *SCRATCH,
        *OUTPUT_CONV,
    ),
    # ImageNet's classifier, and what is computed here
    unused=(
        r"pretrained\.model\.(norm|head)\..*",
        r"pretrained\.model\.layers\..*\.(attn_mask|attn\.(k_bias|relative_coords_table|relative_position_index))",
    ),
    filled=(
        ("pretrained.model.norm.weight", ("8D",), 1.0),
        ("pretrained.model.norm.bias", ("8D",), 0.0),
        ("pretrained.model.head.weight", (1000, "8D"), 0.0),
        ("pretrained.model.head.bias", (1000,), 0.0),
    ),
)

TABLE: Table = {  # of transformers' Swinv2Config
    "model_type": (None, "'swinv2'", fixed("swinv2")),
    "image_size": (224, "the side of a square, in whole patches", lambda value: whole(side(value))),
    "patch_size": (4, "4: transformers' head upsamples by that, whatever the patches are", lambda value: side(value) == 4),
    "num_channels": (3, "3", fixed(3)),
    "embed_dim": default(POSITIVE_WHOLE, 96),
    "depths": ([2, 2, 6, 2], "four whole numbers above 0", lambda value: wholes(value, 4)),
    "num_heads": ([3, 6, 12, 24], "four whole numbers above 0", lambda value: wholes(value, 4)),
    "window_size": default(POSITIVE_WHOLE, 7),
    "pretrained_window_sizes": ([0, 0, 0, 0], "four whole numbers", lambda value: wholes(value, 4, low=0)),
    "mlp_ratio": (4.0, "a number above 0", lambda value: number(value) and value > 0),
    "qkv_bias": (True, "true: our projections have a bias", fixed(True)),
    "hidden_act": ACTIVATION,
    "use_absolute_embeddings": (False, "false: places are known by the windows' biases", fixed(False)),
    "layer_norm_eps": (1e-5, "a number above 0", lambda value: number(value) and value > 0),
}
_TWICE = -200.0  # transformers adds the mask of -100 to the scores twice
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_DPT: Table = {
    **transformers_dpt.DPT,
    "is_hybrid": (False, "false: the encoder is the backbone", fixed(False)),
    "backbone": (None, "null: the encoder is that of backbone_config", fixed(None)),
}


def _encoder(backbone: Document) -> EncoderConfig:
    """The encoder of a `backbone_config` of transformers' Swin V2."""
    values = backbone.obeyed(TABLE)
    indices, features = (backbone.values.get(name) for name in ("out_indices", "out_features"))
    if indices not in ([1, 2, 3, 4], None) or features not in (_STAGES, None) or indices is features:
        raise backbone.refusal("out_features", features if indices is None else indices, f"the four stages, {_STAGES}")
    depths, heads, grid = tuple(values["depths"]), tuple(values["num_heads"]), side(values["image_size"]) // 4
    try:
        encoder = swinv2(values["embed_dim"], depths, heads, values["window_size"], tuple(values["pretrained_window_sizes"]), grid)
        return replace(
            encoder,
            mlp_ratio=values["mlp_ratio"],
            norm_eps=values["layer_norm_eps"],
            activation=ACTIVATIONS[values["hidden_act"]],
            window_mask=_TWICE,
        )
    except ValueError as error:
        raise CheckpointError(f"{backbone.path}: {error}") from error


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of a DPT on Swin V2."""
    values = model.obeyed(_DPT)
    encoder, head = _encoder(model.inner("backbone_config")), transformers_dpt.head_of(model, values)
    decoder = transformers_dpt.decoder_of(model, values)
    if decoder.neck_channels != encoder.map_widths:
        raise model.refusal("neck_hidden_sizes", values["neck_hidden_sizes"], f"{list(encoder.map_widths)}, as the stages have them")
    length = 4 * encoder.pos_grid[0]
    inputs = processed(processor, length, 4, transformers_dpt.output_mode(head.task))
    if inputs.size != (length, length) or inputs.rule != "square":
        path, given = ("preprocessor_config.json", None) if processor is None else (processor.path, processor.values.get("size"))
        raise CheckpointError(f"{path}: size={given}: it must be {length}x{length} without keep_aspect_ratio, as the windows are made for")
    return DPTConfig(name, encoder, decoder, head, inputs, licence="unknown")


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of a DPT on Swin V2, which takes the mask twice."""
    encoder = config.encoder
    computed = {"kind": ("swinv2",), "patch_size": (4,), "window_mask": (_TWICE,)}
    check_writable(config, {"encoder": computed}, known=("encoder.window_mask",))
    backbone = {
        "model_type": "swinv2",
        "image_size": 4 * encoder.pos_grid[0],
        "patch_size": 4,
        "embed_dim": encoder.embed_dim,
        "depths": list(encoder.stage_depths),
        "num_heads": list(encoder.stage_heads),
        "window_size": encoder.window,
        "pretrained_window_sizes": list(encoder.pretrained_windows),
        "mlp_ratio": encoder.mlp_ratio,
        "hidden_act": WRITTEN_ACTIVATIONS[encoder.activation],
        "layer_norm_eps": encoder.norm_eps,
        "out_features": _STAGES,
        "out_indices": [1, 2, 3, 4],
    }
    model = {**transformers_dpt.written_dpt(config), "backbone_config": backbone, "is_hybrid": False}
    return model, written_processor(config.input)


_HF = "encoder.layers.{i}.blocks.{n}."
TRANSFORMERS = Layout(
    name="transformers' DPT on Swin V2",
    format="hf",
    markers=("backbone.embeddings.norm.weight", "backbone.encoder.layers.0.blocks.0.attention.self.logit_scale"),
    rows=(
        *under(
            "backbone.",
            ("encoder.patch_embed.proj.{p}", "embeddings.patch_embeddings.projection.{p}"),
            ("encoder.patch_embed.norm.{p}", "embeddings.norm.{p}"),
            (_BLOCK + "attn.qkv.weight", tuple(f"{_HF}attention.self.{part}.weight" for part in QKV)),
            (_BLOCK + "attn.qkv.bias", (_HF + "attention.self.query.bias", None, _HF + "attention.self.value.bias")),
            (_BLOCK + "attn.proj.{p}", _HF + "attention.output.dense.{p}"),
            (_BLOCK + "attn.logit_scale", _HF + "attention.self.logit_scale"),
            (_BLOCK + "attn.position.mlp.{p}", _HF + "attention.self.continuous_position_bias_mlp.{p}"),
            (_BLOCK + "norm1.{p}", _HF + "layernorm_before.{p}"),
            (_BLOCK + "mlp.fc1.{p}", _HF + "intermediate.dense.{p}"),
            (_BLOCK + "mlp.fc2.{p}", _HF + "output.dense.{p}"),
            (_BLOCK + "norm2.{p}", _HF + "layernorm_after.{p}"),
            (_STAGE + "downsample.{p}", "encoder.layers.{i}.downsample.{p}"),
        ),
        *NECK,
        *HEADS,
    ),
    unused=(r"backbone\..*\.relative_(coords_table|position_index)",),
    differs={"encoder": {"window_mask": _TWICE}, "input": {"antialias": True, "grey_levels": True}},
    stated=Stated(read, write, "dpt"),
)
LAYOUTS = (ORIGINAL, TRANSFORMERS)

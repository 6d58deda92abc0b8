"""TIPSv2's dense models: depth, surface normals and ADE20K's classes, each by a decoder of its own, of one pass through one encoder.

What transformers writes is the layout of the published files. Theirs of one task alone hold one of the decoders.

Sources: https://huggingface.co/docs/transformers/model_doc/tipsv2_dpt, https://github.com/google-deepmind/tips (pytorch/decoders.py)
"""

from __future__ import annotations

import functools
from typing import Any

from ..classes import ade20k, palette
from ..config import TASKS, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig, TaskConfig
from .keys import VIT, under
from .layout import CheckpointError, Layout, Row, Stated
from .stated import (
    ACTIVATION,
    ACTIVATIONS,
    DINOV2,
    WRITTEN_ACTIVATIONS,
    Document,
    Table,
    check_writable,
    default,
    dinov2_computes,
    fixed,
    hooks_of,
    number,
    processed,
    side,
    whole,
    wholes,
    written_processor,
)
from .transformers_dpt import labels

CLASSES = {  # of transformers, and the tasks of each
    "Tipsv2DptForDensePrediction": TASKS,
    "Tipsv2DptForDepthEstimation": ("depth",),
    "Tipsv2DptForSemanticSegmentation": ("segmentation",),
    "Tipsv2DptForNormalEstimation": ("normals",),
}


def _encoder(dim: int, depth: int, heads: int, hooks: tuple[int, ...], **changes: Any) -> EncoderConfig:
    fields = {"patch_size": 14, "pos_grid": (32, 32), "final_norm": "every", "layer_scale": True, "registers": 1, "pos_antialias": True}
    return EncoderConfig(embed_dim=dim, depth=depth, num_heads=heads, hooks=hooks, **{**fields, **changes})


def _decoder(channels: tuple[int, ...], features: int, activation: str = "gelu_tanh") -> DecoderConfig:
    a, b, c, d = channels
    return DecoderConfig(neck_channels=(a, b, c, d), features=features, readout_activation=activation, unit_bias=False)


def _heads(
    classes: tuple[str, ...], colours: tuple[tuple[int, int, int], ...], bins: int, nearest: float, farthest: float
) -> dict[str, HeadConfig]:
    """By task."""
    depth = HeadConfig(task="depth", inverse=False, bins=bins, bin_range=(nearest, farthest), bin_floor=nearest, kind="linear")
    segmentation = HeadConfig(task="segmentation", classes=classes, palette=colours, kind="linear", between="none")
    return {"depth": depth, "segmentation": segmentation, "normals": HeadConfig(task="normals", kind="linear", between="none")}


def _model(
    name: str,
    encoder: EncoderConfig,
    decoder: DecoderConfig,
    heads: dict[str, HeadConfig],
    tasks: tuple[str, ...],
    inputs: InputConfig,
    **fields: Any,
) -> DPTConfig:
    first, *others = (heads[task] for task in tasks)
    return DPTConfig(name, encoder, decoder, first, inputs, further=tuple(TaskConfig(decoder, head) for head in others), **fields)


_SIZES = {  # and what the hub calls them, and how many parameters each has
    "base": (_encoder(768, 12, 12, (2, 5, 8, 11)), "b14", 158_006_489),
    "large": (_encoder(1024, 24, 16, (5, 11, 17, 23)), "l14", 405_694_617),
    "so400m": (_encoder(1152, 27, 16, (6, 13, 20, 26), mlp_ratio=4304 / 1152), "so400m14", 532_923_113),
    "giant": (_encoder(1536, 40, 24, (9, 19, 29, 39), mlp="swiglu"), "g14", 1_320_462_361),
}
_INPUT = InputConfig(
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    size=(448, 448),
    rule="square",
    multiple=14,
    mode="bilinear",
    antialias=True,
    grey_levels=True,
    output_mode="bilinear",
)
MODELS = tuple(
    _model(
        f"tipsv2-{size}",
        encoder,
        _decoder(tuple(encoder.embed_dim >> (3 - level) for level in range(4)), 256),
        _heads(ade20k.CLASSES, ade20k.PALETTE, 256, 0.001, 10.0),
        TASKS,
        _INPUT,
        source=f"https://huggingface.co/google/tipsv2-{letter}-dpt/resolve/main/model.safetensors",
    )
    for size, (encoder, letter, _) in _SIZES.items()
)
PARAMETERS = {f"tipsv2-{size}": count for size, (_, _, count) in _SIZES.items()}

_ENCODER: tuple[Row, ...] = (
    ("encoder.registers", "register_tokens"),
    ("encoder.blocks.{n}.mlp.fc1.{p}", "blocks.{n}.mlp.c_fc.{p}"),
    ("encoder.blocks.{n}.mlp.fc2.{p}", "blocks.{n}.mlp.c_proj.{p}"),
    *VIT,
)


def _decoder_rows(ours: str, task: str) -> tuple[Row, ...]:
    rows = (
        ("reassemble.{i}.readout.linear.{p}", "reassemble.readout_projects.{i}.{p}"),
        ("reassemble.{i}.project.{p}", "reassemble.out_projections.{i}.{p}"),
        ("reassemble.{i}.resize.{p}", "reassemble.resize_layers.{i}.{p}"),
        ("fusion.convs.{i}.{p}", "convs.{i}.{p}"),
        ("fusion.blocks.{i}.project.{p}", "fusion_blocks.{j}.out_conv.{p}"),
        ("fusion.blocks.{i}.unit1.{p}", "fusion_blocks.{j}.residual_unit.{p}"),
        ("fusion.blocks.{i}.unit2.{p}", "fusion_blocks.{j}.main_unit.{p}"),
        ("head.project.{p}", "project.{p}"),
        ("head.linear.{p}", f"{task}_head.{{p}}"),
    )
    return tuple((ours + key, f"{task}_head.{theirs}") for key, theirs in rows)


TIPSV2: Table = {  # of transformers' Tipsv2VisionConfig
    **DINOV2,
    "model_type": (None, "'tipsv2_vision_model'", fixed("tipsv2_vision_model")),
    "image_size": (448, "the side of a square, in whole patches", lambda value: whole(side(value))),
    "num_register_tokens": (1, "a whole number above 0", whole),
    "reshape_hidden_states": (True, "false: the decoders read tokens", fixed(False)),
}
DPT: Table = {  # of transformers' Tipsv2DptConfig, but for its backbone
    "model_type": (None, "'tipsv2_dpt'", fixed("tipsv2_dpt")),
    "reassemble_factors": ([4, 2, 1, 0.5], "[4, 2, 1, 0.5]", lambda value: value == [4, 2, 1, 0.5]),
    "neck_hidden_sizes": ([96, 192, 384, 768], "four whole numbers above 0", lambda value: wholes(value, 4)),
    "fusion_hidden_size": (256, "a whole number above 1", lambda value: whole(value, 2)),
    "readout_activation": default(ACTIVATION, "gelu_pytorch_tanh"),
    "num_depth_bins": (256, "a whole number above 1", lambda value: whole(value, 2)),
    "min_depth": (0.001, "a number above 0", lambda value: number(value) and value > 0),
    "max_depth": (10.0, "a number above min_depth", lambda value: number(value) and value > 0),
    "depth_decoder_activation": ("relu", "'relu'", fixed("relu")),
}
_DEFAULT_BACKBONE = {"model_type": "tipsv2_vision_model", "out_indices": [3, 6, 9, 12], "reshape_hidden_states": False}
_PROCESSOR = {"size": 448, "resample": 2, "do_normalize": False}  # the defaults of its processor, where they are not DPTImageProcessor's


def read(tasks: tuple[str, ...], model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of a class with these tasks."""
    values = model.obeyed(DPT)
    if values["min_depth"] >= values["max_depth"]:
        raise model.refusal("max_depth", values["max_depth"], f"above min_depth={values['min_depth']}")
    backbone = model.inner("backbone_config", _DEFAULT_BACKBONE)
    stated = backbone.obeyed(TIPSV2)
    size, patch = side(stated["image_size"]), side(stated["patch_size"])
    try:
        encoder = _encoder(
            stated["hidden_size"],
            stated["num_hidden_layers"],
            stated["num_attention_heads"],
            hooks_of(backbone, stated["num_hidden_layers"]),
            patch_size=patch,
            pos_grid=(size // patch, size // patch),
            mlp_ratio=stated["mlp_ratio"],
            norm_eps=stated["layer_norm_eps"],
            final_norm="every" if stated["apply_layernorm"] else "none",
            activation=ACTIVATIONS[stated["hidden_act"]],
            registers=stated["num_register_tokens"],
            mlp="swiglu" if stated["use_swiglu_ffn"] else "mlp",
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{backbone.path}: {error}") from error
    classes = labels(model)
    heads = _heads(
        classes,
        palette(len(classes)),
        values["num_depth_bins"],
        values["min_depth"],
        values["max_depth"],
    )
    decoder = _decoder(tuple(values["neck_hidden_sizes"]), values["fusion_hidden_size"], ACTIVATIONS[values["readout_activation"]])
    given = processor or Document("preprocessor_config.json", {})
    inputs = processed(Document(given.path, {**_PROCESSOR, **given.values}), size, patch, "bilinear")
    return _model(name, encoder, decoder, heads, tasks, inputs, licence="unknown")


def write(tasks: tuple[str, ...], config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of a class with these tasks."""
    heads = {head.task: head for head in config.heads}
    encoder, decoder = config.encoder, config.decoder
    if set(heads) != set(tasks) or any(task.decoder != decoder for task in config.further):
        raise CheckpointError(f"{config.name}: its tasks are {', '.join(heads)}, of one form, where transformers has {', '.join(tasks)}")
    computed = {
        "encoder": {
            **dinov2_computes(encoder),
            "pos_mode": ("bilinear",),
            "pos_antialias": (True,),
            "registers": (encoder.registers,),
            "qkv_bias": (True,),
        },
        "decoder": {
            "readout": ("project",),
            "batch_norm": (False,),
            "match_size": (False,),
            "dead_unit": (False,),
            "unit_bias": (False,),
            "token_norm": (False,),
        },
        "head": {"kind": ("linear",), "offset": (0.0,), "reciprocal": (None,), "bounds": (None,)},
    }
    check_writable(config, computed)
    depth = heads.get("depth") or MODELS[0].head
    if depth.bin_floor != depth.bin_range[0] or depth.bin_spacing != "linear" or not depth.bins:
        raise CheckpointError(f"{config.name}: transformers' depth is of bins at even steps, whose floor is the nearest")
    other = [head.task for head in config.heads if (head.between == "relu") != (head.task == "depth")]
    if other:
        raise CheckpointError(f"{config.name}: transformers has a ReLU in the head of depth alone, not as here in that of {other[0]}")
    names = {str(index): name for index, name in enumerate(heads["segmentation"].classes)} if "segmentation" in heads else {}
    model = {
        "model_type": "tipsv2_dpt",
        "architectures": [next(name for name, of in CLASSES.items() if set(of) == set(tasks))],
        "backbone_config": {
            "model_type": "tipsv2_vision_model",
            "hidden_size": encoder.embed_dim,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "mlp_ratio": encoder.mlp_ratio,
            "hidden_act": WRITTEN_ACTIVATIONS[encoder.activation],
            "layer_norm_eps": encoder.norm_eps,
            "image_size": encoder.pos_grid[0] * encoder.patch_size,
            "patch_size": encoder.patch_size,
            "use_swiglu_ffn": encoder.mlp == "swiglu",
            "num_register_tokens": encoder.registers,
            "apply_layernorm": encoder.final_norm == "every",
            "reshape_hidden_states": False,
            "out_indices": [index + 1 for index in encoder.hooks],
            "out_features": [f"stage{index + 1}" for index in encoder.hooks],
        },
        "neck_hidden_sizes": list(decoder.neck_channels),
        "fusion_hidden_size": decoder.features,
        "reassemble_factors": [4, 2, 1, 0.5],
        "readout_activation": WRITTEN_ACTIVATIONS[decoder.readout_activation],
        "num_depth_bins": depth.bins,
        "min_depth": depth.bin_range[0],
        "max_depth": depth.bin_range[1],
        "depth_decoder_activation": "relu",
        **({"id2label": names, "label2id": {name: int(index) for index, name in names.items()}} if names else {}),
    }
    return model, {**written_processor(config.input), "image_processor_type": "Tipsv2DptImageProcessor"}


def _layout(name: str, tasks: tuple[str, ...]) -> Layout:
    first, *others = tasks
    return Layout(
        name=name,
        format="hf",
        markers=("vision_encoder.register_tokens", *(f"{task}_head.{task}_head.weight" for task in tasks)),
        rows=(
            *under("vision_encoder.", *_ENCODER),
            *_decoder_rows("", first),
            *(row for task in others for row in _decoder_rows(f"further.{task}.", task)),
        ),
        unused=(r"vision_encoder\.(mask_token|norm\..*)",),
        filled=(("vision_encoder.mask_token", (1, "D"), 0.0),),
        stated=Stated(functools.partial(read, tasks), functools.partial(write, tasks), "tipsv2_dpt"),
    )


# The one of all tasks first: its files have the markers of all.
LAYOUTS = tuple(_layout(f"TIPSv2's {' and '.join(tasks)}", tasks) for tasks in CLASSES.values())

"""DINOv2's depth models: a frozen DINOv2, which one file holds, and a DPT decoder for NYU's or KITTI's metres, which another does.

Pictures go in at their own size, padded around; those much larger than the data sets' 640x480 and 1216x352 want `scales` below 1.
transformers' files do not say that their depth is metres, nor how far it goes: it is, and 16 bits are written for the farther.

Sources: https://github.com/facebookresearch/dinov2 (dinov2/hub/depthers.py, dinov2/hub/depth),
https://huggingface.co/docs/transformers/model_doc/dpt
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from .keys import DINOV2, HEADS, NECK, VIT, residual_units, under
from .layout import Layout, Stated
from .stated import Document, Table, check_writable, dinov2_computes, dinov2_encoder, fixed, processed, written_dinov2, written_processor
from .transformers_dpt import DPT, decoder_of, head_of, written_dpt


def _encoder(dim: int, depth: int, hooks: tuple[int, ...], mlp: str = "mlp") -> EncoderConfig:
    return EncoderConfig(
        embed_dim=dim,
        depth=depth,
        num_heads=dim // 64,
        hooks=hooks,
        patch_size=14,
        pos_grid=(37, 37),
        layer_scale=True,
        pos_mode="bicubic",
        pos_offset=0.1,
        mlp=mlp,
    )


_SIZES = {  # and how many parameters the whole has
    "small": (_encoder(384, 12, (2, 5, 8, 11)), 36_016_801),
    "base": (_encoder(768, 12, (2, 5, 8, 11)), 110_772_097),
    "large": (_encoder(1024, 24, (4, 11, 17, 23)), 338_555_585),
    "giant": (_encoder(1536, 40, (9, 19, 29, 39), mlp="swiglu"), 1_198_276_929),
}
_NEAREST = 0.001
_DATA = {  # the farthest metres, a picture's size with its padding, and the units of a metre that let 16 bits hold them
    "nyu": (10.0, (490, 644), 1000.0),
    "kitti": (80.0, (364, 1218), 256.0),
}


def _model(size: str, data: str) -> DPTConfig:
    encoder, _ = _SIZES[size]
    farthest, picture, depth_scale = _DATA[data]
    dim, name = encoder.embed_dim, f"dinov2_vit{size[0]}14"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}"
    return DPTConfig(
        name=f"dpt-dinov2-{size}-{data}",
        encoder=encoder,
        decoder=DecoderConfig(neck_channels=(dim // 8, dim // 4, dim // 2, dim), unit_bias=False),
        head=HeadConfig(
            task="depth",
            inverse=False,
            project=True,
            upsample=2,
            offset=_NEAREST,
            bounds=(_NEAREST, farthest),
            depth_scale=depth_scale,
        ),
        input=InputConfig(
            mean=(123.675 / 255, 116.28 / 255, 103.53 / 255),
            std=(58.395 / 255, 57.12 / 255, 57.375 / 255),
            size=picture,
            rule="none",
            multiple=14,
            pad="centre",
            mode="bilinear",
            output_mode="bilinear",
        ),
        source=(f"{url}_pretrain.pth", f"{url}_{data}_dpt_head.pth"),
    )


MODELS = tuple(_model(size, data) for size in _SIZES for data in _DATA)
PARAMETERS = {f"dpt-dinov2-{size}-{data}": parameters for size, (_, parameters) in _SIZES.items() for data in _DATA}

_HEAD = (
    ("reassemble.{i}.readout.linear.{p}", "reassemble_blocks.readout_projects.{i}.0.{p}"),
    ("reassemble.{i}.project.{p}", "reassemble_blocks.projects.{i}.conv.{p}"),
    ("reassemble.{i}.resize.{p}", "reassemble_blocks.resize_layers.{i}.{p}"),
    ("fusion.convs.{i}.{p}", "convs.{i}.conv.{p}"),
    ("fusion.blocks.{i}.project.{p}", "fusion_blocks.{j}.project.conv.{p}"),
    *residual_units("fusion_blocks.{j}.res_conv_unit#.", "conv@.conv", "conv@.norm"),
    ("head.project.{p}", "project.conv.{p}"),
    ("head.conv1.{p}", "conv_depth.head.0.{p}"),
    ("head.conv2.{p}", "conv_depth.head.2.{p}"),
    ("head.conv3.{p}", "conv_depth.head.4.{p}"),
)


def _original(name: str, form: str, prefix: str) -> Layout:
    """The original code's, which calls the encoder `prefix`: nothing in its two files, and "backbone." in the whole model."""
    escaped = prefix.replace(".", r"\.")
    return Layout(
        name=name,
        format=form,
        markers=(f"{prefix}blocks.0.ls1.gamma", "decode_head.conv_depth.head.0.weight"),
        rows=(("fusion.blocks.3.unit1.{p}", ()), ("encoder.norm.{p}", ()), *under(prefix, *VIT), *under("decode_head.", *_HEAD)),
        unused=(rf"{escaped}mask_token", rf"{escaped}norm\..*"),
        filled=((f"{prefix}mask_token", (1, "D"), 0.0), (f"{prefix}norm.weight", ("D",), 1.0), (f"{prefix}norm.bias", ("D",), 0.0)),
    )


ORIGINAL = _original("DINOv2's backbone and head", "dinov2", "")
WHOLE = _original("DINOv2's depther", "dinov2-whole", "backbone.")

_DEPTH = ["DPTForDepthEstimation"]
BACKBONE: Table = {  # of a DPTConfig with a backbone, beside it
    "architectures": (_DEPTH, f"{_DEPTH}: transformers has no other of a backbone", fixed(_DEPTH)),
    "is_hybrid": (False, "false: the encoder is the backbone alone", fixed(False)),
    "backbone": (None, "null: the backbone is the one of backbone_config", fixed(None)),
}


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of a DPTForDepthEstimation with transformers' Dinov2 as its backbone."""
    values = model.obeyed({**DPT, **BACKBONE})
    encoder = dinov2_encoder(model.inner("backbone_config"))
    head = replace(head_of(model, values), inverse=False, upsample=2, depth_scale=_DATA["kitti"][2])
    decoder = replace(decoder_of(model, values), dead_unit=False)  # a random one: the original has none
    inputs = processed(processor, encoder.pos_grid[0] * encoder.patch_size, encoder.patch_size, "bicubic")
    return DPTConfig(name=name, encoder=encoder, decoder=decoder, head=head, input=inputs, licence="unknown")


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of the same."""
    check_writable(config, {"encoder": dinov2_computes(config.encoder)}, known=("encoder.pos_offset",))
    left_out = ("head.offset", "head.bounds", "decoder.dead_unit")  # by transformers' code; its deepest level has a unit that never runs
    model = {
        **written_dpt(config, known=left_out, inverse=(False,), upsample=(2,)),
        "backbone_config": written_dinov2(config.encoder),
        "is_hybrid": False,
    }
    return model, written_processor(config.input)


TRANSFORMERS = Layout(
    name="transformers' DPT on DINOv2",
    format="hf",
    markers=("backbone.encoder.layer.0.layer_scale1.lambda1", "head.head.0.weight"),
    rows=(("fusion.blocks.3.unit1.{p}", ()), ("encoder.norm.{p}", ()), *DINOV2, *NECK, *HEADS),
    unused=(r"backbone\.embeddings\.mask_token", r"backbone\.layernorm\..*", r"neck\.fusion_stage\.layers\.0\.residual_layer1\..*"),
    filled=(
        ("backbone.embeddings.mask_token", (1, "D"), 0.0),
        ("backbone.layernorm.weight", ("D",), 1.0),
        ("backbone.layernorm.bias", ("D",), 0.0),
        *((f"neck.fusion_stage.layers.0.residual_layer1.convolution{index}.weight", ("F", "F", 3, 3), 0.0) for index in (1, 2)),
    ),
    differs={
        "encoder": {"pos_offset": 0.0},
        "head": {"offset": 0.0, "bounds": None},
        "input": {"output_mode": "bicubic"},
    },
    stated=Stated(read, write, "dpt"),
)
LAYOUTS = (ORIGINAL, WHOLE, TRANSFORMERS)

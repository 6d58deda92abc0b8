"""DINOv3's depth models: CHMv2, which sees the height of trees' canopies from satellites and planes, and the depth model of its 7B.

Sources: https://github.com/facebookresearch/dinov3 (dinov3/hub/depthers.py, dinov3/eval/depth/models),
https://huggingface.co/docs/transformers/model_doc/chmv2
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import IMAGENET_MEAN, IMAGENET_STD, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from .keys import VIT, residual_units, under
from .layout import CheckpointError, Layout, Row, Stated
from .stated import (
    ACTIVATION,
    ACTIVATIONS,
    EPSILON,
    POSITIVE_WHOLE,
    TRUTH,
    WRITTEN_ACTIVATIONS,
    Document,
    Table,
    check_writable,
    default,
    fixed,
    hooks_of,
    number,
    processed,
    ratio,
    side,
    whole,
    wholes,
    written_processor,
)

_LICENCE = "DINOv3 License"
_FILES = "https://dl.fbaipublicfiles.com/dinov3/"  # gives them to those to whom Meta has sent the whole address
_NEAREST, _SCALE = (
    0.001,
    8,
)  # transformers divides CHMv2's farthest height by 8 and multiplies the mean of the bins, 0.001 among them, again

MODELS = (
    DPTConfig(
        name="chmv2",
        encoder=EncoderConfig(
            embed_dim=1024,
            depth=24,
            num_heads=16,
            hooks=(5, 11, 17, 23),
            final_norm="every",
            layer_scale=True,
            registers=4,
            kind="dinov3",
        ),
        decoder=DecoderConfig(neck_channels=(128, 256, 512, 1024)),
        head=HeadConfig(
            task="depth",
            hidden=128,
            inverse=False,
            upsample=2,
            depth_scale=256.0,
            bins=256,
            bin_range=(_SCALE * _NEAREST, 96.0),
            bin_spacing="mixed_log",
            bin_floor=1e-8,
        ),
        input=InputConfig(
            mean=(0.420, 0.411, 0.296),
            std=(0.213, 0.156, 0.143),
            size=(416, 416),
            rule="none",
            pad="centre",
            output_mode="bilinear",
            output_align_corners=True,
        ),
        source="https://huggingface.co/facebook/dinov3-vitl16-chmv2-dpt-head/resolve/main/model.safetensors",
        licence=_LICENCE,
    ),
    DPTConfig(
        name="dinov3-7b-depth",
        encoder=EncoderConfig(
            embed_dim=4096,
            depth=40,
            num_heads=32,
            hooks=(9, 19, 29, 39),
            mlp_ratio=3.0,
            norm_eps=1e-5,
            final_norm="every",
            layer_scale=True,
            registers=4,
            mlp="swiglu",
            kind="dinov3",
            qkv_bias=False,
        ),
        decoder=DecoderConfig(neck_channels=(2048, 2048, 2048, 2048), features=512, readout="ignore", unit_bias=False, token_norm=True),
        head=HeadConfig(
            task="depth", inverse=False, project=True, upsample=2, depth_scale=256.0, bins=256, bin_range=(_NEAREST, 100.0), bin_floor=0.1
        ),
        input=InputConfig(
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            size=(768, 768),
            rule="square",
            mode="bilinear",
            antialias=True,
            grey_levels=True,
            output_mode="bilinear",
        ),
        source=(
            f"{_FILES}dinov3_vit7b16/dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth",
            f"{_FILES}dinov3_vit7b16/dinov3_vit7b16_synthmix_dpt_head-02040be1.pth",
        ),
        licence=_LICENCE,
    ),
)
PARAMETERS = {"chmv2": 336_900_352, "dinov3-7b-depth": 6_946_718_752}

_ENCODER: tuple[Row, ...] = (
    ("encoder.registers", "storage_tokens"),
    ("encoder.blocks.{n}.mlp.w12.{p}", ("blocks.{n}.mlp.w1.{p}", "blocks.{n}.mlp.w2.{p}")),
    *VIT,
)
_DECODER = (
    ("reassemble.{i}.readout.linear.{p}", "reassemble_blocks.readout_projects.{i}.0.{p}"),
    ("reassemble.{i}.norm.{p}", "reassemble_blocks.batchnorm_layers.{i}.{p}"),
    ("reassemble.{i}.project.{p}", "reassemble_blocks.projects.{i}.conv.{p}"),
    ("reassemble.{i}.resize.{p}", "reassemble_blocks.resize_layers.{i}.{p}"),
    ("fusion.convs.{i}.{p}", "convs.{i}.conv.{p}"),
    ("fusion.blocks.{i}.project.{p}", "fusion_blocks.{j}.project.conv.{p}"),
    *residual_units("fusion_blocks.{j}.res_conv_unit#.", "conv@.conv", "conv@.bn"),
    ("head.project.{p}", "project.conv.{p}"),
    ("head.conv1.{p}", "conv_depth.head.0.{p}"),
    ("head.conv2.{p}", "conv_depth.head.2.{p}"),
    ("head.conv3.{p}", "conv_depth.head.4.{p}"),
)


def _original(name: str, form: str, backbone: str, head: str) -> Layout:
    """The original code's, with these prefixes: none in its two files, backbone and head.

    What its backbone holds beside what is read, and its code asks for, is kept of a file in the same form: it is not made anew.
    """
    escaped = backbone.replace(".", r"\.")
    return Layout(
        name=name,
        format=form,
        markers=(f"{backbone}storage_tokens", f"{head}conv_depth.head.0.weight"),
        rows=(*under(backbone, *_ENCODER), *under(head, *_DECODER)),
        unused=(rf"{escaped}(mask_token|rope_embed\.periods|blocks\.\d+\.attn\.qkv\.bias_mask|local_cls_norm\..*)",),
        masked="_mask",
        differs={"encoder": {"norm_eps": 1e-5}, "input": {"output_align_corners": False}},
    )


ORIGINAL = _original("DINOv3's backbone and head", "dinov3-parts", "", "")
WHOLE = _original("DINOv3's depther", "dinov3", "encoder.backbone.", "decoder.")

DINOV3: Table = {  # of transformers' DINOv3ViTConfig
    "model_type": (None, "'dinov3_vit'", fixed("dinov3_vit")),
    "hidden_size": default(POSITIVE_WHOLE, 384),
    "intermediate_size": default(POSITIVE_WHOLE, 1536),
    "num_hidden_layers": default(POSITIVE_WHOLE, 12),
    "num_attention_heads": default(POSITIVE_WHOLE, 6),
    "hidden_act": ACTIVATION,
    "layer_norm_eps": default(EPSILON, 1e-5),
    "rope_theta": (100.0, "a number above 1", lambda value: number(value) and value > 1),
    "patch_size": (16, "the side of a square", lambda value: whole(side(value))),
    "num_channels": (3, "3", fixed(3)),
    "num_register_tokens": (0, "a whole number above 0", whole),
    **{name: (True, "true", fixed(True)) for name in ("query_bias", "value_bias", "proj_bias", "mlp_bias")},
    "key_bias": TRUTH,
    "use_gated_mlp": (False, "false: no model with a decoder has it", fixed(False)),
    "apply_layernorm": default(TRUTH, True),
    "return_class_token": (False, "true: the readout reads the class token", fixed(True)),
}
CHMV2: Table = {  # of transformers' CHMv2Config, but for its backbone
    "model_type": (None, "'chmv2'", fixed("chmv2")),
    "patch_size": (16, "the backbone's", whole),
    "reassemble_factors": ([4, 2, 1, 0.5], "[4, 2, 1, 0.5]", lambda value: value == [4, 2, 1, 0.5]),
    "post_process_channels": ([128, 256, 512, 1024], "four whole numbers above 0", lambda value: wholes(value, 4)),
    "fusion_hidden_size": (256, "a whole number above 1", lambda value: whole(value, 2)),
    "head_hidden_size": default(POSITIVE_WHOLE, 128),
    "number_output_channels": (256, "a whole number above 1", lambda value: whole(value, 2)),
    "readout_type": ("project", "one of project, ignore, add", fixed("project", "ignore", "add")),
    "min_depth": (_NEAREST, "a number above 0", lambda value: number(value) and value > 0),
    "max_depth": (96.0, "a number above 0", lambda value: number(value) and value > 0),
    "bins_strategy": ("chmv2_mixlog", "'chmv2_mixlog'", fixed("chmv2_mixlog")),
    "norm_strategy": ("chmv2_mixlog", "'chmv2_mixlog'", fixed("chmv2_mixlog")),
}
_DEFAULT_BACKBONE = {
    "model_type": "dinov3_vit",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_register_tokens": 4,
    "key_bias": True,
    "out_indices": [6, 12, 18, 24],
    "layer_norm_eps": 1e-6,
    "return_class_token": True,
}
_PROCESSOR = {  # the defaults of CHMv2ImageProcessor, where they are not DPTImageProcessor's
    "do_resize": False,
    "do_pad": True,
    "size_divisor": 16,
    "image_mean": [0.420, 0.411, 0.296],
    "image_std": [0.213, 0.156, 0.143],
    "keep_aspect_ratio": True,
    "ensure_multiple_of": 16,
}


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of CHMv2ForDepthEstimation."""
    values = model.obeyed(CHMV2)
    encoder = _encoder(model.inner("backbone_config", _DEFAULT_BACKBONE))
    if values["patch_size"] != encoder.patch_size:
        raise model.refusal("patch_size", values["patch_size"], f"the backbone's {encoder.patch_size}")
    nearest, farthest = values["min_depth"], values["max_depth"]
    if _SCALE * nearest >= farthest:
        raise model.refusal("max_depth", farthest, f"above {_SCALE} times min_depth={nearest}")
    head = HeadConfig(
        task="depth",
        hidden=values["head_hidden_size"],
        inverse=False,
        upsample=2,
        depth_scale=256.0,
        bins=values["number_output_channels"],
        bin_range=(_SCALE * nearest, farthest),
        bin_spacing="mixed_log",
        bin_floor=1e-8,
    )
    decoder = DecoderConfig(
        neck_channels=tuple(values["post_process_channels"]), features=values["fusion_hidden_size"], readout=values["readout_type"]
    )
    stated = processor or Document("preprocessor_config.json", {})
    default_side = MODELS[0].input.size[0]
    inputs = processed(
        Document(stated.path, {**_PROCESSOR, "size": default_side, **stated.values}), default_side, encoder.patch_size, "bilinear"
    )
    inputs = replace(inputs, output_align_corners=True)
    return DPTConfig(name=name, encoder=encoder, decoder=decoder, head=head, input=inputs, licence="unknown")


def _encoder(backbone: Document) -> EncoderConfig:
    """The encoder of a `backbone_config` of transformers' DINOv3ViT."""
    values = backbone.obeyed(DINOV3)
    try:
        return EncoderConfig(
            embed_dim=values["hidden_size"],
            depth=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            hooks=hooks_of(backbone, values["num_hidden_layers"]),
            patch_size=side(values["patch_size"]),
            mlp_ratio=ratio(values["intermediate_size"], values["hidden_size"]),
            norm_eps=values["layer_norm_eps"],
            final_norm="every" if values["apply_layernorm"] else "last",
            layer_scale=True,
            activation=ACTIVATIONS[values["hidden_act"]],
            registers=values["num_register_tokens"],
            kind="dinov3",
            rope_theta=values["rope_theta"],
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{backbone.path}: {error}") from error


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of CHMv2ForDepthEstimation."""
    encoder, decoder, head = config.encoder, config.decoder, config.head
    computed: dict[str, dict[str, tuple[Any, ...]]] = {
        "encoder": {
            "kind": ("dinov3",),
            "final_norm": ("every", "last"),
            "final_norm_eps": (None, encoder.norm_eps),
            "layer_scale": (True,),
            "mlp": ("mlp",),
            "qkv_bias": (True,),
        },
        "decoder": {
            "readout_activation": ("gelu",),
            "batch_norm": (False,),
            "match_size": (False,),
            "dead_unit": (False,),
            "unit_bias": (None, True),
            "token_norm": (False,),
        },
        "head": {
            "task": ("depth",),
            "project": (False,),
            "offset": (0.0,),
            "reciprocal": (None,),
            "bounds": (None,),
            "align_corners": (True,),
            "upsample": (2,),
            "bin_spacing": ("mixed_log",),
            "bin_floor": (1e-8,),
        },
    }
    check_writable(config, computed)
    nearest, farthest = head.bin_range
    model = {
        "model_type": "chmv2",
        "architectures": ["CHMv2ForDepthEstimation"],
        "backbone_config": {
            "model_type": "dinov3_vit",
            "hidden_size": encoder.embed_dim,
            "intermediate_size": int(encoder.mlp_ratio * encoder.embed_dim),
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "hidden_act": WRITTEN_ACTIVATIONS[encoder.activation],
            "layer_norm_eps": encoder.norm_eps,
            "rope_theta": encoder.rope_theta,
            "image_size": config.input.size[0],
            "patch_size": encoder.patch_size,
            "num_register_tokens": encoder.registers,
            "key_bias": True,
            "apply_layernorm": encoder.final_norm == "every",
            "reshape_hidden_states": True,
            "return_class_token": True,
            "out_indices": [index + 1 for index in encoder.hooks],
            "out_features": [f"stage{index + 1}" for index in encoder.hooks],
        },
        "patch_size": encoder.patch_size,
        "reassemble_factors": [4, 2, 1, 0.5],
        "post_process_channels": list(decoder.neck_channels),
        "fusion_hidden_size": decoder.features,
        "head_hidden_size": head.hidden,
        "number_output_channels": head.bins,
        "readout_type": decoder.readout,
        "min_depth": nearest / _SCALE,
        "max_depth": farthest,
        "bins_strategy": "chmv2_mixlog",
        "norm_strategy": "chmv2_mixlog",
    }
    return model, {**written_processor(config.input), "image_processor_type": "CHMv2ImageProcessor"}


def _transformers(name: str, biased: str, *markers: str) -> Layout:
    """`biased`: those of q, k, v that have a bias."""
    biases = tuple(f"layer.{{n}}.attention.{part}_proj.bias" if part in biased else None for part in "qkv")
    return Layout(
        name=name,
        format="hf",
        markers=("backbone.embeddings.register_tokens", "head.conv_depth.head.0.weight", *markers),
        rows=(
            *under(
                "backbone.",
                ("encoder.cls_token", "embeddings.cls_token"),
                ("encoder.registers", "embeddings.register_tokens"),
                ("encoder.patch_embed.{p}", "embeddings.patch_embeddings.{p}"),
                ("encoder.blocks.{n}.norm1.{p}", "layer.{n}.norm1.{p}"),
                ("encoder.blocks.{n}.attn.qkv.weight", tuple(f"layer.{{n}}.attention.{part}_proj.weight" for part in "qkv")),
                ("encoder.blocks.{n}.attn.qkv.bias", biases),
                ("encoder.blocks.{n}.attn.proj.{p}", "layer.{n}.attention.o_proj.{p}"),
                ("encoder.blocks.{n}.ls1.gamma", "layer.{n}.layer_scale1.lambda1"),
                ("encoder.blocks.{n}.norm2.{p}", "layer.{n}.norm2.{p}"),
                ("encoder.blocks.{n}.mlp.fc1.{p}", "layer.{n}.mlp.up_proj.{p}"),
                ("encoder.blocks.{n}.mlp.fc2.{p}", "layer.{n}.mlp.down_proj.{p}"),
                ("encoder.blocks.{n}.ls2.gamma", "layer.{n}.layer_scale2.lambda1"),
                ("encoder.norm.{p}", "norm.{p}"),
            ),
            *under(
                "head.",
                ("reassemble.{i}.readout.linear.{p}", "reassemble_stage.readout_projects.{i}.0.{p}"),
                ("reassemble.{i}.project.{p}", "reassemble_stage.layers.{i}.projection.{p}"),
                ("reassemble.{i}.resize.{p}", "reassemble_stage.layers.{i}.resize.{p}"),
                ("fusion.convs.{i}.{p}", "convs.{i}.{p}"),
                ("fusion.blocks.{i}.project.{p}", "fusion_layers.{j}.projection.{p}"),
                *residual_units("fusion_layers.{j}.residual_layer#.", "convolution@", "batch_norm@"),
                ("head.conv1.{p}", "conv_depth.head.0.{p}"),
                ("head.conv2.{p}", "conv_depth.head.2.{p}"),
                ("head.conv3.{p}", "conv_depth.head.4.{p}"),
            ),
        ),
        unused=(r"backbone\.embeddings\.mask_token",),
        filled=(("backbone.embeddings.mask_token", (1, 1, "D"), 0.0),),
        stated=Stated(read, write, "chmv2"),
    )


TRANSFORMERS = _transformers("transformers' CHMv2", "qkv", "backbone.layer.0.attention.k_proj.bias")
WITHOUT_KEY_BIAS = _transformers("transformers' CHMv2 without biases of its keys", "qv")
LAYOUTS = (ORIGINAL, WHOLE, TRANSFORMERS, WITHOUT_KEY_BIAS)

"""mmsegmentation: DPT with ViT-B/16 on ADE20K, whose figures this project begins with.

Source: https://github.com/open-mmlab/mmsegmentation/tree/main/configs/dpt
"""

from __future__ import annotations

from ..classes import ade20k
from ..config import DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from .keys import residual_units
from .layout import Layout

MODELS = (
    DPTConfig(
        name="dpt-base-ade20k",
        encoder=EncoderConfig(
            embed_dim=768,
            depth=12,
            num_heads=12,
            hooks=(2, 5, 8, 11),
            pos_grid=(14, 14),
            norm_eps=1e-5,
            pos_mode="bicubic",
            pos_by_count=True,
        ),
        decoder=DecoderConfig(neck_channels=(96, 192, 384, 768), batch_norm=True),
        head=HeadConfig(task="segmentation", classes=ade20k.CLASSES, palette=ade20k.PALETTE, align_corners=False),
        input=InputConfig(
            mean=(123.675 / 255, 116.28 / 255, 103.53 / 255),
            std=(58.395 / 255, 57.12 / 255, 57.375 / 255),
            size=(512, 2048),
            rule="short_and_long_side",
            pad="corner",
            mode="bilinear",
            output_mode="bilinear",
        ),
        source="https://download.openmmlab.com/mmsegmentation/v0.5/dpt/dpt_vit-b16_512x512_160k_ade20k/"
        "dpt_vit-b16_512x512_160k_ade20k-db31cf52.pth",
    ),
)

PARAMETERS = {"dpt-base-ade20k": 109_705_046}

LAYOUT = Layout(
    name="mmsegmentation",
    format="mmseg",
    markers=("backbone.patch_embed.projection.weight",),
    rows=(
        ("encoder.cls_token", "backbone.cls_token"),
        ("encoder.pos_embed", "backbone.pos_embed"),
        ("encoder.patch_embed.{p}", "backbone.patch_embed.projection.{p}"),
        ("encoder.blocks.{n}.norm1.{p}", "backbone.layers.{n}.ln1.{p}"),
        ("encoder.blocks.{n}.attn.qkv.{p}", "backbone.layers.{n}.attn.attn.in_proj_{p}"),
        ("encoder.blocks.{n}.attn.proj.{p}", "backbone.layers.{n}.attn.attn.out_proj.{p}"),
        ("encoder.blocks.{n}.norm2.{p}", "backbone.layers.{n}.ln2.{p}"),
        ("encoder.blocks.{n}.mlp.fc1.{p}", "backbone.layers.{n}.ffn.layers.0.0.{p}"),
        ("encoder.blocks.{n}.mlp.fc2.{p}", "backbone.layers.{n}.ffn.layers.1.{p}"),
        ("encoder.norm.{p}", "backbone.ln1.{p}"),
        ("reassemble.{i}.readout.linear.{p}", "decode_head.reassemble_blocks.readout_projects.{i}.0.{p}"),
        ("reassemble.{i}.project.{p}", "decode_head.reassemble_blocks.projects.{i}.conv.{p}"),
        ("reassemble.{i}.resize.{p}", "decode_head.reassemble_blocks.resize_layers.{i}.{p}"),
        ("fusion.convs.{i}.{p}", "decode_head.convs.{i}.conv.{p}"),
        ("fusion.blocks.{i}.project.{p}", "decode_head.fusion_blocks.{j}.project.conv.{p}"),
        *residual_units("decode_head.fusion_blocks.{j}.res_conv_unit#.", "conv@.conv", "conv@.bn"),
        ("head.conv.{p}", "decode_head.project.conv.{p}"),
        ("head.norm.{p}", "decode_head.project.bn.{p}"),
        ("head.classifier.{p}", "decode_head.conv_seg.{p}"),
    ),
    unused=(r"auxiliary_head\..*",),
    final_norm="last",
)
LAYOUTS = (LAYOUT,)

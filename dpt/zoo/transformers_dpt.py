"""transformers' DPT with a plain ViT: any model of it, whose configuration its own config.json states (`checkpoints.pretrained_configs`).

Source: https://huggingface.co/docs/transformers/model_doc/dpt
"""

from __future__ import annotations

from ..config import DPTConfig
from .layout import Layout, residual_units

MODELS: tuple[DPTConfig, ...] = ()
PARAMETERS: dict[str, int] = {}

LAYOUT = Layout(
    name="transformers",
    marker="dpt.embeddings.patch_embeddings.projection.weight",
    rows=(
        ("encoder.cls_token", "dpt.embeddings.cls_token"),
        ("encoder.pos_embed", "dpt.embeddings.position_embeddings"),
        ("encoder.patch_embed.{p}", "dpt.embeddings.patch_embeddings.projection.{p}"),
        ("encoder.blocks.{n}.norm1.{p}", "dpt.encoder.layer.{n}.layernorm_before.{p}"),
        (
            "encoder.blocks.{n}.attn.qkv.{p}",
            tuple(f"dpt.encoder.layer.{{n}}.attention.attention.{part}.{{p}}" for part in ("query", "key", "value")),
        ),
        ("encoder.blocks.{n}.attn.proj.{p}", "dpt.encoder.layer.{n}.attention.output.dense.{p}"),
        ("encoder.blocks.{n}.norm2.{p}", "dpt.encoder.layer.{n}.layernorm_after.{p}"),
        ("encoder.blocks.{n}.mlp.fc1.{p}", "dpt.encoder.layer.{n}.intermediate.dense.{p}"),
        ("encoder.blocks.{n}.mlp.fc2.{p}", "dpt.encoder.layer.{n}.output.dense.{p}"),
        ("reassemble.{i}.readout.linear.{p}", "neck.reassemble_stage.readout_projects.{i}.0.{p}"),
        ("reassemble.{i}.project.{p}", "neck.reassemble_stage.layers.{i}.projection.{p}"),
        ("reassemble.{i}.resize.{p}", "neck.reassemble_stage.layers.{i}.resize.{p}"),
        ("fusion.convs.{i}.{p}", "neck.convs.{i}.{p}"),
        ("fusion.blocks.{i}.project.{p}", "neck.fusion_stage.layers.{j}.projection.{p}"),
        *residual_units("neck.fusion_stage.layers.{j}.residual_layer#.", "convolution@", "batch_norm@"),
        ("head.conv1.{p}", "head.head.0.{p}"),
        ("head.conv2.{p}", "head.head.2.{p}"),
        ("head.conv3.{p}", "head.head.4.{p}"),
        ("head.conv.{p}", "head.head.0.{p}"),
        ("head.norm.{p}", "head.head.1.{p}"),
        ("head.classifier.{p}", "head.head.4.{p}"),
        ("auxiliary_head.conv.{p}", "auxiliary_head.head.0.{p}"),
        ("auxiliary_head.norm.{p}", "auxiliary_head.head.1.{p}"),
        ("auxiliary_head.classifier.{p}", "auxiliary_head.head.4.{p}"),
    ),
    unused=(r"dpt\.(layernorm|pooler)\..*",),
    norm_eps=1e-12,
)

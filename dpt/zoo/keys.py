"""Rows that the layouts of several families share."""

from __future__ import annotations

from .layout import Row

QKV = ("query", "key", "value")


def under(prefix: str, *rows: Row) -> tuple[Row, ...]:
    """The rows with a prefix before their keys."""

    def longer(theirs: str | tuple[str | None, ...]) -> str | tuple[str | None, ...]:
        return prefix + theirs if isinstance(theirs, str) else tuple(None if part is None else prefix + part for part in theirs)

    return tuple((ours, longer(theirs)) for ours, theirs in rows)


def residual_units(theirs: str, conv: str, norm: str) -> tuple[Row, ...]:
    """The rows of both residual units; in the templates `#` is the unit and `@` the convolution within it."""
    return tuple(
        (f"fusion.blocks.{{i}}.unit{unit}.{ours}{index}.{{p}}", theirs.replace("#", str(unit)) + their.replace("@", str(index)) + ".{p}")
        for unit in (1, 2)
        for index in (1, 2)
        for ours, their in (("conv", conv), ("norm", norm))
    )


# timm's ViT and DINOv2's own code name the encoder's parts as we do, but for the convolution of the patches.
VIT: tuple[Row, ...] = (
    ("encoder.cls_token", "cls_token"),
    ("encoder.pos_embed", "pos_embed"),
    ("encoder.patch_embed.{p}", "patch_embed.proj.{p}"),
    ("encoder.blocks.{n}.{p}", "blocks.{n}.{p}"),
    ("encoder.norm.{p}", "norm.{p}"),
)
# isl-org's decoder, and those that came from it.
SCRATCH: tuple[Row, ...] = (
    ("fusion.convs.{i}.{p}", "scratch.layer{k}_rn.{p}"),
    ("fusion.blocks.{i}.project.{p}", "scratch.refinenet{k}.out_conv.{p}"),
    *residual_units("scratch.refinenet{k}.resConfUnit#.", "conv@", "bn@"),
)
# isl-org's depth head.
OUTPUT_CONV: tuple[Row, ...] = (
    ("head.conv1.{p}", "scratch.output_conv.0.{p}"),
    ("head.conv2.{p}", "scratch.output_conv.2.{p}"),
    ("head.conv3.{p}", "scratch.output_conv.4.{p}"),
)
# transformers' Dinov2 as a backbone, with the names that its files have.
DINOV2: tuple[Row, ...] = under(
    "backbone.",
    ("encoder.cls_token", "embeddings.cls_token"),
    ("encoder.pos_embed", "embeddings.position_embeddings"),
    ("encoder.patch_embed.{p}", "embeddings.patch_embeddings.projection.{p}"),
    ("encoder.blocks.{n}.norm1.{p}", "encoder.layer.{n}.norm1.{p}"),
    ("encoder.blocks.{n}.attn.qkv.{p}", tuple(f"encoder.layer.{{n}}.attention.attention.{part}.{{p}}" for part in QKV)),
    ("encoder.blocks.{n}.attn.proj.{p}", "encoder.layer.{n}.attention.output.dense.{p}"),
    ("encoder.blocks.{n}.ls1.gamma", "encoder.layer.{n}.layer_scale1.lambda1"),
    ("encoder.blocks.{n}.norm2.{p}", "encoder.layer.{n}.norm2.{p}"),
    ("encoder.blocks.{n}.mlp.w12.{p}", "encoder.layer.{n}.mlp.weights_in.{p}"),
    ("encoder.blocks.{n}.mlp.w3.{p}", "encoder.layer.{n}.mlp.weights_out.{p}"),
    ("encoder.blocks.{n}.mlp.{p}", "encoder.layer.{n}.mlp.{p}"),
    ("encoder.blocks.{n}.ls2.gamma", "encoder.layer.{n}.layer_scale2.lambda1"),
    ("encoder.norm.{p}", "layernorm.{p}"),
)
# transformers' decoder: DPT's, and those that came from it.
NECK: tuple[Row, ...] = (
    ("reassemble.{i}.readout.linear.{p}", "neck.reassemble_stage.readout_projects.{i}.0.{p}"),
    ("reassemble.{i}.project.{p}", "neck.reassemble_stage.layers.{i}.projection.{p}"),
    ("reassemble.{i}.resize.{p}", "neck.reassemble_stage.layers.{i}.resize.{p}"),
    ("fusion.convs.{i}.{p}", "neck.convs.{i}.{p}"),
    ("fusion.blocks.{i}.project.{p}", "neck.fusion_stage.layers.{j}.projection.{p}"),
    *residual_units("neck.fusion_stage.layers.{j}.residual_layer#.", "convolution@", "batch_norm@"),
)
# transformers' DPT's heads.
HEADS: tuple[Row, ...] = (
    ("head.project.{p}", "head.projection.{p}"),
    ("head.conv1.{p}", "head.head.0.{p}"),
    ("head.conv2.{p}", "head.head.2.{p}"),
    ("head.conv3.{p}", "head.head.4.{p}"),
    ("head.conv.{p}", "head.head.0.{p}"),
    ("head.norm.{p}", "head.head.1.{p}"),
    ("head.classifier.{p}", "head.head.4.{p}"),
    ("auxiliary_head.conv.{p}", "auxiliary_head.head.0.{p}"),
    ("auxiliary_head.norm.{p}", "auxiliary_head.head.1.{p}"),
    ("auxiliary_head.classifier.{p}", "auxiliary_head.head.4.{p}"),
)

"""transformers' DPT-Hybrid, whose patches come from its BiT: any model of it, whose configuration its own config.json states.

Sources: https://huggingface.co/docs/transformers/model_doc/dpt, https://huggingface.co/docs/transformers/model_doc/bit
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DPTConfig
from . import transformers_dpt
from .layout import Layout, Stated
from .stated import POSITIVE_WHOLE, Document, Table, check_writable, default, fixed, wholes, written_processor

_STAGES = ["stage1", "stage2", "stage3"]
HYBRID: Table = {  # of transformers' DPTConfig, what differs from a plain ViT's
    **transformers_dpt.DPT,
    **transformers_dpt.VIT,
    "is_hybrid": (False, "true: the patches come from a BiT", fixed(True)),
    "backbone_config": (None, "null or a BiT", lambda value: value is None or isinstance(value, Mapping)),
    "readout_type": ("project", "'project': a hybrid has no other", fixed("project")),
    "backbone_out_indices": (
        [2, 5, 8, 11],
        "four blocks, counted from 0, the last two different",
        lambda value: wholes(value, 4, low=0) and value[2] != value[3],
    ),
    "neck_ignore_stages": ([0, 1], "[0, 1]: they are maps already", lambda value: value == [0, 1]),
    "backbone_featmap_shape": ([1, 1024, 24, 24], "four whole numbers above 0", lambda value: wholes(value, 4)),
}
BIT: Table = {  # of transformers' BitConfig
    "model_type": ("bit", "'bit'", fixed("bit")),
    "num_channels": (3, "3", fixed(3)),
    "embedding_size": default(POSITIVE_WHOLE, 64),
    "hidden_sizes": ([256, 512, 1024, 2048], "three whole numbers above 0 or more", lambda value: wholes(value[:3], 3)),
    "depths": ([3, 4, 6, 3], "three whole numbers above 0", lambda value: wholes(value, 3)),
    "layer_type": ("preactivation", "'bottleneck'", fixed("bottleneck")),
    "hidden_act": ("relu", "'relu'", fixed("relu")),
    "global_padding": (None, "'same'", fixed("same", "SAME")),
    "num_groups": default(POSITIVE_WHOLE, 32),
    "embedding_dynamic_padding": (False, "true: its pooling is padded as its convolutions are", fixed(True)),
    "output_stride": (32, "32", fixed(32)),
    "width_factor": (1, "1", fixed(1)),
    "out_features": (None, f"{_STAGES}", fixed(_STAGES)),
}
_DEFAULT_BIT = {  # where there is no backbone_config
    "layer_type": "bottleneck",
    "global_padding": "same",
    "depths": [3, 4, 9],
    "out_features": _STAGES,
    "embedding_dynamic_padding": True,
}


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of a DPT with a BiT."""
    values = model.obeyed(HYBRID)
    backbone = model.inner("backbone_config", _DEFAULT_BIT)
    bit = backbone.obeyed(BIT)
    width = bit["embedding_size"]
    widths = [4 * width, 8 * width, 16 * width]
    if bit["hidden_sizes"][:3] != widths:
        raise backbone.refusal("hidden_sizes", bit["hidden_sizes"], f"{widths} to begin with: 4, 8 and 16 times embedding_size")
    if values["backbone_featmap_shape"][1] != widths[2]:
        raise model.refusal("backbone_featmap_shape", values["backbone_featmap_shape"], f"of {widths[2]} channels, as stage3 has them")
    if values["neck_hidden_sizes"][:2] != widths[:2]:
        raise model.refusal("neck_hidden_sizes", values["neck_hidden_sizes"], f"{widths[:2]} to begin with, as the stages have them")
    values["backbone_out_indices"] = values["backbone_out_indices"][2:]  # the others mean nothing: the stem gives two of the maps
    return transformers_dpt.config_of(
        model,
        values,
        processor,
        name,
        stem="resnetv2",
        stem_hooks=(0, 1),
        stem_width=width,
        stem_depths=tuple(bit["depths"]),
        stem_groups=bit["num_groups"],
        stem_eps_on="variance",
    )


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of a DPT with a BiT, which standardises its weights with an epsilon of its own."""
    encoder = config.encoder
    computed: dict[str, dict[str, tuple[Any, ...]]] = {
        "encoder": {"stem": ("resnetv2",), "stem_hooks": ((0, 1),), "stem_eps_on": ("variance",)},
        "decoder": {"readout": ("project",)},
    }
    check_writable(config, computed, known=("encoder.stem_eps_on",))
    side = encoder.pos_grid[0]
    model = {
        **transformers_dpt.written_dpt(config),
        **transformers_dpt.written_vit(config),
        "is_hybrid": True,
        "backbone_out_indices": [*encoder.stem_hooks, *encoder.hooks],
        "neck_ignore_stages": list(encoder.stem_hooks),
        "backbone_featmap_shape": [1, encoder.stem_widths[2], side, side],
        "backbone_config": {
            **_DEFAULT_BIT,
            "model_type": "bit",
            "embedding_size": encoder.stem_width,
            "hidden_sizes": [*encoder.stem_widths, 32 * encoder.stem_width],
            "depths": list(encoder.stem_depths),
            "num_groups": encoder.stem_groups,
        },
    }
    return model, written_processor(config.input)


_BIT = "dpt.embeddings.backbone.bit."
LAYOUT = Layout(
    name="transformers' DPT-Hybrid",
    format="hf",
    markers=("dpt.embeddings.cls_token", f"{_BIT}embedder.convolution.weight"),
    rows=(
        ("encoder.patch_embed.stem.conv.{p}", f"{_BIT}embedder.convolution.{{p}}"),
        ("encoder.patch_embed.stem.norm.{p}", f"{_BIT}embedder.norm.{{p}}"),
        ("encoder.patch_embed.stages.{i}.blocks.{n}.{p}", f"{_BIT}encoder.stages.{{i}}.layers.{{n}}.{{p}}"),
        ("encoder.patch_embed.proj.{p}", "dpt.embeddings.projection.{p}"),
        *transformers_dpt.LAYOUT.rows,
    ),
    unused=transformers_dpt.LAYOUT.unused,
    filled=transformers_dpt.LAYOUT.filled,
    differs={"encoder": {"norm_eps": 1e-12, "stem_eps_on": "variance"}},
    stated=Stated(read, write, "dpt"),
)

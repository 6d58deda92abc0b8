"""The models that come with the package, trained here on rendered scenes; and our own files, whose keys are the model's."""

from __future__ import annotations

from ..classes import scenes
from ..config import HALF, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from .layout import Layout

_ENCODER = EncoderConfig(
    embed_dim=192, depth=6, num_heads=3, hooks=(3, 5), mlp_ratio=3.0, pos_grid=(12, 12), stem="convolutions", stem_hooks=(1, 2)
)
_DECODER = DecoderConfig(neck_channels=(48, 96, 96, 128), features=48)
_INPUT = InputConfig(mean=HALF, std=HALF, size=(192, 192), rule="short_side", mode="bilinear", antialias=True, output_mode="bilinear")

MODELS = (
    DPTConfig(
        name="dpt-tiny-depth",
        encoder=_ENCODER,
        decoder=_DECODER,
        head=HeadConfig(task="depth"),
        input=_INPUT,
        source="weights/dpt-tiny-depth.safetensors",
    ),
    DPTConfig(
        name="dpt-tiny-scenes",
        encoder=_ENCODER,
        decoder=_DECODER,
        head=HeadConfig(task="segmentation", classes=scenes.CLASSES, palette=scenes.PALETTE),
        input=_INPUT,
        source="weights/dpt-tiny-scenes.safetensors",
    ),
)

PARAMETERS = {"dpt-tiny-depth": 3_325_233, "dpt-tiny-scenes": 3_329_137}

# Behind "unused." stands what the network never reads of the file that a model was converted from, for the way back.
LAYOUT = Layout(name="dpt", format="dpt", markers=("fusion.blocks.0.project.weight",), rows=(("{p}", "{p}"),), unused=(r"unused\..*",))
LAYOUTS = (LAYOUT,)

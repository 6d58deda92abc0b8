"""isl-org: the models of the paper (Ranftl et al. 2021), MiDaS 3's DPT-Large among them.

Source: https://github.com/isl-org/DPT
"""

from __future__ import annotations

from ..classes import ade20k
from ..config import HALF, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from . import transformers_dpt
from .keys import SCRATCH, VIT, under
from .layout import Layout

_LARGE = EncoderConfig(embed_dim=1024, depth=24, num_heads=16, hooks=(5, 11, 17, 23))
_NECK = (256, 512, 1024, 1024)
_RELEASE = "https://github.com/isl-org/DPT/releases/download/1_0/"

MODELS = (
    DPTConfig(
        name="dpt-large-midas",
        encoder=_LARGE,
        decoder=DecoderConfig(neck_channels=_NECK, dead_unit=True),
        head=HeadConfig(task="depth"),
        input=InputConfig(mean=HALF, std=HALF, size=(384, 384), multiple=32),
        source=_RELEASE + "dpt_large-midas-2f21e586.pt",
        licence="MIT",
    ),
    DPTConfig(
        name="dpt-large-ade20k",
        encoder=_LARGE,
        decoder=DecoderConfig(neck_channels=_NECK, batch_norm=True, dead_unit=True),
        head=HeadConfig(task="segmentation", classes=ade20k.CLASSES, palette=ade20k.PALETTE, auxiliary=True),
        input=InputConfig(mean=HALF, std=HALF, size=(480, 480), multiple=32),
        source=_RELEASE + "dpt_large-ade20k-b12dca68.pt",
        licence="MIT",
    ),
)

PARAMETERS = {"dpt-large-midas": 343_028_417, "dpt-large-ade20k": 343_958_316}

LAYOUT = Layout(
    name="isl-org",
    format="isl",
    markers=("pretrained.model.patch_embed.proj.weight", "pretrained.model.pos_embed"),
    rows=(
        *under("pretrained.model.", *VIT),
        ("reassemble.{i}.readout.linear.{p}", "pretrained.act_postprocess{k}.0.project.0.{p}"),
        ("reassemble.{i}.project.{p}", "pretrained.act_postprocess{k}.3.{p}"),
        ("reassemble.{i}.resize.{p}", "pretrained.act_postprocess{k}.4.{p}"),
        *SCRATCH,
        ("head.conv1.{p}", "scratch.output_conv.0.{p}"),
        ("head.conv2.{p}", "scratch.output_conv.2.{p}"),
        ("head.conv3.{p}", "scratch.output_conv.4.{p}"),
        ("head.conv.{p}", "scratch.output_conv.0.{p}"),
        ("head.norm.{p}", "scratch.output_conv.1.{p}"),
        ("head.classifier.{p}", "scratch.output_conv.4.{p}"),
        ("auxiliary_head.conv.{p}", "auxlayer.0.{p}"),
        ("auxiliary_head.norm.{p}", "auxlayer.1.{p}"),
        ("auxiliary_head.classifier.{p}", "auxlayer.4.{p}"),
    ),
    unused=(r"pretrained\.model\.(norm|head|pre_logits)\..*",),
    filled=(
        ("pretrained.model.norm.weight", ("D",), 1.0),
        ("pretrained.model.norm.bias", ("D",), 0.0),
        ("pretrained.model.head.weight", (1000, "D"), 0.0),
        ("pretrained.model.head.bias", (1000,), 0.0),
    ),
    final_norm="none",  # of ImageNet's classifier, which no hook sees
)
LAYOUTS = (LAYOUT, transformers_dpt.LAYOUT)

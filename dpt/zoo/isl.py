"""isl-org: the models of the paper (Ranftl et al. 2021), MiDaS 3's DPT-Large and DPT-Hybrid among them.

KITTI's and NYU's have learnt inverse depth of a known scale and shift, and give metres. That evaluations on KITTI crop the pictures, to the
1216x352 at the bottom's middle, is a matter of the benchmark: isl-org's program does it only when asked to (`--kitti_crop`), to the picture
and before all else, and its depth is then that of the crop.

Source: https://github.com/isl-org/DPT
"""

from __future__ import annotations

from typing import Any

from ..classes import ade20k
from ..config import HALF, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from . import transformers_dpt, transformers_hybrid
from .keys import SCRATCH, VIT, under
from .layout import Layout, Row

_LARGE = EncoderConfig(embed_dim=1024, depth=24, num_heads=16, hooks=(5, 11, 17, 23))
_NECK = (256, 512, 1024, 1024)
_HYBRID = EncoderConfig(embed_dim=768, depth=12, num_heads=12, hooks=(8, 11), stem="resnetv2", stem_hooks=(0, 1))
_HYBRID_NECK = (256, 512, 768, 768)
_RELEASE = "https://github.com/isl-org/DPT/releases/download/1_0/"


def _hybrid_depth(name: str, size: tuple[int, int], file: str, **head: Any) -> DPTConfig:
    return DPTConfig(
        name=name,
        encoder=_HYBRID,
        decoder=DecoderConfig(neck_channels=_HYBRID_NECK, dead_unit=True),
        head=HeadConfig(task="depth", **head),
        input=InputConfig(mean=HALF, std=HALF, size=size, multiple=32),
        source=_RELEASE + file,
        licence="MIT",
    )


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
    _hybrid_depth("dpt-hybrid-midas", (384, 384), "dpt_hybrid-midas-501f0c75.pt"),
    _hybrid_depth(
        "dpt-hybrid-kitti", (352, 1216), "dpt_hybrid_kitti-cb926ef4.pt", inverse=False, reciprocal=(0.00006016, 0.00579), depth_scale=256.0
    ),
    _hybrid_depth("dpt-hybrid-nyu", (480, 640), "dpt_hybrid_nyu-2ce69ec7.pt", inverse=False, reciprocal=(0.000305, 0.1378)),
    DPTConfig(
        name="dpt-hybrid-ade20k",
        encoder=_HYBRID,
        decoder=DecoderConfig(neck_channels=_HYBRID_NECK, batch_norm=True, dead_unit=True),
        head=HeadConfig(task="segmentation", classes=ade20k.CLASSES, palette=ade20k.PALETTE, auxiliary=True),
        input=InputConfig(mean=HALF, std=HALF, size=(480, 480), multiple=32),
        source=_RELEASE + "dpt_hybrid-ade20k-53898607.pt",
        licence="MIT",
    ),
)

PARAMETERS = {
    "dpt-large-midas": 343_028_417,
    "dpt-large-ade20k": 343_958_316,
    **dict.fromkeys(("dpt-hybrid-midas", "dpt-hybrid-kitti", "dpt-hybrid-nyu"), 122_376_449),
    "dpt-hybrid-ade20k": 123_306_348,
}


def _layout(name: str, format: str, readout: str, project: int) -> Layout:
    """isl-org's: where its reassembling has the readout, and the number of its projection."""
    model, reassemble = "pretrained.model.", "pretrained.act_postprocess{k}"
    return Layout(
        name=name,
        format=format,
        markers=(f"{model}pos_embed", f"{reassemble.format(k=4)}.{project}.weight"),
        rows=(
            *under(
                f"{model}patch_embed.",
                ("encoder.patch_embed.stem.{p}", "backbone.stem.{p}"),
                ("encoder.patch_embed.stages.{p}", "backbone.stages.{p}"),
                ("encoder.patch_embed.proj.{p}", "proj.{p}"),
            ),
            *under(model, *VIT),
            ("reassemble.{i}.readout.linear.{p}", f"{readout}.0.project.0.{{p}}"),
            ("reassemble.{i}.project.{p}", f"{reassemble}.{project}.{{p}}"),
            ("reassemble.{i}.resize.{p}", f"{reassemble}.{project + 1}.{{p}}"),
            *SCRATCH,
            *_HEADS,
        ),
        unused=(r"pretrained\.model\.(norm|head|pre_logits)\..*",),
        filled=(
            (f"{model}norm.weight", ("D",), 1.0),
            (f"{model}norm.bias", ("D",), 0.0),
            (f"{model}head.weight", (1000, "D"), 0.0),
            (f"{model}head.bias", (1000,), 0.0),
        ),
        differs={"encoder": {"norm_eps": 1e-6, "stem_eps_on": "deviation"}},  # than what is converted from transformers
        final_norm="none",  # of ImageNet's classifier, which no hook sees
    )


_HEADS: tuple[Row, ...] = (
    ("head.conv1.{p}", "scratch.output_conv.0.{p}"),
    ("head.conv2.{p}", "scratch.output_conv.2.{p}"),
    ("head.conv3.{p}", "scratch.output_conv.4.{p}"),
    ("head.conv.{p}", "scratch.output_conv.0.{p}"),
    ("head.norm.{p}", "scratch.output_conv.1.{p}"),
    ("head.classifier.{p}", "scratch.output_conv.4.{p}"),
    ("auxiliary_head.conv.{p}", "auxlayer.0.{p}"),
    ("auxiliary_head.norm.{p}", "auxlayer.1.{p}"),
    ("auxiliary_head.classifier.{p}", "auxlayer.4.{p}"),
)
LAYOUT = _layout("isl-org", "isl", "pretrained.act_postprocess{k}", 3)
SCRIPTABLE = _layout("isl-org's branch dpt_scriptable", "isl-scriptable", "pretrained.readout_oper{k}", 0)
LAYOUTS = (LAYOUT, SCRIPTABLE, transformers_dpt.LAYOUT, transformers_hybrid.LAYOUT)

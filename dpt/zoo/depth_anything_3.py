"""Depth Anything 3's two models of single pictures: Mono, depth up to scale and shift, and Metric, which needs the focal length.

V2's large encoder and decoder, but for the last LayerNorm's epsilon and a unit that is gone; depth is an exponential, and not inverse.
Source: https://github.com/ByteDance-Seed/Depth-Anything-3
"""

from __future__ import annotations

from dataclasses import replace

from ..config import IMAGENET_MEAN, IMAGENET_STD, DPTConfig, HeadConfig, InputConfig
from . import depth_anything
from .keys import VIT, under
from .layout import Layout, Stated
from .stated import Document, fixed

_V2 = next(config for config in depth_anything.MODELS if config.name == "depth-anything-v2-large")
_ENCODER = replace(_V2.encoder, final_norm_eps=1e-5)
_DECODER = replace(_V2.decoder, dead_unit=False, float32=True)
_MONO = HeadConfig(task="depth", activation="exp", inverse=False, relative=True, sky=True)
_METRIC = replace(_MONO, relative=False, focal=300.0, depth_scale=256.0)  # 16 bits hold 255 m of 256ths
_INPUT = InputConfig(
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    size=(504, 504),
    rule="longest_side",
    multiple=14,
    mode="area_cubic",
    output_mode="bilinear",  # upstream leaves its maps at the network's size
)
_HEADS = {"mono": _MONO, "metric": _METRIC}

MODELS = tuple(
    DPTConfig(
        name=f"depth-anything-3-{kind}-large",
        encoder=_ENCODER,
        decoder=_DECODER,
        head=head,
        input=_INPUT,
        source=f"https://huggingface.co/depth-anything/DA3{kind.upper()}-LARGE/resolve/main/model.safetensors",
    )
    for kind, head in _HEADS.items()
)
PARAMETERS = {config.name: 334_171_394 for config in MODELS}

_NAMES = {f"da3{kind}-large": config for kind, config in zip(_HEADS, MODELS, strict=True)}  # by what its config.json calls them


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read`: config.json names one of upstream's configurations. Their files have the same keys, so it alone tells them apart."""
    stated = model.obeyed({"model_name": (None, f"one of {', '.join(_NAMES)}", fixed(*_NAMES))})
    return replace(_NAMES[stated["model_name"]], name=name)


LAYOUT = Layout(
    name="Depth Anything 3",
    format="depth-anything-3",
    markers=("backbone.pretrained.patch_embed.proj.weight", "head.scratch.sky_output_conv2.0.weight"),
    rows=(
        *under("backbone.pretrained.", *VIT),
        *under(
            "head.",
            *depth_anything.HEAD,
            ("head.sky.conv2.{p}", "scratch.sky_output_conv2.0.{p}"),
            ("head.sky.conv3.{p}", "scratch.sky_output_conv2.2.{p}"),
        ),
    ),
    prefix="model.",
    stated=Stated(read),
)
LAYOUTS = (LAYOUT,)

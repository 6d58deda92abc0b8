"""Every named model, as data: frozen dataclasses and one table, `CONFIGS`.

What differs between the checkpoint families is a field here and never an `if` in the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import ade20k, scenes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def numbered_classes(count: int) -> tuple[str, ...]:
    """The names of classes that have none."""
    return tuple(f"class {index}" for index in range(count))


@dataclass(frozen=True)
class EncoderConfig:
    """The Vision Transformer."""

    embed_dim: int
    depth: int
    num_heads: int
    hooks: tuple[int, ...]  # 0-based blocks whose tokens go to the decoder, shallow to deep; four with `stem_hooks`
    patch_size: int = 16
    stem: str = "patch"  # the patch embedding: one convolution, or "convolutions": four, each halving (Xiao et al. 2021)
    stem_hooks: tuple[int, ...] = ()  # 0-based convolutions of the stem whose maps go to the decoder before the tokens (DPT-Hybrid)
    pos_grid: tuple[int, int] = (24, 24)  # rows and columns of patches the positional embedding is stored for
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    final_norm: bool = False  # LayerNorm on every hooked layer (Depth Anything)
    layer_scale: bool = False  # DINOv2
    pos_mode: str = "bilinear"  # how the positional embedding is resized
    pos_offset: float = 0.0  # DINOv2 resizes by (n + 0.1) / grid instead of to n
    pos_by_count: bool = False  # mmsegmentation resizes only when the NUMBER of patches differs
    attention: str = "sdpa"  # "sdpa" or "xformers"


@dataclass(frozen=True)
class DecoderConfig:
    """Reassemble and Fusion."""

    neck_channels: tuple[int, int, int, int]
    features: int = 256
    readout: str = "project"  # or "ignore"
    batch_norm: bool = False  # in the residual units, whose convolutions then have no bias
    match_size: bool = False  # upsample to the next level's size (Depth Anything) instead of by two
    dead_unit: bool = False  # the deepest block carries a first unit that is never run (kept for a round trip)


@dataclass(frozen=True)
class HeadConfig:
    """What the fused map is turned into."""

    task: str  # "depth" or "segmentation"
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    hidden: int = 32  # depth: channels before the last 1x1 convolution
    activation: str = "relu"  # depth: "relu", or "sigmoid" times max_depth
    max_depth: float = 1.0
    inverse: bool = True  # depth: the output is inverse depth up to scale and shift, and not metres
    dropout: float = 0.1
    auxiliary: bool = False  # segmentation: a second classifier on the map one level deeper, for training
    align_corners: bool = True  # of the last upsampling


@dataclass(frozen=True)
class InputConfig:
    """How a picture becomes the model's input, and its output a map of the picture's size."""

    mean: tuple[float, float, float]  # on RGB in 0..1
    std: tuple[float, float, float]
    size: tuple[int, int]  # height, width that `rule` aims at
    rule: str = "minimal"  # see `dpt.images.network_size`
    multiple: int = 16
    pad: bool = False  # reach the multiple by zeros at the bottom and right, instead of by resizing
    mode: str = "bicubic"  # of the resize on the way in
    antialias: bool = False  # average over the pixels that a smaller map leaves out; every upstream but ours does not
    output_mode: str = "bicubic"  # of the resize on the way out
    output_align_corners: bool = False


@dataclass(frozen=True)
class DPTConfig:
    """One named model.

    `source` is where `weights="pretrained"` comes from: a file name inside the package, or a URL whose file name ends
    in the first eight hex digits of its SHA-256. `licence` is that of the weights.
    """

    name: str
    encoder: EncoderConfig
    decoder: DecoderConfig
    head: HeadConfig
    input: InputConfig
    source: str | None = None
    licence: str = "Apache-2.0"

    def with_(self, section: str, **changes) -> DPTConfig:
        """A copy with fields of one section changed, e.g. `config.with_("encoder", attention="xformers")`."""
        return replace(self, **{section: replace(getattr(self, section), **changes)})


_BASE = EncoderConfig(embed_dim=768, depth=12, num_heads=12, hooks=(2, 5, 8, 11))
_LARGE = EncoderConfig(embed_dim=1024, depth=24, num_heads=16, hooks=(5, 11, 17, 23))
_TINY = EncoderConfig(
    embed_dim=192, depth=6, num_heads=3, hooks=(3, 5), mlp_ratio=3.0, pos_grid=(12, 12), stem="convolutions", stem_hooks=(1, 2)
)
_TINY_DECODER = DecoderConfig(neck_channels=(48, 96, 96, 128), features=48)
_TINY_INPUT = InputConfig(mean=HALF, std=HALF, size=(192, 192), rule="short_side", mode="bilinear", antialias=True, output_mode="bilinear")
_ISL = "https://github.com/isl-org/DPT/releases/download/1_0/"
_MMSEG = "https://download.openmmlab.com/mmsegmentation/v0.5/dpt/dpt_vit-b16_512x512_160k_ade20k/"

CONFIGS: dict[str, DPTConfig] = {
    config.name: config
    for config in (
        DPTConfig(
            name="dpt-base-ade20k",
            encoder=replace(_BASE, pos_grid=(14, 14), norm_eps=1e-5, pos_mode="bicubic", pos_by_count=True),
            decoder=DecoderConfig(neck_channels=(96, 192, 384, 768), batch_norm=True),
            head=HeadConfig(task="segmentation", classes=ade20k.CLASSES, palette=ade20k.PALETTE, align_corners=False),
            input=InputConfig(
                mean=(123.675 / 255, 116.28 / 255, 103.53 / 255),
                std=(58.395 / 255, 57.12 / 255, 57.375 / 255),
                size=(512, 2048),
                rule="short_and_long_side",
                pad=True,
                mode="bilinear",
                output_mode="bilinear",
            ),
            source=_MMSEG + "dpt_vit-b16_512x512_160k_ade20k-db31cf52.pth",
        ),
        DPTConfig(
            name="dpt-large-midas",
            encoder=_LARGE,
            decoder=DecoderConfig(neck_channels=(256, 512, 1024, 1024), dead_unit=True),
            head=HeadConfig(task="depth"),
            input=InputConfig(mean=HALF, std=HALF, size=(384, 384), multiple=32),
            source=_ISL + "dpt_large-midas-2f21e586.pt",
            licence="MIT",
        ),
        DPTConfig(
            name="dpt-large-ade20k",
            encoder=_LARGE,
            decoder=DecoderConfig(neck_channels=(256, 512, 1024, 1024), batch_norm=True, dead_unit=True),
            head=HeadConfig(task="segmentation", classes=ade20k.CLASSES, palette=ade20k.PALETTE, auxiliary=True),
            input=InputConfig(mean=HALF, std=HALF, size=(480, 480), multiple=32),
            source=_ISL + "dpt_large-ade20k-b12dca68.pt",
            licence="MIT",
        ),
        DPTConfig(
            name="dpt-tiny-depth",
            encoder=_TINY,
            decoder=_TINY_DECODER,
            head=HeadConfig(task="depth"),
            input=_TINY_INPUT,
            source="weights/dpt-tiny-depth.safetensors",
        ),
        DPTConfig(
            name="dpt-tiny-scenes",
            encoder=_TINY,
            decoder=_TINY_DECODER,
            head=HeadConfig(task="segmentation", classes=scenes.CLASSES, palette=tuple(map(tuple, scenes.PALETTE.tolist()))),
            input=_TINY_INPUT,
            source="weights/dpt-tiny-scenes.safetensors",
        ),
    )
}

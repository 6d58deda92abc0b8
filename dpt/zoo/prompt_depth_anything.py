"""Prompt Depth Anything: Depth Anything V2 with a sensor's depth beside the picture, and metres between the sensor's nearest and farthest.

Sources: https://github.com/DepthAnything/PromptDA, https://huggingface.co/docs/transformers/model_doc/prompt_depth_anything
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import IMAGENET_MEAN, IMAGENET_STD, DPTConfig, HeadConfig, InputConfig
from . import depth_anything
from .keys import under
from .layout import Layout, Stated
from .stated import Document, Table, fixed, number

# Pictures are never made larger; what is above 1008 pixels is averaged, as OpenCV's INTER_AREA does.
_INPUT = InputConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD, size=(1008, 1008), rule="at_most", multiple=14, mode="area")
_THEIRS = {  # transformers' processor
    "size": (756, 756),
    "rule": "minimal",
    "mode": "bicubic",
    "antialias": True,
    "grey_levels": True,
    "output_mode": "bicubic",
}
_FILES = {"small": "vits", "small-transparent": "vits-transparent", "large": "vitl"}


def _model(size: str, file: str) -> DPTConfig:
    v2 = next(config for config in depth_anything.MODELS if config.name == f"depth-anything-v2-{size.partition('-')[0]}")
    return replace(
        v2,
        name=f"prompt-depth-anything-{size}",
        decoder=replace(v2.decoder, prompt=True),
        head=HeadConfig(task="depth", activation="sigmoid", inverse=False),
        input=_INPUT,
        source=f"https://huggingface.co/depth-anything/prompt-depth-anything-{file}/resolve/main/model.ckpt",
        licence="Apache-2.0",
    )


MODELS = tuple(_model(size, file) for size, file in _FILES.items())
PARAMETERS = {
    "prompt-depth-anything-small": 25_082_689,
    "prompt-depth-anything-small-transparent": 25_082_689,
    "prompt-depth-anything-large": 340_045_505,
}

_BRANCH = "fusion.blocks.{i}.prompt.conv"
ORIGINAL = Layout(
    name="Prompt Depth Anything",
    format="prompt-depth-anything",
    markers=("pretrained.patch_embed.proj.weight", "depth_head.scratch.refinenet1.resConfUnit_depth.0.weight"),
    rows=(
        *under(
            "depth_head.scratch.refinenet{k}.resConfUnit_depth.",
            *((f"{_BRANCH}{index + 1}.{{p}}", f"{2 * index}.{{p}}") for index in range(3)),
        ),
        *depth_anything.ORIGINAL.rows,
    ),
    unused=(*depth_anything.ORIGINAL.unused, "_mean|_std"),
    filled=(*depth_anything.ORIGINAL.filled, ("_mean", (1, 3, 1, 1), IMAGENET_MEAN), ("_std", (1, 3, 1, 1), IMAGENET_STD)),
    wrapper="state_dict",
    prefix="pipeline.",  # nine characters, which its own code cuts off whatever they are
)

TABLE: Table = {  # of transformers' PromptDepthAnythingConfig, what differs from Depth Anything's
    "model_type": (None, "'prompt_depth_anything'", fixed("prompt_depth_anything")),
    "max_depth": (1, "a number, or null: nothing reads it", lambda value: value is None or number(value)),
}
SCALE: Table = {"prompt_scale_to_meter": (0.001, "0.001: PNGs hold millimetres", fixed(0.001))}  # of its processor


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of PromptDepthAnythingForDepthEstimation, which is Depth Anything but for the prompt, and never multiplies."""
    model.obeyed(TABLE)
    if processor is not None:
        processor.obeyed(SCALE)
    plain = depth_anything.read(Document(model.path, {**model.values, "model_type": "depth_anything", "max_depth": 1}), processor, name)
    return replace(plain, decoder=replace(plain.decoder, prompt=True), head=replace(plain.head, inverse=False))


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of PromptDepthAnythingForDepthEstimation."""
    if config.input.rule == "at_most":
        config = config.with_("input", **_THEIRS)
    relative = config.head.activation == "relu"
    model, processor = depth_anything.write(config.with_("head", inverse=relative))
    return (
        {**model, "model_type": "prompt_depth_anything", "architectures": ["PromptDepthAnythingForDepthEstimation"], "max_depth": None},
        {**processor, "image_processor_type": "PromptDepthAnythingImageProcessor", "prompt_scale_to_meter": 0.001},
    )


TRANSFORMERS = Layout(
    name="transformers' Prompt Depth Anything",
    format="hf",
    markers=(*depth_anything.TRANSFORMERS.markers, "neck.fusion_stage.layers.0.prompt_depth_layer.convolution1.weight"),
    rows=(
        *(
            (f"{_BRANCH}{index}.{{p}}", f"neck.fusion_stage.layers.{{j}}.prompt_depth_layer.convolution{index}.{{p}}")
            for index in (1, 2, 3)
        ),
        *depth_anything.TRANSFORMERS.rows,
    ),
    unused=depth_anything.TRANSFORMERS.unused,
    filled=depth_anything.TRANSFORMERS.filled,
    differs={"encoder": {"pos_offset": 0.0}, "input": _THEIRS},
    stated=Stated(read, write, "prompt_depth_anything"),
)
LAYOUTS = (ORIGINAL, TRANSFORMERS)

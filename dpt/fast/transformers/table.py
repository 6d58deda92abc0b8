"""Which of transformers' modules have a fast form: `FORMS`, by class; and the classes that are made of them.

A fast class is a subclass of upstream's with its name, so that what goes by names (a printed model, `device_map`, FSDP's wrapping) finds
what it knows, and lives here, where pickles look for it. The class of a model itself is never exchanged, only those of modules inside.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from torch import nn

from ...kernels.depth_head import HIDDEN_CHANNELS
from ...kernels.reassemble import ACTIVATIONS as READOUTS
from ..rules import BATCH_NORM, FAST, LINEAR, PLAIN, Check, Replacement, convolution, has, is_a, layer_norm, resampling
from . import decoder, encoder


@dataclass(frozen=True)
class Form:
    """What is mixed into a class; which children it reads, what they must be, and which it calls as upstream does."""

    mixin: type
    reads: dict[str, Check]
    calls: tuple[str, ...] = ()
    rule: Any = lambda module: None
    note: Any = lambda module: None


def anything(module: nn.Module) -> str | None:
    """For a child that only holds others, or is asked for its numbers."""
    return None


def _layer() -> Form:
    reads: dict[str, Check] = {
        name: anything for name in ("attention", "attention.attention", "attention.output", "intermediate", "output", "mlp")
    }
    checks = {"norm1": layer_norm, "norm2": layer_norm, "attention": anything, **dict.fromkeys(encoder.LINEAR, LINEAR)}
    for role, check in checks.items():
        reads |= dict.fromkeys(encoder.ROLES[role], check)
    passed = ("drop_path", "dropout", "attention.output.dropout", "output.dropout", "attention.dropout", "attention.attention.dropout")
    scales = ("layer_scale1", "layer_scale2")
    reads |= dict.fromkeys((*passed, *scales, "intermediate.intermediate_act_fn.act"), anything)
    return Form(encoder.Layer, reads, calls=(*encoder.BIAS, *encoder.ROLES["activation"]), rule=encoder.refused)


def in_order(*checks: Check) -> Check:
    """Of the layers of a Sequential."""

    def check(module: nn.Module) -> str | None:
        layers = list(module.children())
        if len(layers) != len(checks):
            return f"has {len(layers)} layers, not {len(checks)}"
        problems = ((index, each(layer)) for index, (each, layer) in enumerate(zip(checks, layers, strict=True)))
        return next((f"has a layer {index} that {problem}" for index, problem in problems if problem is not None), None)

    return check


def last_hidden(name: str) -> Check:
    """Of a depth head, by the convolution before its last one."""

    def check(head: nn.Module) -> str | None:
        conv: Any = head.get_submodule(name)
        known = ", ".join(map(str, HIDDEN_CHANNELS))
        if conv.out_channels in HIDDEN_CHANNELS:
            return None
        return f"{conv.out_channels} channels before the last convolution: the kernel takes {known}"

    return check


def level_problem(stage: Any, index: int) -> str | None:
    """What of a level of reassembling is upstream's to compute, so that its stage stays plain."""
    kind = getattr(stage, "readout_type", getattr(getattr(stage, "config", None), "readout_type", "ignore"))
    if kind == "add":
        return "its readout adds the class token, which the kernels do not"
    if "readout_projects" not in stage._modules or index in getattr(stage, "neck_ignore_stages", ()):
        return None
    project = stage.readout_projects[index]
    layers = list(project.layers if hasattr(project, "layers") else project)
    if len(layers) == 2 and encoder.activation(layers[1]) in READOUTS:
        return LINEAR(layers[0])
    return f"readout_projects.{index} has another activation than GELU, exact or by tanh, which the kernel has"


LAYER = _layer()
STANDARDISED = Form(
    encoder.StandardisedConv, {}, calls=("pad",), note=lambda module: "its standardised weight is kept; the convolution is PyTorch's"
)
REASSEMBLE = Form(decoder.ReassembleLayer, {"projection": convolution(1), "resize": resampling})
UNIT = Form(
    decoder.ResidualLayer,
    {
        **dict.fromkeys(("activation1", "activation2"), is_a(nn.ReLU)),
        **dict.fromkeys(("convolution1", "convolution2"), convolution(3)),
        **dict.fromkeys(("batch_norm1", "batch_norm2"), BATCH_NORM),
    },
)
FUSION = Form(decoder.FusionLayer, {"projection": convolution(1)}, calls=("residual_layer1", "residual_layer2", "prompt_depth_layer"))
UPSAMPLED = has({"scale_factor": 2.0, "mode": "bilinear", "align_corners": True}, nn.Upsample)
RELU = is_a(nn.ReLU)
SEQUENTIAL_DEPTH = Form(
    decoder.SequentialDepthHead,
    {
        "head": in_order(convolution(3), UPSAMPLED, convolution(3), RELU, convolution(1), RELU),
        "head.*": anything,
        "projection": convolution(3),
    },
    rule=last_hidden("head.2"),
)
DEPTH = Form(
    decoder.DepthHead,
    {
        **dict.fromkeys(("conv1", "conv2"), convolution(3)),
        "activation1": RELU,
        "conv3": convolution(1),
        "activation2": is_a(nn.ReLU, nn.Sigmoid),
    },
    rule=last_hidden("conv2"),
)
SEGMENTATION = Form(
    decoder.SequentialSegmentationHead,
    {"head": in_order(convolution(3), BATCH_NORM, RELU, is_a(nn.Dropout), convolution(1), UPSAMPLED), "head.*": anything},
)

STAGE = Form(
    decoder.ReassembleStage,
    dict.fromkeys(
        (
            "layers",
            "layers.*",
            "layers.*.projection",
            "layers.*.resize",
            *(f"readout_projects{inside}" for inside in ("", ".*", ".*.*", ".*.layers", ".*.layers.*")),
        ),
        anything,
    ),
    rule=lambda stage: next((problem for index in range(len(stage.layers)) if (problem := level_problem(stage, index)) is not None), None),
)
NECK = {"convs": anything, "convs.*": convolution(3)}
PARTS = ("reassemble_stage", "fusion_stage", "fusion_layers", "conv_depth")
PROMPT = Form(
    decoder.PromptLayer,
    {
        **dict.fromkeys(("activation1", "activation2"), RELU),
        "convolution1": anything,
        **dict.fromkeys(("convolution2", "convolution3"), convolution(3)),
    },
)
BINS = Form(decoder.BinsHead, {"head": in_order(convolution(3), UPSAMPLED, convolution(3), RELU, convolution(1)), "head.*": anything})
BINS_DEPTH = Form(
    decoder.BinsDepth,
    {},
    rule=lambda depth: None if {depth.bins_strategy, depth.norm_strategy} == {"chmv2_mixlog"} else "its bins or their weights are other",
    note=lambda module: "its bins are summed without maps between",
)
LINEAR_DECODER = Form(decoder.LinearDecoder, {"project": convolution(3), "activation": is_a(nn.ReLU, nn.Identity)}, calls=("head",))
RELATIVE = Form(
    decoder.RelativeHead,
    {**dict.fromkeys(("projection", "conv1", "conv2"), convolution(3)), "upsample": UPSAMPLED, "conv3": convolution(1)},
)

DECODERS = {  # the prefix of a family's classes, and its folder under transformers/models
    "DPT": "dpt",
    "DepthAnything": "depth_anything",
    "PromptDepthAnything": "prompt_depth_anything",
    "ZoeDepth": "zoedepth",
    "CHMv2": "chmv2",
    "Tipsv2Dpt": "tipsv2_dpt",
}
FORMS: dict[tuple[str, str], Form] = {
    **{
        (package, prefix + suffix): form
        for prefix, package in DECODERS.items()
        for suffix, form in (
            ("ReassembleStage", STAGE),
            ("Neck", Form(decoder.Neck, NECK, PARTS)),
            ("ReassembleLayer", REASSEMBLE),
            ("PreActResidualLayer", UNIT),
            ("FeatureFusionLayer", FUSION),
        )
    },
    ("dpt", "DPTViTLayer"): LAYER,
    ("dinov2", "Dinov2Layer"): LAYER,
    ("dinov2_with_registers", "Dinov2WithRegistersLayer"): LAYER,
    ("dinov3_vit", "DINOv3ViTLayer"): LAYER,
    ("vit", "ViTLayer"): LAYER,
    ("beit", "BeitLayer"): LAYER,
    ("tipsv2", "Tipsv2VisionLayer"): LAYER,
    ("bit", "WeightStandardizedConv2d"): STANDARDISED,
    ("dpt", "DPTDepthEstimationHead"): SEQUENTIAL_DEPTH,
    ("dpt", "DPTSemanticSegmentationHead"): SEGMENTATION,
    ("depth_anything", "DepthAnythingDepthEstimationHead"): DEPTH,
    ("prompt_depth_anything", "PromptDepthAnythingDepthEstimationHead"): replace(DEPTH, mixin=decoder.PromptDepthHead),
    ("prompt_depth_anything", "PromptDepthAnythingLayer"): PROMPT,
    ("zoedepth", "ZoeDepthNeck"): Form(decoder.NeckWithBottleneck, NECK, PARTS),
    ("zoedepth", "ZoeDepthRelativeDepthEstimationHead"): RELATIVE,
    ("chmv2", "CHMv2ReassembleStage"): replace(STAGE, mixin=decoder.PairedReassembleStage),
    ("chmv2", "CHMv2Head"): Form(decoder.FeaturesHead, NECK, PARTS),
    ("chmv2", "CHMv2UpsampleConvHead"): BINS,
    ("chmv2", "CHMv2FeaturesToDepth"): BINS_DEPTH,
    ("tipsv2_dpt", "Tipsv2DptDecoder"): LINEAR_DECODER,
}


def _home(package: str) -> str:
    return f"transformers.models.{package}.modeling_{package}"


def _form(kind: type[nn.Module]) -> Form | None:
    package, _, module = kind.__module__.removeprefix("transformers.models.").partition(".")
    return FORMS.get((package, kind.__name__)) if module and kind.__module__ == _home(package) else None


def learn(model: nn.Module) -> None:
    """Enter the fast classes of those of transformers' that a model has into `rules.FAST`."""
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__.startswith("transformers.models.") and kind not in FAST:
            form = _form(kind)
            if form is not None:
                _enter(kind, form)


def _enter(kind: type[nn.Module], form: Form) -> type[nn.Module]:
    namespace: dict[str, Any] = {"__module__": __name__, "__qualname__": kind.__name__, "__doc__": form.mixin.__doc__}
    if form.mixin is encoder.Layer:
        namespace["POSITIONAL"] = tuple(inspect.signature(kind.forward).parameters)[2:]
    fast: type[nn.Module] = type(kind.__name__, (form.mixin, kind), namespace)
    FAST[kind] = Replacement(fast, reads=form.reads, calls=form.calls, rule=form.rule, note=form.note, cautious=True)
    PLAIN[fast] = kind
    return fast


def __getattr__(name: str) -> type[nn.Module]:
    """A fast class by upstream's name, for pickles."""
    for package, known in FORMS:
        if known == name:
            kind = getattr(import_module(_home(package)), name)
            return FAST[kind].fast if kind in FAST else _enter(kind, FORMS[package, name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

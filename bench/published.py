"""transformers' models at their published sizes, random weights, accelerated against untouched on one picture: `python -m bench.published`
writes docs/transformers.json and docs/transformers.md; `--check` only compares the page with the file. Small ones: tests/dpt/fast.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import dpt

from . import ROOT
from .reporting import recorded

RECORD, PAGE = ROOT / "docs" / "transformers.json", ROOT / "docs" / "transformers.md"
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
NECK = {"neck_hidden_sizes": [256, 512, 1024, 1024]}
MIDAS = {**LARGE, **NECK, "intermediate_size": 4096, "backbone_out_indices": [5, 11, 17, 23]}
HYBRID = {
    "is_hybrid": True,
    "neck_hidden_sizes": [256, 512, 768, 768],
    "backbone_featmap_shape": [1, 1024, 24, 24],
    "neck_ignore_stages": [0, 1],
}
TOKENS = {"apply_layernorm": True, "reshape_hidden_states": False, "image_size": 518, "patch_size": 14}
BINS = [{"name": name, "n_bins": 64, "min_depth": 1e-3, "max_depth": metres} for name, metres in (("nyu", 10.0), ("kitti", 80.0))]
ROUTER = {
    "num_patch_transformer_layers": 4,
    "patch_transformer_hidden_size": 128,
    "patch_transformer_intermediate_size": 1024,
    "patch_transformer_num_attention_heads": 4,
}


def of(name: str, backbone: Any = None, **fields: Any) -> Any:
    """A model by its class, with the configuration of that class."""
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**fields, **({} if backbone is None else {"backbone_config": backbone})))


def config(name: str, **fields: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**fields)


def dinov2(size: dict[str, Any], out: list[int]) -> Any:
    return config("Dinov2Config", **size, **TOKENS, out_indices=out)


def beit() -> Any:
    bias = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "reshape_hidden_states": False}
    return config("BeitConfig", **LARGE, **bias, intermediate_size=4096, image_size=384, patch_size=16, out_indices=[6, 12, 18, 24])


def swinv2() -> Any:
    size = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 16, "image_size": 256}
    return config("Swinv2Config", **size, out_features=["stage1", "stage2", "stage3", "stage4"])


def dinov3(**fields: Any) -> Any:
    return config("DINOv3ViTConfig", **LARGE, intermediate_size=4096, num_register_tokens=4, **fields)


def tipsv2(task: str) -> Any:
    size = {**BASE, "image_size": 448, "apply_layernorm": True, "reshape_hidden_states": False}
    return of(f"Tipsv2DptFor{task}", config("Tipsv2VisionConfig", **size, out_indices=[3, 6, 9, 12]))


GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
HOOKED = {"out_indices": [6, 12, 18, 24], "apply_layernorm": True, "reshape_hidden_states": True, "return_class_token": True}
ANYTHING_LARGE = {**NECK, "reassemble_hidden_size": 1024, "fusion_hidden_size": 256}
MODELS: dict[str, tuple[Callable[[], Any], int]] = {  # what they are published as, and the side of their pictures
    "dpt-large": (lambda: of("DPTForDepthEstimation", image_size=384, **MIDAS), 384),
    "dpt-large-ade": (lambda: of("DPTForSemanticSegmentation", image_size=480, num_labels=150, **MIDAS), 480),
    "dpt-hybrid-midas": (lambda: of("DPTForDepthEstimation", image_size=384, **HYBRID), 384),
    "dpt-dinov2-giant-kitti": (lambda: of("DPTForDepthEstimation", dinov2(GIANT, [10, 20, 30, 40]), **NECK), 518),
    "dpt-swinv2-tiny-256": (lambda: of("DPTForDepthEstimation", swinv2(), neck_hidden_sizes=[96, 192, 384, 768]), 256),
    "Depth-Anything-V2-Base": (
        lambda: of(
            "DepthAnythingForDepthEstimation",
            dinov2(BASE, [3, 6, 9, 12]),
            **{"reassemble_hidden_size": 768, "neck_hidden_sizes": [96, 192, 384, 768], "fusion_hidden_size": 128},
        ),
        518,
    ),
    "Depth-Anything-V2-Metric-Outdoor-Large": (
        lambda: of(
            "DepthAnythingForDepthEstimation",
            dinov2(LARGE, [5, 12, 18, 24]),
            **{**ANYTHING_LARGE, "depth_estimation_type": "metric", "max_depth": 80},
        ),
        518,
    ),
    "prompt-depth-anything-vitl": (
        lambda: of("PromptDepthAnythingForDepthEstimation", dinov2(LARGE, [5, 12, 18, 24]), **ANYTHING_LARGE),
        518,
    ),
    "zoedepth-nyu-kitti": (lambda: of("ZoeDepthForDepthEstimation", beit(), bin_configurations=BINS, **ROUTER, **NECK), 384),
    "chmv2": (lambda: of("CHMv2ForDepthEstimation", dinov3(**HOOKED)), 416),
    "tipsv2-b14-dpt": (lambda: tipsv2("DensePrediction"), 448),
    "tipsv2-b14-dpt-depth": (lambda: tipsv2("DepthEstimation"), 448),
    "tipsv2-b14-dpt-normals": (lambda: tipsv2("NormalEstimation"), 448),
    "tipsv2-b14-dpt-segmentation": (lambda: tipsv2("SemanticSegmentation"), 448),
    "dinov2-large": (lambda: of("Dinov2Model", **LARGE, image_size=518, patch_size=14), 518),
    "dinov3-vitl16": (lambda: of("DINOv3ViTModel", **dinov3().to_dict()), 224),
    "dinov3-vitl16, gated": (lambda: of("DINOv3ViTModel", **{**dinov3().to_dict(), **GATED}), 224),
    "vit-base-patch16-384": (lambda: of("ViTModel", **BASE, image_size=384), 384),
}


@torch.inference_mode()
def randomise(model: nn.Module) -> None:
    """Weights that keep a signal's size from layer to layer, where transformers' own fade until a last bias is all there is."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if key == "weight" and parameter.dim() > 1:
                parameter.normal_(0, (parameter.dim() / 2 / parameter[0].numel()) ** 0.5)  # of a convolution twice, for the ReLU before it
            elif key != "bias" and parameter.dim() == 1:
                parameter += 0.1 * parameter * torch.randn_like(parameter)  # of norms and scales
            else:
                parameter.normal_(0, 0.1)


@torch.inference_mode()
def compared(name: str) -> dict[str, Any]:
    """A model of random weights, before, in float64, and after; in place, for two do not fit."""
    make, side = MODELS[name]
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model = make().eval()
    randomise(model)
    inputs = {"pixel_values": torch.randn(1, 3, side, side)}
    if name.startswith("prompt"):
        inputs["prompt_depth"] = 1 + torch.rand(1, 1, 192, 256)
    before = given(model, inputs)
    exact = given(model.double(), {key: value.double() for key, value in inputs.items()})
    after = given(dpt.accelerate(model.float()), inputs)
    report = dpt.fast_report(model)
    return {
        "published as": name,
        "class": type(model).__name__,
        "side": side,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fused": sum(row.fused for row in report),
        "plain": {row.name: row.how for row in report if not row.fused},
        "difference": largest_difference(after, exact),
        "untouched": largest_difference(before, exact),
        "spread": min(float(value.std() / value.abs().max()) for value in exact.values()),
    }


def given(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}


def largest_difference(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Over the largest value of that output."""
    return max(float((found[key] - value).abs().max() / value.abs().max()) for key, value in exact.items())


def measured(names: Sequence[str]) -> dict[str, Any]:
    import transformers

    found = []
    for name in names:
        found.append(compared(name))
        print(found[-1], flush=True)
        gc.collect()
    return {"transformers": transformers.__version__, "torch": torch.__version__, "models": found}


def page(record: dict[str, Any]) -> str:
    lines = [
        "# transformers' models at their published sizes",
        "",
        f"Written by `python -m bench.published`: transformers {record['transformers']}, torch {record['torch']}, float32 on a CPU, random",
        "weights, one picture; before `dpt.accelerate` and after, each against the same model in float64: the largest difference, over the",
        "largest value of that output. What is compared varies: its standard deviation over its largest value is in the file.",
        "",
        "| published as | class | side | parameters | modules fused | plain | accelerated | untouched |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in record["models"]:
        numbers = [f"{model['parameters'] / 1e6:.0f} M", str(model["fused"]), str(len(model["plain"]))]
        numbers += [f"{model[what]:.1e}" for what in ("difference", "untouched")]
        lines.append(f"| {model['published as']} | `{model['class']}` | {model['side']} | {' | '.join(numbers)} |")
    farther = [model["published as"] for model in record["models"] if model["difference"] > 2 * model["untouched"]]
    if farther:
        lines += [
            "",
            f"More than twice as far: {', '.join(farther)}; on a CPU its convolutions are Winograd's, which round more than direct ones.",
        ]
    reasons = dict.fromkeys(reason for model in record["models"] for reason in model["plain"].values())
    return (
        "\n".join(
            [*lines, "", *(["What stays plain:", "", *(f"- {reason}" for reason in reasons)] if reasons else ["Nothing stays plain."])]
        )
        + "\n"
    )


def main(arguments: list[str] | None = None) -> int:
    return recorded.run(sys.modules[__name__], page, measured, MODELS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())

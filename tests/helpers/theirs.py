"""Small models of transformers, one of each class that has fast forms, with random weights none of which is at its initial value."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

import dpt
from bench.published import randomise

SIZE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
VIT = {**SIZE, "intermediate_size": 128}
NECK = {"neck_hidden_sizes": [16, 24, 32, 40], "fusion_hidden_size": 32}
OUT = [1, 2, 3, 4]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # of values of about 1


class Case(NamedTuple):
    """A class: how one is made, the side of its pictures, what a call takes beside them, and how many of its modules run fused."""

    make: Callable[[], nn.Module]
    side: int
    fused: int
    plain: int = 0
    prompt: bool = False
    layers: int = 4
    quiet: str = ""  # a part with small weights: one whose large ones make two depths of two roundings
    classes: tuple[str, ...] = ()  # that older versions of transformers have not: the case is left out there

    def model(self) -> Any:
        torch.manual_seed(0)
        model = self.make().eval()
        randomise(model)
        if self.quiet:
            with torch.no_grad():
                for parameter in model.get_submodule(self.quiet).parameters():
                    parameter *= 0.2
        return model

    def inputs(self, batch: int = 2) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        given = {"pixel_values": torch.randn(batch, 3, self.side, self.side, generator=generator)}
        if self.prompt:
            given["prompt_depth"] = 1 + torch.rand(batch, 1, 20, 20, generator=generator)
        return given


def dpt_config(**fields: Any) -> Any:
    common = {
        "image_size": 64,
        "patch_size": 16,
        "backbone_out_indices": [index - 1 for index in OUT],
        "is_hybrid": False,
        "backbone_featmap_shape": None,
    }
    return transformers.DPTConfig(**{**VIT, **NECK, **common, **fields})


def dinov2_config(**fields: Any) -> Any:
    size = {**SIZE, "image_size": 56, "patch_size": 14}
    return transformers.Dinov2Config(**{**size, "out_indices": [*OUT], "apply_layernorm": True, "reshape_hidden_states": False, **fields})


HYBRID = {
    "is_hybrid": True,
    "neck_hidden_sizes": [32, 64, 32, 40],
    "backbone_featmap_shape": [1, 128, 4, 4],
    "backbone_config": {
        **{"model_type": "bit", "embedding_size": 8, "hidden_sizes": [32, 64, 128], "depths": [1, 2, 1], "num_groups": 4},
        **{"layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True},
        "out_features": ["stage1", "stage2", "stage3"],
    },
}
SWIN2_NECK = {"neck_hidden_sizes": [16, 32, 64, 128]}


def swin2_config() -> Any:
    size = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4, "image_size": 64, "patch_size": 4}
    return transformers.Swinv2Config(**size, out_features=["stage1", "stage2", "stage3", "stage4"])


def depth_anything(kind: str = "DepthAnything", backbone: Any = None, **fields: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")
    made = config(backbone_config=backbone or dinov2_config(), reassemble_hidden_size=64, patch_size=14, **NECK, **fields)
    return getattr(transformers, f"{kind}ForDepthEstimation")(made)


def dinov3_config(**fields: Any) -> Any:
    return transformers.DINOv3ViTConfig(**{**VIT, "patch_size": 16, "num_register_tokens": 4, **fields})


def zoedepth() -> nn.Module:
    bias = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.0}
    backbone = transformers.BeitConfig(**VIT, **bias, image_size=64, patch_size=16, out_indices=[*OUT], reshape_hidden_states=False)
    fields = {"backbone_hidden_size": 64, "bottleneck_features": 32, "num_relative_features": 32}
    return transformers.ZoeDepthForDepthEstimation(transformers.ZoeDepthConfig(backbone_config=backbone, **fields, **NECK))


def chmv2() -> nn.Module:
    hooked = {"out_indices": [*OUT], "apply_layernorm": True, "reshape_hidden_states": True, "return_class_token": True}
    fields = {"post_process_channels": [16, 24, 32, 40], "fusion_hidden_size": 32, "head_hidden_size": 16}
    return transformers.CHMv2ForDepthEstimation(transformers.CHMv2Config(backbone_config=dinov3_config(**hooked), **fields))


def tipsv2(task: str) -> nn.Module:
    size = {**SIZE, "image_size": 56, "patch_size": 14}
    backbone = transformers.Tipsv2VisionConfig(**size, out_indices=[*OUT], apply_layernorm=True, reshape_hidden_states=False)
    return getattr(transformers, f"Tipsv2DptFor{task}")(transformers.Tipsv2DptConfig(backbone_config=backbone, **NECK))


TIPSV2 = ("Tipsv2DptConfig",)
# Fused: 4 layers, 8 units, 4 fusion layers, 4 reassemble layers, their stage, the neck, the head.
CASES: dict[str, Case] = {
    "dpt": Case(lambda: transformers.DPTForDepthEstimation(dpt_config()), 64, 23),
    "dpt-segmentation": Case(
        lambda: transformers.DPTForSemanticSegmentation(dpt_config(num_labels=5, use_batch_norm_in_fusion_residual=True)), 64, 23
    ),
    "dpt-dinov2": Case(lambda: transformers.DPTForDepthEstimation(dpt_config(backbone_config=dinov2_config())), 70, 23),
    "dpt-hybrid": Case(
        lambda: transformers.DPTForDepthEstimation(dpt_config(**HYBRID)), 64, 37
    ),  # two levels are the stem's, of 16 convolutions
    "dpt-swin2": Case(
        lambda: transformers.DPTForDepthEstimation(dpt_config(backbone_config=swin2_config(), **SWIN2_NECK)), 64, 14, layers=0
    ),
    "depth-anything": Case(depth_anything, 70, 23),
    "depth-anything-metric": Case(
        lambda: depth_anything(backbone=dinov2_config(use_swiglu_ffn=True), depth_estimation_type="metric", max_depth=20), 70, 23
    ),
    "prompt-depth-anything": Case(lambda: depth_anything("PromptDepthAnything"), 70, 27, prompt=True),
    "zoedepth": Case(zoedepth, 64, 23, quiet="metric_head.conditional_log_binomial"),
    "chmv2": Case(chmv2, 64, 23, classes=("CHMv2Config",)),  # whose deepest level has one unit
    "tipsv2-dense": Case(lambda: tipsv2("DensePrediction"), 56, 58, classes=TIPSV2),
    "tipsv2-depth": Case(lambda: tipsv2("DepthEstimation"), 56, 22, classes=TIPSV2),
    "tipsv2-normals": Case(lambda: tipsv2("NormalEstimation"), 56, 22, classes=TIPSV2),
    "tipsv2-segmentation": Case(lambda: tipsv2("SemanticSegmentation"), 56, 22, classes=TIPSV2),
    "dinov2": Case(lambda: transformers.Dinov2Model(dinov2_config()), 70, 4),
    "dinov3": Case(lambda: transformers.DINOv3ViTModel(dinov3_config()), 80, 4),
    "dinov3-gated": Case(lambda: transformers.DINOv3ViTModel(dinov3_config(use_gated_mlp=True, hidden_act="silu", key_bias=False)), 80, 4),
    "vit": Case(lambda: transformers.ViTModel(transformers.ViTConfig(**VIT, image_size=64, patch_size=16)), 64, 4),
}


CASES = {name: case for name, case in CASES.items() if all(hasattr(transformers, kind) for kind in case.classes)}


def deepened(monkeypatch: Any) -> None:
    """From here on models have eight layers, of which their heads read every other one."""
    for sizes in (SIZE, VIT):
        monkeypatch.setitem(sizes, "num_hidden_layers", 8)
    monkeypatch.setattr(f"{__name__}.OUT", [2, 4, 6, 8])


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """What a model gives, by name, without what it was asked for beside."""
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def those(*names: str) -> list[str]:
    """The cases of these names that this version of transformers has."""
    return [name for name in names if name in CASES]


def pair(name: str) -> tuple[Any, Any]:
    """(accelerated, untouched) of the same weights."""
    untouched = CASES[name].model()
    return dpt.accelerate(copy.deepcopy(untouched)), untouched


def near(one: torch.Tensor | None, other: torch.Tensor | None) -> None:
    """Equal but for the rounding of the largest values; or nothing, both."""
    if one is None or other is None:
        assert one is other
        return
    largest = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(one / largest, other / largest, **CLOSE)


def same(one: Any, other: Any) -> None:
    """The same outputs, by class, names and numbers."""
    ours, theirs = tensors(one), tensors(other)
    assert type(one) is type(other) and ours.keys() == theirs.keys() and ours
    for key, expected in theirs.items():
        assert expected.abs().max() > 0.01  # or nothing is compared
        near(ours[key], expected)

"""isl-org's own maps of DPT-Hybrid on random weights: inverse depth, KITTI's and NYU's depth, and classes.

`python -m tests.dpt.nets.oracles.dpt_hybrid FOLDER` writes `dpt_hybrid.pt` and `dpt_hybrid_ade20k.pt`, in the layout of the published
files, and a recording beside each. The README beside this file has the environment, the keys and the reasons for the numbers.
"""

import argparse
import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import nn

from tests.helpers import recording

# The filters of the stem are small, so that an epsilon on their deviation shows. What is written to the residual stream is small, so that a
# LayerNorm epsilon other than 1e-6 shows; the readout brings it back to the size of the decoder's biases.
GAINS = {
    r"backbone.*conv.*weight": 0.05,
    r"patch_embed\.proj|pos_embed|cls_token": 0.02,
    r"attn\.proj|mlp\.fc2": 0.01,
    r"act_postprocess\d\.0\.project.*weight": 50.0,
    r"output_conv\.4\.weight": 200.0,  # thousands come out of the published networks; KITTI's and NYU's depths are made for those
}
SPREAD = r"backbone.*conv.*weight"
DEPTH_BIAS = {r"output_conv\.4\.bias": 400.0}  # or a last ReLU would hide half of the map
WIDTH, NECK, HOOKS = 24, [32, 64, 20, 28], [0, 1, 1, 3]
CLASSES = 7
INPUTS = {"square": (1, 96, 96), "wide": (2, 64, 160), "tall": (1, 224, 32)}
SMALL, LARGE = (97, 131), (677, 541)
TASKS = {  # the changes to the model, the network's width and height, KITTI's crop, pictures
    "midas": ({}, (384, 384), False, {"small_picture": SMALL, "large_picture": LARGE}),
    "kitti": ({"scale": 0.00006016, "shift": 0.00579, "invert": True}, (1216, 352), True, {"kitti_picture": (375, 1242)}),
    "nyu": ({"scale": 0.000305, "shift": 0.1378, "invert": True}, (640, 480), False, {"nyu_picture": (240, 311)}),
}


def narrow_vit(name: str, pretrained: bool) -> nn.Module:
    """timm's vit_base_resnet50_384 with 8 channels in its stem and 1, 2, 1 blocks in its stages, and 4 blocks of width 24."""
    from timm.models.layers import GroupNormAct, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2
    from timm.models.vision_transformer import VisionTransformer

    backbone = ResNetV2(
        layers=(1, 2, 1),
        channels=(32, 64, 128),
        stem_chs=8,
        norm_layer=functools.partial(GroupNormAct, num_groups=4),
        num_classes=0,
        global_pool="",
        in_chans=3,
        preact=False,
        stem_type="same",
        conv_layer=StdConv2dSame,
    )
    return VisionTransformer(img_size=96, embed_dim=WIDTH, depth=4, num_heads=3, num_classes=5, hybrid_backbone=backbone)


def make_narrow() -> types.ModuleType:
    """The original's `models`, which builds narrow networks from here on."""
    # PyTorch had this module when timm 0.4.5 was written.
    sys.modules["torch._six"] = types.ModuleType("torch._six")
    sys.modules["torch._six"].container_abcs = __import__("collections.abc", fromlist=["Iterable"])
    from atoolkitdpt.dpt import blocks, models, vit

    vit.timm.create_model = narrow_vit
    backbone, scratch = vit._make_vit_b_rn50_backbone, blocks._make_scratch

    def narrow_backbone(pretrained: bool, use_readout: str, **_: object) -> nn.Module:
        model = vit.timm.create_model("vit_base_resnet50_384", pretrained=pretrained)
        return backbone(model, features=NECK, size=[96, 96], hooks=HOOKS, vit_features=WIDTH, use_readout=use_readout)

    blocks._make_pretrained_vitb_rn50_384 = narrow_backbone
    blocks._make_scratch = lambda in_shape, *arguments, **options: scratch(NECK, *arguments, **options)
    return models


def scriptable_keys(checkout: Path, depth: nn.Module) -> list[str]:
    """A line "theirs ours" for each key of the branch dpt_scriptable, whose model gives the same map with the tensors so named."""
    recording.import_from(checkout, "dpt")
    from dpt import blocks, models, vit

    scratch = blocks._make_scratch
    blocks._make_scratch = lambda in_shape, *arguments, **options: scratch(NECK, *arguments, **options)
    blocks._make_pretrained_vitb_rn50_384 = lambda pretrained, use_readout, **_: vit.BackboneWrapper(
        narrow_vit("", pretrained), features=NECK, hooks=HOOKS, vit_features=WIDTH, hybrid_backbone=True, use_readout=use_readout
    )
    scriptable = models.DPTDepthModel(backbone="vitb_rn50_384", features=10).eval()
    ours, order = depth.state_dict(), {"pretrained.model": 0, "pretrained.act_postprocess": 2, "pretrained.readout_oper": 1}
    # In theirs all readouts stand before all reassembling layers.
    keys = sorted(ours, key=lambda key: 1 if ".project." in key else next((n for start, n in order.items() if key.startswith(start)), 3))
    theirs = list(scriptable.state_dict())
    scriptable.load_state_dict({name: ours[key] for name, key in zip(theirs, keys, strict=True)})
    x = recording.network_input(INPUTS["wide"])
    with torch.no_grad():
        assert torch.equal(scriptable(x), depth(x))
    return [f"{name} {key}" for name, key in zip(theirs, keys, strict=True)]


def prepare(width: int, height: int) -> Callable[[numpy.ndarray], torch.Tensor]:
    """The preparation that run_monodepth.py and run_segmentation.py make from the package's parts, RGB uint8 -> (1, 3, H, W)."""
    import cv2
    from atoolkitdpt.dpt.transforms import NormalizeImage, PrepareForNet, Resize

    parts = [
        Resize(
            width,
            height,
            resize_target=None,
            keep_aspect_ratio=True,
            ensure_multiple_of=32,
            resize_method="minimal",
            image_interpolation_method=cv2.INTER_CUBIC,
        ),
        NormalizeImage(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
        PrepareForNet(),
    ]

    def prepared(picture: numpy.ndarray) -> torch.Tensor:
        sample = {"image": picture / 255.0}
        for part in parts:
            sample = part(sample)
        return torch.from_numpy(sample["image"])[None]

    return prepared


def resized(maps: torch.Tensor, picture: numpy.ndarray) -> torch.Tensor:
    """The last resize of both scripts."""
    return torch.nn.functional.interpolate(maps, size=picture.shape[:2], mode="bicubic", align_corners=False)


def depth_arrays(model: nn.Module) -> dict[str, numpy.ndarray]:
    """The recording of all three tasks: `NAME.output`, `NAME.kitti` and `NAME.nyu` of the inputs, and each task's pictures."""

    def as_task(task: str) -> None:
        vars(model).update({"scale": 1.0, "shift": 0.0, "invert": False} | TASKS[task][0])

    def run(x: torch.Tensor) -> recording.Maps:
        maps = {}
        for task in TASKS:
            as_task(task)
            maps["output" if task == "midas" else task] = model(x)
        return maps

    def predict(task: str, picture: numpy.ndarray) -> recording.Maps:
        _, (width, height), crop, _ = TASKS[task]
        if crop:
            top, left = picture.shape[0] - 352, (picture.shape[1] - 1216) // 2
            picture = picture[top : top + 352, left : left + 1216]
        as_task(task)
        tensor = prepare(width, height)(picture)
        return {"tensor": tensor, "map": resized(model(tensor)[:, None], picture)[0, 0]}

    arrays: dict[str, numpy.ndarray] = {}
    for task, (_, _, _, pictures) in TASKS.items():
        inputs = INPUTS if task == "midas" else {}
        arrays |= recording.Oracle(model, run, functools.partial(predict, task), inputs, pictures).arrays()
    return arrays


def segmentation_oracle(model: nn.Module) -> recording.Oracle:
    def predict(picture: numpy.ndarray) -> recording.Maps:
        tensor = prepare(480, 480)(picture)
        logits = resized(model(tensor), picture)
        return {"tensor": tensor, "logits": logits[0], "map": logits.argmax(1)[0] + 1}

    return recording.Oracle(model, lambda x: {"output": model(x)}, predict, INPUTS, {"small_picture": SMALL, "large_picture": LARGE})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write dpt_hybrid and dpt_hybrid_ade20k, each .pt and .npz, to FOLDER.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sensitivity", action="store_true", help="print instead which tensors matter least")
    parser.add_argument(
        "--scriptable", type=Path, metavar="CHECKOUT", help="write dpt_hybrid_scriptable.txt, from the branch dpt_scriptable"
    )
    arguments = parser.parse_args()

    recording.let_torchvision_import()
    models = make_narrow()
    options = {"backbone": "vitb_rn50_384", "features": 10}
    depth = models.DPTDepthModel(non_negative=True, **options).eval()
    depth.load_state_dict(recording.random_weights(depth.state_dict(), GAINS, DEPTH_BIAS, SPREAD))
    classes = models.DPTSegmentationModel(CLASSES, **options).eval()
    gains = {key: gain for key, gain in GAINS.items() if "output_conv" not in key}
    classes.load_state_dict(recording.random_weights(classes.state_dict(), gains, {}, SPREAD))
    if arguments.sensitivity:
        recording.Oracle(depth, lambda x: {"output": depth(x)}, lambda picture: {}, INPUTS, {}).print_least_visible()
        segmentation_oracle(classes).print_least_visible(24)
        return
    if arguments.scriptable:
        lines = scriptable_keys(arguments.scriptable, depth)
        (arguments.folder / "dpt_hybrid_scriptable.txt").write_text("\n".join(lines) + "\n")
        return
    torch.save(recording.stored_weights(depth.state_dict()), arguments.folder / "dpt_hybrid.pt")
    recording.write(arguments.folder / "dpt_hybrid.npz", depth_arrays(depth))
    torch.save(recording.stored_weights(classes.state_dict()), arguments.folder / "dpt_hybrid_ade20k.pt")
    recording.write(arguments.folder / "dpt_hybrid_ade20k.npz", segmentation_oracle(classes).arrays())


if __name__ == "__main__":
    main()

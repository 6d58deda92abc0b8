"""MiDaS 3.1's own maps on random weights, with the encoders BEiT and Swin V2.

`python -m tests.dpt.nets.oracles.midas FOLDER` writes `midas_beit.pt` and `midas_swin2.pt`, in the layout of the published files, and what
`RECORDINGS` lists. The README beside this file has the environment, the keys and the reasons for the numbers.
"""

import argparse
import functools
from pathlib import Path

import numpy
import torch
from torch import nn

from tests.helpers import recording

BEIT_NECK, SWIN_WIDTHS = [8, 12, 16, 20], [6, 12, 24, 48]
KEPT = r"relative_position_index|attn_mask"
FIXED = {r"output_conv\.4\.bias": 0.5}  # or a last ReLU would hide half of the map
# What BEiT writes to the residual stream is small, so that a LayerNorm epsilon other than 1e-6 shows; the readout brings it back to the
# size of the decoder's biases.
BEIT_GAINS = {
    r"patch_embed|cls_token": 0.02,
    r"gamma": 0.1,
    r"act_postprocess\d\.0\.project.*weight": 30.0,
    r"act_postprocess1\.4\.weight": 4.0,
    r"act_postprocess2\.4\.weight": 2.0,
}
# Swin V2 normalises what it writes to the residual stream: what comes before those norms is small, for the same reason.
SWIN_GAINS = {r"logit_scale": 3.0, r"patch_embed\.proj|attn\.proj|mlp\.fc2|downsample\.reduction": 0.02}
BEIT_INPUTS = {"square": (1, 64, 64), "wide": (2, 48, 112), "tall": (1, 144, 32)}
SWIN_INPUTS = {"square": (2, 64, 64)}
LARGE = {"large_picture": (677, 541)}
PICTURES = {"small_picture": (97, 131), **LARGE}
RECORDINGS = (  # name, weights, the original's model, the height of its input where it is not its own, inputs, pictures
    ("midas_beit", "midas_beit", "dpt_beit_large_384", None, BEIT_INPUTS, PICTURES),
    ("midas_beit_512", "midas_beit", "dpt_beit_large_512", None, {}, LARGE),
    ("midas_swin2", "midas_swin2", "dpt_swin2_large_384", 64, SWIN_INPUTS, PICTURES),
    ("midas_swin2_tiny", "midas_swin2", "dpt_swin2_tiny_256", 64, SWIN_INPUTS, LARGE),
)


def narrow_beit(use_pretrained: bool, use_readout: str, hooks: list[int]) -> nn.Module:
    """BEiT with 5 blocks of width 24 and a relative position bias for 4x4 patches."""
    from atoolkitdpt.midas.backbones.beit import _make_beit_backbone
    from timm.models.beit import Beit

    model = Beit(
        img_size=64,
        patch_size=16,
        embed_dim=24,
        depth=5,
        num_heads=3,
        mlp_ratio=4,
        qkv_bias=True,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=1e-5,
        num_classes=5,
    )
    return _make_beit_backbone(model, BEIT_NECK, size=[64, 64], hooks=[0, 1, 3, 4], vit_features=24, use_readout=use_readout)


def narrow_swin(pretrained_window: int, use_pretrained: bool, hooks: list[int]) -> nn.Module:
    """Swin V2 with 2, 2, 2 and 1 blocks of widths 6 to 48, and windows of 4 on grids of 16, 8, 4 and 2."""
    from atoolkitdpt.midas.backbones.swin_common import _make_swin_backbone
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = SwinTransformerV2(
        img_size=64,
        window_size=4,
        embed_dim=6,
        depths=(2, 2, 2, 1),
        num_heads=(1, 2, 2, 4),
        pretrained_window_sizes=(pretrained_window,) * 4,
        num_classes=5,
    )
    return _make_swin_backbone(model, hooks=[1, 1, 1, 0], patch_grid=[16, 16])


def make_narrow() -> None:
    """Let the original's `DPTDepthModel` build narrow networks from here on."""
    from atoolkitdpt.midas import blocks, model_loader

    scratch = blocks._make_scratch
    blocks._make_pretrained_beitl16_384 = blocks._make_pretrained_beitl16_512 = narrow_beit
    blocks._make_pretrained_swin2l24_384 = functools.partial(narrow_swin, 2)  # the published: 12 for windows of 24
    blocks._make_pretrained_swin2t16_256 = functools.partial(narrow_swin, 0)
    narrow = {1024: BEIT_NECK, 1536: SWIN_WIDTHS, 768: SWIN_WIDTHS}  # by the deepest width that the original passes
    blocks._make_scratch = lambda widths, *arguments, **options: scratch(narrow[widths[3]], *arguments, **options)
    model_loader.DPTDepthModel = functools.partial(model_loader.DPTDepthModel, features=10)


def write_weights(path: Path, backbone: str, gains: dict[str, float]) -> None:
    from atoolkitdpt.midas.model_loader import DPTDepthModel

    weights = recording.random_weights(DPTDepthModel(backbone=backbone).state_dict(), gains, FIXED, kept=KEPT)
    for key, value in weights.items():
        if key.endswith("logit_scale"):
            value.abs_()  # logarithms of 1 and more, some of them of more than 100, where the original cuts them off
    torch.save(recording.stored_weights(weights), path)


def oracle(
    path: Path, name: str, height: int | None, inputs: dict[str, recording.Shape], pictures: dict[str, tuple[int, int]]
) -> recording.Oracle:
    """The original's model, which reads the file by its own loader, with its own preparation and the last resize of its run.py."""
    from atoolkitdpt.midas.model_loader import load_model

    model, transform, _, _ = load_model(torch.device("cpu"), str(path), name, optimize=False, height=height)

    def predict(picture: numpy.ndarray) -> recording.Maps:
        tensor = torch.from_numpy(transform({"image": picture / 255.0})["image"])[None]
        resized = nn.functional.interpolate(model(tensor)[:, None], size=picture.shape[:2], mode="bicubic", align_corners=False)
        return {"tensor": tensor, "map": resized[0, 0]}

    return recording.Oracle(model, lambda x: {"output": model(x)}, predict, inputs, pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write midas_beit.pt, midas_swin2.pt and their recordings to FOLDER.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sensitivity", action="store_true", help="print which tensors matter least, and write no recording")
    arguments = parser.parse_args()

    recording.let_torchvision_import()
    make_narrow()
    write_weights(arguments.folder / "midas_beit.pt", "beitl16_384", BEIT_GAINS)
    write_weights(arguments.folder / "midas_swin2.pt", "swin2l24_384", SWIN_GAINS)
    for name, weights, *rest in RECORDINGS:
        made = oracle(arguments.folder / f"{weights}.pt", *rest)
        if not arguments.sensitivity:
            recording.write(arguments.folder / f"{name}.npz", made.arrays())
        elif made.inputs:
            made.print_least_visible()


if __name__ == "__main__":
    main()

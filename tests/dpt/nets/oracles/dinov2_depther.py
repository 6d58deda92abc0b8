"""DINOv2's own metres of its DPT depthers on random weights, NYU and KITTI, with the plain MLP and with SwiGLU.

`python -m tests.dpt.nets.oracles.dinov2_depther CHECKOUT FOLDER`, with a checkout of facebookresearch/dinov2, which no package holds with
its depthers, writes `dinov2_depther.pth` and `dinov2_depther_head.pth`, in the layout of the published pairs of files, and
`dinov2_depther.npz`; and the same for `dinov2_depther_giant`. The README beside this file has the environment, the keys and the reasons for
the numbers.
"""

import argparse
import functools
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from tests.helpers import recording

# What is written to the residual stream is small, so that a LayerNorm epsilon other than 1e-6 shows; the readout brings it back to the size
# of the decoder's biases. The transposed convolutions spread one input over 16 or 4 outputs.
GAINS = {
    r"patch_embed|pos_embed|cls_token": 0.02,
    r"gamma": 0.1,
    r"readout_projects.*weight": 30.0,
    r"resize_layers\.0\.weight": 4.0,
    r"resize_layers\.1\.weight": 2.0,
    r"conv_depth\.head\.4\.weight": 16.0,  # beyond NYU's 10 m, at which the depth is cut off
}
FIXED = {r"conv_depth\.head\.4\.bias": 5.0}  # or a last ReLU would hide half of the map
RANGES = {"nyu": (0.001, 10.0), "kitti": (0.001, 80.0)}
INPUTS = {"square": (1, 112, 112), "wide": (2, 42, 98), "tall": (1, 154, 28), "padded": (1, 75, 94)}
PICTURES = {"small_picture": (97, 131), "large_picture": (211, 180)}
MODELS = {  # the original's name for what it is like, and the blocks that are hooked where they are not the original's
    "dinov2_depther": ("vit_small", {"depth": 12}, None),
    "dinov2_depther_giant": ("vit_giant2", {"depth": 5, "ffn_layer": "swiglufused"}, [0, 1, 3, 4]),
}


def build_model(arch_name: str, options: dict[str, object], hooks: list[int] | None, depth_range: tuple[float, float]) -> nn.Module:
    """What hub/depthers.py builds, 16 wide, with 10 features, for 8x8 patches."""
    from dinov2.hub import depthers
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.models import vision_transformer

    def narrow(depth: int, **arguments: object) -> nn.Module:
        block = functools.partial(NestedTensorBlock, attn_class=MemEffAttention)
        return vision_transformer.DinoVisionTransformer(embed_dim=16, depth=depth, num_heads=2, mlp_ratio=4, block_fn=block, **arguments)

    setattr(vision_transformer, arch_name, narrow)  # where the original looks it up
    head = depthers.DPTHead
    depthers.DPTHead = lambda **arguments: head(**arguments | {"channels": 10})
    try:
        model = depthers._make_dinov2_dpt_depther(arch_name=arch_name, pretrained=False, depth_range=depth_range, img_size=112, **options)
    finally:
        depthers.DPTHead = head
    if hooks is not None:
        model.backbone.forward.keywords["n"] = hooks
    return model.eval()


def prepare(picture: numpy.ndarray) -> Tensor:
    """The transform of notebooks/depth_estimation.ipynb, at a scale of 1. (1, 3, H, W)"""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.ToTensor(),
            lambda x: 255.0 * x[:3],
            transforms.Normalize(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
        ]
    )
    return transform(Image.fromarray(picture))[None]


def oracle(models: dict[str, nn.Module]) -> recording.Oracle:
    """`models`: the same weights with the range of depths of each data set."""
    both = nn.ModuleDict(models)

    def run(x: Tensor) -> recording.Maps:
        model = next(iter(both.values()))
        raw = model.decode_head.forward_test(model.extract_feat(x), None)[:, 0]
        return {"raw": raw} | {name: model.whole_inference(x, img_meta=None, rescale=True)[:, 0] for name, model in both.items()}

    def predict(picture: numpy.ndarray) -> recording.Maps:
        padded: list[Tensor] = []
        handle = both["nyu"].backbone.patch_embed.register_forward_pre_hook(lambda _, arguments: padded.append(arguments[0]))
        maps = run(prepare(picture))
        handle.remove()
        return {"tensor": padded[0]} | {name: maps[name][0] for name in both}

    return recording.Oracle(both, run, predict, INPUTS, PICTURES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the files of dinov2_depther and dinov2_depther_giant to FOLDER.")
    parser.add_argument("checkout", type=Path, help="of facebookresearch/dinov2")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sensitivity", action="store_true", help="print instead which tensors matter least")
    arguments = parser.parse_args()

    recording.let_torchvision_import()
    recording.import_from(arguments.checkout, "dinov2")
    for name, (arch_name, options, hooks) in MODELS.items():
        models = {data: build_model(arch_name, options, hooks, depth_range) for data, depth_range in RANGES.items()}
        weights = recording.random_weights(models["nyu"].state_dict(), GAINS, FIXED)
        for model in models.values():
            model.load_state_dict(weights)
        if arguments.sensitivity:
            oracle({"kitti": models["kitti"]}).print_least_visible()
            continue
        stored = recording.stored_weights(weights)
        backbone = {key.removeprefix("backbone."): value for key, value in stored.items() if key.startswith("backbone.")}
        head = {key: value for key, value in stored.items() if key.startswith("decode_head.")}
        torch.save(backbone, arguments.folder / f"{name}.pth")
        torch.save({"meta": {}, "state_dict": head}, arguments.folder / f"{name}_head.pth")
        recording.write(arguments.folder / f"{name}.npz", oracle(models).arrays())


if __name__ == "__main__":
    main()

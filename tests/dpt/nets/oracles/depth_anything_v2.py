"""Depth Anything V2's own maps, relative and metric, and V1's, on random weights.

`python -m tests.dpt.nets.oracles.depth_anything_v2 FOLDER` writes `depth_anything_v2.pth`, in the layout of the published files, and
`depth_anything_v2.npz`. For the same weights, `--metric CHECKOUT/metric_depth` writes `depth_anything_v2_metric.npz` from the metric code,
with a depth of at most 80 m, and `--first CHECKOUT`, of LiheYoung/Depth-Anything, `depth_anything_v1.npz`. The README beside this file has
the environment, the keys and the reasons for the numbers.
"""

import argparse
import sys
import types
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import nn

from tests.helpers import recording

# What is written to the residual stream is small, so that a LayerNorm epsilon other than 1e-6 shows. The transposed convolutions spread
# one input over 16 or 4 outputs.
GAINS = {
    r"patch_embed|pos_embed|cls_token": 0.02,
    r"gamma": 0.1,
    r"resize_layers\.0\.weight": 4.0,
    r"resize_layers\.1\.weight": 2.0,
}
FIXED = {r"output_conv2\.2\.bias": 0.5}  # or a last ReLU would hide half of the map
HOOKS = [1, 2, 4, 5]
MAX_DEPTH = 80.0
INPUTS = {"square": (1, 70, 70), "wide": (2, 42, 98), "tall": (1, 154, 28), "stored": (1, 518, 518)}
PICTURES = {"small_picture": (97, 131), "large_picture": (677, 541)}


def build_model(**metric: float) -> nn.Module:
    """The original's model, 6 blocks of width 16 instead of 12 of 384."""
    from depth_anything_v2 import dinov2, dpt

    def narrow(model_name: str) -> nn.Module:
        return dinov2.DinoVisionTransformer(
            img_size=518,
            patch_size=14,
            embed_dim=16,
            depth=6,
            num_heads=2,
            mlp_ratio=4,
            block_fn=partial(dinov2.Block, attn_class=dinov2.MemEffAttention),
            init_values=1.0,
            ffn_layer="mlp",
            block_chunks=0,
            num_register_tokens=0,
            interpolate_antialias=False,
            interpolate_offset=0.1,
        )

    dpt.DINOv2 = narrow
    model = dpt.DepthAnythingV2(encoder="vits", features=10, out_channels=[8, 12, 16, 20], **metric)
    model.intermediate_layer_idx = {"vits": HOOKS}
    return model.eval()


def first_oracle(checkout: Path) -> recording.Oracle:
    """Depth Anything V1's model, as narrow, and what its run.py does with a picture; its keys are the same."""
    hub = types.ModuleType("huggingface_hub")  # only for downloads
    hub.PyTorchModelHubMixin, hub.hf_hub_download = type("PyTorchModelHubMixin", (), {}), None
    sys.modules["huggingface_hub"] = hub
    encoder = checkout / "torchhub" / "facebookresearch_dinov2_main"
    recording.import_from(encoder, "dinov2")
    recording.import_from(checkout, "depth_anything")
    sys.path.append(str(encoder))
    import cv2
    from depth_anything.dpt import DPT_DINOv2
    from depth_anything.util.transform import NormalizeImage, PrepareForNet, Resize
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from vision_transformer import DinoVisionTransformer

    block = partial(NestedTensorBlock, attn_class=MemEffAttention)
    sizes = {"img_size": 518, "patch_size": 14, "embed_dim": 16, "depth": 6, "num_heads": 2}
    options = {"init_values": 1.0, "block_chunks": 0, "interpolate_antialias": False, "interpolate_offset": 0.1}
    torch.hub.load = lambda *_, **__: DinoVisionTransformer(**sizes, **options, block_fn=block)
    model = DPT_DINOv2(encoder="vits", features=10, out_channels=[8, 12, 16, 20]).eval()
    resize = Resize(
        width=518,
        height=518,
        resize_target=False,
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        resize_method="lower_bound",
        image_interpolation_method=cv2.INTER_CUBIC,
    )
    normalise = NormalizeImage(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])

    def predict(picture: numpy.ndarray) -> recording.Maps:
        tensor = torch.from_numpy(PrepareForNet()(normalise(resize({"image": picture / 255.0})))["image"])[None]
        resized = nn.functional.interpolate(model(tensor)[None], picture.shape[:2], mode="bilinear", align_corners=False)
        return {"tensor": tensor, "map": resized[0, 0]}

    return recording.Oracle(model, lambda x: {"output": model(x)}, predict, INPUTS, PICTURES)


def oracle(model: nn.Module) -> recording.Oracle:
    def predict(picture: numpy.ndarray) -> recording.Maps:
        bgr = picture[:, :, ::-1].copy()
        return {"tensor": model.image2tensor(bgr)[0], "map": model.infer_image(bgr)}

    return recording.Oracle(model, lambda x: {"output": model(x)}, predict, INPUTS, PICTURES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write depth_anything_v2.pth and .npz, or depth_anything_v2_metric.npz, to FOLDER.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metric", type=Path, metavar="CHECKOUT/metric_depth", help="the metric code, in no package")
    parser.add_argument("--first", type=Path, metavar="CHECKOUT", help="the code of Depth Anything V1, in no package")
    parser.add_argument("--sensitivity", action="store_true", help="print instead which tensors matter least")
    arguments = parser.parse_args()

    recording.let_torchvision_import()
    if arguments.first:
        first = first_oracle(arguments.first)
        first.model.load_state_dict(torch.load(arguments.folder / "depth_anything_v2.pth"))
        recording.write(arguments.folder / "depth_anything_v1.npz", first.arrays())
        return
    if arguments.metric:
        recording.import_from(arguments.metric, "depth_anything_v2")
    model = build_model(**({"max_depth": MAX_DEPTH} if arguments.metric else {}))
    model.load_state_dict(recording.random_weights(model.state_dict(), GAINS, FIXED))
    if arguments.sensitivity:
        oracle(model).print_least_visible()
    elif arguments.metric:
        recording.write(arguments.folder / "depth_anything_v2_metric.npz", oracle(model).arrays())
    else:
        torch.save(recording.stored_weights(model.state_dict()), arguments.folder / "depth_anything_v2.pth")
        recording.write(arguments.folder / "depth_anything_v2.npz", oracle(model).arrays())


if __name__ == "__main__":
    main()

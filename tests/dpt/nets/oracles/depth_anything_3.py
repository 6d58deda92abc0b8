"""Depth Anything 3's own maps, monocular and metric, on random weights.

`python -m tests.dpt.nets.oracles.depth_anything_3 FOLDER` writes `depth_anything_3.safetensors`, in the layout of the published files, and
`depth_anything_3.npz`. The README beside this file has the environment, the keys and the reasons for the numbers.
"""

import argparse
import functools
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers import recording

# What is written to the residual stream is small, so that an epsilon other than 1e-6, or than 1e-5 in the last LayerNorm, shows. The
# transposed convolutions spread one input over 16 or 4 outputs.
GAINS = {
    r"patch_embed|pos_embed|cls_token": 0.02,
    r"gamma": 0.1,
    r"resize_layers\.0\.weight": 4.0,
    r"resize_layers\.1\.weight": 2.0,
    r"scratch\.output_conv2\.2\.weight": 0.5,  # an exponential follows
}
FIXED = {r"scratch\.output_conv2\.2\.bias": 0.25, r"sky_output_conv2\.2\.bias": 0.0625}  # a part of each map is sky, the rest is none
INPUTS = {"square": (1, 70, 70), "wide": (1, 42, 98), "tall": (1, 154, 28), "stored": (1, 518, 518)}
# Above so many pixels the original estimates its quantile from a random part of them: the pictures, 504 on their longer side, stay below.
MOST_PIXELS = 100_000
PICTURES = {"small_picture": (61, 167), "large_picture": (1031, 389), "smaller_twice": (700, 241)}
INTRINSICS = torch.tensor([[411.5, 0.0, 90.0], [0.0, 390.25, 250.0], [0.0, 0.0, 1.0]])


def build_model(name: str = "da3mono-large") -> nn.Module:
    """The original's model, 6 blocks of width 16 instead of 24 of 1024. The configuration of da3metric-large is the same."""
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.model.dinov2 import dinov2, vision_transformer
    from depth_anything_3.registry import MODEL_REGISTRY

    narrow = {"embed_dim": 16, "depth": 6, "num_heads": 2, "mlp_ratio": 4, "num_register_tokens": 0}
    dinov2.vit_large = functools.partial(vision_transformer.DinoVisionTransformer, **narrow)
    config = load_config(MODEL_REGISTRY[name])
    assert config == load_config(MODEL_REGISTRY["da3metric-large"])
    config.net.out_layers = [1, 2, 4, 5]
    config.head |= {"dim_in": 16, "features": 10, "out_channels": [8, 12, 16, 20]}
    return create_object(config).eval()


def run(model: nn.Module, x: Tensor) -> recording.Maps:
    """What the head gives, (B, H, W), and the depth after the sky is set to the 99th percentile of the rest."""
    head = model.head
    raw = {}
    handle = head.register_forward_hook(lambda *arguments: raw.update(arguments[-1]))
    output = model(x[:, None])  # one view
    handle.remove()
    maps = {"depth": raw["depth"][:, 0], "sky": raw["sky"][:, 0], "output": output.depth[:, 0]}
    if maps["depth"].numel() > MOST_PIXELS:
        del maps["output"]
    return maps


def predict(model: nn.Module, picture: numpy.ndarray) -> recording.Maps:
    """The original's tensor, and its maps at that tensor's size, which it never resizes; the metric one for `INTRINSICS`."""
    from depth_anything_3.utils.alignment import apply_metric_scaling
    from depth_anything_3.utils.io.input_processor import InputProcessor
    from depth_anything_3.utils.io.output_processor import OutputProcessor

    tensor = InputProcessor()([picture], process_res=504, process_res_method="upper_bound_resize", sequential=True)[0]
    output = model(tensor[None])
    metres = apply_metric_scaling(output.depth, INTRINSICS[None, None])
    return {"tensor": tensor, "sky": output.sky[0, 0], "map": OutputProcessor()(output).depth[0], "metres": metres[0, 0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write depth_anything_3.safetensors and .npz to FOLDER.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sensitivity", action="store_true", help="print instead which tensors matter least")
    arguments = parser.parse_args()

    recording.let_torchvision_import()
    model = build_model()
    model.load_state_dict(recording.random_weights(model.state_dict(), GAINS, FIXED))
    oracle = recording.Oracle(model, functools.partial(run, model), functools.partial(predict, model), INPUTS, PICTURES)
    if arguments.sensitivity:
        oracle.print_least_visible()
        return
    weights = recording.stored_weights(model.state_dict())
    save_file({f"model.{key}": value for key, value in weights.items()}, arguments.folder / "depth_anything_3.safetensors")
    recording.write(arguments.folder / "depth_anything_3.npz", oracle.arrays())


if __name__ == "__main__":
    main()

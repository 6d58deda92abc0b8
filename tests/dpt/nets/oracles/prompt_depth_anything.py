"""Prompt Depth Anything's own maps on random weights.

`python -m tests.dpt.nets.oracles.prompt_depth_anything CHECKOUT FOLDER` writes `prompt_depth_anything.ckpt`, in the layout of the published
files, and `prompt_depth_anything.npz`, from a checkout of DepthAnything/PromptDA, which is in no package. The README beside this file has
the environment, the keys and the reasons for the numbers.
"""

import argparse
import sys
import types
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import torch
from PIL import Image
from torch import nn

from tests.helpers import recording

GAINS = {
    r"patch_embed|pos_embed|cls_token": 0.02,
    r"gamma": 0.1,
    r"resize_layers\.0\.weight": 4.0,
    r"resize_layers\.1\.weight": 2.0,
}
HOOKS = [1, 2, 4, 5]
KEPT = r"^_(mean|std)$"
PREFIX = "pipeline."  # nine characters, which the original's loader cuts off; those of the published files are not known here
INPUTS = {"square": (1, 70, 70), "wide": (2, 42, 98), "tall": (1, 154, 28), "stored": (1, 518, 518)}
PICTURES = {"small_picture": (98, 126), "large_picture": (1073, 541)}
MEAN, STD = ([[values]] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def prompt(batch: int) -> torch.Tensor:
    """Metres (B, 1, 12, 16), multiples of 1/64, of each picture farther than of the one before."""
    values = numpy.random.RandomState(recording.INPUT_SEED + 1).randint(32, 256, (batch, 1, 12, 16))
    return torch.from_numpy(values).float() / 64 * torch.arange(1, batch + 1).view(-1, 1, 1, 1)


def build_model(checkout: Path) -> nn.Module:
    """The original's model, 6 blocks of width 16 instead of 12 of 384."""
    sys.path[:0] = [str(checkout), str(checkout / "torchhub" / "facebookresearch_dinov2_main")]
    import vision_transformer
    from promptda import promptda

    def narrow(*_: object, **__: object) -> nn.Module:
        return vision_transformer.DinoVisionTransformer(
            img_size=518,
            patch_size=14,
            embed_dim=16,
            depth=6,
            num_heads=2,
            mlp_ratio=4,
            block_fn=partial(vision_transformer.Block, attn_class=vision_transformer.MemEffAttention),
            init_values=1.0,
            ffn_layer="mlp",
            block_chunks=0,
        )

    promptda.torch.hub.load = narrow
    promptda.model_configs["narrow"] = {"features": 10, "out_channels": [8, 12, 16, 20], "layer_idxs": HOOKS}
    return promptda.PromptDA(encoder="narrow", ckpt_path="").eval()


def oracle(model: nn.Module) -> recording.Oracle:
    for name in ("matplotlib", "matplotlib.pyplot", "promptda.utils.depth_utils"):  # for its drawings, which are not made here
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].visualize_depth = None
    from promptda.utils.io_wrapper import load_image

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def run(x: torch.Tensor) -> recording.Maps:
        return {"output": model(x * std.to(x) + mean.to(x), prompt(len(x)).to(x))[:, 0]}  # the original normalises within

    def predict(picture: numpy.ndarray) -> recording.Maps:
        with TemporaryDirectory() as folder:
            Image.fromarray(picture).save(f"{folder}/picture.png")
            image = load_image(f"{folder}/picture.png")
        return {"tensor": (image - mean) / std, "map": model.predict(image, prompt(1))[0, 0]}

    return recording.Oracle(model, run, predict, INPUTS, PICTURES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompt_depth_anything.ckpt and .npz to FOLDER.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sensitivity", action="store_true", help="print instead which tensors matter least")
    arguments = parser.parse_args()

    recording.let_torchvision_import()
    model = build_model(arguments.checkout)
    model.load_state_dict(recording.random_weights(model.state_dict(), GAINS, {}, kept=KEPT))
    if arguments.sensitivity:
        oracle(model).print_least_visible()
    else:
        weights = {key: value for key, value in model.state_dict().items() if key not in ("_mean", "_std")}
        stored = recording.stored_weights(weights) | {name: model.state_dict()[name] for name in ("_mean", "_std")}
        torch.save({"state_dict": {PREFIX + key: value for key, value in stored.items()}}, arguments.folder / "prompt_depth_anything.ckpt")
        recording.write(arguments.folder / "prompt_depth_anything.npz", oracle(model).arrays())


if __name__ == "__main__":
    main()

"""Logits of mmsegmentation's own DPT on random weights: the independent side of the checkpoint-loading test.

`python tests/dpt/nets/oracles/mmsegmentation.py tiny tests/dpt/nets/data` writes `mmseg_tiny.pth`, a checkpoint in the layout of
mmsegmentation's published DPT files, and `mmseg_tiny.npz`, the logits mmsegmentation computes from it. `base` in place
of `tiny` does the same at the size of `dpt_vit-b16_512x512_160k_ade20k`. The environment it needs, the layout of both
files and the reasons for the numbers are in the README beside this file.

Every random number comes from `numpy.random.RandomState`, whose streams NumPy keeps unchanged between versions, so the
weights and the inputs are the same, bit for bit, wherever this runs.
"""

import argparse
import math
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]  # batch, height, width

# Weights have unit gain but for these. What is written to the residual stream is small, so that a LayerNorm epsilon
# other than 1e-5 shows in the logits; the readout brings it back to the size of the decoder's biases, so that the
# encoder shows in them. The transposed convolutions spread one input over 16 or 4 outputs.
GAINS = {
    r"patch_embed|pos_embed|cls_token": 0.02,
    r"attn\.out_proj|ffn\.layers\.1": 0.01,
    r"readout_projects.*weight": 100.0,
    r"resize_layers\.0\.weight": 4.0,
    r"resize_layers\.1\.weight": 2.0,
}
WEIGHT_SEED = 0
INPUT_SEED = 1
PUBLISHED_CONFIGURATION = ".mim/configs/dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py"
STRIDE = 7  # coprime to every factor of the decoder's upsampling: the stored pixels fall on all of its phases


@dataclass(frozen=True)
class Size:
    """One fixture: what it changes in the published configuration of the model, and its inputs by name."""

    backbone: dict[str, object]
    decode_head: dict[str, object]
    inputs: dict[str, Shape]


SIZES = {
    "tiny": Size(
        backbone={"embed_dims": 16, "num_heads": 2, "num_layers": 6, "out_indices": (0, 2, 3, 5)},
        decode_head={
            "in_channels": (16, 16, 16, 16),
            "embed_dims": 16,
            "post_process_channels": [8, 12, 16, 16],
            "channels": 10,
            "num_classes": 7,
        },
        inputs={"square": (1, 224, 224), "same_token_count": (1, 112, 448), "resized": (2, 96, 160)},
    ),
    "base": Size(
        backbone={},
        decode_head={},
        inputs={"square": (1, 512, 512), "same_token_count": (1, 112, 448), "resized": (1, 384, 640)},
    ),
}


def build_model(size: Size) -> nn.Module:
    """mmsegmentation's EncoderDecoder from its published DPT configuration, with the patch bias its files hold."""
    stand_in_for_compiled_operators()
    import mmseg
    from mmseg.apis import init_model

    changes = {
        "model.backbone": {**size.backbone, "patch_bias": True},
        # Published with SyncBN: the same parameters and, in evaluation, the same arithmetic, but for several GPUs.
        "model.decode_head": {**size.decode_head, "norm_cfg": {"type": "BN"}},
    }
    return init_model(Path(mmseg.__file__).parent / PUBLISHED_CONFIGURATION, device="cpu", cfg_options=changes)


def stand_in_for_compiled_operators() -> None:
    """Let mmsegmentation import beside mmcv-lite, which lacks `mmcv.ops`; DPT uses nothing from it."""
    operators = types.ModuleType("mmcv.ops")
    for name in ("point_sample", "sigmoid_focal_loss", "CrissCrossAttention", "PSAMask"):
        setattr(operators, name, None)
    sys.modules.setdefault("mmcv.ops", operators)


def random_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with every tensor drawn anew, none of it left at a default value."""
    random = numpy.random.RandomState(WEIGHT_SEED)
    state_dict = model.state_dict()
    for key, tensor in state_dict.items():
        if tensor.is_floating_point():
            state_dict[key] = torch.from_numpy(random_array(key, tuple(tensor.shape), random)).float()
        else:
            state_dict[key] = torch.full_like(tensor, 160_000)  # num_batches_tracked
    return state_dict


def random_array(key: str, shape: tuple[int, ...], random: numpy.random.RandomState) -> numpy.ndarray:
    """Values for one tensor, by its role: a variance, a normalisation's gain, a shift, or a weight matrix."""
    normal = random.standard_normal(shape)
    gain = next((value for pattern, value in GAINS.items() if re.search(pattern, key)), 1.0)
    if key.endswith("running_var"):
        return numpy.exp(0.5 * normal)
    if key.endswith("weight") and len(shape) == 1:
        return 1 + 0.3 * normal
    if key.endswith("weight"):
        return gain * normal / math.sqrt(math.prod(shape[1:]))
    if len(shape) == 1:
        return 0.3 * gain * normal
    return gain * normal


def random_image(shape: Shape) -> Tensor:
    """An image of multiples of 1/64 in [-2, 2), exact in every floating-point format down to bfloat16."""
    batch, height, width = shape
    values = numpy.random.RandomState(INPUT_SEED).randint(-128, 128, (batch, 3, height, width))
    return torch.from_numpy(values).float() / 64


def sampled_lines(length: int) -> numpy.ndarray:
    """Indices of the stored rows (or columns): every seventh, and the two at either border."""
    return numpy.unique([*range(0, length, STRIDE), 1, length - 2, length - 1])


@torch.inference_mode()
def predict_logits(model: nn.Module, image: Tensor) -> Tensor:
    """mmsegmentation's logits after its last resize. (B, 3, H, W) -> (B, K, H, W)"""
    return torch.stack([sample.seg_logits.data for sample in model(image, mode="predict")])


def expected_arrays(model: nn.Module, size: Size) -> dict[str, numpy.ndarray]:
    """For every input of the fixture: its shape, the rows and columns stored, and the logits there."""
    arrays = {"input_seed": numpy.array(INPUT_SEED)}
    for name, shape in size.inputs.items():
        rows, columns = sampled_lines(shape[1]), sampled_lines(shape[2])
        logits = predict_logits(model, random_image(shape))
        arrays[f"{name}.shape"] = numpy.array(shape)
        arrays[f"{name}.rows"] = rows
        arrays[f"{name}.columns"] = columns
        arrays[f"{name}.logits"] = logits[:, :, rows[:, None], columns].numpy()
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description="Write mmseg_SIZE.pth and mmseg_SIZE.npz to FOLDER.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]

    model = build_model(size)
    model.load_state_dict(random_state_dict(model))
    classes = range(model.num_classes)
    meta = {"CLASSES": tuple(f"class {index}" for index in classes), "PALETTE": [[index] * 3 for index in classes]}
    stem = arguments.folder / f"mmseg_{arguments.size}"
    torch.save({"meta": meta, "state_dict": model.state_dict()}, stem.with_suffix(".pth"))
    numpy.savez_compressed(stem.with_suffix(".npz"), **expected_arrays(model, size))


if __name__ == "__main__":
    main()

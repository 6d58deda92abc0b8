"""ZoeDepth's own metres on random weights: N, K and NK.

`python -m tests.dpt.nets.oracles.zoedepth FOLDER` writes `zoedepth_n.pt`, `zoedepth_k.pt` and `zoedepth_nk.pt`, in the layout of the
published files, and the recordings that `MODELS` lists. The README beside this file has the environment, the keys and the reasons for the
numbers.
"""

import argparse
import functools
import importlib.util
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from tests.dpt.nets.oracles import midas
from tests.helpers import recording

FEATURES, BINS, EMBEDDING = 10, 16, 12
KEPT = r"relative_position_index|k_idx|K_minus_1"
FIXED = midas.FIXED
GAINS = {  # the bins lie apart, where an attractor moves them, and the distributions over them are narrow and wide
    **midas.BEIT_GAINS,
    r"(seed_bin_regressors?|attractors)\..*_net\.2\.weight": 3.0,
    r"log_binomial.*mlp\.2\.weight": 3.0,
    r"mlp_classifier\.2\.weight": 8.0,
}
ROUTER_BIAS = (1.125, 0.125)  # sends some of the inputs to NYU's bins, and some to KITTI's
INPUTS = {"square": (1, 64, 64), "wide": (2, 48, 112), "tall": (1, 144, 32), "other": (1, 96, 48)}
PICTURES = {"small_picture": (97, 131), "large_picture": (577, 641)}
MODELS = {  # recording: weights, what the original's `get_config` is asked for. K's depth ends at 80 m in training, at 10 m in hubconf.py
    "zoedepth_n": ("zoedepth_n", "zoedepth", {}),
    "zoedepth_k": ("zoedepth_k", "zoedepth", {"config_version": "kitti", "dataset": "kitti"}),
    "zoedepth_k_hub": ("zoedepth_k", "zoedepth", {"config_version": "kitti"}),
    "zoedepth_nk": ("zoedepth_nk", "zoedepth_nk", {}),
}


def make_narrow() -> None:
    """Let the original build its models upon MiDaS' narrow BEiT from here on."""
    midas.make_narrow()
    spec = importlib.util.find_spec("controlnet_aux")
    recording.import_from(Path(spec.origin).parent / "zoe", "zoedepth")
    from atoolkitdpt.midas.dpt_depth import DPTDepthModel
    from zoedepth.models.base_models.midas import MIDAS_SETTINGS

    MIDAS_SETTINGS["DPT_BEiT_L_384"] = (FEATURES,) * 5
    torch.hub.load = lambda *_, **__: DPTDepthModel(backbone="beitl16_384", features=FEATURES)


def build_model(name: str, **options: object) -> nn.Module:
    """What hubconf.py builds, with fewer bins and a narrower embedding, and for NK a narrower and shallower router."""
    from zoedepth.models.builder import build_model
    from zoedepth.models.layers.patch_transformer import PatchTransformerEncoder
    from zoedepth.utils.config import get_config

    config = get_config(name, "infer", pretrained_resource=None, n_bins=BINS, bin_embedding_dim=EMBEDDING, **options)
    model = build_model(config)
    if name == "zoedepth_nk":
        model.patch_transformer = PatchTransformerEncoder(FEATURES, 1, 16, num_heads=4, use_class_token=True)
        layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=24)
        model.patch_transformer.transformer_encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        model.mlp_classifier = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    return model.eval()


def run(model: nn.Module, x: Tensor) -> recording.Maps:
    """Relative and metric depth, (B, H, W), of a tensor that needs no preparation; of NK, the router's logits as well, (B, 1, 2)."""
    prepare = vars(model.core).pop("prep")
    model.core.prep = lambda tensor: tensor
    try:
        found = model(x)
        maps = {"relative": model.core(x, return_rel_depth=True)[0], "output": found["metric_depth"][:, 0]}
        return maps | ({"router": found["domain_logits"][:, None]} if "domain_logits" in found else {})
    finally:
        model.core.prep = prepare


def predict(model: nn.Module, picture: numpy.ndarray) -> recording.Maps:
    """`infer_pil` with its padding and flip, and without; and the tensor that enters the core of the first of its two runs."""
    tensors: list[Tensor] = []
    handle = model.core.core.register_forward_pre_hook(lambda _, arguments: tensors.append(arguments[0]))
    image = Image.fromarray(picture)
    augmented = model.infer_pil(image)
    plain = model.infer_pil(image, pad_input=False, with_flip_aug=False)
    handle.remove()
    return {"tensor": tensors[0], "map": augmented, "plain_tensor": tensors[2], "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write zoedepth_n.pt, zoedepth_k.pt, zoedepth_nk.pt and their recordings to FOLDER.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sensitivity", action="store_true", help="print instead which tensors matter least")
    arguments = parser.parse_args()

    recording.let_torchvision_import()
    make_narrow()
    from zoedepth.models.model_io import load_state_from_resource

    for name, (weights_name, kind, options) in MODELS.items():
        model = build_model(kind, **options)
        path = arguments.folder / f"{weights_name}.pt"
        weights = recording.random_weights(model.state_dict(), GAINS, FIXED, kept=KEPT)
        if kind == "zoedepth_nk":
            weights["mlp_classifier.2.bias"] = torch.tensor(ROUTER_BIAS)
        torch.save({"model": recording.stored_weights(weights)}, path)
        load_state_from_resource(model, f"local::{path}")
        oracle = recording.Oracle(model, functools.partial(run, model), functools.partial(predict, model), INPUTS, PICTURES)
        if arguments.sensitivity:
            oracle.print_least_visible(30)
        else:
            recording.write(arguments.folder / f"{name}.npz", oracle.arrays())


if __name__ == "__main__":
    main()

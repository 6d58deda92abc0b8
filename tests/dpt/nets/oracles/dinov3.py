"""CHMv2's and DINOv3's 7B depth model's own maps, on random weights.

`python -m tests.dpt.nets.oracles.dinov3 CHECKOUT FOLDER` writes `chmv2.pth`, `chmv2.npz`, `dinov3_7b.pth` and `dinov3_7b.npz`, from a
checkout of facebookresearch/dinov3. The README beside this file has the environment, the keys and the reasons for the numbers.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from tests.helpers import recording

GAINS = {
    r"patch_embed|storage_tokens|cls_token": 0.1,
    r"gamma": 0.3,
    r"qkv\.weight": 2.0,  # attention that is far from uniform, in which a wrong rotation shows
    r"resize_layers\.0\.weight": 4.0,
    r"resize_layers\.1\.weight": 2.0,
}
KEPT = r"bias_mask|periods"
HOOKS = [1, 2, 4, 5]
INPUTS = {"square": (1, 64, 64), "wide": (2, 48, 112), "tall": (1, 176, 32)}
PICTURES = {"padded": (50, 75)}
NECK = [8, 12, 16, 20]
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the encoder's arguments, the decoder's
    "chmv2": (
        {"ffn_ratio": 4, "qkv_bias": True, "ffn_layer": "mlp"},
        {
            "max_depth": 96.0,
            "bins_strategy": "chmv2_mixlog",
            "norm_strategy": "chmv2_mixlog",
            "use_cls_token": True,
            "head_kwargs": {
                "channels": 10,
                "post_process_channels": NECK,
                "n_hidden_channels": 20,
                "use_bias": True,
                "projection_after_fusion": False,
            },
        },
    ),
    "dinov3_7b": (
        {"ffn_ratio": 3, "qkv_bias": False, "ffn_layer": "swiglu64"},
        {"max_depth": 100.0, "use_batchnorm": True, "head_kwargs": {"channels": 10, "post_process_channels": NECK}},
    ),
}


def build_model(encoder: dict[str, Any], decoder: dict[str, Any]) -> nn.Module:
    """The original's model, 6 blocks of width 32 and 32 bins."""
    from dinov3.eval.depth.models import DecoderConfig, make_depther_from_config
    from dinov3.models.vision_transformer import DinoVisionTransformer

    backbone = DinoVisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=32,
        depth=6,
        num_heads=2,
        pos_embed_rope_base=100,
        pos_embed_rope_normalize_coords="separate",
        pos_embed_rope_dtype="fp32",
        layerscale_init=1e-5,
        norm_layer="layernormbf16",
        ffn_bias=True,
        proj_bias=True,
        n_storage_tokens=4,
        mask_k_bias=True,
        untie_global_and_local_cls_norm=True,
        **encoder,
    )
    backbone.init_weights()
    config = DecoderConfig(min_depth=0.001, n_output_channels=32, use_backbone_norm=True, backbone_out_layers=HOOKS, type="dpt", **decoder)
    return make_depther_from_config(backbone, config=config).eval()


def oracle(model: Any) -> recording.Oracle:
    def run(x: torch.Tensor) -> recording.Maps:
        """Its forward without the autocast to bfloat16 that this enters on a CPU; its bins are float32."""
        return {"output": model.features_to_depth(model.decoder(model.encoder(x)).float())[:, 0]}

    def predict(picture: numpy.ndarray) -> recording.Maps:
        """As the notebook of CHMv2 does it, which the original has as a notebook alone."""
        mean, std = numpy.array([0.420, 0.411, 0.296]), numpy.array([0.213, 0.156, 0.143])
        x = torch.from_numpy((picture / 255 - mean) / std).permute(2, 0, 1)[None].float()
        found = run(x)["output"]
        assert isinstance(found, torch.Tensor)
        return {"map": nn.functional.interpolate(found[:, None], size=picture.shape[:2], mode="bilinear", align_corners=False)[0, 0]}

    return recording.Oracle(model, run, predict, INPUTS, PICTURES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write chmv2 and dinov3_7b, .pth and .npz, to FOLDER.")
    parser.add_argument("checkout", type=Path, help="of facebookresearch/dinov3")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sensitivity", action="store_true", help="print instead which tensors matter least")
    arguments = parser.parse_args()

    recording.import_from(arguments.checkout, "dinov3")
    for name, (encoder, decoder) in MODELS.items():
        model = build_model(encoder, decoder)
        model.load_state_dict(recording.random_weights(model.state_dict(), GAINS, {}, kept=KEPT))
        if arguments.sensitivity:
            oracle(model).print_least_visible()
            continue
        state = {key: value for key, value in model.state_dict().items() if not key.endswith("rope_embed.periods")}
        torch.save(recording.stored_weights(state), arguments.folder / f"{name}.pth")
        oracle(model).write(arguments.folder / f"{name}.npz")


if __name__ == "__main__":
    main()

"""Small models for the tests: every stage there, in milliseconds."""

import torch

from bench.harness.shrunk import shrunk
from dpt.config import DPTConfig
from dpt.model import DPT
from dpt.zoo import CONFIGS


def config(name: str = "dpt-large-midas", classes: int = 5, embed_dim: int = 32, **encoder) -> DPTConfig:
    """A named model shrunk to 4 blocks of width 32 and 16 features."""
    full = CONFIGS[name]
    neck = None if full.encoder.map_widths else (8, 12, 16, 16)
    return shrunk(full, "small", width=embed_dim, features=16, grid=4, neck=neck, classes=classes, **encoder)


TRANSFORMERS_FIELDS = {  # of transformers.DPTConfig: the same small model
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 12, 16, 16],
    "fusion_hidden_size": 16,
}

HYBRID_FIELDS = {  # the same, of the small hybrids
    **TRANSFORMERS_FIELDS,
    "neck_hidden_sizes": [32, 64, 16, 16],
    "is_hybrid": True,
    "backbone_featmap_shape": [1, 128, 4, 4],
    "backbone_config": {
        "model_type": "bit",
        "embedding_size": 8,
        "hidden_sizes": [32, 64, 128],
        "depths": [1, 2, 1],
        "num_groups": 4,
        "layer_type": "bottleneck",
        "global_padding": "same",
        "embedding_dynamic_padding": True,
        "out_features": ["stage1", "stage2", "stage3"],
    },
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter and statistic random, none at its initial value: one that is dropped or mixed up shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                if name.endswith("running_var"):
                    noise = noise.abs() + 0.5
                elif value.dim() > 1:
                    noise = noise * value[0].numel() ** -0.5
                else:
                    noise = 0.3 * noise + (name.endswith("weight") or value.numel() == 1)  # gains, and the bias before a last ReLU
                value.copy_(noise)
    return model.eval()


def wide(name: str = "dpt-large-midas", **encoder) -> DPT:
    """A small model whose heads are wide enough for the kernel: 2 of 32."""
    return small(name, embed_dim=64, num_heads=2, **encoder)


def depth_anything() -> DPT:
    """A small model with what Depth Anything's metric models have and the named ones have not."""
    full = config("dpt-large-midas", final_norm="every", layer_scale=True, pos_mode="bicubic", pos_offset=0.1, patch_size=14)
    full = full.with_("encoder", embed_dim=64, num_heads=2).with_("decoder", readout="ignore", match_size=True)
    return randomise(DPT(full.with_("head", activation="sigmoid", max_depth=20.0)))


def depth_anything_3() -> DPT:
    """A small Depth Anything 3, to which a part of each picture is sky."""
    model = wide("depth-anything-3-mono-large")
    torch.nn.init.constant_(model.head.sky.conv3.bias, 0.2)
    return model


def small(name: str = "dpt-large-midas", seed: int = 0, **changes) -> DPT:
    return randomise(DPT(config(name, **changes)), seed)


def upstream(model: DPT, layout) -> dict[str, torch.Tensor]:
    """The model's state under a layout's own keys."""
    state = {}
    for key, value in model.state_dict().items():
        names = layout.source(key)
        parts = zip(names, value.chunk(len(names)) if len(names) > 1 else (value,), strict=True)
        state.update({name: part for name, part in parts if name is not None})
    return state

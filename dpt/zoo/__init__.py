"""The registry of checkpoint families: what they publish, by name, and what their files call their tensors.

A family is one file here, with `MODELS` (configurations with source and licence), `PARAMETERS` (how many each has: models are not built
to be listed; a test counts), and `LAYOUTS` (its tables of keys), and stands in `FAMILIES`. What differs between families is a field of
their configurations and never an `if` in the model. Nothing here needs PyTorch.
"""

from __future__ import annotations

import fnmatch

from ..config import DPTConfig
from ..rules import nearest
from . import (
    carried,
    depth_anything,
    depth_anything_3,
    dinov2_depthers,
    dinov3,
    isl,
    midas,
    midas_swin2,
    mmsegmentation,
    prompt_depth_anything,
    tipsv2,
    transformers_dpt,
    zoedepth,
)
from .layout import CheckpointError, Layout

__all__ = ["CONFIGS", "FAMILIES", "LAYOUTS", "PARAMETERS", "CheckpointError", "Layout", "config_of", "configs_in", "models"]

FAMILIES = (
    mmsegmentation,
    isl,
    midas,
    midas_swin2,
    zoedepth,
    prompt_depth_anything,
    depth_anything,
    depth_anything_3,
    dinov2_depthers,
    dinov3,
    tipsv2,
    transformers_dpt,
    carried,
)
CONFIGS: dict[str, DPTConfig] = {config.name: config for family in FAMILIES for config in family.MODELS}
PARAMETERS: dict[str, int] = {name: count for family in FAMILIES for name, count in family.PARAMETERS.items()}
# A file is of the first whose markers it has; families may share one.
LAYOUTS: tuple[Layout, ...] = tuple({layout.name: layout for family in FAMILIES for layout in family.LAYOUTS}.values())


def models(pattern: str = "*") -> list[str]:
    """The names that `build` takes, or those of them that a pattern fits, such as "*anything*"; * is any text, ? any letter.

    ValueError where none fits.
    """
    found = fnmatch.filter(CONFIGS, pattern)
    if not found:
        raise ValueError(f"no model's name fits {pattern!r}; the names are {', '.join(CONFIGS)}")
    return found


def config_of(name: str | DPTConfig) -> DPTConfig:
    """The configuration of a named model; a configuration is returned as it is. ValueError for an unknown name."""
    if isinstance(name, DPTConfig):
        return name
    if name not in CONFIGS:
        raise ValueError(f"no model is named {name!r}{nearest(str(name), CONFIGS)}; the names are {', '.join(CONFIGS)}")
    return CONFIGS[name]


def configs_in(layout: Layout) -> list[DPTConfig]:
    """The named models whose files may be in a layout: those of its families, and of ours all."""
    if layout is carried.LAYOUT:
        return list(CONFIGS.values())
    return [config for family in FAMILIES if layout in family.LAYOUTS for config in family.MODELS]

"""The registry of checkpoint families: what they publish, by name, and what their files call their tensors.

A family is one file here, with `MODELS` (configurations with source and licence), `PARAMETERS` (how many each has: models are not built
to be listed; a test counts), and `LAYOUT` (its table of keys), and stands in `FAMILIES`. What differs between families is a field of their
configurations and never an `if` in the model. Nothing here needs PyTorch.
"""

from __future__ import annotations

from ..config import DPTConfig, nearest
from . import carried, isl, mmsegmentation, transformers_dpt
from .layout import CheckpointError, Layout

__all__ = ["CONFIGS", "FAMILIES", "LAYOUTS", "PARAMETERS", "CheckpointError", "Layout", "config_of", "models"]

FAMILIES = (mmsegmentation, isl, transformers_dpt, carried)
CONFIGS: dict[str, DPTConfig] = {config.name: config for family in FAMILIES for config in family.MODELS}
PARAMETERS: dict[str, int] = {name: count for family in FAMILIES for name, count in family.PARAMETERS.items()}
LAYOUTS: tuple[Layout, ...] = tuple(family.LAYOUT for family in FAMILIES)  # a file is of the first whose marker it has


def models() -> list[str]:
    """The names that `build` takes."""
    return list(CONFIGS)


def config_of(name: str | DPTConfig) -> DPTConfig:
    """The configuration of a named model; a configuration is returned as it is. ValueError for an unknown name."""
    if isinstance(name, DPTConfig):
        return name
    if name not in CONFIGS:
        raise ValueError(f"no model is named {name!r}{nearest(str(name), CONFIGS)}; the names are {', '.join(CONFIGS)}")
    return CONFIGS[name]

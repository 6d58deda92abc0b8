"""Checkpoints: reading files safely (`files`, `pickles`, `stored`), what families call their tensors (`layouts`) and say of their models
(`pretrained_configs`), and transformers' hub (`hub`)."""

from .files import Checkpoint, read, save
from .hub import find
from .layouts import ISL, LAYOUTS, MMSEG, NATIVE, TRANSFORMERS, Layout, convert, layout_of, problems, shortened
from .pretrained_configs import palette, saved_config, stated_config
from .stored import CheckpointError

__all__ = [
    "ISL",
    "LAYOUTS",
    "MMSEG",
    "NATIVE",
    "TRANSFORMERS",
    "Checkpoint",
    "CheckpointError",
    "Layout",
    "convert",
    "find",
    "layout_of",
    "palette",
    "problems",
    "read",
    "save",
    "saved_config",
    "shortened",
    "stated_config",
]

"""Checkpoints: reading files safely, and writing (`files`, `pickles`, `stored`), state dicts brought to our keys (`conversion`), what files
say of their models (`pretrained_configs`), downloads (`downloads`) and transformers' hub (`hub`)."""

from ..zoo import CheckpointError, Layout
from .conversion import convert, layout_of, problems, reverted, shortened
from .files import Checkpoint, read, save, save_state
from .hub import Source, fetched, find
from .pretrained_configs import saved_config, stated_config

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Layout",
    "Source",
    "convert",
    "fetched",
    "find",
    "layout_of",
    "problems",
    "read",
    "reverted",
    "save",
    "save_state",
    "saved_config",
    "shortened",
    "stated_config",
]

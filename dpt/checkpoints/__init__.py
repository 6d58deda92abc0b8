"""Checkpoints: reading files safely, and writing (`files`, `pickles`, `stored`), state dicts brought to our keys (`conversion`), what files
say of their models (`pretrained_configs`), downloads (`downloads`), transformers' hub (`hub`) and its models as objects (`objects`)."""

from ..zoo import CheckpointError, Layout
from .conversion import convert, layout_of, parted, problems, reverted, shortened
from .files import Checkpoint, read, save, save_state
from .hub import Source, fetched, find
from .objects import of_transformers, own_names
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
    "of_transformers",
    "own_names",
    "parted",
    "problems",
    "read",
    "reverted",
    "save",
    "save_state",
    "saved_config",
    "shortened",
    "stated_config",
]

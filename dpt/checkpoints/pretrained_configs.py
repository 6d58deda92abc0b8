"""What files say of the model they hold: our own metadata, and transformers' config.json and preprocessor_config.json, as a `DPTConfig`.

The tables of transformers' fields are those of the families, in `dpt.zoo`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..config import DPTConfig, config_from
from ..zoo import CheckpointError, Layout
from ..zoo.stated import Document
from .files import INPUT_FILE, MODEL_FILE, Checkpoint, read_json


def stated_config(checkpoint: Checkpoint, layout: Layout) -> DPTConfig | None:
    """The configuration that a checkpoint carries, in itself or beside it; None if it carries none, CheckpointError if a wrong one."""
    saved = saved_config(checkpoint.metadata, checkpoint.path)
    path = checkpoint.folder / MODEL_FILE
    if saved is not None or layout.stated is None or not path.is_file():
        return saved
    processor = checkpoint.folder / INPUT_FILE
    try:
        return layout.stated.read(_document(path), _document(processor) if processor.is_file() else None, checkpoint.name)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _document(path: Path) -> Document:
    return Document(str(path), read_json(path))


def saved_config(metadata: Mapping[str, str], path: str | Path) -> DPTConfig | None:
    """The configuration a file of ours carries; None if it carries none, CheckpointError if it is not one."""
    if "dpt" not in metadata:
        return None
    try:
        return config_from(json.loads(metadata["dpt"]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read ({error})") from error

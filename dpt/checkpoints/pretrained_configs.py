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
from .objects import stated_values


def stated_config(checkpoint: Checkpoint, layout: Layout) -> DPTConfig | None:
    """The configuration that a checkpoint carries, in itself or beside it; None if it carries none, CheckpointError if a wrong one."""
    saved = saved_config(checkpoint.metadata, checkpoint.path)
    if saved is not None or layout.stated is None:
        return saved
    if checkpoint.model is None:
        model, processor = (_document(checkpoint.folder / name) for name in (MODEL_FILE, INPUT_FILE))
    else:
        model, processor = Document(f"{checkpoint.path}.config", stated_values(checkpoint.model)), None
    if model is None:
        return None
    try:
        return layout.stated.read(model, processor, checkpoint.name)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{model.path}: {error}") from error


def _document(path: Path) -> Document | None:
    return Document(str(path), read_json(path)) if path.is_file() else None


def saved_config(metadata: Mapping[str, str], path: str | Path) -> DPTConfig | None:
    """The configuration a file of ours carries; None if it carries none, CheckpointError if it is not one."""
    if "dpt" not in metadata:
        return None
    try:
        return config_from(json.loads(metadata["dpt"]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be read ({error})") from error

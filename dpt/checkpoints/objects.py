"""Models of transformers as objects: known without its import, and read as `save_pretrained` would write them, on the memory they have."""

from __future__ import annotations

import copy
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .conversion import joined
from .files import Checkpoint
from .stored import Opaque


def is_object(value: object) -> bool:
    """Whether it is a model of transformers, which those who have none never imported."""
    return isinstance(value, getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ()))


def of_transformers(module: str) -> ModuleType:
    """transformers, or a module of it; ImportError, and what to do, where it is not installed or older than models as objects need."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"models of transformers as objects need its version 5 ({error}): pip install '.[hf]'") from error


def own_names(model: Any) -> dict[str, tuple[str, ...]]:
    """Which of a model's own tensors those of its files join along their first dimension, by the files' names: transformers is asked."""
    model = copy.copy(model)
    model._weight_conversions = None  # those of the file that it came from, which may have had other names than the class writes
    names = list(model.state_dict())
    numbers = {name: torch.tensor([index], device="cpu") for index, name in enumerate(names)}
    files = of_transformers("transformers.core_model_loading").revert_weight_conversion(model, numbers)
    return {key: tuple(names[index] for index in parts.tolist()) for key, parts in files.items()}


def read_object(model: Any) -> Checkpoint:
    """A model as a checkpoint, whose tensors are the model's own; those that its files join are copies where they do not lie so already."""
    values = model.state_dict()
    opaque = {name: Opaque(what) for name, value in values.items() if (what := _not_plain(value))}
    state: dict[str, Any] = {}
    for key, names in own_names(model).items():
        unread = next((opaque[name] for name in names if name in opaque), None)
        state[key] = joined([values[name] for name in names]) if unread is None else unread
    kind = type(model).__name__
    return Checkpoint(Path(kind), (), Path(model.name_or_path).name or kind, state, model=model)


def _not_plain(value: Tensor) -> str | None:
    if type(value) is not Tensor or value.layout is not torch.strided:
        return f"a {type(value).__name__} of {value.layout}"
    return "a tensor without values, of the meta device" if value.is_meta else None


def stated_values(model: Any) -> dict[str, Any]:
    """What config.json would say of a model."""
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {**values, "architectures": [type(model).__name__]}

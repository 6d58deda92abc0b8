"""`build`, `load` and `models`: from a name or a file to a model."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoints, downloads
from .checkpoints import CheckpointError
from .config import CONFIGS, DPTConfig
from .encoder import check_attention
from .model import DPT

DEFAULT = "dpt-base-ade20k"


def models() -> list[str]:
    """The names that `build` takes."""
    return list(CONFIGS)


def config_of(name: str | DPTConfig) -> DPTConfig:
    """The configuration of a named model; a configuration is returned as it is. ValueError for an unknown name."""
    if isinstance(name, DPTConfig):
        return name
    if name not in CONFIGS:
        close = difflib.get_close_matches(str(name), CONFIGS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no model is named {name!r}; {hint}the names are {', '.join(CONFIGS)}")
    return CONFIGS[name]


def build(
    name: str | DPTConfig = DEFAULT,
    *,
    weights: str | Path | None = None,
    fast: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> DPT:
    """A model in evaluation mode.

    Args:
        name: one of `models()`, or a `DPTConfig`.
        weights: None for random initialisation; a path to a checkpoint in any known layout; "pretrained" for the file the package
            carries (dpt-tiny-*) or a download into torch.hub's cache, checked against the hash in its name (all others).
        fast: run on the fused kernels where they apply (`dpt.accelerate`).
        device: where the parameters live; None is PyTorch's default device.
        dtype: of the parameters; None is PyTorch's default dtype.
        attention: "sdpa" (default) or "xformers", which needs that package.

    Raises:
        ValueError: an unknown name or attention; CheckpointError, a ValueError, for a file that does not fit.
        ImportError: the attention's package is missing.
        FileNotFoundError: no such weights file; `dpt.downloads.DownloadError`, an OSError too, for a download that failed.
    """
    config = config_of(name)
    if attention is not None:
        check_attention(attention)
        config = config.with_("encoder", attention=attention)
    model = DPT(config)
    if weights is not None:
        checkpoints.load_into(model, _pretrained(config) if weights == "pretrained" else weights)
    return _finish(model, fast, device, dtype)


def load(
    path: str | Path,
    name: str | DPTConfig | None = None,
    *,
    fast: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> DPT:
    """The model a checkpoint file holds, in evaluation mode: ours, mmsegmentation's, isl-org's or transformers' layout.

    The architecture is read off the file. `name` (or a `DPTConfig`) is needed where the file does not settle it; the error says
    so. A segmentation file with another number of classes gets classes named by number. The other arguments and errors are
    `build`'s.
    """
    state, metadata = checkpoints.read(path)
    layout = checkpoints.layout_of(state, path)
    config = config_of(name) if name is not None else checkpoints.saved_config(metadata, path) or _recognise(state, layout, path)
    if layout.norm_eps is not None:
        config = config.with_("encoder", norm_eps=layout.norm_eps)
    if attention is not None:
        check_attention(attention)
        config = config.with_("encoder", attention=attention)
    model = DPT(_with_classes_of(state, layout, config))
    model.load_state_dict(checkpoints.convert(state, layout, model.state_dict(), path))
    return _finish(model, fast, device, dtype)


def _finish(model: DPT, fast: bool, device, dtype) -> DPT:
    model = model.to(device=device, dtype=dtype).eval()
    if fast:
        from .fast import accelerate  # Triton is loaded only by those who ask for it

        accelerate(model)
    return model


def _pretrained(config: DPTConfig) -> Path:
    """The file `weights="pretrained"` stands for."""
    if config.source is None:
        raise ValueError(f"{config.name} has no pretrained weights: give weights= a path")
    if "://" not in config.source:
        return Path(__file__).parent / config.source
    target = Path(torch.hub.get_dir()) / "checkpoints" / config.source.rsplit("/", 1)[1]
    return downloads.fetch(config.source, target)


def _with_classes_of(state: dict[str, Tensor], layout: checkpoints.Layout, config: DPTConfig) -> DPTConfig:
    """The configuration with the file's number of classes, numbered instead of named if it is another."""
    if config.head.task != "segmentation":
        return config
    weight = state.get(layout.source("head.classifier.weight")[0])
    if weight is None or len(weight) == len(config.head.classes):
        return config
    generator = torch.Generator().manual_seed(0)
    palette = tuple(tuple(colour) for colour in torch.randint(256, (len(weight), 3), generator=generator).tolist())
    return config.with_("head", classes=tuple(f"class {index}" for index in range(len(weight))), palette=palette)


def _recognise(state: dict[str, Tensor], layout: checkpoints.Layout, path: str | Path) -> DPTConfig:
    """The one named model whose parameters have the file's names and shapes; CheckpointError if there is none, or several."""
    fitting, problems = [], []
    for config in CONFIGS.values():
        candidate = _with_classes_of(state, layout, config)
        with torch.device("meta"):
            expected = DPT(candidate).state_dict()
        try:
            checkpoints.convert({key: value.to("meta") for key, value in state.items()}, layout, expected, path)
        except CheckpointError as error:
            problems.append(f"{config.name}: {error}")
        else:
            fitting.append(candidate)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(config.name for config in fitting)
        raise CheckpointError(f"{path} ({layout.name} layout) fits {names} alike: say which with name=")
    raise CheckpointError(f"{path} ({layout.name} layout) fits no named model; give name= a DPTConfig, or mind what differs: {problems[0]}")

"""`build` and `load`: from a name or a file to a model."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from pathlib import Path

import torch

from . import checkpoints
from .checkpoints import Checkpoint, CheckpointError, Layout
from .checkpoints.conversion import State
from .checkpoints.stored import Opaque, Stored
from .classes import palette
from .config import DPTConfig, differences, numbered_classes
from .model import DPT
from .nets.encoders.vit import check_attention
from .system.processes import place
from .zoo import config_of, configs_in

DEFAULT = "dpt-base-ade20k"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(dtype: torch.dtype | None) -> None:
    """ValueError unless it is None or one of `DTYPES`."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: it must be one of {', '.join(map(str, DTYPES))}, or None, PyTorch's default")


def build(
    name: str | DPTConfig = DEFAULT,
    *,
    weights: checkpoints.Source | None = None,
    fast: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    accept_license: bool = False,
) -> DPT:
    """A model in evaluation mode.

    Args:
        name: one of `dpt.models()`, or a `DPTConfig`.
        weights: None for random initialisation; whatever `load` takes; "pretrained" for the file the package carries (dpt-tiny-*) or
            a download into torch.hub's cache or huggingface_hub's, checked against the hash in its name where that has one; where it is
            from and its licence are said on stderr. The model is the named one whatever the file says of itself.
        fast: run on the fused kernels where they apply (`dpt.accelerate`).
        device: where the parameters live; None is PyTorch's default device.
        dtype: of the parameters, one of `DTYPES`; None is PyTorch's default dtype. Pictures are resized and normalised in float32 whatever
            it is, and docs/precision.md says what else is computed in float32.
        attention: "sdpa" (default) or "xformers", which needs that package.
        accept_license: you have read the licence of the pretrained weights and keep to it; needed where it does not allow every use.

    Raises:
        ValueError: an unknown name or attention; a dtype that is none of `DTYPES`; a licence that was not accepted; CheckpointError, a
            ValueError, for a file that does not fit.
        ImportError: the attention's package is missing.
        FileNotFoundError: no such weights file; `dpt.checkpoints.downloads.DownloadError`, an OSError too, for a download that failed.
    """
    check_dtype(dtype)
    config = config_of(name)
    if attention is not None:
        check_attention(attention)
        config = config.with_("encoder", attention=attention)
    if weights is None:
        model = DPT(config).to(device=device).eval()
        model.cast(dtype)
    else:
        checkpoint = checkpoints.find(_pretrained(config, accept_license) if weights == "pretrained" else weights)
        model = _assembled(config, checkpoint, checkpoints.layout_of(checkpoint.state, checkpoint.path), device, dtype)
    return _finished(model, fast)


def load(
    path: checkpoints.Source | Checkpoint,
    name: str | DPTConfig | None = None,
    *,
    fast: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> DPT:
    """The model a checkpoint holds, in any layout of `dpt.zoo`: ours, the families' own, transformers'; in evaluation mode.

    Args:
        path: a file of PyTorch (any zip or legacy one; what is not a tensor is passed over and never run) or of safetensors, or the
            address of one, in wrappers such as "state_dict" and with prefixes such as "module."; a folder of transformers, or the index of
            its shards; or, where nothing here has that name, a model on transformers' hub ("Intel/dpt-large"), through huggingface_hub's
            cache, which is asked first; or a model of transformers as an object, of any class whose folders are read; or a list of these,
            which hold one model together, such as a backbone and a head; or what `dpt.checkpoints.find` made of them.
        name: a named model or a `DPTConfig`, where the file does not settle the architecture; the error says so. It goes before what the
            file says. Without it a file of ours says all, and transformers' config.json beside the weights is obeyed or refused.

    A model object of transformers is followed in its device, its dtype and its mode, where no argument says otherwise. The parameters are
    its own bit for bit, and on its memory: what one model changes in place the other has; gradients are each's own. Copies are those of
    another dtype or device; query, key and value, which are one tensor here, unless they lie one behind the other in memory, as
    `dpt.to_transformers` and `dpt.accelerate` lay them; and with `fast` in evaluation mode the convolutions' weights. Its `config` is
    obeyed or refused as config.json is. It has no processor: pictures are prepared as the class' processor does by default, at the
    model's own size, but as the named models that compute the same where these agree, as Depth Anything's do in mean and deviation.

    Number of classes, grid of the positional embedding, mmsegmentation's final norm and the auxiliary head are read off the tensors. The
    other arguments and errors are `build`'s; CheckpointError also for values that are not finite, and for a model the hub does not give.
    """
    check_dtype(dtype)
    checkpoint = path if isinstance(path, Checkpoint) else checkpoints.find(path)
    layout = checkpoints.layout_of(checkpoint.state, checkpoint.path)
    config = config_in(checkpoint, layout, name)
    if attention is not None:
        check_attention(attention)
        config = config.with_("encoder", attention=attention)
    return _finished(_assembled(config, checkpoint, layout, device, dtype), fast)


def config_in(checkpoint: Checkpoint, layout: Layout, name: str | DPTConfig | None = None) -> DPTConfig:
    """The configuration of the model that a checkpoint holds, as its layout's own code runs it; the arguments and errors are `load`'s."""
    stated = checkpoints.stated_config(checkpoint, layout) if name is None else None
    if stated is not None:
        return stated if checkpoint.model is None else _prepared_as_named(stated, layout)
    if name is None:
        return layout.as_run(recognised(checkpoint.state, layout, checkpoint.path))
    return layout.as_run(_as_in_file(config_of(name), checkpoint.state, layout))


def _prepared_as_named(config: DPTConfig, layout: Layout) -> DPTConfig:
    """The configuration with that of its input in which all named models of a layout agree that compute the same."""
    alike = [
        other.input
        for other in map(layout.as_run, configs_in(layout))
        if all(field.startswith("input.") for field, *_ in differences(config, other))
    ]
    values = {field.name: {getattr(other, field.name) for other in alike} for field in fields(config.input)}
    return config.with_("input", **{name: found.pop() for name, found in values.items() if len(found) == 1})


def _assembled(
    config: DPTConfig, checkpoint: Checkpoint, layout: Layout, device: str | torch.device | None, dtype: torch.dtype | None
) -> DPT:
    """The model with the checkpoint's tensors as its parameters; nothing is initialised, and nothing allocated beside them. One that is a
    model of transformers is followed in its device, dtype and mode."""
    path, depth = checkpoint.path, config.encoder.depth
    first, last = (f"encoder.blocks.{index}.norm1.weight" for index in (0, depth - 1))
    # Before thousands of blocks are made for a damaged number; an encoder without such blocks has neither.
    if layout.find(first, checkpoint.state) is not None and layout.find(last, checkpoint.state) is None:
        missing = layout.source(last)[0]
        raise CheckpointError(f"{path} ({layout.name} layout): the model has {depth} blocks, but {missing} is not in the file")
    with torch.device("meta"):
        model = DPT(config)
        model.cast(dtype)
    given = checkpoint.model
    device = torch.get_default_device() if device is None and given is None else device
    as_stored = dtype is None and given is not None
    state = checkpoints.convert(checkpoint.state, layout, model.state_dict(), path, device=device, as_stored=as_stored)
    model.load_state_dict(state, assign=True)
    return model.train(given is not None and given.training)


def _finished(model: DPT, fast: bool) -> DPT:
    if fast:
        from .fast.acceleration import accelerate  # Triton is loaded only by those who ask for it

        accelerate(model)
    return model


def _pretrained(config: DPTConfig, accept_license: bool) -> checkpoints.Source:
    """The file or files that `weights="pretrained"` stands for."""
    if config.source is None:
        raise ValueError(f"{config.name} has no pretrained weights: give weights= a path")
    if not config.addresses:
        return Path(__file__).parent / str(config.source)
    source = " and ".join(config.addresses)
    if config.restricted and not accept_license:
        raise ValueError(
            f"the weights of {config.name} are under {config.licence}, which does not allow every use ({source}): read it, and say "
            "accept_license=True (--accept-license)"
        )
    if place().first:
        print(f"{config.name}: weights from {source}, licence {config.licence}", file=sys.stderr)
    return [checkpoints.fetched(address) for address in config.addresses]


def _as_in_file(config: DPTConfig, state: State, layout: Layout) -> DPTConfig:
    """The configuration with what the file's tensors show of it.

    Classes of another number are numbered instead of named. The positional embedding's grid is a square where it is not the configured one.
    """
    position = _shape("encoder.pos_embed", state, layout)
    patches = position[1] - 1 if len(position) == 3 else 0
    side = math.isqrt(max(patches, 0))
    if patches != math.prod(config.encoder.pos_grid) and 0 < patches == side * side:
        config = config.with_("encoder", pos_grid=(side, side))
    if layout.find("encoder.norm.weight", state) is not None and config.encoder.final_norm == "none":
        config = config.with_("encoder", final_norm=layout.final_norm)
    config = config.with_("decoder", dead_unit=layout.find("fusion.blocks.3.unit1.conv1.weight", state) is not None)
    if config.head.task != "segmentation":
        return config
    config = config.with_("head", auxiliary=layout.find("auxiliary_head.conv.weight", state) is not None)
    count, *_ = _shape("head.classifier.weight", state, layout) or (0,)
    if count in (0, len(config.head.classes)):
        return config
    return config.with_("head", classes=numbered_classes(count), palette=palette(count))


def _shape(key: str, state: State, layout: Layout) -> tuple[int, ...]:
    """The shape of the file's tensor for one of our keys; empty where there is none, or none that can be read, or nothing in it."""
    value = layout.find(key, state)
    if value is None or isinstance(value, Opaque) or (isinstance(value, Stored) and value.problem() is not None):
        return ()
    return () if 0 in value.shape else tuple(value.shape)


def recognised(state: State, layout: Layout, path: str | Path) -> DPTConfig:
    """The one named model whose parameters have the file's names and shapes.

    Raises:
        CheckpointError: there is none, and what the file lacks for the nearest; or there are several.
    """
    found: dict[str, tuple[DPTConfig, list[str]]] = {}
    for config in configs_in(layout):
        candidate = _as_in_file(config, state, layout)
        with torch.device("meta"):
            expected = DPT(candidate).state_dict()
        found[config.name] = candidate, checkpoints.problems(state, layout, expected)
    fitting = [candidate for candidate, wrong in found.values() if not wrong]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(config.name for config in fitting)
        raise CheckpointError(
            f"{path} ({layout.name} layout) fits {names} alike, which the tensors cannot tell apart: say which with name= (--model NAME)"
        )
    if not found:
        raise CheckpointError(f"{path} ({layout.name} layout): no named model has files like it; give name= a DPTConfig")
    nearest, (_, wrong) = min(found.items(), key=lambda item: len(item[1][1]))
    raise CheckpointError(
        f"{path} ({layout.name} layout) fits no named model; give name= a DPTConfig, or mind what differs from {nearest}, "
        f"the nearest: {checkpoints.shortened(wrong)}"
    )

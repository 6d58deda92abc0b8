"""The weights that a training starts from: those of a model, whole or in part, or of a Vision Transformer alone."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checkpoints
from ..checkpoints import Checkpoint, CheckpointError
from ..checkpoints.stored import Stored
from ..config import HeadConfig
from ..factory import build, load
from ..model import DPT
from ..zoo import models

_TIMM = {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}  # keys of timm's ViT, JAX' by timm, and DeiT's


def start_from(model: DPT, start: str, accept_license: bool = False) -> list[str]:
    """Give a model the weights of another, in place; returns the names of the parts that it got.

    Args:
        start: a named model, with its pretrained weights; a checkpoint of any layout, its address or a name on the hub; or a ViT of timm's,
            which gives the encoder.

    The encoder is always given; where both decoders have the same configuration, Reassemble and Fusion too; and where then the heads'
    layers say the same, the head. CheckpointError where the encoders differ.
    """
    if start in models():
        return _take_over(model, build(start, weights="pretrained", accept_license=accept_license), start)
    checkpoint = checkpoints.find(start)
    if _TIMM <= checkpoint.state.keys():
        _fill(model.encoder, _timm_encoder(model, checkpoint), str(checkpoint.path))
        return ["encoder"]
    return _take_over(model, load(checkpoint), start)


def _take_over(model: DPT, source: DPT, start: str) -> list[str]:
    parts = ["encoder"]
    if source.config.decoder == model.config.decoder:
        parts += ["reassemble", "fusion"]
        if _layers_of(source.config.head) == _layers_of(model.config.head):
            parts += ["head"]
    for part in parts:
        _fill(getattr(model, part), getattr(source, part).state_dict(), start)
    return parts


def _layers_of(head: HeadConfig) -> HeadConfig:
    """The head before what it makes of its layers' numbers: isl-org's metres are the reciprocal of MiDaS' inverse depth."""
    unscaled = replace(head, depth_scale=HeadConfig.depth_scale, bounds=None)
    return replace(unscaled, inverse=True, reciprocal=None) if head.reciprocal else unscaled


def _fill(module: torch.nn.Module, state: dict[str, Tensor], start: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:4])[:400]
        raise CheckpointError(f"{start}: its encoder is not that of the model that is trained: {reasons}") from error


def _timm_encoder(model: DPT, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The encoder's state of a ViT of timm's: its names are ours but for the patches'. The classifier and, where our encoder has no norm at
    its end, that norm are left out; the positional embedding is resized to our grid, as mmsegmentation does before a training."""
    wanted, found = model.encoder.state_dict(), {}
    for key, value in checkpoint.state.items():
        name = re.sub(r"^patch_embed\.proj\.", "patch_embed.", key)
        if name in wanted:
            if not isinstance(value, Stored) or value.problem():
                raise CheckpointError(f"{checkpoint.path}: {key} cannot be read")
            found[name] = value.read().float()
        elif not re.match(r"(head|head_dist|norm|fc_norm|pre_logits|dist_token)\b", key):
            raise CheckpointError(f"{checkpoint.path}: the encoder of {model.config.name} has no place for {key}")
    if "pos_embed" in found:
        found["pos_embed"] = _resized_positions(found["pos_embed"], wanted["pos_embed"], model.config.encoder.pos_grid, checkpoint)
    return found


def _resized_positions(stored: Tensor, wanted: Tensor, grid: tuple[int, int], checkpoint: Checkpoint) -> Tensor:
    """(1, 1 + n*n, D) -> (1, 1 + h*w, D), bicubic."""
    if stored.shape == wanted.shape:
        return stored
    side = round((stored.shape[1] - 1) ** 0.5) if stored.dim() == 3 else 0
    if stored.dim() != 3 or side * side + 1 != stored.shape[1] or stored.shape[2] != wanted.shape[2]:
        raise CheckpointError(f"{checkpoint.path}: pos_embed of shape {tuple(stored.shape)} is no class token and square of patches")
    patches = stored[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat((stored[:, :1], patches.flatten(2).transpose(1, 2)), 1)

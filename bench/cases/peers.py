"""Other people's implementations of the same model, on the same weights: their outputs are held to the same gate as ours."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpt import DPT, CheckpointError, checkpoints, exchange
from dpt.checkpoints import Layout
from dpt.config import differences
from dpt.exporting import MissingPackage, export, onnx_files
from dpt.zoo import LAYOUTS, mmsegmentation

from ..harness.runner import Unavailable

TRANSFORMERS_NOTE = "its default attention (sdpa); align_corners of its last resize set as in our model"
MMSEGMENTATION_NOTE = "its DPT as published, with the patch embedding's bias"


def installed(package: str) -> None:
    """Unavailable unless a package can be imported."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def their_state(model: DPT, layout: Layout) -> dict[str, Tensor]:
    """Our state under another layout's keys, sharing memory; Unavailable if the model has a part that the layout has not."""
    state = {key: value.detach() for key, value in model.state_dict(keep_vars=True).items()}
    try:
        return checkpoints.reverted(state, layout, model.config.encoder.embed_dim)
    except CheckpointError as error:
        raise Unavailable(str(error)) from error


class _Output(nn.Module):
    """A model of transformers that returns its map instead of a dictionary."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        further = {} if prompt is None else {"prompt_depth": prompt[:, None]}
        return getattr(self.model(pixel_values=x, **further), self.name)


def transformers_model(model: DPT, size: tuple[int, int]) -> nn.Module:
    """transformers' model with our parameters, for square pictures of one size: the only ones that all its classes take.

    The positional embedding is given to it as our model resizes it for that size.
    """
    installed("transformers")
    if size[0] != size[1]:
        raise Unavailable(f"transformers' DPT takes square pictures only, this is {size[0]}x{size[1]}")
    if model.config.further:
        raise Unavailable("of several tasks the gate judges one, and nobody else's times are told by that")
    import transformers

    layout, fields = _as_transformers_has_it(model, size[0])
    state = their_state(model, layout)
    if hasattr(model.encoder, "position"):
        patch = model.config.encoder.patch_size
        with torch.no_grad():
            state[str(layout.source("encoder.pos_embed")[0])] = model.encoder.position((size[0] // patch, size[1] // patch)).detach()
    kind = getattr(transformers, fields["architectures"][0])
    theirs, found = kind.from_pretrained(  # which renames what its files name otherwise than its modules
        None,
        config=transformers.AutoConfig.for_model(**fields),
        state_dict=state,
        output_loading_info=True,
        dtype=next(model.parameters()).dtype,
    )
    never_read = "neck.fusion_stage.layers.0.residual_layer1."
    wrong = [key for key in found["missing_keys"] if not key.startswith(never_read)] + sorted(found["unexpected_keys"])
    if wrong:
        raise Unavailable(f"this version of transformers and the key table differ in {wrong[0]}")
    depth = model.config.head.task == "depth"
    if not depth:
        theirs.head.head[-1].align_corners = model.config.head.align_corners
    return _Output(theirs, "predicted_depth" if depth else "logits").to(next(model.parameters())).eval()


def _as_transformers_has_it(model: DPT, side: int) -> tuple[Layout, dict[str, Any]]:
    """The layout of transformers' that holds a model, and what config.json says of it, for pictures of one size and but for what is given
    or set otherwise: the resize of the positional embedding, a unit that is never run, the corners of the last resize."""
    config, patches = model.config, side // model.config.encoder.patch_size
    resized = {"pos_grid": (patches, patches), "pos_offset": 0.0, "pos_by_count": False} if hasattr(model.encoder, "position") else {}
    reasons, holds, fits = [], [], []  # the last are of layouts that are nearest
    for layout, mode, dead in itertools.product((layout for layout in LAYOUTS if layout.stated), ("bilinear", "bicubic"), (True, False)):
        given = {**resized, "pos_mode": mode} if resized else {}
        asked = config.with_("encoder", **given).with_("decoder", dead_unit=dead).with_("head", align_corners=True)
        try:
            keys = {name for key in model.state_dict() for name in layout.source(key) if name is not None}
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        if not layout.is_of(keys):
            holds.append(f"{layout.name} holds {', '.join(sorted(set(layout.markers) - keys))}")
            continue
        assert layout.stated is not None
        if layout.stated.write is None:
            fits.append(f"{layout.name} is read and not written")
            continue
        try:
            files = layout.stated.write(asked)
        except CheckpointError as error:
            fits.append(str(error))
            continue
        others = [
            f"{name}={theirs!r} for {ours!r}"
            for name, ours, theirs in differences(asked, exchange.run_by(layout, files, asked))
            if not name.startswith("input.")
        ]
        if not others:
            return layout, files[0]
        fits.append(f"{layout.name} computes {', '.join(others)}")
    raise Unavailable(f"transformers has no class with this model's parts: {(fits or holds or reasons)[0]}")


def exported(model: DPT, inputs: tuple[Tensor, ...], folder: Path) -> Path:
    """A model as `dpt.export` writes it to ONNX, for pictures of this size: a file in ``folder``."""
    try:
        return export(model, folder / "model.onnx", size=(inputs[0].shape[2], inputs[0].shape[3]), check=False).files[-1]
    except MissingPackage as error:
        raise Unavailable(str(error)) from error


def onnxruntime_session(path: Path, threads: int) -> Callable[..., Tensor]:
    """ONNX Runtime's run of an exported model on the CPU, from tensors to a tensor."""
    installed("onnxruntime")
    run = onnx_files.session(path, threads)
    return lambda *tensors: run(*tensors)[0]


def openvino_model(path: Path, threads: int) -> Callable[..., Tensor]:
    """OpenVINO's run of an exported model on the CPU, in float32 and for the least latency, from tensors to a tensor."""
    installed("openvino")
    import openvino

    core = openvino.Core()
    how = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = core.compile_model(core.read_model(path), "CPU", how)
    return lambda *tensors: torch.from_numpy(compiled([t.numpy() for t in tensors])[0].copy())


class _Logits(nn.Module):
    """mmsegmentation's model from a picture to logits of its size, without the data structures around them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x, mode="tensor")
        return nn.functional.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=self.model.align_corners)


def mmsegmentation_model(model: DPT) -> nn.Module:
    """mmsegmentation's DPT, built from its published configuration, with our parameters, which it shares."""
    installed("mmseg")
    state = their_state(model, mmsegmentation.LAYOUT)
    _stand_in_for_compiled_operators()
    import mmseg
    from mmseg.apis import init_model

    published = Path(mmseg.__file__).parent / ".mim/configs/dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py"
    if not published.is_file():
        raise Unavailable("this mmsegmentation carries no configuration of DPT")
    theirs = init_model(published, device="cpu", cfg_options=_mmsegmentation_options(model))
    found = theirs.load_state_dict(state, strict=False, assign=True)
    missing = [key for key in found.missing_keys if not key.startswith(("auxiliary_head.", "backbone.ln1."))]
    if missing or found.unexpected_keys:
        raise Unavailable(f"this version of mmsegmentation names parameters otherwise: {[*missing, *found.unexpected_keys][0]}")
    return _Logits(theirs).to(next(model.parameters())).eval()


def _mmsegmentation_options(model: DPT) -> dict[str, Any]:
    """Our sizes in the place of the published ones, and the patch bias that the published files hold."""
    encoder, decoder, head = model.config.encoder, model.config.decoder, model.config.head
    return {
        "model.backbone": {
            "patch_bias": True,
            "img_size": tuple(side * encoder.patch_size for side in encoder.pos_grid),
            "embed_dims": encoder.embed_dim,
            "num_heads": encoder.num_heads,
            "num_layers": encoder.depth,
            "out_indices": encoder.hooks,
        },
        "model.decode_head": {
            "in_channels": (encoder.embed_dim,) * 4,
            "embed_dims": encoder.embed_dim,
            "post_process_channels": list(decoder.neck_channels),
            "channels": decoder.features,
            "num_classes": len(head.classes),
            "norm_cfg": {"type": "BN"},  # published with SyncBN: the same in evaluation
        },
    }


def _stand_in_for_compiled_operators() -> None:
    """Let mmsegmentation import beside mmcv-lite, which has no `mmcv.ops`: DPT uses nothing of it."""
    if importlib.util.find_spec("mmcv._ext") is None:
        operators = types.ModuleType("mmcv.ops")
        for name in ("point_sample", "sigmoid_focal_loss", "CrissCrossAttention", "PSAMask"):
            setattr(operators, name, None)
        sys.modules["mmcv.ops"] = operators

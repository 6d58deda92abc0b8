"""What half precision costs, stage by stage: `python -m bench.precision` runs each model of `AUDITED` in float32, bfloat16 and float16 on
the same pictures, and writes docs/precision.json and docs/precision.md; `--check` only compares the page with the file.

For each stage the largest activation in float32, and how far those of half precision are off; then the map, were a part that is computed
in float32 rounded to half precision at every step (`ROUNDED`), or the last layer not, or not, in float32. On a CPU, of the plain model; the
kernels round no oftener. Stages are found in the tree of modules.
"""

from __future__ import annotations

import contextlib
import copy
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dpt
from dpt.inference.images import load_image
from dpt.inference.resizing import preprocess
from dpt.nets.decoder import FusionBlock
from dpt.nets.encoders.residual import ResidualBlock
from dpt.nets.functional import LastConv2d, LastLinear

from . import ROOT
from .cases.models import randomise
from .reporting import recorded
from .reporting.precision import page

RECORD, PAGE = ROOT / "docs" / "precision.json", ROOT / "docs" / "precision.md"
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
AUDITED = {  # by name, whether the weights are trained ones
    "dpt-tiny-depth": True,
    "dpt-tiny-scenes": True,
    "dpt-base-ade20k": False,
    "dpt-large-midas": False,
    "depth-anything-v2-large": False,
}
PATCHES = 12  # a side of what models of random weights see
PICTURES = sorted((Path(dpt.__file__).parent / "examples").glob("*.png"))


EMBEDDING = "encoder.patch_embed"


def stage_of(name: str, module: nn.Module) -> str | None:
    """What a module's output is called: the embedded patches, of a stem of several layers the last one's; those of the encoder's blocks,
    the reassembled maps, the levels of the fusion. None for what is within them."""
    if name == EMBEDDING or name.startswith(f"{EMBEDDING}."):
        return EMBEDDING
    parent, _, last = name.rpartition(".")
    reassembled = parent.endswith("reassemble") and last.isdigit()
    return name if isinstance(module, ResidualBlock | FusionBlock) or reassembled else None


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name == "head" or name.endswith(".head")}


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, float], dict[str, nn.Module]]]:
    """Of the forwards inside: what the stages gave, float32 copies by what they are called, in their order; the largest magnitude that each
    module gave; and each head's last layer."""
    outputs: dict[str, Tensor] = {}
    largest: dict[str, float] = {}
    last: dict[str, nn.Module] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs.pop(name, None)  # a layer that is called again moves behind the others
            outputs[name] = output.float().clone()

        return hook

    def keep_around(head: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            last[head] = layer
            for name, value in ((f"{head}, before its last layer", inputs[0]), (f"{head}, behind it", output)):
                outputs.pop(name, None)
                outputs[name] = value.float().clone()

        return hook

    def measure(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for value in (output,) if isinstance(output, Tensor) else output if isinstance(output, list | tuple) else ():
                largest[name] = max(largest.get(name, 0.0), float(value.abs().max()))

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(measure(name)))
        if (stage := stage_of(name, module)) is not None:
            handles.append(module.register_forward_hook(keep(stage)))
    for head, module in heads_of(model).items():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                handles.append(layer.register_forward_hook(keep_around(head)))
        handles.append(module.register_forward_hook(keep(f"{head}, its map")))
    try:
        yield outputs, largest, last
    finally:
        for handle in handles:
            handle.remove()


def errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    """The largest, relative to the largest value, and the root mean square, relative to that of the values."""
    apart, exact = (found - exact).double(), exact.double()
    return {
        "largest": rounded(apart.abs().max() / exact.abs().max()),
        "rms": rounded((apart.square().mean() / exact.square().mean()).sqrt()),
    }


def rounded(value: Tensor | float) -> float:
    """To four digits; NaN, of a map that is not finite, as infinity."""
    number = float(f"{float(value):.3e}")
    return math.inf if math.isnan(number) else number


def layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm, each step rounded to x's dtype."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * ((centred * centred).mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Attention, its scores and each step of its softmax rounded to q's dtype."""
    scores = (q @ k.mT) * options.get("scale", q.shape[-1] ** -0.5)
    scores = scores if bias is None else scores + bias
    share = (scores - scores.amax(-1, keepdim=True)).exp()
    return (share / share.sum(-1, keepdim=True)) @ v


def gelu(x: Tensor, **options: Any) -> Tensor:
    """GELU, each step rounded to x's dtype."""
    return x * (0.5 * (1 + torch.erf(x * 0.5**0.5)))


ROUNDED: dict[str, dict[Any, Callable[..., Tensor]]] = {
    "LayerNorm's statistics": {F.layer_norm: layer_norm},
    "attention's softmax": {F.scaled_dot_product_attention: attention},
    "GELU": {F.gelu: gelu},
}


class Instead(TorchFunctionMode):
    """Calls other functions for some of PyTorch's."""

    def __init__(self, others: dict[Any, Callable[..., Tensor]]):
        super().__init__()
        self.others = others

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.others.get(function, function)(*args, **(kwargs or {}))


KINDS = {nn.Conv2d: LastConv2d, nn.Linear: LastLinear}  # of a last layer: in the model's dtype, in float32


def compared(model: nn.Module, found: Tensor, exact: Tensor) -> dict[str, float]:
    """A map beside float32's: its errors, and of labels the share that differs, of depth how many distinct values a picture has."""
    result = errors(found.float(), exact)
    if model.config.head.task == "segmentation":
        return {**result, "labels": rounded((found.argmax(1) != exact.argmax(1)).float().mean())}
    return {**result, "values": max(len(picture.unique()) for picture in found)}


def audit(name: str, trained: bool) -> dict[str, Any]:
    """The record of one model."""
    torch.manual_seed(0)
    model = dpt.build(name, weights="pretrained" if trained else None, dtype=torch.float32, device="cpu")
    config = model.config
    if not trained:
        randomise(model)
        config = config.with_("input", size=(PATCHES * config.encoder.patch_size,) * 2)
    x = torch.cat([preprocess(load_image(path), config.input)[0] for path in PICTURES])
    with torch.inference_mode():
        with watched(model) as (exact, largest, _):
            map_ = model(x)
        where = max(largest, key=lambda path: largest[path])
        record: dict[str, Any] = {
            "name": name,
            "weights": "trained" if trained else "random",
            "task": config.head.task,
            "input": list(x.shape),
            "largest": {"module": where, "value": rounded(largest[where])},
            "stages": {stage: {"largest": rounded(value.abs().max())} for stage, value in exact.items()},
            "rounded": {part: {} for part in ("nothing else", *ROUNDED)},
            "last layer": {"float32": {}, "half": {}},
        }
        if config.head.task == "depth":
            record["values"] = max(len(picture.unique()) for picture in map_)
        for dtype, half in HALVES.items():
            low, seen = copy.deepcopy(model).to(half), x.to(half)
            with watched(low) as (outputs, _, last):
                found = low(seen)
            for stage, value in outputs.items():
                record["stages"][stage][dtype] = errors(value, exact[stage])
            record["rounded"]["nothing else"][dtype] = errors(found.float(), map_)
            for part, functions in ROUNDED.items():
                with Instead(functions):
                    record["rounded"][part][dtype] = errors(low(seen).float(), map_)
            for kind, classes in (("float32", KINDS.values()), ("half", KINDS)):
                for layer in last.values():
                    layer.__class__ = next(own for own in classes if issubclass(own, nn.Conv2d) == isinstance(layer, nn.Conv2d))
                record["last layer"][kind][dtype] = compared(model, low(seen), map_)
    return record


def measured(names: Sequence[str]) -> dict[str, Any]:
    models = []
    for name in names:
        print(name, flush=True)
        models.append(audit(name, AUDITED[name]))
    pictures = [path.name for path in PICTURES]
    return {"torch": torch.__version__, "machine": platform.machine(), "pictures": pictures, "models": models}


def main(arguments: list[str] | None = None) -> int:
    return recorded.run(sys.modules[__name__], page, measured, AUDITED, arguments)


if __name__ == "__main__":
    sys.exit(main())

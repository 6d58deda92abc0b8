"""What is traced of a model: its inputs and outputs by name, which of their sides are open, and pictures of any size to try it with."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DPTConfig, HeadConfig
from ..inference.images import load_image
from .failures import ExportError, quiet, untraced
from .processing import FIELDS, Processed, nominal_size, refusal

PICTURES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))
LEAST = 3  # patches of a side that is left open: of one or two PyTorch makes rules of their own
EXAMPLE, FURTHER = (5, 3), ((6, 9), (11, 7))  # rows and columns of patches: what is traced with, and what is tried beside the nominal size
NETWORK_OUTPUTS = {"depth": "depth", "segmentation": "logits", "normals": "normals"}  # by task
UNITS = {"labels": "index of the class", "logits": "logits of the classes", "normals": "x, y, z", "depth": "depth"}


@dataclass(frozen=True)
class Open:
    """A side that is left open: a multiple of a named number, which is `least` or more."""

    name: str
    multiple: int = 1
    least: int = 1

    def __str__(self) -> str:
        return self.name if self.multiple == 1 else f"{self.multiple}*{self.name}"


@dataclass(frozen=True)
class Entry:
    """An input: its name, its sides, and what it holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | Open, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')} ({', '.join(map(str, self.shape))}), {self.what}"


@dataclass(frozen=True)
class Graph:
    """What is to be exported.

    Attributes:
        module: what is traced.
        outputs: their names, in the order in which they come; `units`: what each holds.
        size: height and width of the network's input, where it is not open.
        processing: whether pictures go in as they are.
    """

    module: nn.Module
    config: DPTConfig
    inputs: tuple[Entry, ...]
    outputs: tuple[str, ...]
    units: tuple[str, ...]
    size: tuple[int, int] | None
    processing: bool

    @classmethod
    def of(cls, model: nn.Module, size: tuple[int, int] | None, processing: bool) -> Graph:
        """Of a `dpt.DPT`. ValueError for a size that it does not take, ExportError for processing that no graph holds."""
        config, dtype = cast(DPTConfig, model.config), next(model.parameters()).dtype
        fixed = size or config.encoder.fixed_size or (nominal_size(config) if processing else None)
        if fixed is not None:
            _check_size(config, fixed, padded=processing and config.input.pad != "none")
        batch, patch = Open("batch"), config.encoder.patch_size
        if processing:
            why = refusal(config)
            if why is not None:
                raise ExportError(f"its processing cannot be in the graph: {why}")
            image = Entry("image", torch.uint8, (batch, Open("height", least=LEAST), Open("width", least=LEAST), 3), "RGB")
        else:
            sides = fixed or (Open("rows", patch, LEAST), Open("columns", patch, LEAST))
            mean, std = (", ".join(f"{value:g}" for value in values) for values in (config.input.mean, config.input.std))
            image = Entry("image", dtype, (batch, 3, *sides), f"RGB from 0 to 1, less ({mean}), over ({std})")
        inputs = [image]
        if config.decoder.prompt:
            sides = (Open("prompt_height", least=LEAST), Open("prompt_width", least=LEAST))
            inputs.append(Entry("prompt", torch.float32, (batch, *sides), "a sensor's metres"))
        if processing and config.head.focal is not None:
            inputs.append(Entry("focal", torch.float32, (batch,), "focal length in pixels of the picture"))
        names = tuple((FIELDS if processing else NETWORK_OUTPUTS)[head.task] for head in config.heads)
        units = tuple(_unit(name, head) for name, head in zip(names, config.heads, strict=True))
        module = Processed(model, cast("tuple[int, int]", fixed)).eval() if processing else model
        return cls(module, config, tuple(inputs), names, units, fixed, processing)

    def traced(self) -> torch.export.ExportedProgram:
        """The program of `torch.export`. ExportError names the line that it stops at."""
        sides = {open.name: open for entry in self.inputs for open in entry.shape if isinstance(open, Open)}
        dims = {name: torch.export.Dim(name, min=open.least) for name, open in sides.items()}
        shapes = tuple({at: open.multiple * dims[open.name] for at, open in _open(entry)} for entry in self.inputs)
        given = self.examples(self._example_size(), 2)
        if self.processing and len(shapes) > 1:  # those behind the first are *further
            shapes = cast(Any, (shapes[0], shapes[1:]))
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(self.module, given, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # exporters raise whatever the model's own code leads them to
            raise untraced(self.module, error) from error

    def _example_size(self) -> tuple[int, int]:
        if self.processing:
            return 75, 58
        return self.size or _times(EXAMPLE, self.config.encoder.patch_size)

    def trials(self) -> list[tuple[tuple[int, int], int]]:
        """Three sizes of pictures, the nominal one first, with a batch each; of a network of one size that one."""
        height, width = self.size or rounded_size(nominal_size(self.config), self.config.encoder.patch_size)
        if self.processing:
            return [((height, width), 1), ((height * 3 // 4 + 1, width + 13), 2), ((101, 67), 1)]
        if self.size is not None:
            return [(self.size, 1), (self.size, 2)]
        further = [_times(sides, self.config.encoder.patch_size) for sides in FURTHER]
        return [((height, width), 1), (further[0], 2), (further[1], 1)]

    def examples(self, size: tuple[int, int], batch: int) -> tuple[Tensor, ...]:
        """Inputs: the pictures that come with the package, at a size."""
        device = next(self.module.parameters()).device
        pictures = torch.cat([_picture(index % len(PICTURES), size) for index in range(batch)])  # (B, 3, H, W), 0..255
        values = {"focal": torch.linspace(0.9, 1.1, batch) * size[1], "prompt": _prompt(pictures)}
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (self.config.input.mean, self.config.input.std))
        values["image"] = pictures.permute(0, 2, 3, 1) if self.processing else (pictures / 255 - mean) / std
        return tuple(values[entry.name].to(device, entry.dtype).contiguous() for entry in self.inputs)

    def run(self, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The outputs by name, as PyTorch computes them."""
        with torch.inference_mode():
            return self.named(self.module(*given))

    def named(self, found: Any) -> dict[str, Tensor]:
        """What the module, or a program of it, gives, by name."""
        maps: Iterable[Tensor] = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else [found]
        return dict(zip(self.outputs, maps, strict=True))


def _open(entry: Entry) -> list[tuple[int, Open]]:
    return [(at, open) for at, open in enumerate(entry.shape) if isinstance(open, Open)]


def _times(sides: tuple[int, int], patch: int) -> tuple[int, int]:
    return sides[0] * patch, sides[1] * patch


def rounded_size(size: tuple[int, int], patch: int) -> tuple[int, int]:
    return max(round(size[0] / patch), LEAST) * patch, max(round(size[1] / patch), LEAST) * patch


def _check_size(config: DPTConfig, size: tuple[int, int], padded: bool) -> None:
    patch, fixed, told = config.encoder.patch_size, config.encoder.fixed_size, "x".join(map(str, size))
    if fixed is not None and tuple(size) != fixed:
        raise ValueError(f"size {told}: {config.name} sees {'x'.join(map(str, fixed))} alone")
    if min(size) < 1 or (not padded and any(side % patch for side in size)):
        raise ValueError(f"size {told} (height x width): both must be multiples of {patch}, the patch of {config.name}")


def _unit(name: str, head: HeadConfig) -> str:
    if name != "depth":
        return UNITS[name]
    if head.focal is not None:
        return f"metres times {head.focal:g} over the focal length in pixels of the input"
    return "metres" if head.metric else "inverse depth up to scale and shift" if head.inverse else "depth up to scale and shift"


@functools.lru_cache
def _pixels(index: int) -> Tensor:
    return torch.from_numpy(load_image(PICTURES[index]).copy()).permute(2, 0, 1)[None].float()


def _picture(index: int, size: tuple[int, int]) -> Tensor:
    return F.interpolate(_pixels(index), size=size, mode="bilinear", antialias=True).round()


def _prompt(pictures: Tensor) -> Tensor:
    """Metres (B, h, w) of another size than the pictures': the darker, the farther."""
    return 6 - F.interpolate(pictures.mean(1, keepdim=True), size=(23, 31), mode="bilinear", antialias=True)[:, 0] / 64

"""How predictions are asked for: the keywords of `predict`, and what they come to, checked against the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from ..config import DPTConfig, InputConfig
from .prompts import Prompt
from .resizing import network_size

TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # mmsegmentation's, each with and without a horizontal flip
PROMPT_OPTION = "give --prompt FILE (or prompt=)"


class Choices(TypedDict, total=False):
    """The keywords of `Options.of`, for those that hand them on."""

    tta: bool
    scales: Sequence[float] | None
    flip: bool | None
    slide: bool
    tiles: bool
    window: int | tuple[int, int] | None
    stride: int | tuple[int, int] | None
    probability: bool
    focal: float | None
    prompt: Prompt | Sequence[Prompt] | None


class PredictOptions(Choices, total=False):
    """The keywords of `predict`."""

    batch_size: int
    max_pixels: int
    graph: bool


@dataclass(frozen=True)
class Options:
    """How to predict, checked; made by `Options.of` from the keywords of `predict`."""

    scales: tuple[float, ...]
    flips: tuple[bool, ...]
    window: tuple[int, int] | None
    stride: tuple[int, int] | None
    probability: bool
    focal: float | None
    prompts: tuple[Prompt, ...] = ()
    tiles: bool = False  # the window and the stride are those of tiles, and the whole is seen without

    @classmethod
    def of(
        cls,
        config: DPTConfig,
        *,
        tta: bool = False,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
        slide: bool = False,
        tiles: bool = False,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        probability: bool = False,
        focal: float | None = None,
        prompt: Prompt | Sequence[Prompt] | None = None,
    ) -> Options:
        """ValueError for scales or a focal length that are not positive or not the model's, windows that do not fit it, strides that leave
        gaps."""
        chosen = tuple(scales) if scales is not None else TTA_SCALES if tta else (1.0,)
        if not chosen or not all(math.isfinite(scale) and scale > 0 for scale in chosen):
            raise ValueError(f"scales are positive numbers, at least one, not {chosen}")
        flips = (False, True) if (tta or config.input.flip if flip is None else flip) else (False,)
        tasks = [head.task for head in config.heads]
        if probability and "segmentation" not in tasks:
            raise ValueError(f"probability is of the winning class; {config.name} predicts {' and '.join(tasks)}")
        if focal is not None and not 0 < focal < math.inf:
            raise ValueError(f"focal={focal}: it must be a positive number, the focal length in pixels of the pictures")
        if focal is not None and config.head.focal is None:
            raise ValueError(f"focal={focal}: {config.name} takes no focal length")
        fixed = config.encoder.fixed_size
        if tiles and "depth" not in tasks:
            raise ValueError(f"tiles refine depth; {config.name} predicts {' and '.join(tasks)}")
        if tiles and (slide or chosen != (1.0,)):
            raise ValueError("tiles refine what the network sees of the whole, at one scale: no scales, tta or slide beside them")
        if fixed and (chosen != (1.0,) or slide or tiles or window is not None or stride is not None):
            size = "x".join(map(str, fixed))
            raise ValueError(f"{config.name} sees {size} pixels alone: no other scales, and no windows (the mirrored picture, by flip)")
        if config.decoder.prompt and prompt is None:
            raise ValueError(f"{config.name} needs a prompt, a sensor's depth: {PROMPT_OPTION}")
        if prompt is not None and not config.decoder.prompt:
            raise ValueError(f"{config.name} takes no prompt")
        if prompt is not None and (slide or tiles or window is not None or stride is not None):
            raise ValueError("a prompt is of the whole picture: it cannot be seen in windows")
        if not slide and not tiles and window is None and stride is None:
            prompts = () if prompt is None else tuple(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else (prompt,)
            return cls(chosen, flips, None, None, probability, focal, prompts)
        sides = _pair(min(config.input.size) if window is None else window, "window")
        usual = 1 / 2 if tiles else 2 / 3
        steps = _pair(tuple(max(int(side * usual), 1) for side in sides) if stride is None else stride, "stride")
        if any(side % config.input.multiple for side in sides):
            raise ValueError(f"the window's sides are multiples of {config.input.multiple}, not {sides}")
        if any(step > side for step, side in zip(steps, sides, strict=True)):
            raise ValueError(f"a stride of {steps} leaves gaps between windows of {sides}")
        return cls(chosen, flips, sides, steps, probability, focal, tiles=tiles)

    def ratios(self, height: int, width: int, config: InputConfig) -> tuple[float, ...]:
        """The scales at which a picture is shown to the network; behind them, with tiles, that at which it has its own pixels."""
        if not self.tiles:
            return self.scales
        seen = network_size(height, width, config)
        return *self.scales, max(height / seen[0], width / seen[1], 1.0)


def _pair(value: int | tuple[int, ...], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name} is a positive integer or two, height and width, not {value}")
    height, width = pair
    return height, width

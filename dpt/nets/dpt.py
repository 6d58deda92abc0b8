"""The Dense Prediction Transformer, stage by stage (Ranftl, Bochkovskiy, Koltun 2021, arXiv 2103.13413)."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import DecoderConfig, DPTConfig, EncoderConfig, TaskConfig
from .decoder import Fusion, Reassemble, ReassembleMap
from .encoders import ENCODERS
from .encoders.residual import ResidualBlock
from .heads import DepthHead, SegmentationHead, head_of
from .metric_bins import MetricBinsHead
from .prompt import normalised


def _reassemble(encoder: EncoderConfig, decoder: DecoderConfig) -> nn.ModuleList:
    """Of each level, shallow to deep."""
    stem = len(encoder.map_widths)
    return nn.ModuleList(ReassembleMap() if level < stem else Reassemble(encoder.embed_dim, level, decoder) for level in range(4))


class FurtherTask(nn.Module):
    """Reassemble, Fusion and head of another task on the same encoder's tokens."""

    def __init__(self, encoder: EncoderConfig, config: TaskConfig):
        super().__init__()
        self.reassemble = _reassemble(encoder, config.decoder)
        self.fusion = Fusion(config.decoder)
        self.head = head_of(config.decoder.features, config.head)

    def forward(self, tokens: list[Tensor], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        return self.head(self.fusion(reassemble(t, grid) for reassemble, t in zip(self.reassemble, tokens, strict=True)), size)


class DPTNetwork(nn.Module):
    """Encoder, Reassemble, Fusion, head, with random parameters of PyTorch's default dtype on its default device.

    Args:
        config: which model; `dpt.build` takes the named ones.
    """

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, prompt: Tensor | None = None) -> Tensor: ...

    def __init__(self, config: DPTConfig):
        super().__init__()
        self.config = config
        encoder, decoder = config.encoder, config.decoder
        with _Unfilled():
            self.encoder = ENCODERS[encoder.kind](encoder)
            self.reassemble = _reassemble(encoder, decoder)
            self.fusion = Fusion(decoder)
            self.head = (MetricBinsHead if config.head.attractors else head_of)(decoder.features, config.head)
            if config.head.auxiliary:
                self.auxiliary_head = SegmentationHead(decoder.features, config.head)
            if config.further:
                self.further = nn.ModuleDict({task.head.task: FurtherTask(encoder, task) for task in config.further})
        _initialise(self)
        if isinstance(self.head, DepthHead | MetricBinsHead):
            nn.init.ones_(self.get_parameter("head.conv3.bias"))  # a last ReLU that starts below zero gets no gradient and never leaves it

    def features(self, x: Tensor, deeper: int = 0) -> Tensor | tuple[Tensor, ...]:
        """Picture (B, 3, H, W) -> the fused map (B, F, H/2, W/2); with `deeper`, so many deeper ones behind it, as `Fusion` says."""
        return self._fused(self._tokens(x), self.encoder.grid(x), deeper)

    def _tokens(self, x: Tensor) -> list[Tensor]:
        """The encoder's, in the decoder's dtype."""
        tokens = self.encoder(x)
        return [t.to(self.get_parameter("fusion.convs.0.weight").dtype) for t in tokens] if self.config.decoder.float32 else tokens

    def _fused(
        self, tokens: list[Tensor], grid: tuple[int, int], deeper: int = 0, prompt: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        with self._behind_encoder(tokens[0]):
            maps = (reassemble(t, grid) for reassemble, t in zip(self.reassemble, tokens, strict=True))
            return self.fusion(maps, deeper, prompt)  # one map at a time: none is kept when its first convolution is done

    def _behind_encoder(self, x: Tensor) -> AbstractContextManager[object]:
        """Where the decoder and the head run: without autocast, where they stay in float32."""
        device = x.device.type
        float32 = self.config.decoder.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.autocast(device, enabled=False) if float32 else nullcontext()

    def cast(self, dtype: torch.dtype | None) -> None:
        """Bring the parameters into a dtype, in place; None leaves them. With `config.decoder.float32` those behind the encoder stay."""
        (self.encoder if self.config.decoder.float32 else self).to(dtype=dtype)

    def blocks(self) -> list[ResidualBlock]:
        """The encoder's, the first one first."""
        return [module for module in self.encoder.modules() if isinstance(module, ResidualBlock)]

    def set_drop_path(self, rate: float) -> None:
        """In training leave out the branches of the encoder's blocks by chance, for each picture anew: of the first block none, of the last
        with a probability of `rate`, between them in proportion. ValueError unless it is from 0, which drops none, to below 1."""
        if not 0 <= rate < 1:
            raise ValueError(f"drop path of {rate}: it must be from 0 to below 1")
        blocks = self.blocks()
        for index, block in enumerate(blocks):
            block.drop_path = rate * index / max(1, len(blocks) - 1)

    def set_checkpointing(self, on: bool) -> None:
        """In training keep nothing of the inside of the encoder's blocks for the backward and compute it again there: less memory, a second
        forward of the encoder, the same gradients."""
        for block in self.blocks():
            block.checkpointing = on

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Picture (B, 3, H, W), normalised as `config.input` says -> depth (B, H, W), logits (B, K, H, W) or normals (B, 3, H, W), not of
        unit length; of several tasks (`config.further`) a dictionary of these by task, from one pass through the encoder.

        Depth is inverse depth up to scale and shift where `config.head.inverse`, depth up to both where `relative`, metres over the focal
        length where `focal`, else metres; with `config.head.upsample`, or of kind "linear", maps (..., H', W') are of the head's own size.
        Depth and normals are float32 at least, logits in the parameters' dtype.
        H and W are multiples of the patch size; ValueError otherwise. `torch.export` takes B, H and W as open, with
        `patch * Dim(..., min=3)` for the sides: of one or two patches PyTorch makes rules of their own.

        With `config.decoder.prompt` a `prompt` (B, h, w) is needed, metres of any size, and no other model takes one: ValueError. The
        metres are then in the prompt's dtype.
        """
        if prompt is not None or self.config.decoder.prompt:
            return self._prompted(x, prompt)
        grid, size, head = self.encoder.grid(x), tuple(x.shape[2:]), cast(Any, self.head)
        tokens = self._tokens(x)
        fused = self._fused(tokens, grid, head.DEEPER)
        with self._behind_encoder(x):
            found = head(fused, size)
            if not self.config.further:
                return found
            return {self.config.head.task: found, **{name: task(tokens, grid, size) for name, task in self.further.items()}}

    def _prompted(self, x: Tensor, prompt: Tensor | None) -> Tensor:
        """What the head gives, from 0 to 1, between the nearest and the farthest of the prompt."""
        name = self.config.name
        if prompt is None:
            raise ValueError(f"{name} needs prompt=, a sensor's depth in metres (batch, height, width)")
        if not self.config.decoder.prompt:
            raise ValueError(f"{name} takes no prompt")
        if prompt.dim() != 3 or prompt.shape[0] != x.shape[0] or 0 in prompt.shape:
            raise ValueError(
                f"prompt of shape {tuple(prompt.shape)}: it must be (batch, height, width), of as many pictures as {x.shape[0]}"
            )
        prompt, near, apart = normalised(prompt)
        fused = self._fused(self._tokens(x), self.encoder.grid(x), prompt=prompt)
        with self._behind_encoder(x):
            found: Tensor = self.head(fused, tuple(x.shape[2:]))
        return near + apart * found.to(apart.dtype)

    def forward_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and with it the auxiliary head's logits (B, K, H, W), for training."""
        size = tuple(x.shape[2:])
        fused, deeper = self.features(x, deeper=1)
        return self.head(fused, size), self.auxiliary_head(deeper, size)


class _Unfilled(TorchFunctionMode):
    """Layers made within skip their own initialisation: `_initialise` gives each parameter its numbers, once."""

    FILLS = (Tensor.fill_, Tensor.zero_, Tensor.normal_, Tensor.uniform_)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self.FILLS or getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _initialise(model: nn.Module) -> None:
    """Fill every parameter and buffer; on the meta device, or of fake tensors, there is no memory to fill.

    Each module draws from a generator of its own, seeded from PyTorch's, so that threads share the work, of which DPT-Large has 340
    million numbers, and the numbers do not depend on them.
    """
    first = next(model.parameters())
    if first.is_meta or type(first) is not nn.Parameter:
        return
    modules, inference = list(model.modules()), torch.is_inference_mode_enabled()

    def fill(module: nn.Module, seed: int) -> None:
        with torch.inference_mode(inference):  # which each thread has for itself
            _fill(module, torch.Generator(first.device).manual_seed(seed))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        seeds = torch.randint(2**63 - 1, (len(modules),), device="cpu").tolist()
        list(pool.map(fill, modules, seeds))


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """A module's own tensors: ViT's initialisation of linear layers, class token and positional embedding, PyTorch's of convolutions, with
    biases of zero, and of norms.

    ViT's is a normal distribution of standard deviation 0.02 cut off at 2, which is at a hundred of them: it is not cut. TypeError for a
    module that is none of these and has tensors, which would stay as the memory was.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        else:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm):
        module.reset_parameters()
    elif hasattr(module, "reset_parameters") and not module.__module__.startswith("torch."):
        cast(Any, module).reset_parameters(generator)
    elif any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
        raise TypeError(f"{type(module).__name__} has tensors that no rule here initialises")

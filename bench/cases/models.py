"""Whole models as cases: random weights that leave nothing at its initial value, inputs, references, and the contenders' table."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dpt
from dpt.config import DPTConfig
from dpt.inference import graphs
from dpt.kernels.tools import parity
from dpt.zoo import LAYOUTS, CheckpointError, config_of, configs_in

from ..harness import measure, records
from ..harness.runner import Case, Context, Prepared, Unavailable
from ..harness.shrunk import shrunk
from . import peers

INPUTS = 3  # rotated, so that no run finds its input in a cache
NO_GRAPHS = "CUDA graphs need an NVIDIA GPU"


def find(name: str) -> str | None:
    """A model's name if `dpt.models()` has it; Depth Anything V2 also under its sizes' other spellings. None if it has not come yet."""
    spellings = [name]
    for size in ("small", "base", "large"):
        if name == f"depth-anything-v2-{size}":
            spellings += [f"depth-anything-v2-{size[0]}", f"depth-anything-v2-vit{size[0]}"]
    return next((spelling for spelling in spellings if spelling in dpt.models()), None)


def toy(config: DPTConfig) -> DPTConfig:
    """A named model shrunk to four blocks of width 64, with every part it had."""
    return shrunk(config, "toy", width=64, features=32, grid=4 if config.encoder.stage_depths else 3)  # stages halve their windows


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gains, biases and statistics away from one and zero, where a part that is dropped or mixed up would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or value.dim() > 1:
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(noise.abs() + 0.5)
        elif name.endswith("weight") or name.endswith("gamma") or value.numel() == 1:
            value.copy_(1 + 0.1 * noise)
        else:
            value.copy_(0.1 * noise)
    return model


@torch.no_grad()
def without_what_files_lack(model: nn.Module, config: DPTConfig) -> nn.Module:
    """Zeros where the layouts of the model's family have no tensor, such as a bias of keys, which other people's models then have not."""
    layouts = [layout for layout in LAYOUTS if config in configs_in(layout)]
    for (key, value), layout in itertools.product(model.state_dict().items(), layouts):
        with contextlib.suppress(CheckpointError):
            parts = layout.source(key)
            for part, chunk in zip(parts, value.chunk(len(parts)) if None in parts else (), strict=False):
                if part is None:
                    chunk.zero_()
    return model


def build(name: str, context: Context) -> nn.Module:
    """The model's float32 master on the context's device, at the toy size if that is what the context wants."""
    config = config_of(name)
    torch.manual_seed(0)
    model = dpt.build(toy(config) if context.toy else config)
    return without_what_files_lack(randomise(model), config).to(context.device)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are the original's own: no memory, and no difference."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def held_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters and buffers, what is shared within it counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(storages.values())


@functools.cache
def prompt_of(config: DPTConfig, batch: int, device: torch.device | str) -> tuple[torch.Tensor, ...]:
    """What a model takes beside pictures: a sensor's metres, the same for each, or nothing."""
    if not config.decoder.prompt:
        return ()
    return (torch.linspace(1, 5, 192 * 256, device=device).view(1, 192, 256).expand(batch, -1, -1).contiguous(),)


def first_of(found: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
    """A model's output; of several tasks the first one's, by which the model is judged."""
    return next(iter(found.values())) if isinstance(found, dict) else found


def count_flops(name: str, size: tuple[int, int], batch: int = 1, backward: bool = False) -> int:
    """The FLOPs of one run of the plain model, counted on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = dpt.build(name)
        x = torch.empty(batch, 3, *size)
    with FlopCounterMode(display=False) as counter:
        y = first_of(model(x, *prompt_of(model.config, batch, "meta")))
        if backward:
            y.backward(torch.empty_like(y))
    return counter.get_total_flops()


def report_note(model: nn.Module) -> str:
    """How an accelerated model runs: what `dpt.fast_report` says, in a few words."""
    rows = dpt.fast_report(model)
    fused = [row for row in rows if row.fused]
    kernels = sum("kernels" == row.how or row.how.startswith("kernels") for row in fused)
    how = f"{records.ALGEBRA}, no kernels on this device" if not kernels else f"{kernels} of {len(fused)} fused modules run kernels"
    plain = len(rows) - len(fused)
    return how + (f"; {plain} modules refused" if plain else "")


@dataclass(frozen=True)
class Sizes:
    """A model's input, (batch, height, width)."""

    batch: int
    height: int
    width: int


class OpenedModel:
    """Forward passes of one model.

    ``name``: a model of `dpt.models()`; ``sizes``: of its input; ``dtype``: of parameters and input. The toy size is four patches square.
    """

    unit = "images"
    bytes = None
    rms = False

    def __init__(self, name: str, sizes: Sizes, dtype: torch.dtype, context: Context):
        self.name, self.dtype, self.context = name, dtype, context
        self.master = build(name, context)
        if context.toy:
            side = 4 * self.master.config.encoder.patch_size
            sizes = Sizes(2, *(self.master.config.encoder.fixed_size or (side, side)))
        self.sizes = sizes
        generator = torch.Generator().manual_seed(1)
        shape = (sizes.batch, 3, sizes.height, sizes.width)
        self.pictures = [torch.randn(shape, generator=generator).to(context.device) for _ in range(INPUTS)]
        self.inputs = [picture.to(dtype) for picture in self.pictures]
        self.prompt = prompt_of(self.master.config, sizes.batch, context.device)
        self.plain = shared_copy(self.master) if dtype == torch.float32 else copy.deepcopy(self.master).to(dtype)
        self.per_run = float(sizes.batch)
        self.flops = None if context.toy else count_flops(name, (sizes.height, sizes.width)) * sizes.batch

    def exact(self) -> list[torch.Tensor]:
        """The first input's output, from the float32 parameters and pictures, picture by picture."""
        wide = parity.exact_dtype(self.dtype)
        key = ("exact", self.name, self.sizes, wide, self.context.toy)
        if key not in self.context.cache:
            model = (copy.deepcopy(self.master) if wide != torch.float32 else self.master).to(wide)
            with measure.full_precision(), torch.inference_mode():
                prompt = prompt_of(model.config, 1, self.context.device)
                parts = [first_of(model(picture[None].to(wide), *prompt)) for picture in self.pictures[0]]
            self.context.cache[key] = torch.cat(parts)
        return [self.context.cache[key]]

    def other_plain(self) -> None:
        """Its deviations are the encoder's as well: the one yardstick does."""

    def input(self, index: int) -> torch.Tensor:
        return self.inputs[index % len(self.inputs)]

    def prepare(self, contender: str) -> Prepared:
        return CONTENDERS[contender](self)


def run_of(opened: OpenedModel, model: Callable[[torch.Tensor], torch.Tensor]) -> measure.Run:
    """A contender's run: the model on the input of that index, without gradients."""

    @torch.inference_mode()
    def run(index: int) -> torch.Tensor:
        return first_of(model(opened.input(index), *opened.prompt))

    return run


def captured(model: Callable[[torch.Tensor], torch.Tensor], opened: OpenedModel) -> Prepared:
    """A contender that replays a CUDA graph of the model; copying the input into the graph's own is part of each run.

    The peak memory that counts is the capture's: a replay allocates nothing. Where nothing is recorded, as at the toy size, the first run
    captures.
    """
    device = opened.context.device
    if device.type != "cuda":
        raise Unavailable(NO_GRAPHS)
    with torch.inference_mode():
        static = opened.input(0).clone()
        on_side_stream(lambda: model(static, *opened.prompt), device)
    graph, made = torch.cuda.CUDAGraph(), []

    def capture() -> None:
        with torch.inference_mode(), torch.cuda.graph(graph):
            made.append(first_of(model(static, *opened.prompt)))

    @torch.inference_mode()
    def run(index: int) -> torch.Tensor:
        if not made:
            capture()
        static.copy_(opened.input(index))
        graph.replay()
        return made[0]

    return Prepared(run, recorded=capture, outputs=lambda: [run(0)])


def on_side_stream(call: Callable[[], object], device: torch.device, times: int = 3) -> None:
    """Warm-up before a capture: lazy initialisation must not fall into it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)


def compiled(model: Callable, context: Context) -> tuple[Callable, str]:
    """torch.compile as it is fastest on the device, and what to say of it.

    At the toy size a graph is traced but not turned into machine code, and only the first of a kind: the toy run may take a minute in all.
    """
    if context.toy:
        if context.cache.setdefault(("traced", type(model)), model) is not model:
            return model, "not traced again"
        return torch.compile(model, backend="eager", dynamic=False), "traced only"
    if context.device.type == "cuda":
        return torch.compile(model, mode="max-autotune", dynamic=False), "max-autotune"
    return torch.compile(model, dynamic=False), "default mode, not max-autotune, on a CPU"


def prepared_compiled(opened: OpenedModel, model: nn.Module) -> Prepared:
    """A contender under torch.compile. The second call on a GPU records its CUDA graph: that one's peak memory counts."""
    function, note = compiled(model, opened.context)
    plain_run = run_of(opened, function)

    def run(index: int) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return plain_run(index)

    return Prepared(run, held=lambda: held_bytes(model), warm_up=1, recorded=lambda: run(0), note=note)


def plain(opened: OpenedModel) -> Prepared:
    return Prepared(run_of(opened, opened.plain), held=lambda: held_bytes(opened.plain))


def fast(opened: OpenedModel) -> Prepared:
    model = dpt.accelerate(shared_copy(opened.plain))
    return Prepared(run_of(opened, model), held=lambda: held_bytes(model), note=report_note(model))


def fast_graph(opened: OpenedModel) -> Prepared:
    """As `dpt.graphed` runs it: what it looks at before a replay, and the copies in and out, are part of each run.

    The peak memory that counts is the capture's. A capture that failed is an error here, where `dpt.graphed` goes on without.
    """
    if opened.context.device.type != "cuda":
        raise Unavailable(NO_GRAPHS)
    model = dpt.accelerate(shared_copy(opened.plain))
    run, recorded = run_of(opened, dpt.graphed(model)), graphs.Graphs.of(model)

    def capture() -> None:
        recorded.forget()
        for _ in range(graphs.FIRST_SIGHTS):
            run(0)
        if len(recorded) != 1:
            raise RuntimeError("no CUDA graph could be captured, as a warning says")

    def outputs() -> list[torch.Tensor]:
        if not len(recorded):
            capture()
        return [run(0)]

    return Prepared(run, outputs, capture, held=lambda: held_bytes(model), note=report_note(model))


def plain_compiled(opened: OpenedModel) -> Prepared:
    return prepared_compiled(opened, shared_copy(opened.plain))


def transformers(opened: OpenedModel) -> Prepared:
    model = peers.transformers_model(opened.plain, (opened.sizes.height, opened.sizes.width))
    return Prepared(run_of(opened, model), held=lambda: held_bytes(model), note=peers.TRANSFORMERS_NOTE)


def transformers_compiled(opened: OpenedModel) -> Prepared:
    return prepared_compiled(opened, peers.transformers_model(opened.plain, (opened.sizes.height, opened.sizes.width)))


def mmsegmentation(opened: OpenedModel) -> Prepared:
    model = peers.mmsegmentation_model(opened.plain)
    return Prepared(run_of(opened, model), held=lambda: held_bytes(model), note=peers.MMSEGMENTATION_NOTE)


def by_library(load: Callable[[Path, int], Callable[..., torch.Tensor]]) -> Callable[[OpenedModel], Prepared]:
    """A contender that runs the plain model's ONNX export in a library for CPUs."""

    def prepare(opened: OpenedModel) -> Prepared:
        context, cache = opened.context, opened.context.cache
        if context.device.type != "cpu" or opened.dtype != torch.float32:
            raise Unavailable("compared on a CPU in float32")
        if context.toy and cache.setdefault("exported", opened.name) != opened.name:
            raise Unavailable("exported once at the toy size, of another model")
        inputs = (opened.input(0), *opened.prompt)
        with tempfile.TemporaryDirectory() as folder:
            session = load(peers.exported(opened.plain, inputs, Path(folder)), torch.get_num_threads())

        def run(index: int) -> torch.Tensor:
            return session(opened.input(index), *opened.prompt)

        return Prepared(run, unseen=True, note="the plain model, exported to ONNX")

    return prepare


# In order of importance; the first is the baseline.
CONTENDERS: dict[str, Callable[[OpenedModel], Prepared]] = {
    "plain": plain,
    "fast": fast,
    "fast, CUDA graph": fast_graph,
    "plain, torch.compile": plain_compiled,
    "transformers": transformers,
    "ONNX Runtime": by_library(peers.onnxruntime_session),
    "OpenVINO": by_library(peers.openvino_model),
    "mmsegmentation": mmsegmentation,
    "transformers, torch.compile": transformers_compiled,
}


# Batch 1 is what a picture takes, batch 16 what a GPU can do; what lies between is the least telling.
BATCH_IMPORTANCE = {1: 0.0, 16: 3.0, 4: 6.0}


@dataclass(frozen=True)
class ModelRow:
    """A line of a suite's table: a model, the side of its square input, the batches, and how important it is (lower comes first)."""

    model: str
    side: int
    batches: tuple[int, ...]
    importance: float


def cases(
    rows: Iterable[ModelRow], suite: str, contenders: Iterable[str], dtypes: Iterable[torch.dtype], kind: type, cost: float = 1.0
) -> list[Case]:
    """The cases of a table of models, one for each batch and dtype. ``kind``: what opens them. ``cost``: of a run, in forward passes."""
    found = []
    for row in rows:
        name = find(row.model)
        for batch in row.batches:
            sizes = Sizes(batch, row.side, row.side)
            for dtype in dtypes:
                found.append(
                    Case(
                        suite=suite,
                        name=f"{row.model} {row.side}x{row.side}, batch {batch}, {str(dtype).removeprefix('torch.')}",
                        dtype=dtype,
                        shape=(batch, 3, row.side, row.side),
                        contenders=tuple(contenders),
                        open=lambda context, name=name, sizes=sizes, dtype=dtype: kind(name, sizes, dtype, context),
                        importance=row.importance + BATCH_IMPORTANCE.get(batch, 0.0),
                        estimate=lambda name=name, sizes=sizes: cost * sizes.batch * count_flops(name, (sizes.height, sizes.width)),
                        unavailable=None if name else f"dpt.models() has no {row.model} yet",
                        key=f"{row.model} {dtype}",
                        facts={"model": row.model, "batch": batch},
                    )
                )
    return found

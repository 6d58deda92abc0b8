"""Pictures to predictions at each picture's own size: batches, test-time augmentation, sliding windows.

Several maps of one picture (scales, flips, windows) are merged, labels as mmsegmentation does: softmax averaged over scales
and flips, logits averaged where windows overlap. Relative depth has a scale and shift of its own in every map, so each is
first aligned to the picture's plain map by least squares, and then averaged, as inverse depth; metres are averaged as they
are. Normals are averaged, and made of unit length again.
"""

from __future__ import annotations

import itertools
import math
import operator
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DPTConfig, HeadConfig, InputConfig
from ..evaluation.alignment import align
from ..system.endings import out_of_memory
from ..system.forks import held_over_forks, in_forked
from .drawing import Ends, drawn
from .finite import Watch, error_of
from .graphs import Graphed, ungraphed
from .images import MAX_PIXELS, ImageError, NoFocalLength, Picture, Pictures, load, name_of
from .options import Choices, Options, PredictOptions
from .prompts import Prompt, load_prompt
from .reading import Place, Window
from .resizing import labels_from_logits, network_size, postprocess, resize_and_normalise, resized_strips
from .transfer import Fetched, is_staged, to_device
from .windows import Maps, Network, infer, refine

if TYPE_CHECKING:
    from typing_extensions import Unpack

MERGE_PIXELS = 1 << 21  # pictures up to this size average their class probabilities at their own size
FOCAL_OPTION = "give --focal (or focal=), in pixels"

# Modules that predictions took out of training mode, and the threads of those predictions that still run.
_evaluating_now: dict[nn.Module, list[int]] = {}
_evaluating_lock = held_over_forks(threading.Lock())


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one picture; of `depth`, `labels` and `normals` those are None that are none of its tasks.

    Attributes:
        depth: float32 (H, W): metres where the head is `metric`; else inverse depth up to scale and shift where its `inverse`, or depth up
            to both.
        labels: (H, W), index into the head's `classes`; uint8, or int16 beyond 256 classes.
        probability: float32 (H, W), the softmax of the winning class, if asked for.
        source: the picture's path, if it came from a file.
        normals: float32 (H, W, 3): unit vectors, as the model was taught their axes: x along the picture's rows.
    """

    depth: np.ndarray | None = None
    labels: np.ndarray | None = None
    probability: np.ndarray | None = None
    source: str | None = None
    normals: np.ndarray | None = None

    def of(self, task: str) -> np.ndarray:
        """The map of a task, "depth", "segmentation" or "normals", which is one of the model's."""
        return cast(np.ndarray, {"depth": self.depth, "segmentation": self.labels, "normals": self.normals}[task])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, the picture's."""
        height, width = next(found for found in (self.depth, self.labels, self.normals) if found is not None).shape[:2]
        return height, width


@dataclass(frozen=True, eq=False)
class Result:
    """One picture of `predict_iter`: either `prediction` and the decoded `image`, uint8 (H, W, 3), or an `error`.

    `focal`: in pixels of the picture, what was given or its file tells. `prompt`: the metres (h, w) that were given for it. `drawn`: by
    task, where a GPU was asked to draw, `dpt.inference.drawing.drawn` of its map. `deep`: of a picture of more than 8 bits what the network
    saw, uint16 or float32 in 0..1, (H, W, 3), of which `image` is the 8 bits.
    """

    source: Any
    image: np.ndarray | None = None
    prediction: Prediction | None = None
    error: Exception | None = None
    focal: float | None = None
    prompt: np.ndarray | None = None
    drawn: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    deep: np.ndarray | None = None


@dataclass(frozen=True)
class Beside:
    """What a program may want beside predictions.

    `drawn`: maps are drawn for files (`Result.drawn`) where the device does so while the host goes on, depth between `ends` where they are
    given. `clock`: entered around each run of the network, on its stream.
    """

    drawn: bool = False
    ends: Ends = None
    clock: AbstractContextManager[object] = field(default_factory=nullcontext)


@overload  # a path of text is one picture, though text is an iterable of text
def predict(  # type: ignore[overload-overlap]
    model: Network, images: Picture, **options: Unpack[PredictOptions]
) -> Prediction: ...


@overload
def predict(model: Network, images: Pictures, **options: Unpack[PredictOptions]) -> list[Prediction]: ...


def predict(model: Network, images: Any, *, batch_size: int = 1, **options: Any) -> Prediction | list[Prediction]:
    """One picture -> its `Prediction`; an iterable of pictures -> a list in its order.

    Args:
        model: a `dpt.DPT`. It runs in evaluation mode; modules in training mode are put back into it afterwards. Several threads may
            predict with one model. So may a process forked from this one, on a CPU, with one of PyTorch's threads; on a GPU one that was
            spawned.
        images: what `dpt.inference.images.load_image` takes, or an iterable of such.
        batch_size: pictures whose network sizes are equal run together, so many at a time; memory grows with it. A batch for which there
            are too few is filled up, and costs as much as a whole one: the number of pictures in a batch decides how sums are rounded, and
            so nobody's result depends on what other pictures there are.
        max_pixels: a file whose picture has more is refused; of memory, several times as many bytes are needed.
        graph: replay one CUDA graph for each form of input that comes again (`dpt.graphed`); it matters on CUDA alone.
        tta: mmsegmentation's scales, `TTA_SCALES`, and flip.
        scales, flip: either of them chosen freely; network sizes are multiplied by the scales. By default pictures are flipped too where
            `config.input.flip` says so.
        slide: run in overlapping windows of the resized picture, and merge the overlaps (depth runs on the whole, too); implied by
            `window` and `stride`, in pixels of the network's input, an integer or (height, width). A window is by default
            the network's size and a stride two thirds of it (512 and 341 for dpt-base-ade20k); the last window of a
            row or column is shifted inside the picture.
        tiles: refine depth by overlapping tiles of the picture at its own size, each aligned to the map of the whole: finer edges, for as
            many times the work as there are tiles. `window` and `stride` are then theirs, a stride by default half a tile. A picture that
            is not larger than what the network sees gets the map of the whole; tasks beside depth stay the whole's.
        probability: keep the winning class's probability as well.
        focal: the focal length of all the pictures, in their own pixels, for models whose metres depend on it (`config.head.focal`). By
            default each picture's EXIF data tell it; one without it is a `NoFocalLength`, an ImageError.
        prompt: a sensor's depth, of models that need one (`config.decoder.prompt`): what `dpt.inference.prompts.load_prompt` takes, metres
            of any size or a file; of several pictures a list, one for each.

    Raises:
        ImageError, TypeError: a picture that cannot be used; `dpt.inference.finite.NotFinite`, a FloatingPointError: one whose map is not
            finite, with the stage that made it so. `predict_iter` goes on instead. ValueError: an option.
    """
    if isinstance(images, str | np.ndarray | Tensor) or not isinstance(images, Iterable) or hasattr(images, "read"):
        one: list[Any] = [images]
        return predict(model, one, batch_size=batch_size, **options)[0]
    predictions = []
    for result in predict_iter(model, images, batch_size=batch_size, **options):
        if result.error is not None:
            raise result.error
        predictions.append(cast(Prediction, result.prediction))
    return predictions


def predict_iter(
    model: Network,
    images: Iterable[Picture],
    beside: Beside = Beside(),  # noqa: B008
    /,
    *,
    batch_size: int = 1,
    max_pixels: int = MAX_PIXELS,
    graph: bool = True,
    **options: Unpack[Choices],
) -> Generator[Result, None, None]:
    """As `predict`, one `Result` at a time, in order; a bad picture, a map that is not finite, or memory running out, is its `error`.

    Pictures are read ahead in threads, and each batch is made of those of the next four batches that fit it (`reading.LOOK_AHEAD`). So many
    pictures are held at most, read or predicted: a list of any length needs no more memory. A GPU predicts one batch while the next is
    queued: results come one batch late.
    """
    chosen = Options.of(model.config, **options)
    if chosen.prompts and isinstance(images, Sized) and len(images) != len(chosen.prompts):
        raise ValueError(f"{len(chosen.prompts)} prompts for {len(images)} pictures: give one for each")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is a positive integer, not {batch_size!r}")
    return _results(cast(Network, Graphed(model)) if graph else model, images, batch_size, max_pixels, chosen, beside)


def _results(
    model: Network, images: Iterable[Picture], batch_size: int, max_pixels: int, options: Options, beside: Beside
) -> Generator[Result, None, None]:
    late = 1 if is_staged(next(model.parameters()).device) else 0  # batches that may be in work while the next one is queued
    pairs = zip(images, itertools.chain(options.prompts, itertools.repeat(None)), strict=False)
    window = Window(pairs, partial(_read, model.config, options, max_pixels), batch_size)
    in_work: deque[Callable[[], None]] = deque()
    try:
        while (batch := window.next_batch()) is not None:
            if batch:
                in_work.append(_queued(model, batch, batch_size, options, beside))
            while len(in_work) > (late if batch else 0):
                in_work.popleft()()
            del batch
            yield from window.finished()
    finally:
        window.close()


def _read(config: DPTConfig, options: Options, max_pixels: int, pair: tuple[Picture, Prompt | None]) -> tuple[Result, Hashable]:
    """A picture, decoded, and what decides its form in the network, by which it is batched: None where there is an error."""
    source, prompt = pair
    try:
        loaded = load(source, max_pixels)
    except (ImageError, TypeError) as error:
        return Result(source, error=error), None
    result = Result(source, loaded.image, focal=loaded.focal if options.focal is None else options.focal, deep=loaded.deep)
    try:
        if config.head.focal is not None and result.focal is None:
            raise NoFocalLength(f"{config.name} needs the focal length, and the picture does not tell it: {FOCAL_OPTION}")
        height, width = loaded.image.shape[:2]
        sizes = tuple(network_size(height, width, config.input, ratio) for ratio in options.ratios(height, width, config.input))
        if not options.prompts:
            return result, sizes
        if prompt is None:
            raise ImageError("there are fewer prompts than pictures: give one for each")
        metres = load_prompt(prompt)
        return replace(result, prompt=metres), (sizes, metres.shape)
    except ImageError as error:
        return Result(source, error=type(error)(f"{name_of(source)}: {error}")), None


def _queued(model: Network, batch: list[tuple[Place[Result], Result]], count: int, options: Options, beside: Beside) -> Callable[[], None]:
    """Have pictures of equal network sizes predicted in one batch of `count`. What is returned waits for the results and puts them into
    their places."""
    places, loaded = [place for place, _ in batch], [result for _, result in batch]
    try:
        with _evaluating(model), torch.inference_mode():
            fetched = Fetched(_found(model, loaded, count, options, beside))
    except (RuntimeError, MemoryError) as error:
        failed = _without_memory(loaded, error)
        return lambda: _finish(places, failed)
    return lambda: _finish(places, _predicted(model, loaded, options, fetched))


def _finish(places: list[Place[Result]], results: list[Result]) -> None:
    for place, result in zip(places, results, strict=True):
        place.finish(result)


def _without_memory(loaded: list[Result], error: Exception) -> list[Result]:
    """The results where memory ran out; another error is raised."""
    if not out_of_memory(error):
        raise error
    advice = "memory ran out; a smaller batch size, smaller scales or windows need less"
    return [Result(result.source, error=MemoryError(f"{name_of(result.source)}: {advice}")) for result in loaded]


Found = dict[tuple[int, str | None, str], Tensor]  # by picture, by task what was drawn, and by None the fields of its `Prediction`
NOT_FINITE = (-1, None, "")  # of a batch: whether a map of each of its pictures is not finite


def _found(model: Network, loaded: list[Result], count: int, options: Options, beside: Beside) -> Found:
    """All that is wanted of a batch's pictures, on the model's device."""
    device, images = next(model.parameters()).device, _images(loaded, model)
    found, watch = Found(), Watch()
    for head, views in zip(model.config.heads, _views(model, images, loaded, count, options, beside.clock, watch), strict=True):
        for index, fields in enumerate(READERS_OF[head.task](model, head, loaded, views, options)):
            found |= {(index, None, name): value for name, value in fields.items()}
            if beside.drawn and is_staged(device):
                shown = images[index] if loaded[index].deep is None else _on_device(loaded[index].image, device)
                made = drawn(next(iter(fields.values())), shown, head, beside.ends)
                found |= {(index, head.task, what): value for what, value in made.items()}
    return {**found, NOT_FINITE: watch.not_finite()}


def _images(loaded: list[Result], model: Network) -> list[Tensor]:
    """The pictures, (H, W, 3), uint8 or with all the bits that they have, on the model's device."""
    device = next(model.parameters()).device
    return [_on_device(result.image if result.deep is None else result.deep, device) for result in loaded]


def _on_device(image: np.ndarray | None, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(image)), device)


def _predicted(model: Network, loaded: list[Result], options: Options, fetched: Fetched[tuple[int, str | None, str]]) -> list[Result]:
    try:
        arrays = fetched.arrays()
    except (RuntimeError, MemoryError) as error:
        return _without_memory(loaded, error)
    results, not_finite = [], arrays.pop(NOT_FINITE)
    for index, result in enumerate(loaded):
        if not_finite[index]:
            results.append(_not_finite(model, result, options))
            continue
        of: dict[str | None, dict[str, np.ndarray]] = {None: {}}
        for (_, task, name), array in ((key, array) for key, array in arrays.items() if key[0] == index):
            of.setdefault(task, {})[name] = array
        source = str(result.source) if _is_path(result.source) else None
        prediction = Prediction(**cast(Any, of.pop(None)), source=source)
        results.append(replace(result, prediction=prediction, drawn=cast("dict[str, dict[str, np.ndarray]]", of)))
    return results


def _not_finite(model: Network, result: Result, options: Options) -> Result:
    """The error of a picture whose map is not finite, for which it goes through the network again."""

    def again(network: Network) -> Iterator[Maps]:
        return _passes(network, _images([result], network), [result], 1, options, nullcontext())

    with _evaluating(model), torch.inference_mode():
        return Result(result.source, error=error_of(ungraphed(model), name_of(result.source), again))


def _is_path(source: Any) -> bool:
    return isinstance(source, str) or hasattr(source, "__fspath__")


@contextmanager
def _evaluating(model: Network) -> Iterator[None]:
    """Evaluation mode; each module that was training is put back, and none that was not (frozen batch norms), as soon as no other thread
    predicts with it."""
    own = threading.get_ident()
    with _evaluating_lock:
        training = [module for module in model.modules() if module.training or module in _evaluating_now]
        for module in training:
            _evaluating_now.setdefault(module, []).append(own)
            module.training = False
    try:
        yield
    finally:
        with _evaluating_lock:
            for module in training:
                _evaluating_now[module].remove(own)
                _put_back(module)


def _put_back(module: nn.Module) -> None:
    if not _evaluating_now[module]:
        del _evaluating_now[module]
        module.training = True


@in_forked
def _end_those_of_others() -> None:
    """Of the threads that predicted, a forked process has the one that forked."""
    for module, threads in list(_evaluating_now.items()):
        threads[:] = [thread for thread in threads if thread == threading.get_ident()]
        _put_back(module)


Fields = dict[str, Tensor]  # of a Prediction, the map first


def _depths(model: Network, head: HeadConfig, loaded: list[Result], views: Iterator[Tensor], options: Options) -> list[Fields]:
    config = model.config.input
    images = [cast(np.ndarray, result.image) for result in loaded]
    first: list[Tensor] = []
    sums: list[Tensor] = []
    for number, maps in enumerate(views, 1):
        depths = [postprocess(y[0], y.shape[1:], image.shape[:2], config) for y, image in zip(maps, images, strict=True)]
        if head.focal is not None:
            focals = (_focal_in_network(result, maps.shape[2:]) for result in loaded)
            depths = [depth * (focal / head.focal) for depth, focal in zip(depths, focals, strict=True)]
        if number == 1:
            first = sums = depths
            continue
        aligned = depths if head.metric else map(align, depths, first)
        sums = [total + depth for total, depth in zip(sums, aligned, strict=True)]
    return [{"depth": total if number == 1 else total / number} for total in sums]


def _focal_in_network(result: Result, size: Sequence[int]) -> float:
    """The focal length in pixels of the network's input, the mean of both sides'."""
    height, width = cast(np.ndarray, result.image).shape[:2]
    scale: float = (size[0] / height + size[1] / width) / 2
    return cast(float, result.focal) * scale


def _normals(model: Network, head: HeadConfig, loaded: list[Result], views: Iterator[Tensor], options: Options) -> list[Fields]:
    sums: list[Any] = [0] * len(loaded)
    for maps in views:
        for index, (y, result) in enumerate(zip(F.normalize(maps.float(), dim=1), loaded, strict=True)):
            sums[index] = sums[index] + postprocess(y, y.shape[1:], cast(np.ndarray, result.image).shape[:2], model.config.input)
    return [{"normals": F.normalize(total, dim=0).permute(1, 2, 0)} for total in sums]


def _labels(model: Network, head: HeadConfig, loaded: list[Result], views: Iterator[Tensor], options: Options) -> list[Fields]:
    config, images = model.config.input, [cast(np.ndarray, result.image) for result in loaded]
    module = model.head if head is model.config.head else cast(Any, model).further[head.task].head
    if len(options.scales) * len(options.flips) == 1:
        logits: Iterable[Tensor] = next(views)
    else:
        logits = _mean_log_probabilities(images, views, config)
    found: list[Fields] = []
    for maps, image in zip(logits, images, strict=True):
        labels, probability = decided_labels(module, maps, image.shape[:2], config, options.probability)
        found.append({"labels": labels} if probability is None else {"labels": labels, "probability": probability})
    return found


READERS_OF = {"depth": _depths, "segmentation": _labels, "normals": _normals}  # by task, what makes a prediction of all views


def decided_labels(
    head: nn.Module, logits: Tensor, size: tuple[int, int], config: InputConfig, probability: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`labels_from_logits`, unless the head has a fused form of it that runs here (`dpt.fast`)."""
    fused = getattr(head, "fused_labels", None)
    found = fused and fused(logits, size, config.output_mode, config.output_align_corners, probability)
    return labels_from_logits(logits, size, config, probability) if found is None else found


def _mean_log_probabilities(images: list[np.ndarray], views: Iterator[Tensor], config: InputConfig) -> list[Tensor]:
    """The logarithm of the mean softmax per picture, (K, H, W): logits again, whose softmax is that mean.

    As mmsegmentation, softmax and mean are taken at the picture's size, unless that has more than MERGE_PIXELS, whose K
    maps would not fit: then at the size of the first view.
    """
    sums: list[Tensor] = []
    for number, maps in enumerate(views, 1):
        if number == 1:
            own = [image.shape[:2] for image in images]
            sizes = [size if math.prod(size) <= MERGE_PIXELS else tuple(maps.shape[2:]) for size in own]
            sums = [torch.zeros(maps.shape[1], *size, device=maps.device) for size in sizes]
        for total, logits in zip(sums, maps, strict=True):
            for rows, strip in resized_strips(logits, (total.shape[1], total.shape[2]), config):
                total[:, rows] += strip.softmax(0)
    return [(total / number).clamp_min_(torch.finfo(total.dtype).tiny).log_() for total in sums]


def _views(
    model: Network,
    images: list[Tensor],
    loaded: list[Result],
    count: int,
    options: Options,
    clock: AbstractContextManager[object],
    watch: Watch,
) -> tuple[Iterator[Tensor], ...]:
    """Of each task, its maps (B, K, h, w), depth with K = 1, one tensor per scale and flip: the scale nearest to 1 first, flips undone, no
    padding. All come from the same passes through the network."""
    tasks = [head.task for head in model.config.heads]
    passes = itertools.tee(watch.over(_passes(model, images, loaded, count, options, clock)), len(tasks))
    return tuple(map(operator.itemgetter(task), each) for task, each in zip(tasks, passes, strict=True))


def _passes(
    model: Network,
    images: list[Tensor],
    loaded: list[Result],
    count: int,
    options: Options,
    clock: AbstractContextManager[object],
) -> Iterator[Maps]:
    parameter = next(model.parameters())
    prompt: Any = None
    if options.prompts:
        metres = torch.from_numpy(np.stack([cast(np.ndarray, result.prompt) for result in loaded]))
        prompt = _filled(to_device(metres, parameter.device), count)

    def at(scale: float | None) -> Tensor:
        """The pictures at a scale; at None as finely as tiles see them."""
        ratios = [options.ratios(image.shape[0], image.shape[1], model.config.input)[-1] if scale is None else scale for image in images]
        how = model.config.input, parameter.device, parameter.dtype
        return _filled(torch.cat([resize_and_normalise(image, *how, ratio) for image, ratio in zip(images, ratios, strict=True)]), count)

    for scale in sorted(options.scales, key=lambda scale: abs(math.log(scale))):
        x, fine = at(scale), at(None) if options.tiles else None
        for flip in options.flips:
            shown = (x, prompt) if not flip else (x.flip(-1), None if prompt is None else prompt.flip(-1))
            with clock:
                maps = infer(model, shown[0], *((None, None) if options.tiles else (options.window, options.stride)), shown[1])
                if fine is not None and fine.shape != x.shape:
                    maps["depth"] = _refined(model, maps["depth"], x.shape, fine.flip(-1) if flip else fine, options)
            maps = {task: y[: len(images)] for task, y in maps.items()}
            yield {task: _unflipped(task, y) for task, y in maps.items()} if flip else maps


def _refined(model: Network, whole: Tensor, seen: Sequence[int], fine: Tensor, options: Options) -> Tensor:
    """Depth of the whole, which was seen as (B, 3, h, w), refined by tiles of a finer picture."""
    if model.config.head.focal is not None:  # its metres are of a focal length in pixels, of which a finer picture has more
        whole = whole * ((seen[2] / fine.shape[2] + seen[3] / fine.shape[3]) / 2)
    return refine(model, fine, whole, *cast("tuple[tuple[int, int], tuple[int, int]]", (options.window, options.stride)))


def _filled(batch: Tensor, count: int) -> Tensor:
    """(B, ...) with the last repeated up to `count`.

    What a picture is given in a batch depends on the batch's number, by which libraries choose how to sum, and not on its place in it or
    who else is there: a CPU's maps of batches of one and of eight differ by 5e-7 of the largest value. All batches of one number are also
    all replays of one CUDA graph.
    """
    return torch.cat([batch, batch[-1:].expand(count - len(batch), *batch.shape[1:])]) if len(batch) < count else batch


def _unflipped(task: str, maps: Tensor) -> Tensor:
    """Maps of mirrored pictures, mirrored back; normals point the other way along the rows."""
    maps = maps.flip(-1)
    return torch.cat((-maps[:, :1], maps[:, 1:]), 1) if task == "normals" else maps

"""Pictures as cases: files decoded, predicted and written into a temporary folder as `dpt predict` does, and beside it the network alone.

Every other picture is upright, so that batches are made across both orientations. The gate is on the first picture's map as it was written,
or, of the network alone, as `predict` gives it: depth itself; of labels the exact logits of those that were chosen, which are the largest
where the label is right.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import dpt
from dpt.commands.pipeline import in_threads
from dpt.commands.predict import WRITERS
from dpt.inference import outputs
from dpt.inference.images import load_image
from dpt.inference.prediction import Beside, Result, predict_iter
from dpt.inference.resizing import network_size, postprocess, preprocess, resize_and_normalise
from dpt.inference.windows import infer
from dpt.kernels.tools import parity
from dpt.zoo import config_of

from ..harness import measure
from ..harness.runner import Case, Context, Prepared
from . import models

EXAMPLES = sorted((Path(dpt.__file__).parent / "examples").glob("*.png"))
BATCHES = 4  # of each run, and of batches of one twice as many: the first and the last have nothing beside them
WHOLE, ALONE = "end to end", "network alone"
CONTENDERS = tuple(f"{how}, {what}" for what in (WHOLE, ALONE) for how in ("plain", "fast"))


@dataclass(frozen=True)
class PictureRow:
    """A line of the suite's table: a model, pictures of one size (height, width), the batches, and how important it is."""

    model: str
    size: tuple[int, int]
    batches: tuple[int, ...]
    importance: float


class OpenedPictures:
    """One model's pictures, as files. The carried weights, where the model has some: of random maps PNGs are larger."""

    unit = "pictures"
    bytes = None
    flops = None
    rms = False

    def __init__(self, row: PictureRow, batch: int, dtype: torch.dtype, context: Context):
        self.dtype, self.context = dtype, context
        size = row.size
        if context.toy:
            size, batch = (48, 64), 2
            self.master = models.build(row.model, context)
        else:
            self.master = dpt.build(row.model, weights="pretrained", device=context.device)
        self.batch, self.config = batch, self.master.config
        self.plain = models.shared_copy(self.master) if dtype == torch.float32 else copy.deepcopy(self.master).to(dtype)
        self.folder = tempfile.TemporaryDirectory(prefix="dpt-bench-")
        self.paths = [self._written(number, size) for number in range(count_of(batch))]
        self.per_run = float(len(self.paths))

    def _written(self, number: int, size: tuple[int, int]) -> Path:
        path = Path(self.folder.name) / f"{number}.jpg"
        with Image.open(EXAMPLES[number // 2 % len(EXAMPLES)]) as picture:
            picture = picture.convert("RGB").resize(size[::-1])
        (picture.transpose(Image.Transpose.ROTATE_90) if number % 2 else picture).save(path, quality=92)
        return path

    @functools.cached_property
    def logits(self) -> Tensor:
        """The first picture's exact maps at its size (K, H, W), of labels or of depth."""
        wide = parity.exact_dtype(self.dtype)
        model = copy.deepcopy(self.master).to(wide)
        with measure.full_precision(), torch.inference_mode():
            image = load_image(self.paths[0])
            x = resize_and_normalise(image, self.config.input, self.context.device, wide)
            maps = infer(model, x, None, None)[self.config.head.task]
            return postprocess(maps[0], tuple(maps.shape[2:]), image.shape[:2], self.config.input).cpu()

    def exact(self) -> list[Tensor]:
        return [self.logits.amax(0)]

    def other_plain(self) -> None:
        """As of the model's forward."""

    def judged(self, found: np.ndarray) -> list[Tensor]:
        """What the gate compares of the first picture's depth or labels."""
        if self.config.head.task == "depth":
            return [torch.from_numpy(found)]
        return [self.logits.gather(0, torch.from_numpy(found).long()[None])[0]]

    def prepare(self, contender: str) -> Prepared:
        how, what = contender.split(", ")
        model = dpt.accelerate(models.shared_copy(self.plain)) if how == "fast" else self.plain
        note = models.report_note(model) if how == "fast" else ""
        prepared = self._end_to_end(model) if what == WHOLE else self._alone(model)
        prepared.note, prepared.held, prepared.warm_up = note, (lambda: models.held_bytes(model)), 1
        return prepared

    def _end_to_end(self, model: nn.Module) -> Prepared:
        head = self.config.head
        stem = Path(self.folder.name) / "out"

        def write(result: Result) -> None:
            if result.error is not None:
                raise result.error
            drawn = result.drawn.get(head.task)
            outputs.write(stem / Path(result.source).stem, result.image, result.prediction, head, drawn=drawn)

        def run(index: int) -> None:
            results = predict_iter(model, self.paths, Beside(drawn=True), batch_size=self.batch)
            for _, error in in_threads(write, results, min(WRITERS, torch.get_num_threads())):
                if error is not None:
                    raise error

        def written() -> list[Tensor]:
            run(0)
            first = stem / self.paths[0].stem
            path = first.with_suffix(".npy" if head.task == "depth" else ".png")
            return self.judged(np.load(path) if head.task == "depth" else np.array(Image.open(path)))

        return Prepared(run, outputs=written, recorded=lambda: run(0))

    def _alone(self, model: nn.Module) -> Prepared:
        images = [preprocess(load_image(path), self.config.input, self.context.device, self.dtype)[0] for path in self.paths]
        batches = [
            torch.cat(images[first::2][start : start + self.batch]) for first in (0, 1) for start in range(0, len(images) // 2, self.batch)
        ]

        @torch.inference_mode()
        def run(index: int) -> None:
            for batch in batches:
                model(batch)

        def predicted() -> list[Tensor]:
            found = next(predict_iter(model, self.paths[:1], batch_size=self.batch)).prediction
            return self.judged(found.depth if self.config.head.task == "depth" else found.labels)

        return Prepared(run, outputs=predicted, recorded=lambda: run(0))


def count_of(batch: int) -> int:
    """The pictures of a run."""
    return BATCHES * batch * (2 if batch == 1 else 1)


def cases(rows: Iterable[PictureRow], dtypes: Iterable[torch.dtype]) -> list[Case]:
    """The cases of a table of pictures, one for each batch and dtype."""
    found = []
    for row in rows:
        sides = network_size(*row.size, config_of(row.model).input)
        for batch in row.batches:
            for dtype in dtypes:
                height, width = row.size
                found.append(
                    Case(
                        suite="pictures",
                        name=f"{row.model}, pictures of {width}x{height}, batch {batch}, {str(dtype).removeprefix('torch.')}",
                        dtype=dtype,
                        shape=(batch, 3, height, width),
                        contenders=CONTENDERS,
                        open=lambda context, row=row, batch=batch, dtype=dtype: OpenedPictures(row, batch, dtype, context),
                        importance=row.importance + (0.0 if batch == 1 else 0.5),
                        estimate=lambda row=row, batch=batch, sides=sides: count_of(batch) * models.count_flops(row.model, sides),
                        key=f"{row.model} {dtype}",
                        facts={"model": row.model, "batch": batch, "pictures": count_of(batch)},
                    )
                )
    return found

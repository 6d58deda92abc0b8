"""Train a model on pictures with depth or labels, by a recipe, with one process or, under torchrun, several.

A run that was killed goes on from its last checkpoint when it is made again in the same folder, and ends bit for bit as one that was never
killed: what a step draws at random depends on the recipe's seed, the step and the process's rank alone.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import checkpoints
from ..data.crops import Crops, Key
from ..data.pairs import PairDataset
from ..distributed import gathered
from ..evaluation.protocols import protocol_of
from ..evaluation.scoring import evaluate
from ..factory import build
from ..model import DPT
from ..nets.hollow import freeze_unreached
from ..system.disk import must_be_replaceable, prepare, write_whole
from ..system.endings import leave_words_to_the_main_process, leaving_signals_to_us
from ..system.processes import Place, place
from . import logs, states
from .objective import objective, trained_config
from .optimization import Average, optimizer_of, set_rates
from .parallel import Shared, Step, mean_over_processes, norm_of, whole, with_synchronised_norms
from .recipes import Recipe
from .starting import start_from

CHECKPOINT, WEIGHTS, BEST = "checkpoint.pt", "model.safetensors", "best.safetensors"
FILES = (CHECKPOINT, "run.json", "log.jsonl", "curve.png", WEIGHTS, BEST)
PARALLEL = ("ddp", "fsdp")  # DistributedDataParallel; FSDP2
LARGER_IS_BETTER = ("miou", "mIoU", "delta1")  # of the first figures of protocols, by which a validation is the best so far
SMALLEST_SCALE = 1.0  # below it float16's gradients do not overflow by chance


class Training:
    """A training run in a folder: `checkpoint.pt` is all that resuming needs; `model.safetensors` and `best.safetensors` are the last
    weights and those that validated best, for `dpt.load`; `run.json` has the recipe, versions and commit, `log.jsonl` the figures,
    `curve.png` and `pictures/` show them, `tensorboard/` has all again.

    `recipe.start_from` gives the encoder, and where they are alike the decoder and the head: see `dpt.training.starting`; `accept_license`
    is `dpt.build`'s, for its weights. `fast` (`dpt.accelerate`), the device, how processes share the work (`parallel`: "ddp", or "fsdp",
    which shares the parameters out too) and how many they are decide nothing but rounding, and what several draw at random: a run may go on
    with others.

    Raises:
        ValueError: the folder holds a run of another recipe, a checkpoint.pt that is none, or a folder where a file is to be, or is not
            the same for all processes; the batch
            does not share out; the data sets are not for the model's head, or hold a target that cannot be used: all are read first.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: PairDataset,
        validation: PairDataset,
        directory: str | Path,
        device: str | torch.device = "cpu",
        workers: int = 1,
        fast: bool = False,
        accept_license: bool = False,
        parallel: str = "ddp",
    ):
        self.recipe, self.train, self.validation = recipe, train, validation
        self.directory, self.device, self.workers, self.fast = Path(directory), torch.device(device), workers, fast
        self.place: Place = place() if distributed.is_initialized() else Place()
        self.config = trained_config(recipe, train.root)
        self.protocol, _ = protocol_of(recipe.protocol, self.config)
        if parallel not in PARALLEL:
            raise ValueError(f"parallel={parallel!r}: it must be one of {', '.join(PARALLEL)}")
        if parallel == "fsdp" and recipe.amp == "float16":
            raise ValueError("amp='float16' with parallel='fsdp': its gradients' scaler knows no shards; bfloat16 needs none")
        self._check()
        must_be_replaceable(*(self.directory / name for name in FILES))
        if self.place.first:
            prepare(self.directory)
        torch.manual_seed(recipe.seed)
        # FSDP2 shards contiguous parameters alone; the pictures are in channels-last order all the same.
        order = torch.contiguous_format if parallel == "fsdp" else torch.channels_last
        self.model = self._built(order)
        if recipe.sync_batch_norm:
            self.model = with_synchronised_norms(self.model, self.device)
        resuming = self.checkpoint.exists()
        self._alike("find a checkpoint", resuming)
        if recipe.start_from is not None and not resuming:
            start_from(self.model, recipe.start_from, accept_license)
        freeze_unreached(self.model)  # DistributedDataParallel would wait for their gradients
        self.model.set_drop_path(recipe.drop_path)
        self.model.set_checkpointing(recipe.checkpointing)
        self.shared = Shared(Step(self.model, lambda *seen: self._loss(*seen)), parallel, self.device)
        self.optimizer = optimizer_of(self.model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")
        self.average = None if recipe.ema is None else Average(self.model, recipe.ema)
        self.step, self.seconds = 0, 0.0
        self.best: float | None = None
        self.unlogged, self.since = torch.zeros((), device=self.device), 0  # the sum of the losses that are in no row yet, and how many
        self._evaluated: DPT | None = None
        if resuming:
            states.resume(self)
        self._alike("go on from step", self.step)

    def _alike(self, what: str, value: object) -> None:
        """ValueError unless all processes have the same: else they would wait for each other at different steps."""
        told = gathered(value)
        if any(other != told[0] for other in told):
            each = ", ".join(map(str, told))
            raise ValueError(f"{self.directory}: the processes {what}: {each}; they must share one folder, in which nobody else writes")

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT

    def _built(self, order: torch.memory_format = torch.channels_last) -> DPT:
        model = build(self.config, device=self.device).to(memory_format=order)  # type: ignore[call-overload]
        if self.fast:
            from ..fast.acceleration import accelerate

            accelerate(model)  # after the memory format, for the kernels read transposed convolutions in another
        return cast(DPT, model)

    def _check(self) -> None:
        recipe, parts = self.recipe, self.place.world * self.recipe.accumulate
        if recipe.batch_size % parts:
            words = f"{self.place.world} processes times accumulate={recipe.accumulate}"
            raise ValueError(f"batch_size={recipe.batch_size}: it must be a multiple of {words}")
        if len(self.train) < recipe.batch_size:
            found = f"{self.train.root} holds {len(self.train)} pictures, a batch is {recipe.batch_size}"
            raise ValueError(f"{found}: it must be at most that many")
        for data in (self.train, self.validation):
            if data.head != self.config.head:
                raise ValueError(f"{data.root} was read for the head {data.head}: it must be {recipe.model}'s, {self.config.head}")
            if self.place.first:  # for all: where it raises, the others end too
                data.check()

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        dtype = None if self.recipe.amp is None else getattr(torch, self.recipe.amp)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            auxiliary = self.config.head.auxiliary
            outputs: tuple[Tensor, ...] = self.model.forward_auxiliary(images) if auxiliary else (self.model(images),)
        return objective(self.config.head, self.recipe, outputs, targets)

    def _batches(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """This process's parts of the batches from the current step on, the same whether or not the run was interrupted."""
        recipe, own = self.recipe, self.place
        size, length = recipe.batch_size, len(self.train)
        per_epoch, part = length // size, size // (own.world * recipe.accumulate)

        def keys() -> Iterator[list[Key]]:
            step = self.step
            while step < recipe.steps:
                epoch, start = divmod(step, per_epoch)
                order = torch.randperm(length, generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)).tolist()
                for batch in range(start, min(per_epoch, start + recipe.steps - step)):
                    pixels = recipe.coarse_size if step < recipe.coarse * recipe.steps else recipe.crop
                    first = batch * size + own.rank * recipe.accumulate * part
                    for index in range(recipe.accumulate):
                        yield [(epoch, sample, pixels) for sample in order[first + index * part : first + (index + 1) * part]]
                    step += 1

        generator = torch.Generator()  # a loader without one draws from the global state, and once more when a run is resumed
        ahead = 4 if self.workers else None
        crops = Crops(self.train, self.config.input, recipe.augmentation, recipe.seed)
        options: dict[str, Any] = {"prefetch_factor": ahead, "worker_init_fn": leave_words_to_the_main_process}
        options["pin_memory"] = self.device.type == "cuda"
        return DataLoader(crops, batch_sampler=_Keys(keys), num_workers=self.workers, generator=generator, **options)

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last row of the log, with the validation metrics."""
        recipe = self.recipe
        self._describe()
        started, self._ticked = time.monotonic() - self.seconds, (time.monotonic(), self.step)
        self.model.train()
        with leaving_signals_to_us():
            batches = iter(self._batches())
        bar = tqdm(total=recipe.steps, initial=self.step, desc=recipe.name, unit="step", mininterval=5, disable=not self.place.first)
        with bar, closing(logs.Log(self.directory, self.step) if self.place.first else _NoLog()) as log:
            while self.step < recipe.steps:
                value, norm = self._take_step(batches)
                bar.update()
                now, last = self.step, self.step == recipe.steps
                if now % recipe.log_every == 0 or last:
                    self.seconds = time.monotonic() - started
                    row = self._training_row(value, norm)
                    bar.set_postfix_str(logs.in_words(row), refresh=False)
                    log.add(row)
                if now % recipe.validate_every == 0 or last:
                    log.add(self._validate(log, started))
                if now % (recipe.pictures_every or recipe.validate_every) == 0 or last:
                    self._draw(log)
                if now % recipe.checkpoint_every == 0 or last or (recipe.keep_every and now % recipe.keep_every == 0):
                    self.seconds = time.monotonic() - started
                    self.save()
            final = log.rows[-1] if log.rows else {}
        self._write_weights(self.directory / WEIGHTS)
        return final

    def _take_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
        """One step of the optimiser; returns the learning rate and the gradient's norm."""
        recipe = self.recipe
        torch.manual_seed(((recipe.seed * 1_000_003 + self.step) * 65_537 + self.place.rank) % (1 << 63))
        learning_rate = set_rates(self.optimizer, recipe, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(recipe.accumulate):
            images, targets = next(batches)
            with self.shared.part(last=index == recipe.accumulate - 1):
                images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
                loss = self.shared(images, targets.to(self.device, non_blocking=True)) / recipe.accumulate
                self.scaler.scale(loss).backward()
            self.unlogged = self.unlogged + loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip if recipe.clip is not None else math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step, self.since = self.step + 1, self.since + 1
        if self.average is not None:
            self.average.update(self.model, self.step)
        return learning_rate, norm

    def _must_be_finite(self, value: float) -> None:
        """FloatingPointError where the loss is no number; with a scaler only once that has given up."""
        if not math.isfinite(value) and (not self.scaler.is_enabled() or self.scaler.get_scale() < SMALLEST_SCALE):
            raise FloatingPointError(f"the loss is {value} at step {self.step}; the last whole checkpoint is {self.checkpoint}")

    def _training_row(self, learning_rate: float, norm: Tensor) -> dict[str, float]:
        now, (then, step) = time.monotonic(), self._ticked
        loss = mean_over_processes(self.unlogged.item() / max(self.since, 1))
        self._must_be_finite(loss)
        self.unlogged, self.since, self._ticked = torch.zeros_like(self.unlogged), 0, (now, self.step)
        return {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "loss": loss,
            "rate": learning_rate,
            "gradient": norm_of(norm),
            "pictures_per_second": (self.step - step) * self.recipe.batch_size / max(now - then, 1e-9),
            "memory": logs.peak_memory(self.device),
        }

    def _validate(self, log: logs.Log | _NoLog, started: float) -> dict[str, float]:
        """A row of the validation's metrics; where they are the best so far, best.safetensors."""
        recipe, ticked = self.recipe, time.monotonic()
        metrics = self.validate()
        name = self.protocol.figures[0]
        sign = 1 if name in LARGER_IS_BETTER else -1
        if self.best is None or sign * metrics[name] > sign * self.best:
            self.best = metrics[name]
            self._write_weights(self.directory / BEST)
        then, step = self._ticked
        self._ticked = (then + time.monotonic() - ticked, step)  # which is no training
        self.seconds = time.monotonic() - started
        row = {"step": self.step, "seconds": round(self.seconds, 1), **metrics}
        if self.place.first:
            logs.draw_curve([*log.rows, row], self.directory / "curve.png", recipe.name)
            words = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            tqdm.write(f"step {self.step}/{recipe.steps}: {words}", file=sys.stderr)
        return row

    def _draw(self, log: logs.Log | _NoLog) -> None:
        """A picture of what is now predicted of the first validation pictures."""
        ticked, model = time.monotonic(), self.evaluated()  # for which all processes must ask
        if self.place.first:
            picture = logs.sheet(self._examples(model), self.config.head)
            folder = self.directory / "pictures"
            prepare(folder)
            logs.save_sheet(folder / f"step-{self.step:07d}.png", picture)
            log.picture(self.step, picture)
        then, step = self._ticked
        self._ticked = (then + time.monotonic() - ticked, step)

    def validate(self) -> dict[str, float]:
        """The figures of the recipe's protocol on the validation set, of the averaged weights where there are such."""
        recipe = self.recipe
        size = max(recipe.batch_size // (self.place.world * recipe.accumulate), 1)
        far = recipe.max_depth if self.protocol.name == "folder" else None  # other protocols have their own
        model, protocol, own = self.evaluated(), self.protocol, self.place
        # without graphs, which would keep memory that the training wants
        return evaluate(model, self.validation, size, far, progress=False, protocol=protocol, own=own, graph=False)

    def _examples(self, model: DPT) -> Iterator[Any]:
        for index in range(min(logs.SHOWN, len(self.validation))):
            image, truth = self.validation[index]
            prediction = model.predict(image, graph=False)
            yield image, truth, prediction.depth if self.config.head.task == "depth" else prediction.labels

    def evaluated(self) -> DPT:
        """The model to validate and to save: the trained one, or a whole one with the averaged weights and shards put together. All
        processes must ask, and have the same then: batch norm's statistics are those of the first."""
        if distributed.is_initialized():
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, 0)
        if self.average is None and not self.shared.sharded:
            return self.model
        if self._evaluated is None:
            self._evaluated = self._built().eval()
        state = whole(self.model.state_dict()) | (whole(dict(self.average.tensors())) if self.average is not None else {})
        self._evaluated.load_state_dict(state)
        return self._evaluated

    def _write_weights(self, path: Path) -> None:
        model = self.evaluated()
        if self.place.first:
            checkpoints.save(model, path, getattr(torch, self.recipe.saved_dtype))

    def save(self) -> None:
        """Write checkpoint.pt, and where it is to be kept, a second name for it."""
        mean = mean_over_processes(self.unlogged.item())
        self._must_be_finite(mean)
        self.unlogged.fill_(mean)  # what a run that goes on from here begins with, whatever the process
        state = states.of(self)  # of which all processes have a part
        if self.place.first:
            keep = self.recipe.keep_every and self.step % self.recipe.keep_every == 0
            for path in [self.checkpoint, *([self.directory / f"checkpoint-{self.step:07d}.pt"] if keep else [])]:
                write_whole(path, lambda file: torch.save(state, file))

    def _describe(self) -> None:
        """Write run.json: what this run is, and of what it is made."""
        if not self.place.first:
            return
        sets = {"train": self.train, "val": self.validation}
        data = {split: {"folder": str(each.root), "pictures": len(each)} for split, each in sets.items()}
        described = {
            "recipe": asdict(self.recipe),
            "data": data,
            "fast": self.fast,
            **logs.circumstances(self.device, self.place.world),
            "resumed_at": self.step,
        }
        text = json.dumps(described, indent=1) + "\n"
        write_whole(self.directory / "run.json", lambda file: file.write(text.encode()))


class _NoLog:
    """The log of the processes that write none."""

    rows: list[dict[str, float]] = []

    def add(self, row: dict[str, float]) -> None:
        self.rows = [row]

    def picture(self, step: int, picture: Any) -> None: ...

    def close(self) -> None: ...


class _Keys:
    """A batch sampler over a function that gives the batches' keys."""

    def __init__(self, keys: Callable[[], Iterator[list[Key]]]):
        self.keys = keys

    def __iter__(self) -> Iterator[list[Key]]:
        return self.keys()

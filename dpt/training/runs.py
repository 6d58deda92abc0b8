"""Train a model on pictures with depth or labels, by a recipe.

A run that was killed goes on from its last checkpoint when it is made again in the same folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import checkpoints
from ..data.crops import Crops, Key
from ..data.datasets import FolderDataset
from ..data.targets import IGNORE
from ..evaluation.metrics import depth_limit
from ..evaluation.scoring import evaluate
from ..factory import build, load
from ..model import DPT
from ..system.disk import must_be_replaceable, open_regular, prepare, write_whole
from ..system.endings import leave_words_to_the_main_process, leaving_signals_to_us
from ..zoo import models
from .losses import scale_invariant_log_loss, scale_shift_invariant_loss
from .recipes import Recipe

FILES = ("checkpoint.pt", "log.json", "curve.png", "model.safetensors")


class Training:
    """A training run in a folder: `checkpoint.pt` (all that resuming needs), `log.json`, `curve.png`, `model.safetensors`.

    `recipe.start_from` gives the encoder; where both models' decoders have the same configuration, Reassemble and Fusion too; and where the
    heads' configurations are the same as well, the head; `accept_license` is `dpt.build`'s, for its weights. `fast` (`dpt.accelerate`) and
    the device decide nothing but rounding: a run may go on with others.

    Raises:
        ValueError: the folder holds a run of another recipe, a checkpoint.pt that is none, or a folder where a file is to be; the crop
            does not fit the model; the data sets are not for its head, or hold a target that cannot be used: all of them are read first.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: FolderDataset,
        validation: FolderDataset,
        directory: str | Path,
        device: str | torch.device = "cpu",
        workers: int = 1,
        fast: bool = False,
        accept_license: bool = False,
    ):
        self.recipe, self.train, self.validation = recipe, train, validation
        self.directory, self.device, self.workers = Path(directory), torch.device(device), workers
        torch.manual_seed(recipe.seed)
        self.model: DPT = build(recipe.model, device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if fast:
            from ..fast.acceleration import accelerate

            accelerate(self.model)  # after the memory format, for the kernels read transposed convolutions in another
        self.config = self.model.config
        head = self.config.head
        if self.config.further:
            tasks = ", ".join(each.task for each in self.config.heads)
            raise ValueError(f"{recipe.model} cannot be trained: its tasks are {tasks}, and a training has one")
        if self.config.decoder.prompt:
            raise ValueError(f"{recipe.model} cannot be trained: it needs a sensor's depth beside each picture, which data sets have not")
        if head.relative or head.focal is not None:
            raise ValueError(f"{recipe.model} cannot be trained: there are losses for inverse depth and for metres without a focal length")
        patch = self.config.encoder.patch_size
        for name, size in {"crop": recipe.crop, **({"coarse_size": recipe.coarse_size} if recipe.coarse else {})}.items():
            if len(size) != 2 or any(side < patch or side % patch for side in size):
                raise ValueError(f"{name} is {size}: height and width must be multiples of the patch size {patch}")
        if len(train) < recipe.batch_size:
            raise ValueError(f"{train.root} holds {len(train)} pictures, a batch is {recipe.batch_size}: it must be at most that many")
        for data in (train, validation):
            if data.head != self.config.head:
                raise ValueError(f"{data.root} was read for the head {data.head}: it must be {recipe.model}'s, {self.config.head}")
            data.check()
        if recipe.start_from is not None:
            self._take_over(_model_at(recipe.start_from, accept_license))
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.model, recipe.weight_decay), lr=recipe.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        must_be_replaceable(*(self.directory / name for name in FILES))
        prepare(self.directory)
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.directory / FILES[0]

    def _rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to zero."""
        recipe = self.recipe
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)))

    def _take_over(self, source: DPT) -> None:
        parts = ["encoder"]
        if source.config.decoder == self.config.decoder:
            parts += ["reassemble", "fusion"]
            if source.config.head == self.config.head:
                parts += ["head"]
        for part in parts:
            getattr(self.model, part).load_state_dict(getattr(source, part).state_dict())

    def _resume(self) -> None:
        try:
            with open_regular(self.checkpoint) as file:
                state = torch.load(file, map_location=self.device, weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
            another = state["recipe"] != asdict(self.recipe)
            if not another:
                self._take_up(state)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # bytes that are no checkpoint lead their reader to any error there is, and so do wrong values
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            rule = "it is what a training of the same recipe wrote: remove it, or give another folder"
            raise ValueError(f"{self.checkpoint}: not a checkpoint ({reason}): {rule}") from error
        if another:
            raise ValueError(f"{self.directory} holds a run of another recipe ({state['recipe']}): give another folder")

    def _take_up(self, state: dict[str, Any]) -> None:
        """Go on from what `_save` wrote; any error there is where it is something else."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, values in self.optimizer.state.items():  # which are not compared with the parameters'
            for key, value in values.items():
                if value.shape not in ((), parameter.shape):
                    raise ValueError(f"the optimizer's {key} is {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
        if state["schedule"].keys() != self.schedule.state_dict().keys() or state["schedule"]["last_epoch"] != state["step"]:
            raise ValueError("the schedule is not that of its step")
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"].cpu())
        self.step, self.seconds, self.log = int(state["step"]), float(state["seconds"]), list(state["log"])
        if not 0 <= self.step <= self.recipe.steps or not all(row.keys() == self.log[0].keys() >= {"step", "loss"} for row in self.log):
            raise ValueError(f"step {self.step} of {self.recipe.steps}, or a log that is none")

    def _save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        write_whole(self.checkpoint, lambda file: torch.save(state, file))

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        head, recipe = self.config.head, self.recipe
        dtype = None if recipe.amp is None else getattr(torch, recipe.amp)
        with torch.autocast(self.device.type, dtype=dtype, enabled=recipe.amp is not None):
            outputs: tuple[Tensor, ...] = self.model.forward_auxiliary(images) if head.auxiliary else (self.model(images),)
        if head.task == "segmentation":
            losses = [_cross_entropy(output, targets) for output in outputs]
            return losses[0] + sum(recipe.auxiliary_weight * loss for loss in losses[1:])
        (output,) = outputs
        if output.shape != targets.shape:  # of a head with a size of its own
            output = F.interpolate(output[:, None], size=targets.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        mask = (targets > 0) & (targets <= depth_limit(head, recipe.max_depth)) & targets.isfinite()
        if not head.inverse:
            return scale_invariant_log_loss(output, targets, mask, recipe.variance_focus)
        if recipe.sky:
            mask |= targets.isinf()
        inverse = normalised_inverse(targets, mask)
        return scale_shift_invariant_loss(output, inverse, mask, recipe.gradient_weight, data_term=recipe.data_term)

    def _batches(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches from the current step on, the same whether or not the run was interrupted."""
        size, length = self.recipe.batch_size, len(self.train)
        per_epoch = length // size

        def keys() -> Iterator[list[Key]]:
            step = self.step
            while step < self.recipe.steps:
                epoch, start = divmod(step, per_epoch)
                order = torch.randperm(length, generator=torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)).tolist()
                for batch in range(start, min(per_epoch, start + self.recipe.steps - step)):
                    pixels = self.recipe.coarse_size if step < self.recipe.coarse * self.recipe.steps else self.recipe.crop
                    yield [(epoch, index, pixels) for index in order[batch * size : (batch + 1) * size]]
                    step += 1

        own = torch.Generator()  # a loader without one draws from the global state, and once more when a run is resumed
        ahead = 4 if self.workers else None
        crops = Crops(self.train, self.config.input, self.recipe.augmentation, self.recipe.seed)
        options: dict[str, Any] = {"prefetch_factor": ahead, "worker_init_fn": leave_words_to_the_main_process}
        return DataLoader(crops, batch_sampler=_Keys(keys), num_workers=self.workers, generator=own, **options)

    def run(self) -> dict[str, float]:
        """Train to the end; returns the validation metrics."""
        recipe = self.recipe
        started, loss_sum, loss_count = time.monotonic() - self.seconds, 0.0, 0
        self.model.train()
        with leaving_signals_to_us():
            batches = iter(self._batches())
        with tqdm(total=recipe.steps, initial=self.step, desc=recipe.model, unit="step", mininterval=5) as bar:
            for images, targets in batches:
                loss = self._loss(images.to(self.device, memory_format=torch.channels_last), targets.to(self.device))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
                self.optimizer.step()
                self.schedule.step()
                self.step += 1
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {self.step}; the last whole checkpoint is {self.checkpoint}")
                loss_sum, loss_count = loss_sum + value, loss_count + 1
                bar.update()
                bar.set_postfix(loss=f"{loss_sum / loss_count:.4f}", refresh=False)
                last = self.step == recipe.steps
                if self.step % recipe.validate_every == 0 or last:
                    metrics = self.validate()
                    self.seconds = time.monotonic() - started
                    self.log.append({"step": self.step, "seconds": round(self.seconds, 1), "loss": loss_sum / loss_count, **metrics})
                    loss_sum, loss_count = 0.0, 0
                    self._write_log()
                if self.step % recipe.checkpoint_every == 0 or last:
                    self.seconds = time.monotonic() - started
                    self._save()
        checkpoints.save(self.model.eval(), self.directory / "model.safetensors", torch.float16)
        self._write_log()
        return self.log[-1]

    def validate(self) -> dict[str, float]:
        """The metrics of `dpt evaluate` on the validation set."""
        return evaluate(self.model, self.validation, self.recipe.batch_size, self.recipe.max_depth, progress=False)

    def _write_log(self) -> None:
        text = json.dumps(
            {"recipe": asdict(self.recipe), "pictures": len(self.train), "torch": torch.__version__, "log": self.log}, indent=1
        )
        write_whole(self.directory / "log.json", lambda file: file.write(f"{text}\n".encode()))
        draw_curve(self.log, self.directory / "curve.png", self.recipe.model)


class _Keys:
    """A batch sampler over a function that gives the batches' keys."""

    def __init__(self, keys: Callable[[], Iterator[list[Key]]]):
        self.keys = keys

    def __iter__(self) -> Iterator[list[Key]]:
        return self.keys()


def normalised_inverse(depth: Tensor, mask: Tensor) -> Tensor:
    """Metres (B, H, W) -> inverse depth scaled to 0..1 over each picture's valid pixels, so that near and far scenes weigh alike."""
    inverse = torch.where(mask, 1 / depth.clamp_min(1e-6), 0)
    low = torch.where(mask, inverse, torch.inf).amin((1, 2), keepdim=True)
    high = inverse.amax((1, 2), keepdim=True)
    return torch.where(mask, (inverse - low) / (high - low).clamp_min(1e-6), 0)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over labelled pixels; 0 where a batch has none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and convolutions only: not on norms, biases, the cls token, registers or the positional embedding."""
    decay: list[nn.Parameter] = []
    none: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (none if parameter.dim() < 2 or name.endswith(("cls_token", "registers", "pos_embed")) else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": none, "weight_decay": 0.0}]


def _model_at(start: str, accept_license: bool) -> DPT:
    """The model of a name, with its pretrained weights, or of a checkpoint file."""
    return build(start, weights="pretrained", accept_license=accept_license) if start in models() else load(start)


def draw_curve(log: list[dict[str, float]], path: Path, title: str) -> None:
    """The loss and the validation metrics over steps, as a picture."""
    from matplotlib.figure import Figure

    steps = [row["step"] for row in log]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [row["loss"] for row in log], marker=".")
    left.set(xlabel="step", ylabel="training loss", title=title)
    for name in log[0]:
        if name not in ("step", "seconds", "loss"):
            right.plot(steps, [row[name] for row in log], marker=".", label=name)
    right.set(xlabel="step", title="validation")
    right.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))

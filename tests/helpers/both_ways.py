"""What two processes of test_resuming.py run: trainings in OUT/whole, ddp, fsdp and, with shards too and interrupted, killed."""

import sys
from pathlib import Path

import torch
from torch import distributed

from dpt.data.datasets import FolderDataset
from dpt.distributed import joined
from dpt.training.recipes import Recipe
from dpt.training.runs import Training
from dpt.zoo import CONFIGS

CHANGES = (  # to "scenes", of OUT/whole
    *("steps=9", "batch_size=4", "accumulate=2", "crop=32,32", "ema=0.9", "drop_path=0.3", "warmup=2"),
    *("checkpoint_every=1", "log_every=3", "validate_every=9"),
)
# SGD: Adam divides by what is nearly nothing at first, and makes rounding as large as the rate.
RECIPE = Recipe(
    model="dpt-tiny-scenes",
    crop=(32, 32),
    steps=3,
    batch_size=4,
    accumulate=2,
    optimizer="sgd",
    learning_rate=0.01,
    warmup=1,
    layer_decay=0.9,
    drop_path=0.3,
    checkpointing=True,
    ema=0.9,
    validate_every=3,
    checkpoint_every=1,
)


class Killed(Exception):
    pass


def training(data: Path, out: Path, parallel: str, recipe: Recipe = RECIPE) -> Training:
    sets = (FolderDataset(data / split, CONFIGS[recipe.model].head) for split in ("train", "val"))
    run = Training(recipe, *sets, out, workers=0, parallel=parallel)
    if recipe is RECIPE:
        run.model.head.dropout.p = 0.0  # it draws in the order of memory, which is the channels' last for copies and not for shards
    return run


def main(data: Path, out: Path) -> None:
    with joined(torch.device("cpu")):
        training(data, out / "whole", "ddp", Recipe.of("scenes").with_changes(CHANGES)).run()
        for parallel in ("ddp", "fsdp"):
            training(data, out / parallel, parallel).run()
        run = training(data, out / "killed", "fsdp")
        step = run._take_step

        def take(batches):
            if run.step == 2:
                raise Killed
            return step(batches)

        run._take_step = take
        try:
            run.run()
        except Killed:
            distributed.barrier()  # whoever is killed is so in all: the first has written what the others go on from
            training(data, out / "killed", "fsdp").run()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

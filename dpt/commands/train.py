"""`dpt train`: a run of `training.runs` by a recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import devices
from ..data import open_data
from ..distributed import joined
from ..system.processes import place
from ..training import memory
from ..training.objective import trained_config
from ..training.recipes import Recipe
from ..training.runs import Training
from . import running


def run(args: argparse.Namespace) -> int:
    recipe = Recipe.of(args.recipe).with_changes(args.set)
    config = trained_config(recipe, args.data / "train")
    if args.dry_run and place().first:
        print(recipe.as_text())
        processes = place().world
        parts = f"{recipe.batch_size // (processes * recipe.accumulate)} pictures of {recipe.crop[0]}x{recipe.crop[1]} at a time"
        print(f"\nmemory of each of {processes} processes, {parts}, counted:\n{memory.of_recipe(recipe, config, processes)}")
    reading = running.reading(args)
    train, validation = (open_data(recipe.data, args.data, split, config.head, **reading) for split in ("train", "val"))
    if args.dry_run:
        if place().first:
            print(f"\n{len(train)} pictures to learn from, {len(validation)} to validate on")
        return 0
    device = running.device_of(args.device)
    fast = devices.runs_fast(args.fast, device)
    out = args.out or Path("runs") / recipe.name
    workers = running.readers() if args.workers is None else args.workers
    with joined(device) as own:
        training = Training(recipe, train, validation, out, device, workers, fast, args.accept_license, args.parallel)
        if args.verbose and own.first:
            running.report(training.model)
        figures = training.run()
        if own.first:
            print(json.dumps(figures))
    return 0

"""`dpt train`: a run of `training.runs` by a recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..data import open_data
from ..distributed import device_of_process, joined
from ..system.processes import place
from ..training import memory
from ..training.recipes import Recipe
from ..training.runs import Training, trained_config
from . import running


def run(args: argparse.Namespace) -> int:
    recipe = Recipe.of(args.recipe).with_changes(args.set)
    device = device_of_process(running.device_of(args.device), place())
    fast = running.is_fast(args.fast, device)
    head, reading = trained_config(recipe, args.data / "train").head, running.reading(args)
    train, validation = (open_data(recipe.data, args.data, split, head, **reading) for split in ("train", "val"))
    if args.dry_run:
        print(recipe.as_text())
        for split, data in (("train", train), ("val", validation)):
            print(f"{split}: {len(data)} pictures in {data.root}")
        print(memory.table(recipe, args.data))
        return 0
    out = args.out or Path("runs") / recipe.name
    with joined(device) as own:
        training = Training(recipe, train, validation, out, device, args.workers, fast, args.accept_license, args.parallel)
        if args.verbose and own.first:
            running.report(training.model)
        figures = training.run()
        if own.first:
            print(json.dumps(figures))
    return 0

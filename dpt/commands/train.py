"""`dpt train`: a run of `training.runs` by a recipe, of which a carried model's own is the default."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace

from ..data.datasets import FolderDataset
from ..training.recipes import Recipe
from ..training.runs import Training
from ..zoo import config_of
from . import running


def run(args: argparse.Namespace) -> int:
    changes = {item.name: value for item in fields(Recipe) if (value := getattr(args, item.name, None)) is not None}
    if args.crop is not None:
        changes["crop"] = tuple(args.crop)
    if args.amp == "none":
        changes["amp"] = None
    device, recipe = running.device_of(args.device), replace(Recipe.of(args.model), **changes)
    head, reading = config_of(recipe.model).head, running.reading(args)
    train, validation = (FolderDataset(args.data / split, head, **reading) for split in ("train", "val"))
    fast = running.is_fast(args.fast, device)
    training = Training(recipe, train, validation, args.out, device, args.workers, fast, args.accept_license)
    if args.verbose:
        running.report(training.model)
    print(json.dumps(training.run()))
    return 0

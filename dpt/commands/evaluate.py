"""`dpt evaluate`: the metrics of a model on a folder of pictures with depth or labels, beside those of trivial predictors."""

from __future__ import annotations

import argparse
import json

from ..data.datasets import FolderDataset
from ..evaluation.scoring import evaluate, trivial_predictors
from ..system.disk import must_be_replaceable, prepare, write_whole
from ..system.endings import printable
from . import running


def run(args: argparse.Namespace) -> int:
    if args.json:
        must_be_replaceable(args.json)
        prepare(args.json.parent)
    model = running.model_of(args, args.model, running.device_of(args.device))
    config, reading = model.config, running.reading(args)
    dataset = FolderDataset(args.data, config.head, **reading)
    train = FolderDataset(args.train_data, config.head, **reading) if args.train_data else None
    figures = {config.name: evaluate(model, dataset, args.batch_size, args.max_depth, focal=args.focal)}
    for name, predictor in trivial_predictors(dataset, train).items():
        figures[name] = evaluate(predictor, dataset, max_depth=args.max_depth, progress=False)
    for name, metrics in figures.items():
        print(f"{printable(name):24}" + "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))
    if args.json:
        text = json.dumps({"pictures": len(dataset), "figures": figures}, indent=1) + "\n"
        write_whole(args.json, lambda file: file.write(text.encode()))
    return 0

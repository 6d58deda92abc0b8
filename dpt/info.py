"""The named models: parameters, input, source and licence of their weights; or one checkpoint, told apart and described."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import checkpoints
from .config import CONFIGS
from .endings import printable
from .factory import load
from .model import DPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        help="a checkpoint file or folder, or a model on transformers' hub; without one, all named models are listed",
    )


def run(args: argparse.Namespace) -> int:
    if args.file is not None:
        checkpoint = checkpoints.find(args.file)
        layout = checkpoints.layout_of(checkpoint.state, checkpoint.path)
        print(printable(f"{args.file}: {layout.name} layout, {describe(load(checkpoint))}"))
        return 0
    for config in CONFIGS.values():
        with torch.device("meta"):
            print(describe(DPT(config)))
    return 0


def describe(model: DPT) -> str:
    """One line: name, task, parameters in millions, input size, weights."""
    config = model.config
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    what = (
        f"{len(config.head.classes)} classes"
        if config.head.task == "segmentation"
        else "inverse depth"
        if config.head.inverse
        else "metres"
    )
    size = "x".join(map(str, config.input.size))
    return f"{config.name:18} {config.head.task:13} {what:14} {millions:6.1f} M  input {size:9} weights {config.source} ({config.licence})"
